"""One thread: the machine's cores are shared, and sums must not depend on how many there are."""

import torch

torch.set_num_threads(1)
