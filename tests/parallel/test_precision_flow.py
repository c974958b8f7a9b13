"""One quantiser for training and rollouts: the trainer's weights in a pass, its own after it, gradients, mismatch."""

from __future__ import annotations

import mismatch_work
import precision_flow_work
import pytest
import torch
from command_line import ROW, make_folder, write_rows
from layout_work import ragged_batch
from safetensors.torch import load_file, save_file
from test_layout_parity import EP, LAYOUTS, SP, TOLERANCE, TP, relative_error

from vespo_megatron.quantization import fake_quantize
from vespo_megatron.recipe.loader import load_recipe, save_recipe

FLOWS = {
    "int4": {"scheme": "int4", "group_size": 24},  # 64 and 32 inputs a rank: groups lie across ranks
    "fp8": {"scheme": "fp8_e4m3"},  # a block is all of most tensors, whose rows are apart in linear_qkv
    "some": {
        "scheme": "int6",
        "weights_pattern": r"k_proj|up_proj|lm_head",
    },  # parts of what is joined, and a vocabulary
}
SOME_LAYOUTS = ("one", "tp2_sp_etp2", "tp2_ep2", "ep2", "vpp")


def layout_of(name):
    return LAYOUTS.get(name, (1, {}))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", SOME_LAYOUTS)
def test_weights_in_a_pass_are_the_whole_tensors_rounded_in_every_layout(name, flow, workers, checkpoint):
    world_size, layout = layout_of(name)
    keys = FLOWS[flow]
    precision = "bfloat16" if flow == "fp8" else "float32"
    given = {"folder": checkpoint[0], "layout": layout, "flow": keys, "precision": precision}
    rounded, after = workers.run(precision_flow_work.in_use, world_size, **given)[0]
    original = {
        name: tensor.to(rounded[name].dtype) for name, tensor in load_file(f"{checkpoint[0]}/model.safetensors").items()
    }
    assert precision in {str(tensor.dtype).removeprefix("torch.") for tensor in original.values()}
    taken = keys.get("weights_pattern", "_proj").split("|")
    changed = 0
    for tensor_name, tensor in original.items():
        wanted = tensor
        if any(part in tensor_name for part in taken):
            wanted = fake_quantize(tensor, keys["scheme"], keys.get("group_size"))
        changed += not torch.equal(wanted, tensor)
        assert torch.equal(rounded[tensor_name], wanted), tensor_name
        assert torch.equal(after[tensor_name], tensor), tensor_name
    assert changed >= 2 * 4


def int4_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """Fifteen levels of a row: −7 to 7 times a seventh of its largest magnitude."""
    step = weight.double().abs().max(dim=1, keepdim=True).values / 7
    return ((weight.double() / step).round() * step).float()


