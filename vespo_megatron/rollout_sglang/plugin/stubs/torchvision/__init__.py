"""Stand-in for torchvision in a CPU-only SGLang server, which imports it for image inputs that RL does not send.

The wheel on PyPI is linked to CUDA. This folder is on the server's PYTHONPATH only where the real one cannot be
imported and the device is the CPU.
"""

from torchvision import io, transforms  # noqa: F401

__version__ = "0.0.0+vespo.stub"
