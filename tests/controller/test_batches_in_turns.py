"""Batches and evaluations of responses in turns: their rewards, advantages and metrics, drawn in either way."""

from __future__ import annotations

import numpy as np
import pytest
from listed_prompts import ListedPrompts
from scripted_engine import recipe

from vespo_megatron.controller.controller import Controller
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import PromptStream
from vespo_megatron.environments import EnvironmentPool
from vespo_megatron.errors import UserError
from vespo_megatron.rewards import RewardPool, RewardResult
from vespo_megatron.rollout_sglang.engine import GenerationResult
from vespo_megatron.rollout_sglang.faults import WeightsNeeded

STOP = 1


class Engine:
    """Draws as many tokens as the request's number of turns so far, and one more; interrupted where it is told."""

    description, weight_version = "an engine", 0

    def __init__(self):
        self.requests, self.needs = [], 0

    async def generate(self, requests, *, on_result=None):
        results = []
        for request in requests:
            if self.needs and "/" in request.request_id.rpartition("p")[2].partition("/")[2]:
                self.needs -= 1
                raise WeightsNeeded("a server came back")
            turn = len(self.requests) % 2
            ids = np.array([7] * (2 + turn) + [STOP])
            length = len(ids)
            self.requests.append(request)
            result = GenerationResult(request.request_id, ids, np.full(length, -1.0), np.zeros(length), "stop")
            results.append(result)
            if on_result:
                on_result(result)
        return results

    def metrics(self):
        return {}

    async def pause(self):
        pass

    resume = pause

    def update_weights(self, stream, version, in_place=False):
        pass

    def close(self):
        pass


class Tokenizer:
    eos_token_id, chat_template = STOP, None

    def decode(self, ids, skip_special_tokens=False):
        return "".join("." if token == STOP else "x" if token == 7 else "o" for token in ids if token != STOP)

    def __call__(self, text, **kwargs):
        return {"input_ids": [9] * len(text)}


class Logger:
    def log_samples(self, *args, **kwargs):
        self.shown = args[1]

    def log_problems(self, step, problems):
        self.problems = problems


class Rewards:
    """Scores by position, and remembers what it is asked."""

    def __init__(self):
        self.asked = []

    async def score(self, requests):
        found = [RewardResult(float((len(self.asked) + index) % 2)) for index in range(len(requests))]
        self.asked += requests
        return found

    def close(self):
        pass


class Earns:
    """Two turns; each response earns its prompt's ground truth, and more for longer turns."""

    def reset(self, record):
        self.base = float(record.ground_truth)

    def step(self, turn):
        return "oo", self.base + 0.5 * len(turn.token_ids), turn.number == 1


@pytest.fixture
def build():
    built = []

    def build(name="Earns", rewards=None, **settings):
        values = {"grpo__num_prompts_per_step": 2, "grpo__num_generations_per_prompt": 4, "env__reward": "none"}
        values |= {"policy__train_global_batch_size": 8}
        made = recipe(f"{__name__}:{name}" if name[0].isupper() and ":" not in name else name, **(values | settings))
        records = ListedPrompts([PromptRecord(f"p{i}", (5, 6), "sums", "1") for i in range(16)])
        controller = Controller(
            made,
            Engine(),
            Tokenizer(),
            PromptStream(records, seed=1),
            records[:3],
            rewards or RewardPool(made.env),
            Logger(),
            EnvironmentPool(made.env),
        )
        built.append(controller)
        return controller

    yield build
    for controller in built:
        controller.close()


BESIDE = {"grpo__async_grpo__enabled": True, "grpo__async_grpo__max_staleness": 0.0}
both_sources = pytest.mark.parametrize("source", [{}, BESIDE], ids=["synchronous", "asynchronous"])


@both_sources
@pytest.mark.parametrize("backend", ["in_process", "sglang"])
def test_a_batch_has_whole_responses_of_all_their_turns_with_the_environment_s_rewards(source, backend, build):
    rollout = build(policy__generation__backend=backend, **source).collect(1)
    assert len(rollout.batch) == 8 and rollout.metrics["turns/mean"] == 2
    for sample in rollout.batch.samples:
        drawn = [sample.response_ids[sample.turns == turn].tolist() for turn in (0, 1)]
        assert sample.response_ids.tolist() == [*drawn[0], 9, 9, *drawn[1]]
        assert sample.loss_mask.tolist() == [True] * len(drawn[0]) + [False] * 2 + [True] * len(drawn[1])
        assert sample.turn_rewards.tolist() == [1 + 0.5 * len(ids) for ids in drawn]
        assert sample.reward == sample.turn_rewards.sum() == sample.reward_parts["environment"]
        assert sample.turn_advantages is None
    assert rollout.metrics["reward/environment"] == rollout.metrics["reward/mean"]


@both_sources
def test_a_score_is_of_what_the_policy_wrote_and_is_added_to_what_the_environment_gave(source, build):
    rewards = Rewards()
    rollout = build(rewards=rewards, env__reward="math", **source).collect(1)
    for asked in rewards.asked:
        first, second = asked.solution_str.split("\n")
        assert set(first) == set(second) == {"x"}, "no observation can be taken for an answer"
        assert asked.extra_info["conversation"] == [(True, first), (False, "oo"), (True, second)]
    for sample in rollout.batch.samples:
        assert sample.reward - sample.turn_rewards.sum() in (0.0, 1.0)


