"""An account of every nat between engine and trainer: tokens are scored under one changed condition after another.

From what the engine said, log μ, to the policy that is trained now, log π_θ, each step changes one thing:

1. the engine scores the token again in one pass over prompt and response, as when it fills its cache, instead of token
   by token: `decode` (noise on log-probs is in it);
2. the trainer scores it with the engine's routes and the weights the engine was sent, rounded or not: what is left is
   `rest`, the arithmetic of two programs (with rounded activations or caches in it);
3. its own weights in place of the rounded ones: `precision`;
4. its own routes in place of the engine's: `routing`;
5. the weights after the batch's updates: `staleness`.

The five add up to log π_θ − log μ, whatever the layout. Layer by layer, the account says which experts differ and,
where the engine tells its hidden states, how far those of the two programs are apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vespo_megatron.data.sample import Sample
from vespo_megatron.megatron.hidden_states import HiddenStates
from vespo_megatron.megatron.micro_batch import MicroBatch
from vespo_megatron.megatron.parallel import pipeline_group, tensor_group
from vespo_megatron.megatron.policy import LIVE, MegatronPolicy, RouteUse
from vespo_megatron.megatron.rounded_weights import RoundedWeights
from vespo_megatron.quantization import WeightQuantizer
from vespo_megatron.rollout_sglang.engine import ScoredResponse
from vespo_megatron.routing_replay.table import RouteTable
from vespo_megatron.trainer.response_shards import ResponseShard, on_rank_zero
from vespo_megatron.trainer.scatter import Scatter

# isort: split
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

PARTS = ("decode", "rest", "precision", "routing", "staleness")
_SCORES = ("engine", "prefill", "engine_weights", "engine_routes", "own", "now")
"""Log-probs of a token, each under one condition more that is the trainer's; `PARTS` are their differences."""


@dataclass(frozen=True)
class SampleAccount:
    """One response."""

    sample: Sample
    scores: Mapping[str, np.ndarray]
    """float64 [T] by `_SCORES`."""
    differing: np.ndarray
    """int64 [T]: bit l − 1 is set where engine and trainer choose other experts in layer l."""
    distances: Mapping[int, np.ndarray]
    """Layer, from 1 → float64 [T], ‖trainer's output − engine's‖ / ‖engine's‖; empty where the engine does not tell."""

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """float64 [T] by `PARTS`."""
        later, earlier = _SCORES[1:], _SCORES
        return {
            part: self.scores[one] - self.scores[other] for part, one, other in zip(PARTS, later, earlier, strict=False)
        }

    def layers_of(self, token: int) -> list[int]:
        """Layers, from 1, in which the token's experts differ."""
        mask = int(self.differing[token])
        return [bit + 1 for bit in range(mask.bit_length()) if mask >> bit & 1]


