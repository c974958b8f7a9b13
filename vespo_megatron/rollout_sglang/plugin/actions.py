"""Actions that the plugin adds to SGLang's `/weights_checker`: their names, for both ends of the call."""

from __future__ import annotations

MANIFEST = "vespo_manifest"
"""Hugging Face name -> `"<dtype> <start>:<stop>,..."`, the slice a rank holds."""
CHECKSUM = "vespo_checksum"
"""Hugging Face name -> hexadecimal checksum of that slice."""
SEES = "vespo_sees"
"""With a path after a space: whether a rank sees that file, as `{"sees": "yes" or "no"}`."""
ERROR_KEY = "error"
"""In place of an answer: what went wrong in the rank."""
