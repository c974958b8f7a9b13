"""Names that SGLang and transformers import; none is called for text."""

from enum import Enum


class ImageReadMode(Enum):
    """torchvision's names and values; transformers uses one as a default argument."""

    UNCHANGED = 0
    GRAY = 1
    GRAY_ALPHA = 2
    RGB = 3
    RGB_ALPHA = 4


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise RuntimeError(f"torchvision.io.{name}: this SGLang server was started with a torchvision stub")

    return absent
