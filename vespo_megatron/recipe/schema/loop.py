"""Keys of the loop and the loss: `grpo` and `loss_fn`."""

from __future__ import annotations

import math
from typing import Any, Literal

from vespo_megatron.recipe.schema.base import Section, key, section


class RewardShapingConfig(Section):
    """`grpo.reward_shaping`: DAPO's soft punishment of overlong responses (arXiv 2503.14476, equation 13)."""

    enabled: bool = key(False, "Punish overlong responses.")
    overlong_buffer_length: int = key(128, "The last so many tokens of max_response_length cost ever more.", ge=1)
    overlong_buffer_penalty: float = key(1.0, "The cost at max_response_length and beyond.", ge=0)
    max_response_length: int | None = key(None, "None: policy.generation.max_new_tokens.", ge=1)


class AsyncGRPOConfig(Section):
    """`grpo.async_grpo`: rollout beside training. A step is one batch of num_prompts_per_step groups."""

    enabled: bool = key(False, "Generate beside training.")
    max_staleness: float | None = key(
        None, "Weight versions a token may be behind, or a fraction; None: 1.", ge=0, ours=True
    )
    staleness_threshold: float | None = key(
        None, "veRL's name of the same number; give one of the two.", ge=0, ours=True
    )
    learning_rate_lag: float | None = key(
        None,
        "An update whose largest lag is above this has its learning rate times this over that lag; None: never.",
        gt=0,
        ours=True,
    )
    sync_every: int = key(1, "Steps between weight updates.", ge=1, ours=True)
    on_weight_update: Literal["abort_and_continue", "in_place", "drain"] = key(
        "abort_and_continue", "What becomes of the responses under way.", ours=True
    )

    @property
    def staleness(self) -> float:
        """Whichever of the two names was used; rounded up it bounds every token's lag."""
        given = self.max_staleness if self.staleness_threshold is None else self.staleness_threshold
        return 1.0 if given is None else given


class GRPOConfig(Section):
    """`grpo`: the rollout batch and the loop, whatever the loss is called."""

    num_prompts_per_step: int = key(32, "Prompts in one rollout batch.", ge=1)
    num_generations_per_prompt: int = key(8, "Responses per prompt: the size of one advantage group.", ge=1)
    max_rollout_turns: int = key(10, "Turns of one response at most, where env.class answers between them.", ge=1)
    oversample: float = key(
        1.0,
        "Groups that a step begins for each that it trains on: the first whole ones are taken, the rest is ended.",
        ge=1,
        le=8,
        ours=True,
    )
    partial_rollouts: bool = key(
        False,
        "With oversample: what was ended goes on in the next step with its tokens; else they are lost, and the prompt "
        "comes again in the next epoch.",
        ours=True,
    )
    max_num_steps: int = key(100, "Rollout batches to train on.", ge=1)
    max_num_epochs: int = key(1000000, "Passes over the prompts at most.", ge=1)
    normalize_rewards: bool = key(True, "Divide group advantages by the group's standard deviation.")
    use_leave_one_out_baseline: bool = key(False, "Baseline from the other responses of the group.")
    reward_shaping: RewardShapingConfig = section(RewardShapingConfig)
    use_dynamic_sampling: bool = key(False, "Drop groups whose rewards are all equal (DAPO).")
    dynamic_sampling_reward: Literal["shaped", "raw"] = key(
        "shaped", "The rewards that are to differ: with reward_shaping's part, or without it (NeMo-RL).", ours=True
    )
    overlong_filtering: bool | Literal["off", "drop", "zero_advantage"] = key(
        False,
        "Truncated responses leave the loss and its denominator (drop, or true), or stay in the denominator alone "
        "(zero_advantage).",
        expected="true or false",
    )
    overlong_in_baseline: bool = key(
        True, "Filtered responses still count in their group's baseline (NeMo-RL, DAPO).", ours=True
    )
    advantage_estimator: str = key(
        "auto", "auto: as the two switches above; else a name of losses.advantage_estimators.", ours=True
    )
    advantage_level: Literal["response", "turn"] = key(
        "response",
        "One advantage for all turns of a response, or that of its score and of each turn's own reward beside it "
        "(MT-GRPO, arXiv 2505.11821).",
        ours=True,
    )
    advantage_clip_low: float | None = key(None, "Least advantage, after normalisation; None: none.", ge=-1000, le=0)
    advantage_clip_high: float | None = key(None, "Largest advantage, after normalisation; None: none.", ge=0)
    pass_at_k: int = key(1, "k of the estimator pass_at_k.", ge=1, ours=True)
    reward_part_weights: dict[str, float] = key(
        {}, "Part of the reward → weight, for the estimator gdpo; empty: env.rewards.", ours=True
    )
    val_period: int = key(10, "Evaluate every so many steps; 0 never.", ge=0)
    val_at_start: bool = key(True, "Evaluate before the first step.")
    val_at_end: bool = key(True, "Evaluate after the last step.")
    max_val_samples: int = key(256, "Prompts of the validation set to use at most.", ge=1)
    val_num_generations: int = key(1, "Responses per validation prompt: avg@k.", ge=1, ours=True)
    val_greedy: bool = key(False, "One more, at temperature 0: eval/<set>/greedy.", ours=True)
    async_grpo: AsyncGRPOConfig = section(AsyncGRPOConfig)
    seed: int = key(42, "Seed of initialisation, prompt order and the in-process sampler.", ge=0)

    def evaluates_after(self, step: int) -> bool:
        """Whether the schedule has an evaluation after this step; 0 is before the first."""
        if not self.val_period:
            return False
        if step == 0:
            return self.val_at_start
        return step % self.val_period == 0 or (self.val_at_end and step == self.max_num_steps)

    def groups_begun(self, wanted: int) -> int:
        """Groups that are begun for so many to train on."""
        return math.ceil(self.oversample * wanted)

    @property
    def overlong(self) -> str:
        """What becomes of truncated responses: off, drop or zero_advantage."""
        given = self.overlong_filtering
        return given if isinstance(given, str) else ("drop" if given else "off")


