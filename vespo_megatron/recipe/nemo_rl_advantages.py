"""NeMo-RL's advantages and what goes with them (nemo_rl/algorithms: grpo.py, advantage_estimator.py) as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "grpo.num_prompts_per_step": 32,
    "grpo.num_generations_per_prompt": 16,
    "grpo.max_num_epochs": 1,
    "grpo.max_num_steps": 1000000,
    "grpo.normalize_rewards": True,
    "grpo.use_leave_one_out_baseline": True,
    "grpo.val_period": 10,
    "grpo.val_at_start": False,
    "grpo.val_at_end": False,
    "grpo.max_val_samples": 256,
    "grpo.seed": 42,
    "loss_fn.reference_policy_kl_penalty": 0.01,
    "loss_fn.reference_policy_kl_type": "k3",
    "loss_fn.use_on_policy_kl_approximation": False,
    "loss_fn.kl_input_clamp_value": 20.0,
    "loss_fn.kl_output_clamp_value": 10.0,
}
"""What their keys are where a file says nothing and ours would be another (`GRPOConfig`, `ClippedPGLossConfig`)."""

_ESTIMATOR = "grpo.adv_estimator"
KEYS = {
    f"{_ESTIMATOR}.name",
    f"{_ESTIMATOR}.normalize_rewards",
    f"{_ESTIMATOR}.use_leave_one_out_baseline",
    f"{_ESTIMATOR}.minus_baseline",
    f"{_ESTIMATOR}.reward_weights",
}
"""The keys that are `grpo.advantage_estimator` and the two switches together."""


def advantages(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our `grpo.*` for their dotted keys of advantages."""
    ours: dict[str, Any] = {}
    for switch in ("normalize_rewards", "use_leave_one_out_baseline"):
        # The estimator's own switch is the one that is read; a file without it says the same above.
        own = theirs.get(f"{_ESTIMATOR}.{switch}")
        if own is not None:
            ours[f"grpo.{switch}"] = own
    name = theirs.get(f"{_ESTIMATOR}.name", "grpo")
    if name == "reinforce_plus_plus":
        baseline = theirs.get(f"{_ESTIMATOR}.minus_baseline", True)
        ours["grpo.advantage_estimator"] = f"reinforce_plus_plus{'_baseline' if baseline else ''}_tokens"
    elif name == "gdpo":
        ours["grpo.advantage_estimator"] = "gdpo"
    if theirs.get("grpo.use_dynamic_sampling") and theirs.get("grpo.reward_shaping.enabled"):
        ours["grpo.dynamic_sampling_reward"] = "raw"
    return ours


def refusals(theirs: Mapping[str, Any]) -> dict[str, str]:
    """Their key → why what it asks for is not to be had here."""
    found = {}
    name = theirs.get(f"{_ESTIMATOR}.name", "grpo")
    if name not in ("grpo", "gdpo", "reinforce_plus_plus"):
        found[f"{_ESTIMATOR}.name"] = "estimators here are grpo's, gdpo and reinforce_plus_plus"
    if theirs.get(f"{_ESTIMATOR}.reward_weights") is not None and name == "gdpo":
        found[f"{_ESTIMATOR}.reward_weights"] = "name the parts: grpo.reward_part_weights={part: weight}"
    if name == "gdpo" and theirs.get("grpo.overlong_filtering"):
        found["grpo.overlong_filtering"] = "with gdpo theirs takes filtered responses into the batch's deviation"
    if theirs.get("loss_fn.use_kl_in_reward") and theirs.get("loss_fn.reference_policy_kl_penalty"):
        found["loss_fn.use_kl_in_reward"] = "the KL penalty is a term of the loss"
    return found


def differences(theirs: Mapping[str, Any]) -> dict[str, str]:
    """Their key → in what the number it makes here is another all the same."""
    found = {}
    loo = theirs.get("grpo.use_leave_one_out_baseline")
    if theirs.get("grpo.use_dynamic_sampling") and loo:
        found["grpo.use_dynamic_sampling"] = (
            "theirs drops single responses whose *others* are all equal (its deviation is leave-one-out too) and forms "
            "advantages of what is left; here whole groups without signal go"
        )
    shaping = "grpo.reward_shaping"
    longest, limit = theirs.get(f"{shaping}.max_response_length"), theirs.get("policy.generation.max_new_tokens")
    if theirs.get(f"{shaping}.enabled") and longest is not None and limit is not None and longest < limit:
        found[f"{shaping}.max_response_length"] = (
            f"theirs goes on falling beyond {longest} tokens, up to {limit}; here the cost ends at "
            "overlong_buffer_penalty (DAPO, equation 13)"
        )
    return found
