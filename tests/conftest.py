"""Torch runs on one thread: small models gain nothing from more, and lose much on a busy machine.

For the same reason no single example of hypothesis has a deadline.
"""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