@pytest.fixture(scope="module")
def by_hand(checkpoint, tmp_path_factory):
    """Gradients by HF name of the loss at weights that were rounded by hand, of transformers' model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("rounded")
    weights = load_file(f"{checkpoint[0]}/model.safetensors")
    rounded = {name: int4_by_hand(weight) if "_proj." in name else weight for name, weight in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    Qwen3MoeConfig.from_pretrained(checkpoint[0]).save_pretrained(folder)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = ragged_batch()
    for sample, advantage in zip(batch.samples, batch.advantages, strict=True):
        logits = model(torch.from_numpy(sample.token_ids)[None]).logits[0] / 0.9
        log_probs = logits.log_softmax(-1)[len(sample.prompt_ids) - 1 : -1]
        picked = log_probs.gather(-1, torch.from_numpy(sample.response_ids)[:, None])[:, 0]
        (-(picked * float(advantage) * torch.from_numpy(sample.loss_mask)).sum() / 200).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):  # transformers has a layer's experts in one tensor
            for expert, both in enumerate(parameter.grad):
                prefix = name.removesuffix("gate_up_proj") + f"{expert}."
                gradients[prefix + "gate_proj.weight"], gradients[prefix + "up_proj.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            for expert, gradient in enumerate(parameter.grad):
                gradients[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = gradient
        else:
            gradients[name] = parameter.grad
    return gradients


@pytest.mark.parametrize("name", SOME_LAYOUTS)
def test_gradients_are_those_at_the_rounded_weights_and_the_weights_stay_in_every_pass(
    name, workers, checkpoint, by_hand
):
    world_size, layout = layout_of(name)
    answers = workers.run(
        precision_flow_work.passes, world_size, folder=checkpoint[0], layout=layout, flow={"scheme": "int4"}
    )
    gradients = answers[0].pop("gradients")
    assert gradients.keys() == by_hand.keys()
    errors = {name: relative_error(gradients[name], gradient) for name, gradient in by_hand.items() if gradient.norm()}
    worst = max(errors, key=errors.get)
    print(f"{name}: {worst} {errors[worst]:.1e}")
    assert errors[worst] <= TOLERANCE
    for answer in answers:
        answer.pop("gradients", None)
        assert len(answer) == 4 and all(answer.values()), answer


def test_weights_come_back_from_a_pass_that_fails(workers, checkpoint):
    run = {"folder": checkpoint[0], "layout": {}, "flow": {"scheme": "int4"}}
    assert workers.run(precision_flow_work.after_a_failure, 1, **run) == [True]


def test_overlapped_gathers_of_parameters_and_gradients_change_nothing(workers, checkpoint):
    data_parallel = "distributed_data_parallel_config"
    overlapped = {f"{data_parallel}.overlap_param_gather": True, f"{data_parallel}.overlap_grad_reduce": True}
    run = {"folder": checkpoint[0], "flow": {"scheme": "int4"}}
    plain, other, unrounded = (
        workers.run(precision_flow_work.after_updates, 2, **(run | changes))[0]
        for changes in ({"layout": {}}, {"layout": overlapped}, {"layout": {}, "flow": {}})
    )
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    assert not torch.equal(plain[name], unrounded[name])
    assert not torch.equal(plain[name], fake_quantize(plain[name], "int4"))
    for name, tensor in plain.items():
        assert torch.equal(other[name], tensor), name


@pytest.fixture(scope="module")
def k3(workers, tiny_qwen3_moe_folder, tmp_path_factory):
    """`k3(world_size, layout, flow, …)`: k3 of the first rollout batch, replay off, per flow."""
    folder = make_folder(tmp_path_factory.mktemp("flows"), tiny_qwen3_moe_folder)
    write_rows(folder, [ROW | {"prompt": f"{i} + {j} = 1 + 1 ="} for i in range(8) for j in range(8)])
    recipe = load_recipe(folder / "recipe.yaml").with_values(
        {
            "grpo.num_prompts_per_step": 16,
            "grpo.num_generations_per_prompt": 4,
            "grpo.max_num_steps": 1,
            "policy.train_global_batch_size": 64,
            "policy.generation.max_new_tokens": 20,
            "policy.generation.stop_token_ids": [127],
            "env.reward": "exact_match",
            "grpo.use_dynamic_sampling": False,
        }
    )

    def measure(world_size, layout, *flows):
        sizes = {TP: 1, EP: 1, SP: False} | layout
        values = {f"policy.megatron_cfg.{name}": value for name, value in sizes.items()}
        save_recipe(recipe.with_values(values | {"cluster.gpus_per_node": world_size}), folder / "flow.yaml")
        given = {"recipe_file": str(folder / "flow.yaml"), "run_dir": str(folder), "dials": list(flows)}
        answers = workers.run(mismatch_work.measured, world_size, prefix="policy.quantization.", **given)[0]
        print(world_size, layout, [answer["none"] for answer in answers])
        return [answer["none"]["mismatch/k3"] for answer in answers]

    return measure


@pytest.mark.parametrize("layout", [{}, {EP: 2}, {TP: 2, EP: 2, SP: True}], ids=["one", "ep2", "tp2_ep2"])
def test_with_one_quantiser_on_both_sides_mismatch_is_the_control_s(layout, k3):
    int4 = {"scheme": "int4", "group_size": 24}
    control, rollout, both, fp8 = k3(
        2 if layout else 1,
        layout,
        {},
        int4 | {"where": "rollout"},
        int4 | {"where": "both"},
        {"scheme": "fp8_e4m3"},
    )
    assert rollout > 1e-3 and both <= 10 * control and fp8 <= 10 * control
