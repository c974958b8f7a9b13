"""What the controller makes of a rollout batch: groups, bad samples, resampling, the probe for routes."""

from __future__ import annotations

import numpy as np
import pytest
from listed_prompts import ListedPrompts

from vespo_megatron.controller.controller import Controller
from vespo_megatron.controller.synchronous import MAX_SAMPLING_ROUNDS
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import PromptStream
from vespo_megatron.data.sample import UNKNOWN_VERSION
from vespo_megatron.errors import UserError
from vespo_megatron.losses import Normalizer
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rewards import RewardResult
from vespo_megatron.rollout_sglang.engine import GenerationResult
from vespo_megatron.routing_replay.table import stale_rows


class Engine:
    """Answers every request with three tokens; `spoil` may change an answer."""

    description = "an engine"

    def __init__(self, spoil=lambda number, result: None):
        self.requests, self.spoil = [], spoil

    async def generate(self, requests, *, on_result=None):
        results = []
        for request in requests:
            result = GenerationResult(request.request_id, np.arange(3), np.full(3, -1.0), np.zeros(3), "stop")
            self.spoil(len(self.requests), result)
            self.requests.append(request)
            results.append(result)
        return results

    def metrics(self):
        return {"rollout/servers": 1.0}

    async def pause(self):
        pass

    resume = pause

    def close(self):
        pass


class Rewards:
    """Scores by position: `scores(n)` is the n-th score asked for, or why it does not come."""

    def __init__(self, scores):
        self.scores, self.count = scores, 0

    async def score(self, requests):
        scores = [self.scores(self.count + i) for i in range(len(requests))]
        self.count += len(requests)
        return [
            RewardResult(0.0, unscored=score) if isinstance(score, str) else RewardResult(score, {"format": 1.0})
            for score in scores
        ]

    def close(self):
        pass


class Tokenizer:
    eos_token_id = 1

    def decode(self, ids, **kwargs):
        return "text"


class Logger:
    def log_samples(self, *args, **kwargs):
        pass

    def log_problems(self, step, problems):
        self.problems = problems


@pytest.fixture
def build():
    built = []

    def build(scores=lambda n: float(n % 2), spoil=lambda number, result: None, **settings):
        values = {"grpo.num_prompts_per_step": 4, "grpo.num_generations_per_prompt": 2}
        recipe = Recipe().with_values(values | {name.replace("__", "."): value for name, value in settings.items()})
        records = ListedPrompts([PromptRecord(f"p{i}", (5, 6), "sums", "4", {"level": i % 3}) for i in range(64)])
        controller = Controller(
            recipe, Engine(spoil), Tokenizer(), PromptStream(records, seed=1), records[:6], Rewards(scores), Logger()
        )
        built.append(controller)
        return controller

    yield build
    for controller in built:
        controller.close()


def not_a_number(number, result):
    if number == 3:
        result.behavior_log_probs[1] = np.nan


def test_a_batch_holds_whole_groups_with_group_relative_advantages(build):
    rollout = build().collect(1)
    assert [sample.prompt_id for sample in rollout.batch.samples[::2]] == [
        s.prompt_id for s in rollout.batch.samples[1::2]
    ]
    assert np.allclose(rollout.batch.advantages, np.tile([-1, 1], 4) * rollout.batch.advantages[1])
    assert rollout.metrics["reward/mean"] == 0.5 and rollout.metrics["reward/format"] == 1.0


def test_seeds_differ_by_response_and_repeat_by_run(build):
    one, two = build(), build()
    one.collect(1), two.collect(1)
    seeds = [request.seed for request in one.engine.requests]
    assert len(set(seeds)) == 8 and seeds == [request.seed for request in two.engine.requests]


def test_a_log_prob_that_is_not_finite_is_an_error_naming_the_sample(build):
    with pytest.raises(UserError, match=r"sample 1/p\d+/1: has a log-prob that is not finite"):
        build(spoil=not_a_number).collect(1)


def test_under_drop_the_sample_is_left_out_counted_and_the_run_goes_on(build):
    rollout = build(spoil=not_a_number, loss_fn__on_bad_sample="drop").collect(1)
    assert len(rollout.batch) == 7 and rollout.metrics["rollout/bad_samples"] == 1


def test_dynamic_sampling_draws_until_every_group_carries_signal(build):
    """The first two rollouts of four prompts have two groups without signal each."""
    flat = {0, 1, 2, 3, 8, 9}
    rollout = build(scores=lambda n: 1.0 if n in flat else float(n % 2), grpo__use_dynamic_sampling=True).collect(1)
    assert len(rollout.batch) == 8 and rollout.metrics["rollout/sampling_rounds"] == 3
    assert (rollout.batch.advantages != 0).all()