@both_sources
def test_advantages_of_turns_are_of_each_turn_s_reward_beside_that_of_the_score(source, build):
    rollout = build(rewards=Rewards(), env__reward="math", grpo__advantage_level="turn", **source).collect(1)
    groups = {}
    for sample, advantage in zip(rollout.batch.samples, rollout.batch.advantages, strict=True):
        groups.setdefault(sample.prompt_id, []).append((sample, advantage))
    for members in groups.values():
        scores = np.array([sample.reward - sample.turn_rewards.sum() for sample, _ in members])
        for turn in (None, 0, 1):
            values = scores if turn is None else np.array([sample.turn_rewards[turn] for sample, _ in members])
            expected = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
            found = [a if turn is None else sample.turn_advantages[turn] for sample, a in members]
            assert found == pytest.approx(expected, abs=1e-5)
        sample, advantage = members[0]
        tokens = sample.token_advantages(advantage)
        assert tokens[sample.turns == 1] == pytest.approx(advantage + sample.turn_advantages[1])
        assert not tokens[~sample.drawn].any()


def test_responses_that_are_not_trained_on_have_no_advantage_of_turns_either(build):
    controller = build(
        rewards=Rewards(),
        env__reward="math",
        grpo__advantage_level="turn",
        grpo__max_rollout_turns=1,
        grpo__overlong_filtering="zero_advantage",
    )
    rollout = controller.collect(1)
    assert all(sample.truncated and not sample.turn_advantages.any() for sample in rollout.batch.samples)


class Fails(Earns):
    """Raises on every second episode's second turn."""

    episodes = 0

    def reset(self, record):
        super().reset(record)
        Fails.episodes += 1
        self.fails = Fails.episodes % 2 == 0

    def step(self, turn):
        if self.fails and turn.number == 1:
            raise RuntimeError("no answer")
        return super().step(turn)


@both_sources
@pytest.mark.parametrize(("rule", "kept"), [("zero", 8), ("drop", 4)])
def test_a_response_whose_environment_fails_is_0_or_in_no_group_and_counted(rule, kept, source, build):
    rollout = build("Fails", env__on_unscored=rule, **source).collect(1)
    assert rollout.metrics["rollout/unscored_error"] >= 4 and len(rollout.batch) == kept
    failed = [sample for sample in rollout.batch.samples if sample.unscored]
    assert len(failed) == kept - 4
    assert all(sample.reward == 0 and not sample.turn_rewards.any() for sample in failed)


@both_sources
def test_a_response_whose_environment_fails_can_be_an_error_that_names_it(source, build):
    with pytest.raises(UserError, match=r"sample .*p\d+/\d: has no score: RuntimeError: no answer"):
        build("Fails", env__on_unscored="error", **source).collect(1)


@both_sources
def test_an_evaluation_goes_by_turns_as_training_does(source, build):
    controller = build(rewards=Rewards(), env__reward="math", **source)
    found = controller.evaluate(0) or controller.await_evaluations()
    assert found[0]["eval/sums/avg@1"] > 3, "what the environment gave is in it"
    assert {problem.lengths[0] for problem in controller.parts.logger.problems} <= {8, 9, 10}
    assert all("o" in shown.response for shown in controller.parts.logger.shown)


def test_conversations_that_each_wait_for_weights_wait_for_one_push(build):
    """Every conversation draws by itself; all of them find that servers need weights."""
    controller = build(policy__generation__backend="sglang", grpo__num_prompts_per_step=8)
    controller.parts.engine.needs = 32
    pushes = 0
    while True:
        try:
            rollout = controller.collect(1)
            break
        except WeightsNeeded:
            pushes += 1
    assert 1 <= pushes <= 2 and len(rollout.batch) == 32


def test_a_recipe_whose_keys_need_an_environment_says_so():
    from vespo_megatron.recipe.rules import problems
    from vespo_megatron.recipe.schema import Recipe

    def said(**values):
        made = Recipe().with_values({name.replace("__", "."): value for name, value in values.items()})
        return " ".join(str(problem) for problem in problems(made))

    assert "env.options: is for an environment" in said(env__options={"a": 1})
    assert "env.max_tokens_per_turn: is for an environment" in said(env__max_tokens_per_turn=3)
    assert "grpo.advantage_level: is turn, and responses have one turn" in said(grpo__advantage_level="turn")
    turn = {"env.class": "calculator", "grpo__advantage_level": "turn"}
    assert "is turn with the estimator gdpo" in said(**turn, grpo__advantage_estimator="gdpo")
    assert "makes one advantage of a response" in said(**turn, loss_fn__off_policy_baseline="vcpo")
    assert "grpo.advantage_level: is not clipped" in said(**turn, grpo__advantage_clip_high=1.0)
    assert "advantage_level" not in said(**turn)
    assert "grpo.oversample: begins responses of one turn" in said(**{"env.class": "calculator"}, grpo__oversample=1.5)
