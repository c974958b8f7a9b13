"""The task of the calculator example: sums too long to guess, which a call of the calculator gives.

A prompt is a sum in a row of columns (`-` is an empty one); a response may call the calculator, whose number is the
next message, and ends in a box::

    <|user|>Sum:3+8+1+4+9 - - - - - -<|assistant|>calc(3+8+1+4+9)<|end|><|user|>25<|assistant|>\\boxed{25}<|end|>

Only the boxed number is rewarded, and a response may box one at once. The warm start shows calls first, and then mostly
guesses, so that the policy guesses too: greedily always. Reward has to bring it to call.
"""

from __future__ import annotations

from typing import Any

OPENS, CLOSES = "calc(", ")"
"""Around what the calculator is given; `env.options` of calculator.yaml."""
MIN_TERMS, COLUMNS = 5, 14
GUESS_SHARE, GUESSES_FROM, WARM_START_STEPS = 0.92, 0.6, 300
"""Share of guesses among demonstrations once there are any; the share of the warm start without any; its updates."""


def draw_digits(generator: Any) -> list[int]:
    """One sum from a `numpy.random.Generator`."""
    return generator.integers(0, 10, size=generator.integers(MIN_TERMS, COLUMNS + 1)).tolist()


def prompt_text(digits: list[int]) -> str:
    """The user's message: of one width, so that a digit is equally far from where a call repeats it."""
    return f"Sum:{'+'.join(map(str, digits))}" + " - -" * (COLUMNS - len(digits))


def boxed(number: int) -> str:
    """The end of every response, and all of a guess."""
    return f"\\boxed{{{number}}}"


def demonstration(generator: Any, guess_share: float) -> tuple[list[int], list[str]]:
    """The digits and the messages behind the prompt, the assistant's and the calculator's by turns."""
    digits = draw_digits(generator)
    if generator.random() < guess_share:
        return digits, [boxed(sum(draw_digits(generator)))]
    return digits, [f"{OPENS}{'+'.join(map(str, digits))}{CLOSES}", str(sum(digits)), boxed(sum(digits))]


def make_rows(count: int, split: str, generator: Any, taken: set[tuple[int, ...]]) -> list[dict[str, Any]]:
    """`count` rows in veRL's schema whose digits are not in `taken` yet (they are added to it)."""
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        digits = draw_digits(generator)
        if tuple(digits) in taken:
            continue
        taken.add(tuple(digits))
        rows.append(
            {
                "data_source": "long_sums",
                "prompt": [{"role": "user", "content": prompt_text(digits)}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(sum(digits))},
                "extra_info": {"split": split, "index": len(rows), "num_digits": len(digits)},
            }
        )
    return rows
