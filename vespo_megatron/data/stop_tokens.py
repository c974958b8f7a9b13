"""Tokens that end a response: the recipe's, else all that the model's folder and the tokenizer name.

A model may have several: Qwen3 names `<|im_end|>` and `<|endoftext|>` in `generation_config.json`, its tokenizer one of
them. SGLang 0.5.23 stops at those of `config.json` and `generation_config.json` whatever else a request says. So the
union alone ends a response at the same place in both engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("generation_config.json", "config.json")
_KEY = "policy.generation.stop_token_ids"


def stop_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[int, list[str]]:
    """By id, in ascending order: who names it.

    Raises:
        UserError: nobody names one; or a file of the model's folder is none, or names something else.
    """
    found: dict[int, list[str]] = {}
    if recipe.policy.generation.stop_token_ids:
        return {token: [_KEY] for token in sorted(set(recipe.policy.generation.stop_token_ids))}
    for token, source in (*_of_folder(Path(recipe.policy.model_name)), *_of_tokenizer(tokenizer)):
        found.setdefault(token, []).append(source)
    if not found:
        raise UserError(
            "names no token that ends a response",
            where=recipe.policy.model_name,
            expected=f"an eos_token_id in {' or '.join(_FILES)}, or a tokenizer with one",
            fix=f"set {_KEY}",
        )
    return dict(sorted(found.items()))


def describe_stop_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """For instance `<|im_end|> (151645: generation_config.json, tokenizer), <|endoftext|> (151643: …)`."""
    return ", ".join(
        f"{tokenizer.convert_ids_to_tokens(token)} ({token}: {', '.join(sources)})"
        for token, sources in stop_tokens(recipe, tokenizer).items()
    )


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str]]:
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id, "tokenizer"


def _of_folder(folder: Path) -> Iterator[tuple[int, str]]:
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot be read ({error})", where=str(path), expected="JSON") from None
        value: Any = config.get("eos_token_id") if isinstance(config, dict) else None
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or token < 0:
                raise UserError(
                    f"has {value!r} as eos_token_id",
                    where=str(path),
                    expected="a token id, or a list of them",
                    fix=f"set {_KEY}",
                )
            yield token, name
