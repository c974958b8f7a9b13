"""Stand-in for Transformer Engine: see ../README.md."""

from . import common, pytorch

__version__ = "2.9.0"
