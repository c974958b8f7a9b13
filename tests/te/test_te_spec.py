"""What a policy is made of with Transformer Engine's layers: modules, marks that say who sums a gradient, hooks."""

from __future__ import annotations

import pytest
import te_work
import torch
from test_layout_parity import EP, ETP, SP, TP

from vespo_megatron.errors import UserError
from vespo_megatron.megatron.native import spec
from vespo_megatron.megatron.optimizer import build_optimizer
from vespo_megatron.recipe.schema import MegatronConfig

pytestmark = pytest.mark.parallel
LAYER = "decoder.layers.0."
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "tp2_sp_etp2": (2, {TP: 2, SP: True, ETP: 2}),
    "ep2": (2, {EP: 2}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, te_workers, checkpoint):
    world_size, layout = LAYOUTS[request.param]
    run = {"layers": "te", "work": te_work.made_of, "folder": checkpoint, "layout": layout}
    return layout, te_workers.run(te_work.with_layers, world_size, **run)[0]


def test_modules_are_its_own_and_routers_are_megatron_cores(made):
    layout, policy = made
    classes = policy["classes"]
    expected = {
        "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
        "self_attention.core_attention": "TEPackedAttention",
        "self_attention.linear_proj": "TERowParallelLinear",
        "self_attention.q_layernorm": "RMSNorm",
        "pre_mlp_layernorm": "RMSNorm",
        "mlp": "TEMoELayer",
        "mlp.router": "TokenShardedRouter" if layout.get(TP) and not layout.get(SP) else "PolicyRouter",
        "mlp.experts": "TEGroupedMLP",
        "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
        "mlp.token_dispatcher": None,
    }
    assert {name: classes.get(LAYER + name) for name in expected} == expected
    assert classes["decoder.layers.1.mlp"] == "MLP"
    assert classes["decoder.layers.1.mlp.linear_fc1"] == "TELayerNormColumnParallelLinear"
    assert classes["decoder.final_layernorm"] == "RMSNorm"
    assert policy["optimizer"] == "FusedAdam"


def test_every_router_asks_its_hook(made):
    assert made[1]["layers"] == [1, 3, 4] and made[1]["hooked"] == [True] * 3


def test_experts_are_summed_over_expert_data_parallel_ranks_in_every_layout(made):
    """transformer_engine.py:1551 says so for EP > 1 alone; with TP > 1 and ETP = 1 ranks' experts would drift apart."""
    _, policy = made
    marks = policy["marks"]
    assert [name for name, each in marks.items() if each["allreduce"] is False] == [
        name for name in marks if ".experts." in name
    ]
    assert policy["expert_buffers"] == 1


def test_norms_and_routers_are_summed_over_tensor_parallel_ranks_with_sequence_parallelism(made):
    layout, policy = made
    whole = [name for name in policy["marks"] if name.endswith(("norm.weight", "layer_norm_weight", "router.weight"))]
    assert len(whole) == 4 * 4 + 3 + 1
    marked = {bool(policy["marks"][name]["sequence_parallel"]) for name in whole if "router" not in name}
    assert marked == {bool(layout.get(SP))}
    assert all(not policy["marks"][name]["tensor_model_parallel"] for name in whole)


def test_a_rank_has_its_share_of_every_weight(made):
    layout, policy = made
    tensor, expert_tensor = layout.get(TP, 1), layout.get(ETP, 1)
    shapes, hidden, width = policy["shapes"], 64, 32
    assert shapes[LAYER + "self_attention.linear_qkv.weight"] == ((8 + 2 * 4) * 16 // tensor, hidden)
    assert shapes[LAYER + "self_attention.linear_proj.weight"] == (hidden, 8 * 16 // tensor)
    assert shapes[LAYER + "mlp.experts.linear_fc1.weight0"] == (2 * width // expert_tensor, hidden)
    assert shapes[LAYER + "mlp.experts.linear_fc2.weight0"] == (hidden, width // expert_tensor)
    experts = [name for name in shapes if name.startswith(LAYER + "mlp.experts.linear_fc1.weight")]
    assert len(experts) == 8 // layout.get(EP, 1)


def test_the_random_state_that_checkpoints_keep_is_megatron_cores(made):
    """Transformer Engine's tracker would be used with `use_te_rng_tracker` alone."""
    assert made[1]["tracker"] == "megatron.core.tensor_parallel.random"


# ---- which layers a recipe gets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "device", "there", "expected"),
    [
        ("auto", "cuda", True, "te"),
        ("te", "cuda", True, "te"),
        ("native", "cuda", True, "native"),
        ("auto", "cuda", False, "native"),
        ("auto", "cpu", True, "native"),
    ],
)
def test_auto_is_te_where_it_can_be_used(wanted, device, there, expected, monkeypatch):
    monkeypatch.setattr(spec, "have_transformer_engine", lambda: there)
    fused = MegatronConfig(layer_spec=wanted, apply_rope_fusion=expected == "te")
    assert spec.layers_of(fused, device, torch.bfloat16) == expected


def test_attention_of_its_own_wants_16_bits(monkeypatch):
    monkeypatch.setattr(spec, "have_transformer_engine", lambda: True)
    assert spec.layers_of(MegatronConfig(), "cuda", torch.float32) == "native"
    with pytest.raises(UserError, match=r"layer_spec: is te with torch\.float32"):
        spec.layers_of(MegatronConfig(layer_spec="te"), "cuda", torch.float32)


@pytest.mark.parametrize("key", ["moe_permute_fusion", "apply_rope_fusion"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_fusion_without_it_is_one_error_by_its_key(key, device, monkeypatch):
    monkeypatch.setattr(spec, "have_transformer_engine", lambda: False)
    with pytest.raises(UserError) as caught:
        spec.layers_of(MegatronConfig(**{key: True}), device, torch.bfloat16)
    assert f"policy.megatron_cfg.{key}: is true, but layer_spec auto is native here" in str(caught.value)


def test_te_where_it_is_not_is_one_error(monkeypatch):
    with pytest.raises(UserError, match="policy.megatron_cfg.layer_spec"):
        spec.layers_of(MegatronConfig(layer_spec="te"), "cuda", torch.bfloat16)


def test_its_adam_where_it_is_not_is_one_error():
    megatron = MegatronConfig().with_values({"optimizer.use_precision_aware_optimizer": True})
    with pytest.raises(UserError, match="optimizer.use_precision_aware_optimizer: is true, but there is no"):
        build_optimizer(megatron, [], dtype=torch.bfloat16, total_updates=1)
