"""Are two mathematical answers the same? Math-Verify says so, of answers that are written for it to read."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from functools import cache, lru_cache
from typing import Any

from vespo_megatron.rewards.answers import accepted, final_answer

_AS_LATEX = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "°": r"^\circ ",
    "∅": r"\emptyset ", "⁄": "/", "，": ",", "、": ",", "（": "(", "）": ")", "：": ":", "。": "",
}  # fmt: skip
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_REWRITTEN = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt"),
        (r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"\\(?:left|right)(?![a-z])|\\displaystyle|(?<!\\)\\[,;:! ]", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\varnothing", r"\\emptyset"),
        (r"^\s*(?:=|\\approx(?![a-z])|≈)", ""),
        (r"\\mathrm\{([ei])\}", r"\1"),
        (r"\\?\$|(?<!\\)\\[()]", ""),
        (r"~|\\q?quad(?![a-z])", " "),
        (r"\\(?:color|textcolor)\{\w+\}|\\(?:underline|bm|boldsymbol)(?![a-z])", ""),
        (r"(\d)[eE]([-+]?\d+)", r"\1 \\times 10^{\2}"),
    )
]
"""What is written in more than one way, in the way Math-Verify reads."""
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:(?:,|\{,\}| )\d{3})+(?:\.\d+)?")
_GROUPED = re.compile(r"\{,\}|,| ")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_REPEATING = re.compile(r"(\d+)\.(\d*)\\overline\{(\d+)\}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOSEN = re.compile(r"\(?([A-Ja-j])(?:\)|\.|:|$)\s*(.*)", re.DOTALL)
_LATIN = re.compile(r"(?<![\\a-z])[a-z]+")
_PARTLY_READ = re.compile(r"\d\s*:\s*\d|\\[lc]?dots|\.\.\.")
"""Times, ratios and sequences that go on: Math-Verify drops what it cannot read, and calls the rest the same."""
_PERCENT = re.compile(r"\s*(?:\\?%|percent)\s*$")
_CONNECTED = re.compile(r",?\s*(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z']{2,}(?:/[A-Za-z]+)?(?:\s*\^\s*\{?[23]\}?)?")
_UNIT_LETTERS = re.compile(r"\\(?:text|mbox|textrm)\s*\{\s*[a-zA-Z]\s*\}(?:\s*\^\s*\{?[23]\}?)?")
_FUNCTIONS = frozenset(
    [
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"),
        *("ln", "log", "lg", "exp", "sqrt", "pi", "det", "gcd", "lcm", "max", "min", "mod"),
    ]
)
"""Words that Math-Verify reads as mathematics."""
_DENIALS = frozenset(("no", "not", "never", "non", "none", "except"))
_ABSOLUTE, _RELATIVE = Decimal("5e-7"), Decimal("1e-5")
"""How closely numbers agree: Math-Verify's six decimals alone cannot tell 1.2e-9 from 1.3e-9."""


def math(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    *,
    boxed_only: bool = False,
    answer_in_thinking: bool = False,
) -> float:
    r"""1 when the response's answer equals the ground truth, or any of a list of accepted ones. Runs under a deadline.

    The last `\boxed{…}` or `\fbox{…}` is the answer (`answers.final_answer`).

    Args:
        boxed_only: whether an answer without a box scores 0. By default what the response states last counts.
        answer_in_thinking: whether an answer before `</think>` counts where none follows. By default it scores 0.
    """
    answer = final_answer(solution_str, boxed_only=boxed_only, answer_in_thinking=answer_in_thinking)
    return float(answer is not None and any(same(truth, answer) for truth in accepted(ground_truth)))


def unreadable(ground_truth: Any) -> str | None:
    """Why no answer could ever equal this ground truth; None where one can."""
    answers = accepted(ground_truth)
    if not answers:
        return "is no answer"
    for answer in answers:
        truth = _tidy(answer)
        as_text = _CHOICE.fullmatch(_unwrapped(truth)) or _words(truth) or _PARTLY_READ.search(truth)
        if not (as_text or _DECIMAL.fullmatch(truth) or _readings(truth)):
            return "cannot be parsed"
    return None


def same(truth: str, answer: str) -> bool:
    """Whether `answer` says what `truth` says, both LaTeX or plain text."""
    truth, answer = _tidy(truth), _tidy(answer)
    if not truth or not answer:
        return False
    if "".join(_unwrapped(truth).split()) == "".join(_unwrapped(answer).split()):
        return True
    if _DECIMAL.fullmatch(truth) and _DECIMAL.fullmatch(answer):
        return _same_decimal(Decimal(truth), Decimal(answer))
    chosen = _CHOSEN.fullmatch(_unwrapped(answer))
    if choice := _CHOICE.fullmatch(_unwrapped(truth)):
        return chosen is not None and chosen[1].upper() == choice[1]
    if chosen and chosen[2]:  # "(B) 17"
        answer = chosen[2]
    if words := _words(truth):
        return words == _words(answer)
    if _PARTLY_READ.search(truth) or _PARTLY_READ.search(answer):
        return False
    return any(_equal(one, other) for one in _readings(truth) for other in _readings(answer))


