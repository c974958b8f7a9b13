"""Mismatch as a variable: each dial alone, in rollout batches of the in-process engine that the trainer scores."""

from __future__ import annotations

import mismatch_work
import pytest
from command_line import write_rows

from vespo_megatron.recipe.loader import load_recipe, save_recipe

K3, AGREEMENT = "mismatch/k3", "routes/agreement"
TOKENS = [str(number) for number in range(10)]


@pytest.fixture(scope="module")
def measured(workers, tiny_qwen3_moe_folder, tmp_path_factory):
    """`measured(dial, …)`: per dial, metrics with replay off ("none") and with R3."""
    from command_line import ROW, make_folder

    folder = make_folder(tmp_path_factory.mktemp("dials"), tiny_qwen3_moe_folder)
    write_rows(folder, [ROW | {"prompt": f"{i} + {j} = 1 + 1 ="} for i in TOKENS for j in TOKENS][:64])
    recipe = load_recipe(folder / "recipe.yaml").with_values(
        {
            "grpo.num_prompts_per_step": 32,
            "grpo.num_generations_per_prompt": 4,
            "grpo.max_num_steps": 2,
            "policy.train_global_batch_size": 128,
            "policy.generation.max_new_tokens": 20,
            "policy.generation.stop_token_ids": [127],
            "policy.megatron_cfg.tensor_model_parallel_size": 1,
            "policy.megatron_cfg.expert_model_parallel_size": 1,
            "policy.megatron_cfg.sequence_parallel": False,
            "cluster.gpus_per_node": 1,
            "env.reward": "exact_match",
            "grpo.use_dynamic_sampling": False,
        }
    )
    save_recipe(recipe, folder / "one.yaml")
    known: dict[str, dict] = {}

    def measure(*dials):
        new = [dial for dial in dials if str(dial) not in known]
        given = {"recipe_file": str(folder / "one.yaml"), "run_dir": str(folder), "dials": new}
        answers = workers.run(mismatch_work.measured, 1, **given)[0] if new else []
        known.update({str(dial): answer for dial, answer in zip(new, answers, strict=True)})
        for dial in dials:
            answer = known[str(dial)]
            print(dial, {mode: {name: answer[mode].get(name) for name in (K3, AGREEMENT)} for mode in answer})
        return [known[str(dial)] for dial in dials]

    return measure


def test_without_a_dial_engine_and_trainer_are_the_same_up_to_rounding(measured):
    (control,) = measured({})
    assert control["none"][K3] < 1e-9 and control["none"][AGREEMENT] == 1.0


def test_fewer_bits_of_weights_are_more_k3_and_fewer_routes_in_common(measured):
    dials = [{"weights": name} for name in ("none", "bfloat16", "int8", "int6", "int4", "int3")]
    answers = [answer["none"] for answer in measured(*dials)]
    k3, agreement = [each[K3] for each in answers], [each[AGREEMENT] for each in answers]
    assert k3 == sorted(k3) and k3[2] > 100 * k3[0]
    assert agreement == sorted(agreement, reverse=True) and agreement[-1] < agreement[2] < 1


def test_small_groups_and_fp8_are_between(measured):
    row, groups, fp8, int8 = (
        answer["none"]
        for answer in measured(
            {"weights": "int4"}, {"weights": "int4", "group_size": 8}, {"weights": "fp8_e4m3"}, {"weights": "int8"}
        )
    )
    assert groups[K3] < row[K3] and int8[K3] < fp8[K3] < row[K3]


def test_cache_and_inputs_of_fewer_bits_are_more_k3(measured):
    """With replay, or a handful of tokens whose route changed would weigh more than all the rest."""
    dials = [{"kv_cache": scheme} for scheme in ("bfloat16", "fp8_e4m3")]
    dials += [{"activations": scheme} for scheme in ("float16", "bfloat16", "fp8_e4m3")]
    control, *answers = (answer["R3"][K3] for answer in measured({}, *dials))
    assert 100 * control < answers[0] < answers[1] and 100 * control < answers[2] < answers[3] < answers[4]


def test_flips_change_routes_and_replaying_them_is_the_control_again(measured):
    control, few, many, layer = measured(
        {},
        {"route_flip": 0.05},
        {"route_flip": 0.3},
        {"route_flip": 0.3, "route_flip_layers": [1]},
    )
    assert control["none"][K3] < 1e-9 < layer["none"][K3] < many["none"][K3] and few["none"][K3] < many["none"][K3]
    # One of two experts is another in `p` of the tokens, and what they lead to differs in some more.
    assert 1 - many["none"][AGREEMENT] > 0.3 / 2 > 1 - few["none"][AGREEMENT] > 0.05 / 2
    for flipped in (few, many, layer):
        assert flipped["R3"][K3] < 1e-9


def test_noise_of_spread_s_is_a_k3_of_half_its_square(measured):
    """E[e^d − 1 − d] of a normal d = s²/2 to the second order; a log-prob that noise would make positive is cut."""
    spreads = (0.02, 0.1, 0.3)
    for spread, answer in zip(spreads, measured(*({"log_prob_noise": spread} for spread in spreads)), strict=True):
        for replay in ("none", "R3"):
            assert answer[replay][K3] == pytest.approx(spread**2 / 2, rel=0.15)
            assert answer[replay][AGREEMENT] == 1.0
