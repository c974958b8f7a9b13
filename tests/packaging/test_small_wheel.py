"""`pip install vespo-megatron` alone is the losses, with torch and NumPy; the rest says what to install."""

import re
import sys
import zipfile
from pathlib import Path

import pytest
from installed_wheel import ROOT, canonical, checked, needed_by, run

from vespo_megatron.cli.command_line import COMMANDS

CASES = {
    "train": ["recipe.yaml"],
    "eval": ["recipe.yaml"],
    "mismatch": ["recipe.yaml"],
    "preflight": ["recipe.yaml"],
    "recipe": ["show", "recipe.yaml"],
    "replay-step": ["run/steps/1"],
    "serve": ["recipe.yaml"],
    "convert": ["source", "target"],
    "data": ["prepare", "aime24"],
    "slurm": ["recipe.yaml"],
    "compare": ["study.yaml"],
    "plan": ["recipe.yaml", "--gpu", "h100-80"],
    "predict": ["recipe.yaml"],
    "simulate": ["recipe.yaml", "--gpu", "h100-80"],
    "report": ["."],
    "kernels": [],
}


def readme_example() -> str:
    return re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]


def in_empty_environment(python, folder, code):
    """What `code` prints, run where nothing of this project's own environment or folder can be imported."""
    return checked(python, "-I", "-c", code, cwd=folder)


def test_the_environment_holds_the_package_torch_and_numpy_and_what_those_need(python, tmp_path):
    code = "from importlib import metadata; print(*{d.metadata['Name'] for d in metadata.distributions()})"
    found = {canonical(name) for name in in_empty_environment(python, tmp_path, code).split()}
    assert found == needed_by("torch", "numpy") | {"vespo-megatron"}
    assert not found & {"pydantic", "omegaconf", "transformers", "megatron-core", "datasets", "aiohttp", "matplotlib"}


def test_the_readmes_example_runs_in_it_on_the_installed_files(python, tmp_path):
    code = readme_example() + (
        "\nimport sys, vespo_megatron"
        "\nassert output.loss.isfinite() and log_probs.grad.isfinite().all() and log_probs.grad.any()"
        "\nprint(vespo_megatron.__file__)"
    )
    assert Path(in_empty_environment(python, tmp_path, code).strip()).is_relative_to(python.parent.parent)


def test_every_objective_and_estimator_runs_in_it(python, tmp_path):
    code = """
import torch
from vespo_megatron.losses import compute_advantages, objective_names, policy_loss
made = compute_advantages(torch.tensor([1.0, 0.0, 0.5, 0.0]), ["a", "a", "b", "b"])
for name in objective_names():
    leaf = torch.full((8,), -1.0, requires_grad=True)
    behavior, old = torch.full((8,), -1.1), torch.full((8,), -1.05)
    output = policy_loss(leaf, behavior, made.values, torch.arange(0, 9, 2), name=name, old_log_probs=old)
    output.loss.backward()
    assert leaf.grad.isfinite().all() and output.metrics.finalize()["loss/bad_samples"] == 0, name
print("ran")
"""
    assert in_empty_environment(python, tmp_path, code) == "ran\n"


def test_every_command_but_the_doctor_is_a_case():
    assert set(CASES) == set(COMMANDS) - {"doctor"}


@pytest.mark.parametrize("command", CASES)
def test_a_command_says_in_one_line_what_to_install(python, tmp_path, command):
    (tmp_path / "recipe.yaml").write_text("policy: {model_name: some/model}\n")
    (tmp_path / "study.yaml").write_text("name: a\n")
    done = run(python.parent / "vespo-megatron", command, *CASES[command], cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        rf"vespo-megatron: {command} needs \w+, .*pip install 'vespo-megatron\[train\]'.*\n", done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "study.yaml"]


def test_nemo_s_entry_says_in_one_line_what_to_install(python, tmp_path):
    (tmp_path / "recipe.yaml").write_text("policy: {model_name: some/model}\n")
    done = run(python, "-I", "-m", "vespo_megatron.nemo_entry", "--config-name=recipe", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"vespo-megatron: nemo_entry needs \w+, .*pip install 'vespo-megatron\[train\]'.*\n", done.stderr
    )
    assert "--config-name" in checked(python, "-I", "-m", "vespo_megatron.nemo_entry", "--help", cwd=tmp_path)


def test_help_and_version_answer(python):
    checked(python.parent / "vespo-megatron", "--help")
    assert checked(python, "-m", "vespo_megatron.cli", "--version").startswith("vespo-megatron ")


def test_the_doctor_names_everything_that_is_missing(python, tmp_path):
    done = run(python.parent / "vespo-megatron", "doctor", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"fail  packages: aiohttp, .*transformers.* missing\n.*\[train\]", done.stdout)


def test_the_wheel_holds_the_package_its_types_and_its_templates(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"vespo_megatron", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    package = ROOT / "vespo_megatron"
    kept = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in kept} == {n for n in names if n.startswith("vespo_megatron/")}


@pytest.mark.wheel
@pytest.mark.timeout(1200)
def test_pip_installs_torch_and_numpy_and_nothing_of_the_stack(wheel, tmp_path):
    """The same with pip's own resolution, from an index; then what [train] would add."""
    import torch

    checked(sys.executable, "-m", "venv", tmp_path / "venv")
    pip = (tmp_path / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    checked(*pip, "install", "--quiet", wheel, f"torch=={torch.__version__.split('+')[0]}", timeout=900)
    listed = checked(*pip, "list", "--format", "freeze").split()
    found = {canonical(line.partition("==")[0]) for line in listed}
    cuda = {name for name in found if name.startswith(("nvidia-", "cuda-")) or name == "triton"}  # of a CUDA build
    assert found - cuda - {"pip", "setuptools"} == needed_by("torch", "numpy") - {"setuptools"} | {"vespo-megatron"}
    checked(*pip, "check")
    assert in_empty_environment(pip[0], tmp_path, readme_example() + "\nprint(output.loss)")
    would = checked(*pip, "install", "--dry-run", f"{wheel}[train]", timeout=900)
    for name in ("megatron-core", "omegaconf", "pydantic", "transformers", "aiohttp", "datasets"):
        assert f" {name}-" in would.replace("_", "-")