def test_prompts_that_never_differ_stop_the_run_with_the_reason(build):
    controller = build(scores=lambda n: 1.0, grpo__use_dynamic_sampling=True)
    with pytest.raises(UserError, match=f"{MAX_SAMPLING_ROUNDS} rollouts gave 0 samples"):
        controller.collect(1)


BESIDE = {"grpo__async_grpo__enabled": True, "grpo__async_grpo__max_staleness": 0.0}
both_sources = pytest.mark.parametrize("source", [{}, BESIDE], ids=["synchronous", "asynchronous"])


@both_sources
def test_under_drop_a_group_with_a_bad_sample_goes_on_without_it(source, build):
    rollout = build(spoil=not_a_number, loss_fn__on_bad_sample="drop", **source).collect(1)
    assert len(rollout.batch) == 7 and rollout.metrics["rollout/bad_samples"] == 1
    groups = {}
    for sample in rollout.batch.samples:
        groups.setdefault(sample.prompt_id, []).append(sample)
    assert sorted(map(len, groups.values())) == [1, 2, 2, 2]


@both_sources
def test_under_drop_a_batch_of_groups_with_signal_is_whole_though_a_sample_of_one_is_bad(source, build):
    """Three rewards a group, of which the first group loses one and keeps two that differ."""
    rollout = build(
        scores=lambda n: float(n % 2),
        spoil=lambda number, result: not_a_number(number + 3, result),
        loss_fn__on_bad_sample="drop",
        grpo__use_dynamic_sampling=True,
        grpo__num_generations_per_prompt=3,
        policy__train_global_batch_size=12,
        **source,
    ).collect(1)
    assert len(rollout.batch) == 11 and len({sample.prompt_id for sample in rollout.batch.samples}) == 4


@both_sources
def test_rewards_that_are_no_numbers_are_no_signal(source, build):
    """A group of one reward and one NaN: what is left of it are equal rewards."""
    scores = {0: float("nan"), 1: 1.0}
    rollout = build(
        scores=lambda n: scores.get(n, float(n % 2)),
        loss_fn__on_bad_sample="drop",
        grpo__use_dynamic_sampling=True,
        **source,
    ).collect(1)
    assert len(rollout.batch) == 8 and np.isfinite(rollout.batch.advantages).all()
    assert (rollout.batch.advantages != 0).all()


@both_sources
def test_prompts_that_never_differ_stop_the_run_whichever_way_they_are_drawn(source, build):
    controller = build(scores=lambda n: 1.0, grpo__use_dynamic_sampling=True, **source)
    with pytest.raises(UserError, match=f"{MAX_SAMPLING_ROUNDS} rollouts gave 0 samples"):
        controller.collect(1)


@both_sources
def test_a_run_whose_every_sample_is_bad_stops(source, build):
    def spoil(number, result):
        result.behavior_log_probs[1] = np.nan

    with pytest.raises(UserError, match="no sample of .* usable"):
        build(spoil=spoil, loss_fn__on_bad_sample="drop", **source).collect(1)


def one_is_late(n):
    """Of the first rollout's eight scores in groups of two, that of the fourth does not come."""
    return "timeout" if n == 3 else float(n % 2)


@both_sources
@pytest.mark.parametrize(("rule", "kept", "mean"), [("zero", 8, 3 / 8), ("drop", 7, 3 / 7)])
def test_a_response_without_a_score_is_0_or_in_no_group_and_counted_by_kind(rule, kept, mean, source, build):
    rollout = build(scores=one_is_late, env__on_unscored=rule, **source).collect(1)
    counts = {name: value for name, value in rollout.metrics.items() if name.startswith("rollout/unscored")}
    assert counts == {"rollout/unscored_timeout": 1, "rollout/unscored_error": 0, "rollout/unscored_died": 0}
    assert len(rollout.batch) == kept and rollout.metrics["reward/mean"] == pytest.approx(mean)
    alone = [sample.prompt_id for sample in rollout.batch.samples]
    single = np.array([alone.count(name) == 1 for name in alone])
    assert single.sum() == (rule == "drop")
    assert (rollout.batch.advantages[single] == 0).all(), "what is left of its group has its own baseline"


@both_sources
def test_a_response_without_a_score_can_be_an_error_that_names_it(source, build):
    with pytest.raises(UserError, match=r"sample .*p\d+/1: has no score: it took longer than 10 s"):
        build(scores=one_is_late, env__on_unscored="error", **source).collect(1)


