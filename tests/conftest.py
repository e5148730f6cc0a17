"""Small models gain nothing from torch's threads, and lose much on a busy machine, where no single example has a deadline either."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
