"""Coverage-guided fuzzing of the recipe loader: any file and overrides are a recipe or a `UserError`, nothing else.

`python tests/fuzz/fuzz_recipe.py -max_total_time=600 CORPUS` (libFuzzer's options; `make fuzz` runs it). A recipe
that loads must validate or be refused by a `UserError`, and read back equal when saved.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vespo_megatron"]):
    from vespo_megatron.errors import UserError
    from vespo_megatron.recipe.documentation import documentation
    from vespo_megatron.recipe.loader import flatten, load_recipe, save_recipe
    from vespo_megatron.recipe.rules import problems

KEYS = list(documentation())
VALUES = (
    "null",
    "true",
    "0",
    "1",
    "-1",
    "2",
    "8",
    "1e400",
    ".nan",
    "-.inf",
    "1_000",
    "0x10",
    "0o7",
    "1:30",
    "''",
    "x",
    "[]",
    "{}",
    "[1, a]",
    "{a: 1}",
    "{1: 2}",
    "{null: 1}",
    "{_override_: true}",
    "{_override_: maybe, a: 1}",
    "???",
    "${grpo.seed}",
    "${oc.env:HOME}",
    "${oc.env:NOT_THERE}",
    "${nothing}",
    "${",
    "$",
    "\\${x}",
    "${recipe_dir}/x",
    "${.}",
    "${..}",
    "${policy}",
    "&a [*a]",
    "!!python/object:os.system x",
    "!!binary AAAA",
    "!!set {a}",
    "? ",
    "- ",
    "2026-01-01",
    "|\n  text",
    '"\\uD800"',
    "9" * 400,
    "1e-6",
    "${oc.create:{}}",
    "${oc.decode:1}",
    "${grpo:seed}",
)
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-recipe-"))
(FOLDER / "base.yaml").write_text("grpo: {seed: 3}\nloss_fn: {hyperparameters: {c_pos: 1}}\n")


def one_line(data: atheris.FuzzedDataProvider) -> tuple[str, str]:
    """A key, known or nearly, and a value."""
    key = KEYS[data.ConsumeIntInRange(0, len(KEYS) - 1)]
    kind = data.ConsumeIntInRange(0, 9)
    if kind == 0:
        key = key + data.ConsumeUnicodeNoSurrogates(3)
    elif kind == 1:
        key = data.ConsumeUnicodeNoSurrogates(8)
    value = VALUES[data.ConsumeIntInRange(0, len(VALUES) - 1)]
    if data.ConsumeIntInRange(0, 4) == 0:
        value = data.ConsumeUnicodeNoSurrogates(12)
    return key, value


def nested(key: str, value: str) -> str:
    """`a.b` as nested YAML."""
    lines = []
    for depth, part in enumerate(key.split(".")):
        lines.append("  " * depth + part + ":")
    return "\n".join(lines) + " " + value + "\n"


def one_input(raw: bytes) -> None:
    """A third raw bytes, a third one key in a file, a third overrides on the command line."""
    data = atheris.FuzzedDataProvider(raw)
    kind = data.ConsumeIntInRange(0, 2)
    overrides = ["policy.model_name=m"]
    content = b"policy: {model_name: m}\n"
    if kind == 0:
        content = data.ConsumeBytes(1 << 12)
        overrides = []
    elif kind == 1:
        content = b"defaults: base.yaml\n" * data.ConsumeBool() + nested(*one_line(data)).encode()
    else:
        overrides += ["=".join(one_line(data)) for _ in range(data.ConsumeIntInRange(1, 3))]
    path = FOLDER / "recipe.yaml"
    path.write_bytes(content)
    try:
        recipe = load_recipe(path, overrides)
        list(problems(recipe))
        save_recipe(recipe, FOLDER / "saved.yaml")
    except UserError:
        return
    before, after = flatten(recipe), flatten(load_recipe(FOLDER / "saved.yaml"))
    for name, value in before.items():
        both_nan = isinstance(value, float) and math.isnan(value) and math.isnan(after[name])
        assert both_nan or value == after[name] or "nan" in str(value), (name, value, after[name])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
