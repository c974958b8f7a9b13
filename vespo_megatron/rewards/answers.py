r"""Where a response's answer stands: behind its thinking, in its last `\boxed{…}`, or in its last words.

And what a ground truth accepts: one answer, or any of several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<open>\{)|(?P<bare>[^\s{}$\\.,;]+))")
_BRACE = re.compile(r"\\[{}\\]|[{}]")
_JOINED = re.compile(r"[\s$]*(?:,|,?\s*\b(?:and|or)\b)[\s$]*")
"""What may stand between boxes that are one answer together, as "`\\boxed{1}` and `\\boxed{2}`"."""
_THINKING_ENDS, _THINKING_BEGINS = "</think>", "<think>"
_MARK = re.compile(r"<answer>|####|answers?\**\s*(?:is|are|[:=：])|答案(?:是|为|[:：])+|ответ\s*[:：]", re.IGNORECASE)
"""What stands in front of an answer that has no box."""
_REASON = re.compile(r"[,;]?\s(?:since|because|as|which|so|where|when)\b|[.。](?:\s|$)|;", re.IGNORECASE)
_EXPRESSION = re.compile(
    r"\$\$[^$]+\$\$|\$(?!\s)[^$\n]+(?<!\s)\$(?!\d)"  # and not the dollars of "$5 and $6"
    r"|\\\(.+?\\\)|\\\[.+?\\\]|[-−]?\\[dt]?frac\{[^{}]*\}\{[^{}]*\}"
    r"|(?<![\w.])[-−+]?(?:\d[\d,]*\d|\d)?(?:\.\d+)?(?:/\d+)?(?<=\d)\s?\\?%?"
)
_RUN = re.compile(r"[\s,;•*$-]*(?:\b(?:and|or)\b)?[\s,;•*$-]*")
_TAIL = 4096
"""Characters from the end of which an answer without a box is read; a box may stand anywhere."""
_LONGEST = 2000
"""An answer of more characters is none (the longest of MATH-500 has 159)."""


def accepted(ground_truth: Any) -> list[str]:
    """The answers that count: of a list, or of JSON of a list of texts, each; else the one."""
    if isinstance(ground_truth, str) and re.match(r"\s*\[\s*\"", ground_truth):
        try:
            ground_truth = json.loads(ground_truth)
        except json.JSONDecodeError:
            return [ground_truth]
    if ground_truth is None or isinstance(ground_truth, Mapping):
        return []
    several = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    return [str(one) for one in several if one is not None and str(one).strip()]


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; nothing where thinking begins and never ends; without either, all of it."""
    before, ends, after = text.rpartition(_THINKING_ENDS)
    if _THINKING_BEGINS in after:
        return ""
    return after if ends else before + after


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{…}` or `\fbox{…}`, braces balanced; None when there is none."""
    boxes = list(_boxes(text))
    return boxes[-1][2] if boxes else None


def boxed_answer(text: str) -> str | None:
    r"""The last box, together with those before it that only a comma, "and" or "or" parts from it."""
    boxes = list(_boxes(text))
    if not boxes:
        return None
    parts = [boxes[-1][2]]
    start = boxes[-1][0]
    for begin, end, content in reversed(boxes[:-1]):
        if not _JOINED.fullmatch(text, end, start):
            break
        parts, start = [content, *parts], begin
    return ", ".join(dict.fromkeys(parts))


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """(begin, end, content) of every complete box, by where it begins. One pass: time is linear in the text."""
    closed: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closed[opened.pop()] = brace.start()
    for box in _BOX.finditer(text):
        if box["bare"] is not None:
            yield box.start(), box.end(), box["bare"]
        elif box.start("open") in closed:
            end = closed[box.start("open")]
            yield box.start(), end + 1, text[box.end() : end]


def final_answer(text: str, *, boxed_only: bool = False, answer_in_thinking: bool = False) -> str | None:
    r"""What a response gives as its answer, as it is written; None where it gives none.

    The last box counts. Without one, what stands behind the last "answer is", "Answer:", "####" or in `<answer>`; and
    without that, the last expression of the response. Expressions that only commas, "and", "or" or line breaks part
    from each other are one answer: who lists all he can think of has not answered.

    Args:
        boxed_only: whether an answer without a box is none.
        answer_in_thinking: whether the part before `</think>` is read as well.
    """
    text = text if answer_in_thinking else after_thinking(text)
    answer = boxed_answer(text)
    if answer is None and not boxed_only and not _BOX.search(text):  # a box that nothing closes was cut off
        answer = _stated(text[-_TAIL:])
    return answer if answer is not None and 0 < len(answer) <= _LONGEST else None


def _stated(text: str) -> str | None:
    marks = list(_MARK.finditer(text))
    if not marks:
        return _last_run(text)
    said = text[marks[-1].end() :].partition("</answer>")[0]
    line = next((line for line in said.splitlines() if any(map(str.isalnum, line))), None)
    return _plain(_REASON.split(line, maxsplit=1)[0]) if line else _last_run(text[: marks[-1].start()])


def _last_run(text: str) -> str | None:
    found = list(_EXPRESSION.finditer(text))
    if not found:
        words = _plain(text)
        return words if words and len(words.split()) == 1 else None
    first = len(found) - 1
    while first > 0 and _RUN.fullmatch(text, found[first - 1].end(), found[first].start()):
        first -= 1
    return ", ".join(_plain(one.group()) for one in found[first:])


def _plain(text: str) -> str:
    """Without what surrounds an expression in prose."""
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text.strip().strip("*`_:： ").strip())
    return text.strip("$ ").rstrip(".。,;").strip("$* ")
