"""Evaluation: answers to problem sets, drawn and scored; beside training, and for `vespo-megatron eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vespo_megatron.controller.sampler import Sampler
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.evaluation.record import metrics
from vespo_megatron.evaluation.scores import Problem
from vespo_megatron.recipe.schema import Recipe, SetConfig
from vespo_megatron.rewards.answers import last_boxed
from vespo_megatron.run.records import LoggedSample

if TYPE_CHECKING:
    from vespo_megatron.controller.parts import Parts


_LONGEST = 2000
"""Characters of a ground truth that are written whole: tests of programs may be megabytes, and are in the set."""


async def evaluate(parts: Parts, sampler: Sampler, step: int) -> dict[str, float]:
    """Scores of each validation set, `eval/<set>/avg@<k>` among them; problems and some samples are written."""
    schedule, data = parts.recipe.grpo, parts.recipe.data
    records = list(parts.validation[: schedule.max_val_samples])
    sets: dict[str, list[PromptRecord]] = {}
    for record in records:
        sets.setdefault(record.set_name, []).append(record)
    problems, samples, shown = [], [], []
    for name, members in sets.items():
        solved, drawn = await draw_set(
            sampler, members, parts.recipe, greedy=schedule.val_greedy, group_by=data.group_by
        )
        problems += solved
        samples += drawn
        shown += drawn[:: repeats_of(parts.recipe, name)]
    shown = shown[: parts.recipe.logger.num_val_samples_to_print]
    by_id = {record.prompt_id: record for record in records}
    parts.logger.log_samples(
        step, [_readable(sampler, by_id[each.prompt_id], each) for each in shown], name="validation"
    )
    parts.logger.log_problems(step, problems)
    return metrics(problems) | {"eval/unscored": float(sum(sample.unscored != "" for sample in samples))}


def _readable(sampler: Sampler, record: PromptRecord, sample: Sample) -> LoggedSample:
    return LoggedSample(
        prompt=sampler.decode(sample.prompt_ids),
        response=sampler.decode(sample.response_ids),
        reward=sample.reward,
        ground_truth=str(_shortened(record.ground_truth)),
        finish_reason=sample.finish_reason,
        prompt_id=sample.prompt_id,
    )


def repeats_of(recipe: Recipe, set_name: str) -> int:
    """Responses to each problem of a validation set."""
    return recipe.data.validation.given.get(set_name, SetConfig()).num_samples or recipe.grpo.val_num_generations


async def draw_set(
    sampler: Sampler,
    records: Sequence[PromptRecord],
    recipe: Recipe,
    label: str = "validation",
    *,
    repeats: int | None = None,
    greedy: bool = False,
    group_by: str | None = None,
) -> tuple[list[Problem], list[Sample]]:
    """The prompts of one set answered as a recipe evaluates it, each scored by its reward.

    A problem whose responses were all unusable and dropped is left out.

    Args:
        label: the requests' names begin with it.
        repeats: in place of the recipe's (`repeats_of`).
        greedy: whether each is answered once more at temperature 0; not among the samples that are returned.
        group_by: entry of `extra_info` that is the problem's group.
    """
    name = records[0].set_name
    config = recipe.data.validation.given.get(name, SetConfig())
    drawn = await sampler.sample(
        records,
        repeats or repeats_of(recipe, name),
        label,
        evaluation=True,
        temperature=config.temperature,
        top_p=config.top_p,
    )
    samples = drawn.samples
    answered: dict[str, list[Sample]] = {}
    for sample in samples:
        answered.setdefault(sample.prompt_id, []).append(sample)
    greedily: dict[str, float] = {}
    if greedy:
        ones = (await sampler.sample(records, 1, f"{label}/greedy", evaluation=True, greedy=True)).samples
        greedily = {one.prompt_id: float(one.reward) for one in ones}
    return [
        _problem(record, answered[record.prompt_id], sampler, _group(record, group_by), greedily.get(record.prompt_id))
        for record in records
        if record.prompt_id in answered
    ], samples


def _group(record: PromptRecord, group_by: str | None) -> str:
    value = None if group_by is None else record.extra_info.get(group_by)
    return "" if value is None else str(value)


def _problem(
    record: PromptRecord, samples: Sequence[Sample], sampler: Sampler, group: str, greedy: float | None
) -> Problem:
    return Problem(
        prompt_id=record.prompt_id,
        data_source=record.set_name or record.data_source,
        ground_truth=_shortened(record.ground_truth),
        rewards=tuple(float(sample.reward) for sample in samples),
        answers=tuple(_answer(sampler.text(sample)) for sample in samples),
        lengths=tuple(len(sample.response_ids) for sample in samples),
        finish_reasons=tuple(sample.finish_reason for sample in samples),
        group=group,
        greedy=greedy,
    )


def _shortened(ground_truth: Any) -> Any:
    if len(text := str(ground_truth)) <= _LONGEST:
        return ground_truth
    return f"{text[: _LONGEST // 10]}… ({len(text)} characters)"


def _answer(text: str) -> str | None:
    """The last boxed answer, blanks aside."""
    boxed = last_boxed(text)
    return None if boxed is None else "".join(boxed.split())
