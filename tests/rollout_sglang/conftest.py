"""Engines and the reference for the rollout tests."""

from __future__ import annotations

import pytest
from rollout_helpers import Reference, write_model_with_a_dense_layer


@pytest.fixture(scope="session")
def reference(tiny_qwen3_moe_folder):
    import torch
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(tiny_qwen3_moe_folder, dtype=torch.float32).eval()
    return Reference(model, str(tiny_qwen3_moe_folder))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The folder of `write_model_with_a_dense_layer`'s model."""
    folder = tmp_path_factory.mktemp("model")
    write_model_with_a_dense_layer(folder)
    return folder


@pytest.fixture(scope="session")
def sglang_engine(sglang_servers, tiny_recipe):
    from vespo_megatron.rollout_sglang import connect

    engine = connect(tiny_recipe, sglang_servers.urls)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def in_process_engine(tiny_qwen3_moe_folder):
    from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine

    engine = InProcessEngine(tiny_qwen3_moe_folder, context_length=128)
    yield engine
    engine.close()


@pytest.fixture(params=["in_process", pytest.param("sglang", marks=pytest.mark.sglang)])
def engine(request):
    """Every rollout engine, holding the checkpoint's weights or those of an earlier test's last update."""
    return request.getfixturevalue(f"{request.param}_engine")
