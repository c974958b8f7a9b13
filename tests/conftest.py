"""Fixtures that several folders share. Keep it small: what one folder needs belongs in that folder's conftest.py."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items):
    """A server that starts beside other work takes minutes where it takes 20 s alone."""
    for item in items:
        if item.get_closest_marker("sglang") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(420))


@pytest.fixture(scope="session")
def tiny_qwen3_moe_folder(tmp_path_factory):
    """A random Qwen3-MoE (3 layers, hidden 64, 8 experts top-2, vocabulary 128) as transformers saves it.

    Weights are larger than transformers' initial ones, and norms are not one: a wrong layer would show.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("tiny_qwen3_moe")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_qwen3_moe_folder):
    """A recipe for that model on CPU in float32, routes returned; copy it (`copy.deepcopy`) to change it."""
    from vespo_megatron.recipe.schema import Recipe

    recipe = Recipe()
    recipe.policy.model_name = str(tiny_qwen3_moe_folder)
    recipe.policy.precision = "float32"
    recipe.policy.max_total_sequence_length = 128
    recipe.policy.generation.sglang_cfg.enable_return_routed_experts = True
    recipe.policy.generation.sglang_cfg.weight_bucket_bytes = 65536
    recipe.policy.generation.sglang_cfg.request_timeout = 120.0
    recipe.cluster.device = "cpu"
    return recipe


@pytest.fixture(scope="session")
def sglang_servers(tiny_recipe, tmp_path_factory):
    """One real SGLang server of that model for the whole session (mark tests that use it `sglang`)."""
    from vespo_megatron.rollout_sglang import launch_servers

    with launch_servers(tiny_recipe, tmp_path_factory.mktemp("sglang")) as servers:
        yield servers
