"""What one pass looks at in the routers: their log-probs are recorded, or compared with those of π_old."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.parallel import RankInfo, pipeline_group, tensor_group
from vespo_megatron.routing_replay.router_scores import RouterScores, ScoreRecorder, ShiftMeter

# isort: split
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


class RouterPass:
    """One pass over micro-batches.

    With one pipeline stage γ of a micro-batch is there when its forward ends, before its loss. With several, whose
    losses come before other stages' layers could report, it is there when the pass ends.

    Args:
        scores: gives the table that records a micro-batch; None: nothing is recorded.
        measures: whether `MicroBatch.router_shift` is measured against `MicroBatch.router_scores`.
        layers: MoE layers of the whole model.
    """

    def __init__(
        self,
        scores: Callable[[MicroBatch], RouterScores | None],
        measures: bool,
        rank_info: RankInfo,
        layers: int,
    ) -> None:
        self.scores, self.measures, self.rank_info, self.layers = scores, measures, rank_info, layers
        self._meters: dict[int, ShiftMeter] = {}

    def watcher(self, micro_batch: MicroBatch) -> ScoreRecorder | ShiftMeter | None:
        """What looks at one forward of the micro-batch through one model chunk."""
        if (table := self.scores(micro_batch)) is not None:
            return ScoreRecorder(table)
        if not self.measures:
            return None
        if micro_batch.router_scores is None:
            raise RuntimeError("the routers of π_old were not recorded")
        if id(micro_batch) not in self._meters:  # model chunks of one rank add up in one
            self._meters[id(micro_batch)] = ShiftMeter.of(micro_batch.router_scores, self.rank_info.device)
        return self._meters[id(micro_batch)]

    def after_forward(self, micro_batch: MicroBatch, watcher: ScoreRecorder | ShiftMeter | None) -> None:
        """Call it after every such forward."""
        if isinstance(watcher, ScoreRecorder):
            watcher.write_back()
        elif watcher is not None and self.rank_info.pipeline_size == 1:
            self._measured(micro_batch)

    def after_pass(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Call it when the pass has ended; a collective of pipeline stages."""
        for micro_batch in micro_batches:
            if id(micro_batch) in self._meters:
                self._measured(micro_batch)

    def _measured(self, micro_batch: MicroBatch) -> None:
        distance = self._meters.pop(id(micro_batch)).total()
        if self.rank_info.pipeline_size > 1:
            dist.all_reduce(distance, group=pipeline_group())
        if self.rank_info.tensor_size > 1:  # each of its ranks has routed a shard of the tokens
            distance = gather_from_sequence_parallel_region(distance, group=tensor_group())
        micro_batch.router_shift = torch.exp(-distance / self.layers).index_select(0, micro_batch.request.rows)
