"""Expert routes of one micro-batch on one rank: compact, on the host, checked.

One byte per route where there are at most 256 experts: tokens × layers × topk bytes, for this rank's tokens (context
and sequence parallel shard) and layers (pipeline stages) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vespo_megatron.data.layout import SequenceLayout
from vespo_megatron.data.sample import UNKNOWN_VERSION, Sample, smallest_int_dtype
from vespo_megatron.errors import UserError


@dataclass
class RouteTable:
    """Rows are this rank's tokens in the order its routers see them."""

    experts: np.ndarray
    """Smallest unsigned integer [rows, layers, topk]; `layers` are this rank's MoE layers, in model order."""
    live_rows: np.ndarray
    """int32 [n]: rows nobody recorded a route for (a sequence's last token, or a stale one); the router decides."""

    @classmethod
    def empty(cls, rows: int, layers: int, topk: int, num_experts: int) -> RouteTable:
        """A table to record into."""
        return cls(np.zeros((rows, layers, topk), dtype=smallest_int_dtype(num_experts)), np.zeros(0, dtype=np.int32))

    @property
    def recorded(self) -> np.ndarray:
        """bool [rows], False for the live ones."""
        mask = np.ones(len(self.experts), dtype=bool)
        mask[self.live_rows] = False
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.experts.nbytes + self.live_rows.nbytes

    def check(self, num_experts: int, where: str) -> None:
        """Every replayed route names `topk` different experts there are.

        Raises:
            UserError: an expert out of range, or twice for one token (which breaks all-to-all dispatch).
        """
        used = self.experts[self.recorded]
        if used.size and int(used.max()) >= num_experts:
            row, layer = np.argwhere(used.max(axis=-1) >= num_experts)[0]
            raise UserError(
                f"replayed row {row} of layer index {layer} names expert {used[row, layer].max()}",
                where=where,
                expected=f"experts below {num_experts}",
                fix="the routes are of another model",
            )
        ordered = np.sort(used, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
        if twice.any():
            row, layer = np.argwhere(twice)[0]
            raise UserError(
                f"replayed row {row} of layer index {layer} names an expert twice: {used[row, layer].tolist()}",
                where=where,
                expected=f"{used.shape[-1]} different experts per token",
            )


def row_versions(sample: Sample) -> np.ndarray:
    """int64 [tokens − 1]: the weights under which a row of routes has to be right.

    Row p routed the token at p, whose forward predicted token p + 1; the prompt belongs to the first response token,
    and to no version where nothing was drawn.
    """
    first = sample.weight_versions[0] if len(sample.weight_versions) else UNKNOWN_VERSION
    return np.concatenate([np.full(len(sample.prompt_ids) - 1, first), sample.weight_versions])


def stale_rows(sample: Sample) -> np.ndarray:
    """bool [tokens − 1]: rows whose log-prob was computed under other weights than the routes were, or may have been.

    When a retracted request is run again, engines return routes of the *new* weights beside log-probs of the old.
    """
    versions = row_versions(sample)
    if sample.route_versions is None:
        return np.full(len(versions), True)
    return (versions != sample.route_versions) | (versions == UNKNOWN_VERSION)


def apply_stale_policy(samples: Sequence[Sample], on_stale_routes: str) -> int:
    """Act on samples with stale routes, in place; returns how many there were.

    live: their stale rows are left to the router; drop: the sample is not trained on (and its rows left to the router,
    which must route them somewhere); error: raise.

    Raises:
        UserError: under `error`, naming the sample and the versions.
    """
    found = 0
    known = next((sample.routes for sample in samples if sample.routes is not None), None)
    for sample in samples:
        if not len(sample.weight_versions):
            # Nothing was drawn, and engines give no routes: the live router takes its prompt, nothing is learned of it.
            if sample.routes is None and known is not None:
                sample.routes = np.zeros((sample.num_tokens - 1, *known.shape[1:]), dtype=known.dtype)
                sample.route_versions = np.full(sample.num_tokens - 1, UNKNOWN_VERSION)
            continue
        if sample.routes is None:
            continue
        stale = stale_rows(sample)
        if not stale.any() or sample.route_versions is None:
            continue
        found += 1
        if on_stale_routes == "error":
            raise UserError(
                f"has routes of {_names(sample.route_versions[stale])} and log-probs of versions "
                f"{sorted(set(sample.weight_versions.tolist()))}",
                where=f"sample {sample.sample_id}",
                expected="routes and log-probs of the same weights",
                fix="set policy.router_replay.on_stale_routes to live or drop; where the server was short of memory "
                "and ran it again under new weights, give its cache more",
            )
        if on_stale_routes == "drop":
            sample.loss_mask[:] = False
    return found


def _names(versions: np.ndarray) -> str:
    found = sorted(set(versions.tolist()))
    if found == [UNKNOWN_VERSION]:
        return "weights that nobody knows"
    return f"weight version {found[0]}" if len(found) == 1 else f"weight versions {found}"


def slice_routes(
    samples: Sequence[Sample], layout: SequenceLayout, layers: Sequence[int], *, topk: int, num_experts: int
) -> RouteTable:
    """The engine's routes of a micro-batch → one rank's table.

    Args:
        layout: of the micro-batch, at that rank.
        layers: that rank's MoE layers, counted among the model's MoE layers.

    Raises:
        UserError: a sample without routes, or with those of another shape.
    """
    dtype = smallest_int_dtype(num_experts)
    rows, live = [], []
    for sample in samples:
        if sample.routes is None:
            raise UserError(
                "has no routes",
                where=f"sample {sample.sample_id}",
                expected="the engine's routes, which R3 replays",
                fix="set policy.generation.sglang_cfg.enable_return_routed_experts=true",
            )
        if sample.routes.shape[2] != topk or sample.routes.shape[1] <= max(layers, default=0):
            raise UserError(
                f"has routes of shape {list(sample.routes.shape)}",
                where=f"sample {sample.sample_id}",
                expected=f"[tokens − 1, at least {max(layers, default=0) + 1} layers, {topk}]",
                fix="the engine serves another model than the trainer's",
            )
        rows.append(sample.routes[:, list(layers)].astype(dtype))
        live.append(stale_rows(sample))
    experts, is_live = layout.routes(rows, live, topk)
    return RouteTable(experts, np.flatnonzero(is_live).astype(np.int32))