def test_an_evaluation_leaves_no_response_out_and_counts_those_without_a_score(build):
    controller = build(scores=lambda n: "died" if n == 0 else 1.0, env__on_unscored="drop")
    metrics = controller.evaluate(0)[0]
    assert metrics["eval/sums/avg@1"] == pytest.approx(5 / 6) and metrics["eval/unscored"] == 1


SHORT = {"policy__generation__max_new_tokens": 3}
"""All that the engine draws: beside training a response that was cut off earlier would go on."""


def cut_off(*numbers):
    def spoil(number, result):
        if number in numbers:
            result.finish_reason = "length"

    return spoil


@both_sources
@pytest.mark.parametrize("mode", [True, "zero_advantage"])
def test_truncated_responses_stay_in_the_batch_without_loss_or_without_advantage(source, mode, build):
    """The batch divides as before: under drop they are masked, which takes them out of every denominator too."""
    rollout = build(spoil=cut_off(1, 4), grpo__overlong_filtering=mode, **SHORT, **source).collect(1)
    batch = rollout.batch
    cut = [sample.finish_reason == "length" for sample in batch.samples]
    assert len(batch) == 8 and sum(cut) == 2
    assert not batch.advantages[cut].any() and batch.advantages[np.invert(cut)].all()
    masked = [not sample.loss_mask.any() for sample in batch.samples]
    assert masked == (cut if mode is True else [False] * 8)
    assert rollout.metrics["advantage/filtered_samples"] == 2
    assert rollout.metrics["response/truncated_fraction"] == 0.25 and rollout.metrics["reward/mean"] == 0.5


@both_sources
def test_dynamic_sampling_draws_on_for_groups_that_overlong_filtering_leaves_without_signal(source, build):
    settings = SHORT | {"grpo__overlong_filtering": "drop", "grpo__overlong_in_baseline": False}
    rollout = build(spoil=cut_off(1), grpo__use_dynamic_sampling=True, **settings, **source).collect(1)
    assert len(rollout.batch) == 8 and all(sample.loss_mask.all() for sample in rollout.batch.samples)


def test_evaluation_knows_no_overlong_filtering(build):
    controller = build(scores=lambda n: 1.0, spoil=cut_off(*range(6)), grpo__overlong_filtering=True)
    assert controller.evaluate(0)[0]["eval/sums/avg@1"] == 1.0


def test_masked_responses_are_in_no_denominator(build):
    lengths = [
        int(sample.loss_mask.sum())
        for sample in build(spoil=cut_off(1, 4), grpo__overlong_filtering="drop").collect(1).batch.samples
    ]
    normalizer = Normalizer.from_lengths(lengths)
    assert (normalizer.num_tokens, normalizer.num_sequences) == (6 * 3, 6)


def test_dynamic_sampling_may_judge_rewards_before_their_shaping(build):
    """Rewards that are all 1 differ by the punishment of length alone."""

    def spoil(number, result):
        if number % 2:
            result.output_ids, result.behavior_log_probs = np.arange(9), np.full(9, -1.0)
            result.weight_versions = np.zeros(9)

    shaping = {"enabled": True, "overlong_buffer_length": 4, "max_response_length": 8}
    settings = {f"grpo__reward_shaping__{name}": value for name, value in shaping.items()}
    settings |= {"grpo__use_dynamic_sampling": True}
    assert len(build(scores=lambda n: 1.0, spoil=spoil, **settings).collect(1).batch) == 8
    with pytest.raises(UserError, match="rollouts gave 0 samples"):
        build(scores=lambda n: 1.0, spoil=spoil, grpo__dynamic_sampling_reward="raw", **settings).collect(1)


@both_sources
def test_gdpo_weighs_the_parts_of_the_reward(source, build):
    weights = {"format": 1.0, "absent": 2.0}
    settings = {"grpo__advantage_estimator": "gdpo", "grpo__reward_part_weights": weights}
    with pytest.raises(UserError, match="has no part 'absent' of the reward"):
        build(**settings, **source).collect(1)


