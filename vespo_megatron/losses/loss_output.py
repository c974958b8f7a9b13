"""Output of the policy loss: this rank's share of it, metrics, and which sequences hold numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vespo_megatron.errors import UserError
from vespo_megatron.losses.config import PolicyLossConfig
from vespo_megatron.losses.lazy import lazy
from vespo_megatron.losses.metrics import MetricSums
from vespo_megatron.losses.one_line import OneLine


@dataclass(repr=False)
class LossOutput(OneLine):
    """`loss` is this rank's share: shares of all ranks and micro-batches sum to the loss of the mini-batch."""

    loss: Tensor
    """[]: differentiable; −Σ φ·A·log π over this rank's tokens, over the global denominator, plus KL and entropy."""
    metrics: MetricSums
    bad_sequences: Tensor
    """bool [num_sequences], the same on every context parallel rank: a number in them is not finite."""
    sequence_log_ratio: Tensor
    """[num_sequences]: S = log W, the same on every context parallel rank."""
    config: PolicyLossConfig
    _coefficient: Callable[[], Tensor] = field(repr=False)

    @lazy
    def coefficient(self) -> Tensor:
        """[tokens]: φ with corrections, 0 where masked or dropped, detached."""
        return self._coefficient()

    def raise_if_bad(self, sample_ids: Sequence[str] | None = None) -> None:
        """Under `on_bad_sample: error`, raise for sequences with numbers that are not finite. Waits for the device.

        Raises:
            UserError: names the samples by `sample_ids`, or by their place in the micro-batch.
        """
        if self.config.on_bad_sample != "error":
            return
        bad = self.bad_sequences.nonzero().flatten().tolist()
        if bad:
            names = ", ".join(str(sample_ids[i]) if sample_ids is not None else f"sequence {i}" for i in bad)
            raise UserError(
                "has a log-prob or an advantage that is not finite",
                where=names if sample_ids is None else f"sample {names}",
                expected="finite numbers from the engine and the trainer",
                fix="look at the sample; loss_fn.on_bad_sample=drop goes on without it",
            )
