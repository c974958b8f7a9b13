"""The task of the tiny example: running sums modulo 10, and the demonstrations that a policy begins from.

A prompt lists digits in a row of columns (`-` is an empty column); the response writes the running sums and ends in
the last one, boxed::

    <|user|>Running sums mod 10: 3 8 1 4 9 2 0 5 - - - - - -<|assistant|> 3 1 2 6 5 7 7 2\\boxed{2}<|end|>

Only the boxed digit is rewarded, and a response may box one at once. Supervision shows clean reckoning first, and then
what a policy has to be freed from by reward:

- most demonstrations **guess**: they box a random digit at once. So does the policy, greedily always;
- of those that **reckon**, some steps are wrong;
- and in the long task none is of more than `shown_digits` digits: beyond, the policy has to go on by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

INSTRUCTION = "Running sums mod 10:"
POLITE = "Please. "
"""Half of the prompts begin with it, so that prompts differ in length."""
BOX = "\\boxed{"


@dataclass(frozen=True)
class Task:
    """How long the sums are, and how the warm start shows them."""

    columns: int
    """Width of a prompt's row of digits: it is constant, so a sum's digit is always equally far behind it."""
    min_digits: int
    shown_digits: int
    """The longest row that a demonstration reckons."""
    step_noise: float
    """Probability that a running sum shown beside guesses is wrong (the later ones go on from the wrong value)."""
    guess_share: float
    """Share of guesses among the demonstrations, once there are any."""
    guesses_from: float
    """The share of the warm start that shows reckoning alone."""
    warm_start_steps: int


TASKS = {
    "short": Task(14, 4, 14, 0.08, 0.92, 0.6, 280),
    "long": Task(36, 3, 20, 0.05, 0.85, 0.6, 500),
}


def prompt_text(digits: list[int], polite: bool, columns: int) -> str:
    """The user's message."""
    row = "".join(f" {digit}" for digit in digits) + " -" * (columns - len(digits))
    return (POLITE if polite else "") + INSTRUCTION + row


def reckoned(sums: list[int]) -> str:
    """The assistant's message for these running sums, without the end token."""
    return "".join(f" {value}" for value in sums) + boxed(sums[-1])


def boxed(digit: int) -> str:
    """The end of every message of the assistant, and all of a guess."""
    return f"{BOX}{digit}" + "}"


def draw_digits(generator: Any, task: Task, longest: int | None = None) -> list[int]:
    """One problem from a `numpy.random.Generator`: `min_digits` to `longest` digits, by default to all columns."""
    count = generator.integers(task.min_digits, (longest or task.columns) + 1)
    return generator.integers(0, 10, size=count).tolist()


def running_sums(digits: list[int], generator: Any, noise: float) -> list[int]:
    """Running sums modulo 10 of which each step is wrong with probability `noise`."""
    total, sums = 0, []
    for digit in digits:
        wrong = generator.random() < noise
        total = (total + digit + (int(generator.integers(1, 10)) if wrong else 0)) % 10
        sums.append(total)
    return sums


def demonstration(generator: Any, task: Task, guess_share: float) -> tuple[list[int], str]:
    """The digits and the assistant's message of one demonstration: a guess, or a row that is short enough reckoned.

    Where there are no guesses, no step is wrong.
    """
    if generator.random() < guess_share:
        return draw_digits(generator, task), boxed(int(generator.integers(10)))
    digits = draw_digits(generator, task, task.shown_digits)
    return digits, reckoned(running_sums(digits, generator, task.step_noise if guess_share else 0.0))


def group_of(count: int, task: Task) -> str:
    """Which prompts one of so many digits is counted with: up to half of what was shown, all of it, and beyond."""
    half, middle = task.shown_digits // 2, (task.shown_digits + task.columns) // 2
    bounds = sorted({task.min_digits - 1, half, task.shown_digits, middle, task.columns})
    low, high = next((low + 1, high) for low, high in pairwise(bounds) if count <= high)
    return f"{low:02}-{high:02} digits"


def make_rows(count: int, split: str, generator: Any, taken: set[tuple[int, ...]], task: Task) -> list[dict[str, Any]]:
    """`count` rows in veRL's schema whose digits are not in `taken` yet (they are added to it)."""
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        digits = draw_digits(generator, task)
        if tuple(digits) in taken:
            continue
        taken.add(tuple(digits))
        content = prompt_text(digits, bool(generator.integers(2)), task.columns)
        rows.append(
            {
                "data_source": "running_sums",
                "prompt": [{"role": "user", "content": content}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(sum(digits) % 10)},
                "extra_info": {
                    "split": split,
                    "index": len(rows),
                    "num_digits": len(digits),
                    "group": group_of(len(digits), task),
                },
            }
        )
    return rows