def _same_decimal(truth: Decimal, answer: Decimal) -> bool:
    apart, size = abs(truth - answer), max(abs(truth), abs(answer))
    whole = truth == int(truth) and answer == int(answer)
    return apart == 0 or (not whole and apart <= _ABSOLUTE and apart <= _RELATIVE * size)


def _tidy(text: str) -> str:
    """The same expression in ASCII and LaTeX, without marks around it."""
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{found.group().translate(_SUPERSCRIPTS)}}}", text)
    text = "".join(_AS_LATEX.get(letter, letter) for letter in unicodedata.normalize("NFKC", text))
    text = "".join(str(unicodedata.digit(letter)) if letter.isdigit() else letter for letter in text)
    for pattern, by in _REWRITTEN:
        text = pattern.sub(by, text)
    text = _REPEATING.sub(_repeating, text).strip().rstrip(".").strip()
    return _GROUPED.sub("", text) if _THOUSANDS.fullmatch(text) else text


def _repeating(decimal: re.Match[str]) -> str:
    r"""1.2\overline{3} as the fraction that it is."""
    whole, fixed, repeated = decimal.groups()
    size = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    above = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{size}}}"


def _unwrapped(text: str) -> str:
    r"""Without `\text{…}` and its kin around what they hold."""
    return _TEXT.sub(r" \1 ", text).strip()


def _words(text: str) -> str:
    """A text of words alone, to compare; empty where it is mathematics."""
    text = _unwrapped(text).casefold()
    long = any(len(word) > 2 and word not in _FUNCTIONS for word in _LATIN.findall(text))
    if re.search(r"[\d\\^_=<>{}]", text) or not (long or any(map(_is_prose, text))):
        return ""
    return " ".join(word for word in re.findall(r"[^\W\d_]+", text) if word not in ("a", "an", "the"))


def _readings(text: str) -> tuple[Any, ...]:
    """What Math-Verify reads it as; and without its words, its units and a percent sign, where it has any."""
    forms = dict.fromkeys((text, _without_words(text)))
    forms |= dict.fromkeys(_PERCENT.sub("", form) for form in forms)  # a problem that asks for percent may say 20
    return tuple(read for read in map(_parsed, filter(None, forms)) if read is not None)


def _without_words(text: str) -> str:
    """Without words, units and letters of scripts that mathematics is not written in; empty when they deny it."""
    text = _unwrapped(_UNIT_LETTERS.sub("", text))
    text = _CONNECTED.sub(",", text)
    words = [word.group().casefold() for word in _WORD.finditer(text)]
    if any(word in _DENIALS or word.endswith("n't") for word in words):
        return ""
    text = _WORD.sub(lambda word: word.group() if word.group() in _FUNCTIONS else "", text)
    text = "".join(letter for letter in text if not _is_prose(letter))
    return text.strip(" :,;")


def _is_prose(letter: str) -> bool:
    return not letter.isascii() and unicodedata.category(letter)[0] in "LM" and not "\u0370" <= letter <= "\u03ff"


@lru_cache(maxsize=4096)
def _parsed(latex: str) -> Any | None:
    """A SymPy object; None where Math-Verify makes none of it."""
    from math_verify import LatexExtractionConfig, parse

    _quieten()
    found = parse(
        rf"\boxed{{{latex}}}", [LatexExtractionConfig(boxed_match_priority=0)], "no_fallback", parsing_timeout=None
    )
    return found[0] if found else None


@cache
def _quieten() -> None:
    """Math-Verify warns, once per text, of the deadline it is not given."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _equal(truth: Any, answer: Any) -> bool:
    from math_verify import verify

    try:
        truth, answer = _as_set(truth), _as_set(answer)
        return bool(verify(truth, answer, timeout_seconds=None)) and not _numbers_differ(truth, answer)
    except Exception:  # SymPy raises whatever it likes on expressions that mean nothing
        return False


def _as_set(expression: Any) -> Any:
    """Solved inequalities as the set of their solutions, "x < 2 or x > 3" as its two intervals; else as it is.

    What has yet to be solved stays: who repeats the problem has not answered it.
    """
    import sympy
    from sympy.core.relational import Relational

    if isinstance(expression, sympy.FiniteSet):
        parts, join = expression.args, sympy.Union
    elif type(expression).__name__ == "And":  # Math-Verify's own, or SymPy's
        parts, join = expression.args, sympy.Intersection
    else:
        parts, join = (expression,), sympy.Union
    solved = (
        isinstance(part, Relational)
        and not isinstance(part, (sympy.Eq, sympy.Ne))
        and {part.lhs.is_Symbol, part.rhs.is_Symbol} == {True, False}
        and len(part.free_symbols) == 1
        for part in parts
    )
    return join(*(part.as_set() for part in parts)) if parts and all(solved) else expression


def _numbers_differ(truth: Any, answer: Any) -> bool:
    """Whether they are numbers apart by more than rounding: 1/2^99 and 1/2^98 are the same to Math-Verify."""
    import sympy

    if not all(isinstance(one, sympy.Expr) and one.is_number for one in (truth, answer)):
        return False
    truth, answer = truth.doit(), answer.doit()
    if truth.is_Rational and answer.is_Rational:
        return bool(truth != answer)
    size, apart = abs(truth.evalf(20)) + abs(answer.evalf(20)), abs((truth - answer).evalf(20))
    return bool(size.is_finite and apart.is_finite and apart > float(_RELATIVE) * size)
