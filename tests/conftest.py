"""Small models gain nothing from torch's threads, and lose much on a busy machine."""

import torch

torch.set_num_threads(1)
