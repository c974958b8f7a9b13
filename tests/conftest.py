"""Fixtures that several folders share. Keep it small: what one folder needs belongs in that folder's conftest.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import make_folder
from hypothesis import Phase, settings
from tiny_model import write_tiny_qwen3_moe

# `make nightly` takes the second one: other examples each time, and enough of them. Explaining a failure traces every
# line that runs, which takes minutes where a recipe is loaded.
phases = set(Phase) - {Phase.explain}
settings.register_profile("quick", max_examples=100, deadline=None, derandomize=True, phases=phases)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True, phases=phases)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_addoption(parser):
    """The rollout tests against a server that already runs, for instance on a GPU or of another SGLang version."""
    parser.addoption("--sglang-url", help="that server; it serves the model of tests/tiny_model.py")
    parser.addoption("--sglang-model", help="the folder it serves it from")


def pytest_collection_modifyitems(items):
    """A server that starts beside other work takes minutes where it takes 20 s alone."""
    for item in items:
        if item.get_closest_marker("sglang") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(420))


@pytest.fixture(scope="session")
def tiny_qwen3_moe_folder(request, tmp_path_factory):
    """The folder of `tiny_model.write_tiny_qwen3_moe`'s model."""
    if given := request.config.getoption("--sglang-model"):
        return Path(given)
    folder = tmp_path_factory.mktemp("tiny_qwen3_moe")
    write_tiny_qwen3_moe(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_qwen3_moe_folder):
    """A recipe for that model on CPU in float32, routes returned; `with_values` makes another."""
    from vespo_megatron.recipe.schema import Recipe

    return Recipe().with_values(
        {
            "policy.model_name": str(tiny_qwen3_moe_folder),
            "policy.precision": "float32",
            "policy.max_total_sequence_length": 128,
            "policy.generation.sglang_cfg.enable_return_routed_experts": True,
            "policy.generation.sglang_cfg.weight_bucket_bytes": 65536,
            "policy.generation.sglang_cfg.request_timeout": 120.0,
            "policy.generation.sglang_cfg.recovery_timeout": 5.0,
            "cluster.device": "cpu",
        }
    )


@pytest.fixture(scope="session")
def sglang_servers(request, tiny_recipe, tmp_path_factory):
    """One real SGLang server of that model for the whole session (mark tests that use it `sglang`)."""
    from vespo_megatron.rollout_sglang import ServerGroup, launch_servers

    if given := request.config.getoption("--sglang-url"):
        yield ServerGroup([], [given])
        return
    with launch_servers(tiny_recipe, tmp_path_factory.mktemp("sglang")) as servers:
        yield servers


@pytest.fixture
def folder(tmp_path, tiny_qwen3_moe_folder) -> Path:
    """Everything a `vespo-megatron train` of two processes needs, and all of it right."""
    return make_folder(tmp_path, tiny_qwen3_moe_folder)


@pytest.fixture
def importable(folder, monkeypatch) -> Path:
    """`folder`, with rewards that a run in another process can import."""
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(folder)
    return folder
