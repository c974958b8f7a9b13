"""Stand-in for pytorch/tensor: the class that megatron-core asks of every parameter whether it is one."""

import torch


class QuantizedTensor(torch.Tensor):
    pass