@both_sources
@pytest.mark.parametrize("rule", ["live", "drop", "error"])
def test_a_retracted_response_is_replayed_where_its_routes_are_known_or_left_out_or_an_error(rule, source, build):
    """Of three tokens by two versions, the server ran the first one's again under the second."""

    def spoil(number, result):
        result.routes = np.tile(np.arange(2, dtype=np.uint8), (4, 3, 1))
        result.route_versions = np.zeros(4)
        if number == 3:
            result.weight_versions = np.array([0, 1, 1])
            result.route_versions = np.array([UNKNOWN_VERSION, UNKNOWN_VERSION, 1, 1])

    replay = {"policy__router_replay__mode": "R3", "policy__router_replay__on_stale_routes": rule}
    if source:
        source = source | {"grpo__async_grpo__max_staleness": 1.0}
    controller = build(spoil=spoil, **SHORT, **replay, **source)
    if source:
        controller.source.buffer.version = 1
    if rule == "error":
        with pytest.raises(UserError, match=r"p\d+/1: has routes of weights that nobody knows"):
            controller.collect(1)
        return
    rollout = controller.collect(1)
    assert rollout.metrics["rollout/stale_routes"] == 1 and len(rollout.batch) == 8
    (retracted,) = [sample for sample in rollout.batch.samples if 1 in sample.weight_versions]
    assert stale_rows(retracted).tolist() == [True, True, False, False]
    assert retracted.loss_mask.all() == (rule == "live") and retracted.loss_mask.any() == (rule == "live")
    assert not any(stale_rows(sample).any() for sample in rollout.batch.samples if sample is not retracted)


def test_r3_without_routes_fails_at_the_probe_with_the_flag(build):
    with pytest.raises(UserError, match="--enable-return-routed-experts"):
        build().probe_routes(3, 2)


@pytest.mark.parametrize("shape", [(4, 5, 2), (4, 3, 4)], ids=["layers", "topk"])
def test_r3_with_another_models_routes_fails_at_the_probe(shape, build):
    def spoil(number, result):
        result.routes = np.zeros(shape, np.uint8)

    with pytest.raises(UserError, match="expected: 3 MoE layers and 2"):
        build(spoil=spoil).probe_routes(3, 2)


def test_evaluation_reports_each_set_by_name(build):
    metrics = build(scores=lambda n: 1.0, grpo__val_num_generations=2).evaluate(0)[0]
    assert metrics["eval/sums/avg@2"] == 1.0


def test_evaluation_asks_for_greedy_answers_besides_and_tells_groups_apart(build):
    """Twelve sampled answers, two of each problem, then six greedy ones."""
    controller = build(
        scores=lambda n: float(n < 4 or n >= 17),
        grpo__val_num_generations=2,
        grpo__val_greedy=True,
        data__group_by="level",
    )
    metrics = controller.evaluate(0)[0]
    requests = controller.parts.engine.requests
    assert [request.sampling.temperature for request in requests] == [1.0] * 12 + [0.0] * 6
    assert len({request.request_id for request in requests}) == 18
    assert metrics["eval/sums/avg@2"] == pytest.approx(2 / 6) and metrics["eval/sums/greedy"] == pytest.approx(1 / 6)
    assert [metrics[f"eval/sums/by/{level}"] for level in range(3)] == [0.5, 0.5, 0.0]
    assert [metrics[f"eval/sums/greedy_by/{level}"] for level in range(3)] == [0.0, 0.0, 0.5]


def test_prompts_without_the_entry_have_no_group(build):
    assert not [name for name in build(data__group_by="nothing").evaluate(0)[0] if "/by/" in name]


def test_over_sampling_rounds_every_metric_is_that_of_the_whole_batch(build):
    """Three rounds; the smallest advantage is not the sum of three."""
    flat = {0, 1, 2, 3, 8, 9}
    rollout = build(scores=lambda n: 1.0 if n in flat else float(n % 2), grpo__use_dynamic_sampling=True).collect(1)
    metrics, advantages = rollout.metrics, rollout.batch.advantages
    assert metrics["rollout/sampling_rounds"] == 3
    assert metrics["advantage/min"] == pytest.approx(advantages.min()) and metrics["advantage/min"] > -1
    assert metrics["advantage/max"] == pytest.approx(advantages.max())
    assert metrics["advantage/mean"] == pytest.approx(advantages.mean(), abs=1e-7)
    assert metrics["advantage/std"] == pytest.approx(advantages.std())
    assert metrics["advantage/groups"] == 4 + 2 + 1 and metrics["advantage/groups_without_signal"] == 2 + 1
    assert metrics["advantage/dropped_samples"] == 2 * 3


def test_bad_samples_of_every_sampling_round_are_counted(build):
    """One in each of the first two rounds; what is left of their groups carries no signal."""

    def spoil(number, result):
        if number in (0, 8):
            result.behavior_log_probs[1] = np.nan

    rollout = build(spoil=spoil, loss_fn__on_bad_sample="drop", grpo__use_dynamic_sampling=True).collect(1)
    assert len(rollout.batch) == 8 and rollout.metrics["rollout/sampling_rounds"] == 3
    assert rollout.metrics["rollout/bad_samples"] == 2
    assert rollout.metrics["reward/format"] == 1.0 and rollout.metrics["response/tokens"] == 3 * (7 + 1 + 2)
