"""Names that SGLang's modules import; none is called for text."""

from enum import Enum

from torchvision.transforms import functional  # noqa: F401


class InterpolationMode(Enum):
    """torchvision's names and values."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise RuntimeError(f"torchvision.transforms.{name}: this SGLang server was started with a torchvision stub")

    return absent
