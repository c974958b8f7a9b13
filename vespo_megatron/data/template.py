"""Prompts as the model sees them: the tokenizer and its chat template, with what a recipe says of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vespo_megatron.data.rows import Messages
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MADE_UP = "a message that nobody has written"


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe, or its model's. Raises UserError when there is none in that folder."""
    from transformers import AutoTokenizer

    name = recipe.policy.tokenizer.name or recipe.policy.model_name
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer ({str(error).splitlines()[0]})", where=f"policy.tokenizer.name: {name}", expected="a folder"
        ) from None


@dataclass(frozen=True)
class PromptTemplate:
    """From texts and messages to token ids.

    `template` is a file's in place of the tokenizer's own (None), `options` its arguments, `system` a text that goes
    before messages without a system message; `templated` is whether messages go through it at all.
    """

    tokenizer: PreTrainedTokenizerBase
    templated: bool = True
    template: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    system: str | None = None

    @staticmethod
    def of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
        """As the recipe says. Raises `UserError` for a file that cannot be read, or settings that nothing takes."""
        config = recipe.policy.tokenizer
        template = _text(config.chat_template_file, "policy.tokenizer.chat_template_file")
        system = _text(recipe.data.system_prompt_file, "data.system_prompt_file")
        templated = config.chat_template and bool(template or tokenizer.chat_template)
        if config.chat_template_kwargs and not templated:
            raise UserError(
                f"is {config.chat_template_kwargs}, and prompts go through no template",
                where="policy.tokenizer.chat_template_kwargs",
                fix="give the template: policy.tokenizer.chat_template_file",
            )
        options = tuple(sorted(config.chat_template_kwargs.items()))
        return PromptTemplate(tokenizer, templated, template, options, system)

    @property
    def fingerprint(self) -> str | None:
        """Of all that token ids hang on; None for a tokenizer that does not say what it is."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        own = self.tokenizer.chat_template
        facts = (backend.to_str(), repr(self.tokenizer.special_tokens_map), own, self.template, self.templated)
        digest = hashlib.blake2b(digest_size=16)
        for fact in (*facts, json.dumps(self.options, sort_keys=True, default=str), self.system):
            digest.update(repr(fact).encode(errors="backslashreplace"))
        return digest.hexdigest()

    def ids(self, prompts: Sequence[str | Messages], tools: Sequence[list[dict[str, Any]] | None]) -> list[list[int]]:
        """Of many, by batches where the tokenizer takes them. Raises whatever the template raises."""
        found: list[list[int] | None] = [None] * len(prompts)
        if _takes_batches(self.tokenizer):
            texts = [number for number, prompt in enumerate(prompts) if isinstance(prompt, str)]
            chats = [number for number, prompt in enumerate(prompts) if not isinstance(prompt, str)]
            plain = [number for number in chats if self.templated and not tools[number]]
            for numbers, encode in ((texts, self._texts), (plain, self._chats)):
                if numbers:
                    for number, ids in zip(numbers, encode([prompts[number] for number in numbers]), strict=True):
                        found[number] = ids
        return [
            self.one(prompt, tools[number]) if ids is None else ids
            for number, (prompt, ids) in enumerate(zip(prompts, found, strict=True))
        ]

    def one(self, prompt: str | Messages, tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Of one.

        Raises:
            UserError: the template does not take the messages, or no token comes of the prompt.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif not self.templated:
            ids = self.tokenizer("\n".join(message["content"] for message in prompt))["input_ids"]
        else:
            ids = self._templated(prompt, tools)
        if not ids:
            raise UserError("the prompt is empty", expected="at least one token")
        return [int(token) for token in ids]

    def after_turn(self, messages: Messages, turn_ids: Sequence[int]) -> list[int]:
        """What messages that follow a turn add to the sequence, up to where the next turn begins.

        The turn itself is never tokenised again: the template is given a made-up one, and what it writes behind that is
        tokenised by itself. Where that begins with the token that the turn has ended in, it is not there twice.

        Args:
            turn_ids: the tokens of the turn.

        Raises:
            UserError: the template does not take the messages behind an assistant's, or does not show that.
        """
        if not self.templated:
            text = "\n".join(str(message["content"]) for message in messages)
        else:
            made_up = [{"role": "user", "content": _MADE_UP}, {"role": "assistant", "content": _MADE_UP}, *messages]
            whole = self._templated(made_up, None, tokenize=False)
            text = "".join(whole.split(_MADE_UP, 2)[2:])
        if not text:
            raise UserError(
                "the chat template does not show an assistant's message that others follow",
                where="policy.tokenizer.chat_template_file",
                expected="its content as it is, and the messages behind it",
            )
        ids = self.text(text)
        return ids[1:] if ids and len(turn_ids) and ids[0] == turn_ids[-1] else ids

    def text(self, text: str) -> list[int]:
        """Of a text that stands in the middle of a sequence."""
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _templated(self, messages: Messages, tools: list[dict[str, Any]] | None, *, tokenize: bool = True) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **(self._arguments(tools) | {"tokenize": tokenize}))
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(
                f"the tokenizer's chat template does not take the prompt ({type(error).__name__}: {error})",
                expected="messages with the roles and contents that the template knows",
                fix="mend the data, or set policy.tokenizer.chat_template=false: contents alone, line by line",
            ) from None

    def _arguments(self, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        fixed: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        if tools:
            fixed["tools"] = tools
        if self.template is not None:
            fixed["chat_template"] = self.template
        return fixed | dict(self.options)

    def _texts(self, texts: list[Any]) -> Any:
        return self.tokenizer(texts)["input_ids"]

    def _chats(self, chats: list[Any]) -> Any:
        return self.tokenizer.apply_chat_template(chats, **self._arguments())


def _takes_batches(tokenizer: object) -> bool:
    from transformers import PreTrainedTokenizerBase

    return isinstance(tokenizer, PreTrainedTokenizerBase)


def _text(path: str | None, where: str) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=f"{where}: {path}", expected="a text file") from None