class Accountant:
    """Scores batches on every rank; each method is a collective.

    Args:
        quantizer: what rounds weights on their way to the engine; None where they go as they are.
    """

    def __init__(self, policy: MegatronPolicy, scatter: Scatter, quantizer: WeightQuantizer | None) -> None:
        self.policy, self.scatter = policy, scatter
        self.rounded = (
            None if quantizer is None else RoundedWeights(policy.chunks, policy.shape, policy.rank_info, quantizer)
        )
        self.hidden = HiddenStates(policy.chunks, policy.rank_info)
        self._scores: dict[str, list[torch.Tensor]] = {}
        self._differing: list[torch.Tensor] = []
        self._heard: Mapping[int, list[torch.Tensor]] = {}

    def before_updates(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        engine_routes: Sequence[torch.Tensor],
        own: Sequence[torch.Tensor],
        own_routes: Sequence[RouteTable | None],
        heard: Mapping[int, list[torch.Tensor]],
    ) -> None:
        """Take what was scored under the weights that drew the batch, and score what was not.

        Args:
            micro_batches: of the batch.
            engine_routes: [R] of each, log-probs with the engine's routes; empty but on the last pipeline stage.
            own: the same with the trainer's routes.
            own_routes: what those were.
            heard: what `hidden` heard in that pass.
        """
        self._heard = heard
        self._scores = {"engine": [each.behavior_log_probs for each in micro_batches]}
        self._scores |= {"engine_weights": list(engine_routes), "engine_routes": list(engine_routes), "own": list(own)}
        self._scores["now"] = self._scores["own"]
        if self.rounded is not None:
            with self.rounded.in_use():
                engine = RouteUse("replay", lambda each: (each.engine_routes, None))
                self._scores["engine_weights"] = self._log_probs(micro_batches, engine)
        self._differing = [
            self._differing_layers(each, routes) for each, routes in zip(micro_batches, own_routes, strict=True)
        ]

    def after_updates(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Score under the weights there are now, where they are others than drew the batch."""
        self._scores["now"] = self._log_probs(micro_batches, LIVE)

    def accounts(
        self, micro_batches: Sequence[MicroBatch], samples: Sequence[Sample], prefilled: Sequence[ScoredResponse]
    ) -> list[SampleAccount]:
        """Of the whole batch, in the order of `samples`, on rank 0; elsewhere there are none.

        Args:
            prefilled: the engine's scores of `samples` in one pass each.
        """
        rank_info, shards = self.policy.rank_info, []
        if rank_info.is_last_stage and rank_info.tensor_rank == 0:
            for index, micro_batch in enumerate(micro_batches):
                values = [scores[index].double().cpu().numpy() for scores in self._scores.values()]
                values.append(self._differing[index].cpu().numpy())
                shards.append(ResponseShard.of(micro_batch, (rank_info.data_rank, index), values))
        found = {name: values for _, name, values in on_rank_zero(self.scatter, shards)}
        hidden = self._hidden(micro_batches)
        accounts = []
        for sample, engine in zip(samples, prefilled, strict=True):
            if sample.sample_id in found:
                *scores, differing = found[sample.sample_id]
                named = dict(zip(self._scores, scores, strict=True))
                told = np.full(len(differing), np.nan) if engine.log_probs is None else engine.log_probs
                named["prefill"] = np.where(np.isnan(told), named["engine"], told)
                distances = _distances(hidden.get(sample.sample_id, {}), engine.hidden)
                accounts.append(SampleAccount(sample, named, differing.astype(np.int64), distances))
        return accounts

    def _hidden(self, micro_batches: Sequence[MicroBatch]) -> dict[str, dict[int, np.ndarray]]:
        """Sample → layer → float32 [T, hidden size], on rank 0; nothing where nobody listened."""
        rank_info = self.policy.rank_info
        shards = [
            ResponseShard.of(micro_batch, (layer, rank_info.data_rank, index), [outputs[index].numpy()])
            for layer, outputs in (self._heard.items() if rank_info.tensor_rank == 0 else ())
            for index, micro_batch in enumerate(micro_batches)
        ]
        found: dict[str, dict[int, np.ndarray]] = {}
        for (layer, *_), name, (outputs,) in on_rank_zero(self.scatter, shards):
            found.setdefault(name, {})[layer] = outputs
        return found

    def _log_probs(self, micro_batches: Sequence[MicroBatch], routes: RouteUse) -> list[torch.Tensor]:
        return [output[0] for output in self.policy.log_probs(micro_batches, routes=routes)]

    def _differing_layers(self, micro_batch: MicroBatch, own: RouteTable | None) -> torch.Tensor:
        """float64 [R], whole numbers: `SampleAccount.differing` of this rank's tokens."""
        rank_info, engine = self.policy.rank_info, micro_batch.engine_routes
        if engine is None or own is None:
            raise RuntimeError("routes that are compared were not recorded")
        differ = (np.sort(engine.experts, axis=-1) != np.sort(own.experts, axis=-1)).any(axis=-1)
        bits = 2.0 ** (np.array(self.policy.replay.layer_numbers, dtype=np.float64) - 1)
        rows = torch.from_numpy((differ & engine.recorded[:, None]) @ bits).to(rank_info.device)
        if rank_info.pipeline_size > 1:
            dist.all_reduce(rows, group=pipeline_group())
        if rank_info.tensor_size > 1:  # each of its ranks has routed a shard of the tokens
            rows = gather_from_sequence_parallel_region(rows, group=tensor_group())
        return rows.index_select(0, micro_batch.request.rows)


def _distances(own: Mapping[int, np.ndarray], engine: np.ndarray | None) -> dict[int, np.ndarray]:
    """`SampleAccount.distances` of the trainer's outputs, layer → [T, hidden size], and the engine's."""
    if engine is None:
        return {}
    return {
        layer: np.linalg.norm(outputs - engine[layer - 1], axis=-1) / np.linalg.norm(engine[layer - 1], axis=-1)
        for layer, outputs in sorted(own.items())
    }


def as_json(account: SampleAccount, texts: Sequence[str], batch: int) -> dict[str, Any]:
    """A line of `account.jsonl`; `texts` are the response's tokens."""
    return {
        "batch": batch,
        "sample_id": account.sample.sample_id,
        "reward": account.sample.reward,
        "prompt_ids": account.sample.prompt_ids.tolist(),
        "response_ids": account.sample.response_ids.tolist(),
        "behavior_log_probs": account.scores["engine"].tolist(),
        "tokens": list(texts),
        "parts": {name: values.tolist() for name, values in account.parts.items()},
        "differing_layers": [account.layers_of(token) for token in range(len(texts))],
        "hidden_distances": {layer: values.round(9).tolist() for layer, values in account.distances.items()},
    }
