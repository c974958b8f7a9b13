"""How often rewards are wrong: ours beside veRL's, on the tables of `tests/rewards`.

    python benchmarks/bench_rewards.py --verl CHECKOUT [--packages FOLDER] [--record]

A false negative is a right response that scores nothing, a false positive a wrong one that scores; shares of the right
and of the wrong responses. Of several accepted answers, rivals are given the one that suits them best.

CHECKOUT is a clone of https://github.com/volcengine/verl; nothing of it is imported but its reward functions. Its
`prime_math` needs `pip install --target FOLDER pylatexenc "antlr4-python3-runtime==4.11.*"`; its `prime_code` needs
pyext, which no Python above 3.10 has, and gets the one function of it that it calls from here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.rewards.audit import Case, Rates, math_pairs, programs, rates

Score = Callable[[str, str], float]
"""(response, ground truth) → score."""
MATH_RIVALS = ("math_verify", "math_dapo", "math_dapo, boxed", "prime_math")
CODE_RIVALS = ("prime_code",)
_SECONDS = 3600.0
"""For one rival's whole table."""


def rival(name: str, checkout: Path) -> Score:
    """A reward function of veRL's."""
    for package in ("verl", "verl.utils", "verl.utils.reward_score"):  # without what their own __init__ import
        module = types.ModuleType(package)
        module.__path__ = [str(checkout.joinpath(*package.split(".")))]
        sys.modules[package] = module
    if name == "prime_code":
        pyext: Any = types.ModuleType("pyext")
        pyext.RuntimeModule = types.SimpleNamespace(from_string=_module_of)
        sys.modules["pyext"] = pyext
    compute = importlib.import_module(f"verl.utils.reward_score.{name.split(',')[0]}").compute_score
    if name.startswith("math_dapo"):
        return lambda response, truth: float(compute(response, truth, "boxed" in name)["score"] > 0)
    if name == "math_verify":
        return lambda response, truth: float(compute(response, truth))
    return lambda response, truth: float(compute(response, truth)[0])


def _module_of(name: str, doc: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name, doc)
    exec(source, module.__dict__)
    return module


def score_all(score: Score, cases: Sequence[Case]) -> list[float]:
    """The best score for any accepted answer; 0 where the function raises."""
    found = []
    for case in cases:
        best = 0.0
        for truth in case.truth if isinstance(case.truth, list) else [case.truth]:
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                best = max(best, score(case.response, truth))
        found.append(best)
    return found


def judged_apart(name: str, checkout: Path, packages: Path | None, cases: Sequence[Case]) -> Rates:
    """A rival in a process of its own, which may change whatever it likes of Python."""
    command = [sys.executable, __file__, "--verl", str(checkout), "--rival", name]
    paths = [str(packages)] if packages and name == "prime_math" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if made.returncode != 0:
        raise SystemExit(f"{name}: {made.stderr.strip().splitlines()[-1]}")
    return rates(cases, json.loads(made.stdout.splitlines()[-1]))


def table(rows: dict[str, Rates], cases: Sequence[Case]) -> str:
    """Markdown: a line per reward, and what each misjudges by kind."""
    kinds = list(dict.fromkeys(case.kind for case in cases))
    right = sum(case.right for case in cases)
    lines = [
        f"{len(cases)} responses, {right} of them right.",
        "",
        "| reward | false negatives | false positives | misjudged: " + " | ".join(kinds) + " |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    for name, found in rows.items():
        cells = [f"{found.false_negatives:.1%}", f"{found.false_positives:.1%}"]
        for kind in kinds:
            wrong = sum(case.kind == kind for case in found.misjudged)
            cells.append(f"{wrong} of {sum(case.kind == kind for case in cases)}" if wrong else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Judge, print, and with --record write to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verl", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--packages", type=Path, metavar="FOLDER")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    pairs, codes = math_pairs(), programs()
    if arguments.rival:
        cases = codes if arguments.rival in CODE_RIVALS else pairs
        scores = score_all(rival(arguments.rival, arguments.verl), cases)
        sys.__stdout__.write(f"\n{json.dumps(scores)}\n")  # a rival may have put another in its place
        sys.__stdout__.flush()
        os._exit(0)  # prime_code leaves a Python behind that cannot end properly
    from benchmarks.results import record  # not in a rival's process, which needs none of it
    from vespo_megatron.rewards.code import code_reward
    from vespo_megatron.rewards.mathematics import math

    ours = [float(math("", pair.response, pair.truth, {})) for pair in pairs]
    judged = {"ours": rates(pairs, ours)} | {
        f"veRL {name}": judged_apart(name, arguments.verl, arguments.packages, pairs) for name in MATH_RIVALS
    }
    mathematics = table(judged, pairs)
    print(mathematics)
    ran = [float(code_reward(case.kind, case.response, case.truth, {}, test_timeout=20.0)["score"]) for case in codes]
    judged = {"ours": rates(codes, ran)} | {
        f"veRL {name}": judged_apart(name, arguments.verl, arguments.packages, codes) for name in CODE_RIVALS
    }
    code = table(judged, codes)
    print(code)
    if arguments.record:
        record("Wrong rewards", f"{__doc__.strip().split(chr(10) * 2)[2]}\n\n{mathematics}\n\n{code}")


if __name__ == "__main__":
    main()
