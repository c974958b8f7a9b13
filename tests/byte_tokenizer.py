"""A tokenizer of transformers' own kind over bytes, with the marks of chat templates as tokens of their own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = ("<|bos|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """263 tokens; `chat_template` is `template`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", extra_special_tokens=list(MARKS[2:])
    )
    made.chat_template = template
    return made


def template(name: str) -> str:
    """One of `data/templates`: short ones that follow the published structure."""
    return (Path(__file__).parent / "data" / "templates" / f"{name}.jinja").read_text()
