"""The command line: what each command prints and the status it ends with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vespo_megatron import cli
from vespo_megatron.errors import UserError
from vespo_megatron.launch import launcher
from vespo_megatron.run import processes


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("policy: {model_name: some/model}\n")
    return str(path)


def test_show_prints_every_key_with_overrides_applied(recipe, capsys):
    assert cli.main(["recipe", "show", recipe, "grpo.seed=7"]) == 0
    printed = capsys.readouterr().out
    assert "  seed: 7\n" in printed and "  model_name: some/model\n" in printed and "max_num_steps" in printed


def test_what_show_prints_is_a_recipe(recipe, capsys, tmp_path):
    cli.main(["recipe", "show", recipe, "grpo.seed=7"])
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert cli.main(["recipe", "diff", recipe, str(again)]) == 0
    assert capsys.readouterr().out == "grpo.seed: 42 -> 7\n"


def test_keys_lists_keys_with_their_meaning(capsys):
    assert cli.main(["recipe", "keys", "tensor_model_parallel"]) == 0
    assert (
        capsys.readouterr().out == "policy.megatron_cfg.tensor_model_parallel_size: TP. [int, at least 1; default 1]\n"
    )


def test_a_mistake_is_one_message_on_standard_error_and_status_2(recipe, capsys):
    assert cli.main(["train", recipe, "grpo.sed=7"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vespo-megatron: command line: grpo.sed=7: unknown key grpo.sed")
    assert "Traceback" not in captured.err


def test_check_refuses_what_train_would_refuse(recipe, capsys):
    assert cli.main(["recipe", "check", recipe, "policy.megatron_cfg.tensor_model_parallel_size=2"]) == 2
    assert "cluster.gpus_per_node" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "RECIPE", "--samples", "1", "set=4", "grpo.seed=7", "policy.generation.val_temperature=0"],
        ["eval", "grpo.seed=7", "RECIPE", "policy.generation.val_temperature=0", "--samples", "1", "set=4"],
        ["grpo.seed=7", "eval", "--samples", "1", "set=4", "policy.generation.val_temperature=0", "--", "RECIPE"],
    ],
)
def test_overrides_may_stand_anywhere(recipe, monkeypatch, arguments):
    asked = {}

    def evaluate(recipe, *, checkpoint, data, repeats):
        asked.update(recipe=recipe, repeats=repeats)
        return "folder", "table"

    monkeypatch.setattr("vespo_megatron.launch.evaluate.evaluate", evaluate)
    assert cli.main([recipe if text == "RECIPE" else text for text in arguments]) == 0
    assert asked["repeats"] == {"": 1, "set": 4}
    assert (asked["recipe"].grpo.seed, asked["recipe"].policy.generation.val_temperature) == (7, 0)


def test_the_value_of_an_option_is_no_override_though_it_looks_like_one(recipe, monkeypatch):
    asked = {}
    monkeypatch.setattr(cli.command_line.slurm, "run", lambda parsed: asked.update(vars(parsed)))
    assert (
        cli.main(["slurm", recipe, "--compare", "loss_fn.name=grpo,vespo", "grpo.seed=7", "--submit", "grpo.seed=8"])
        == 0
    )
    assert asked["compare"] == "loss_fn.name=grpo,vespo" and asked["overrides"] == ["grpo.seed=7", "grpo.seed=8"]


def test_an_override_of_a_command_without_a_recipe_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "run", "grpo.seed=7"])
    assert "unrecognized arguments: grpo.seed=7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (UserError("x"), 2),
        (launcher.TrainingFailed("x"), 1),
        (processes.Stopped(15), 143),
        (processes.Stopped(2), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_exit_status_says_how_training_ended(recipe, monkeypatch, raised, status):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(launcher, "train", fail)
    assert cli.main(["train", recipe]) == status


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "a.yaml", "--fast"], ["recipe"]])
def test_what_is_no_command_is_refused_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: vespo-megatron" in capsys.readouterr().err


def test_kernels_takes_its_own_options(tmp_path, capsys):
    picture = tmp_path / "kernels.png"
    assert cli.main(["kernels", "--compare", "vespo,grpo", "--output", str(picture)]) == 0
    assert "vespo" in capsys.readouterr().out and picture.stat().st_size > 1000


def test_report_on_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


def test_training_on_several_nodes_is_left_to_torchrun(recipe, capsys):
    assert cli.main(["train", recipe, "cluster.num_nodes=2"]) == 2
    assert "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.gpus_per_node=4"], "torchrun started 2 processes"),
        (["cluster.gpus_per_node=2"], "exp_manager.version"),
    ],
)
def test_under_torchrun_the_recipe_must_fit_what_was_started(recipe, monkeypatch, capsys, overrides, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", recipe, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_the_module_runs_as_the_command_does(recipe):
    outcome = subprocess.run(
        [sys.executable, "-m", "vespo_megatron.cli", "recipe", "show", recipe, "oops"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert outcome.returncode == 2
    assert outcome.stderr == (
        "vespo-megatron: command line: 'oops' is no override\n  expected: key=value, as in grpo.seed=7\n"
    )


def test_the_version_is_the_package_s(capsys):
    import vespo_megatron

    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"vespo-megatron {vespo_megatron.__version__}\n"


def test_every_command_explains_itself(capsys):
    for name in cli.command_line.COMMANDS:
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0 and f"usage: vespo-megatron {name}" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError("mathtext"), UserError("no finished step to report")])
def test_a_run_has_ended_well_whatever_becomes_of_its_report(error, tmp_path, monkeypatch, capsys):
    from vespo_megatron.study import report

    def fail(runs, output):
        raise error

    monkeypatch.setattr(launcher, "train", lambda *_, **__: tmp_path)
    monkeypatch.setattr(report, "write_report", fail)
    assert cli.main(["train", "recipe.yaml"]) == 0
    told = capsys.readouterr().err
    assert str(error) in told and f"to do: vespo-megatron report {tmp_path}" in told
