"""Drawing the answers that are scored: beside training, and for `vespo-megatron eval`."""

from __future__ import annotations

from collections.abc import Sequence

from vespo_megatron.controller.sampler import Sampler
from vespo_megatron.data.prompts import PromptRecord
from vespo_megatron.data.sample import Sample
from vespo_megatron.evaluation.scores import Problem
from vespo_megatron.rewards.functions import last_boxed


async def draw_problems(
    sampler: Sampler, records: Sequence[PromptRecord], repeats: int, label: str = "validation"
) -> tuple[list[Problem], list[Sample]]:
    """Each prompt answered `repeats` times under the recipe's evaluation sampling, scored by its reward.

    A problem whose responses were all unusable and dropped is left out.
    """
    samples, _ = await sampler.sample(records, repeats, label, evaluation=True)
    answered: dict[str, list[Sample]] = {}
    for sample in samples:
        answered.setdefault(sample.prompt_id, []).append(sample)
    return [
        _problem(record, answered[record.prompt_id], sampler) for record in records if record.prompt_id in answered
    ], samples


def _problem(record: PromptRecord, samples: Sequence[Sample], sampler: Sampler) -> Problem:
    return Problem(
        prompt_id=record.prompt_id,
        data_source=record.data_source,
        ground_truth=record.ground_truth,
        rewards=tuple(float(sample.reward) for sample in samples),
        answers=tuple(_answer(sampler.text(sample)) for sample in samples),
        lengths=tuple(len(sample.response_ids) for sample in samples),
        finish_reasons=tuple(sample.finish_reason for sample in samples),
    )


def _answer(text: str) -> str | None:
    """The last boxed answer, blanks aside."""
    boxed = last_boxed(text)
    return None if boxed is None else "".join(boxed.split())
