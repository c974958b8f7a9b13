"""Numbers on the command line: what means nothing is one error, whichever command is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from vespo_megatron import cli

NUMBERS = {
    "plan --gpu h100-80": {
        "--mfu": ["0", "-1", "nan", "inf", "25", "1e-300", "x"],
        "--prompt-tokens": ["0", "-5", "nan", "inf", "1e300"],
        "--response-tokens": ["0", "-1", "0.5", "nan", "inf"],
        "--compare": ["-1", "1.5", "nan"],
    },
    "simulate --gpu h100-80": {
        "--mfu": ["0", "-1", "nan", "inf"],
        "--prompt-tokens": ["0", "-1", "nan"],
        "--response-tokens": ["0", "-1", "nan", "inf"],
    },
    "predict": {
        "--k3": ["-1", "nan", "inf", "1e308"],
        "--staleness-k3": ["-1", "nan", "inf"],
        "--tokens": ["0", "100,-5", "1,", "1000000000", "1.5"],
    },
    "mismatch": {"--batches": ["0", "-1", "nan"]},
    "compare": {"--parallel": ["0", "-1", "nan"], "--seeds": ["-1", "1,x", ""]},
    "eval": {"--table": ["0", "5", "x", "1.5"]},
    "convert out": {"--jitter": ["-0.1", "1.5", "nan"], "--seed": ["-1", "1.5"]},
    "kernels": {"--sigma": ["0", "-1", "nan", "1e9"], "--length": ["0", "-3", "1.5", "nan"]},
}
"""Command → option → values that mean nothing."""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("policy: {model_name: some/model}\n")
    return str(path)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [(command, option, value) for command, of in NUMBERS.items() for option, values in of.items() for value in values],
)
def test_a_number_that_means_nothing_is_one_error_before_anything_is_done(command, option, value, recipe, capsys):
    name, *options = command.split()
    with pytest.raises(SystemExit) as end:
        cli.main([name, *([] if name == "kernels" else [recipe]), *options, option, value])
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.splitlines()[-1].startswith(
        f"vespo-megatron {name}: error: argument {option}: is {value}, expected "
    )


def test_every_option_that_takes_a_number_is_in_the_table():
    parser = cli.build_parser()
    (commands,) = [action.choices for action in parser._actions if action.dest == "command"]
    found = {
        (name, action.option_strings[-1])
        for name, command in commands.items()
        for action in command._actions
        if action.type is not None and action.type is not Path
    }
    assert found - {(command.split()[0], option) for command, of in NUMBERS.items() for option in of} == {
        ("predict", "--k2")
    }


@pytest.mark.parametrize("samples", ["0", "-1", "x", "²", "aime24=", "aime24=0", "1.5", "9" * 5000])
def test_responses_per_problem_are_a_whole_number(recipe, capsys, samples):
    assert cli.main(["eval", recipe, f"--samples={samples}"]) == 2
    assert capsys.readouterr().err.startswith("vespo-megatron: --samples: is ")