class RouterShiftConfig(Section):
    """`loss_fn.router_shift`: RSPO's weight of each token, by how far the routers have moved since π_old."""

    apply: Literal["none", "before_clip", "after_clip"] = key(
        "none", "Weigh each token's ratio (before_clip), or its φ (after_clip), by γ̃; none: not at all.", ours=True
    )
    floor: float = key(0.8, "γ_min, below which no weight is.", gt=0, le=1, ours=True)


class LossConfig(Section):
    """`loss_fn`: one objective φ, its correction and its aggregation."""

    name: str = key("vespo", "An objective of `losses.objectives`, or package.module:function.", ours=True)
    hyperparameters: dict[str, Any] = key({}, "Arguments of that objective; unknown ones are an error.", ours=True)
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm"] = key(
        "token-mean", "From token losses to one number.", ours=True
    )
    aggregation_length: int | None = key(None, "The constant length of token-sum-norm.", ge=1, ours=True)
    behavior: Literal["auto", "rollout", "recompute", "version"] = key(
        "auto",
        "W = π_θ/μ of the engine (rollout), or π_θ/π_old by the trainer, of the weights the batch began with "
        "(recompute) or that drew each token (version); auto: recompute, and rollout in an asynchronous run.",
        ours=True,
    )
    expected_k3: float | None = key(
        None,
        "KL per token of engine and trainer, as mismatch measures it, for warnings and predict; None: published.",
        ge=0,
        ours=True,
    )
    correction: dict[str, Any] = key(
        {}, "Correction of π_train/μ: {weight: tis|mis|icepop, reject: [{…}], …}; empty is none.", ours=True
    )
    router_shift: RouterShiftConfig = section(RouterShiftConfig)
    reference_policy_kl_penalty: float = key(0.0, "Weight of the KL to the initial policy; 0 skips its pass.", ge=0)
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = key("k3", "Estimator of that KL.")
    reference_policy_kl_weight: Literal["none", "score", "anchor", "behavior"] = key(
        "none",
        "What weighs the estimate, with its gradient: nothing, e^(log π − sg(log π)), π_θ/π_anchor, or π_θ/μ.",
        ours=True,
    )
    kl_input_clamp_value: float | None = key(20.0, "Bound of |log π_ref − log π| in the estimate; null: none.", gt=0)
    kl_output_clamp_value: float | None = key(10.0, "Bound of the estimate; null: none.", gt=0)
    entropy_coefficient: float = key(0.0, "Weight of the entropy bonus.", ge=0, ours=True)
    ess_learning_rate: Literal["none", "sqrt", "linear"] = key(
        "none", "Scale the learning rate by the ESS of W (VCPO).", ours=True
    )
    ess_base: float = key(1.0, "The ESS, as a share of the mini-batch, at which the scale is 1.", gt=0, le=1, ours=True)
    off_policy_baseline: Literal["none", "vcpo"] = key(
        "none",
        "Advantages over VCPO's baseline, from every response's own gradient norm: a forward and a backward per "
        "response more.",
        ours=True,
    )
    on_bad_sample: Literal["error", "drop"] = key("error", "Samples whose numbers are not finite.", ours=True)
