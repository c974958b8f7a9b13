"""Fingerprint of a run's prompts: whether a checkpoint's position in them means the same rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vespo_megatron.data.prompts import PromptRecord


def fingerprint(records: Iterable[PromptRecord]) -> str:
    """16 hexadecimal digits of all that rows, in their order, ask for and are scored by, tokenised as they are now."""
    digest = hashlib.blake2b(digest_size=8)
    for record in records:
        row = (record.prompt_ids, record.data_source, record.ground_truth, sorted(record.extra_info.items()))
        digest.update(repr(row).encode(errors="backslashreplace"))
    return digest.hexdigest()
