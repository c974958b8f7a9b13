"""A gradient does not depend on how the mini-batch is cut: micro-batches, data and context parallel, order, padding."""

import multiprocessing

import pytest
import torch

from tests.losses.batches import Batch, make_batch, select_sequences, zigzag
from tests.losses.invariance_work import configs, counted, difference, gradient, label, worker
from vespo_megatron.losses import AGGREGATIONS, MetricSums, Normalizer, PolicyLossConfig, objective_names

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[str, float]:
    """Largest difference per case, over four gloo processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    path = str(tmp_path_factory.mktemp("rendezvous") / "store")
    processes = [context.Process(target=worker, args=(rank, 4, path, results), daemon=True) for rank in range(4)]
    for process in processes:
        process.start()
    worst: dict[str, float] = {}
    try:
        for _ in processes:
            rank, found = results.get(timeout=240)
            assert isinstance(found, dict), f"rank {rank}:\n{found}"
            for case, value in found.items():
                worst[case] = max(worst.get(case, 0.0), value)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.terminate()
    return worst


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["dp1 cp2", "dp1 cp4", "dp2 cp2", "dp4 cp1"])
@pytest.mark.parametrize("what", ["gradient", "metrics"])
def test_nothing_changes_on_real_processes(differences, what, layout):
    cases = {case: value for case, value in differences.items() if case.startswith(f"{what} {layout} ")}
    for name in objective_names():
        for aggregation in AGGREGATIONS if what == "gradient" else ("token-mean", "token-sum-norm"):
            assert any(f" {name} " in case and aggregation in case for case in cases)
    limit = TOLERANCE if what == "gradient" else 1e-9
    wrong = {case: value for case, value in cases.items() if not value <= limit}
    assert not wrong, wrong


def test_some_context_parallel_rank_holds_no_token_of_a_sequence():
    batch = make_batch(11)
    for size in (2, 4):
        pieces = [zigzag(batch, rank, size) for rank in range(size)]
        assert sorted(torch.cat([at for _, at in pieces]).tolist()) == list(range(len(batch.log_probs)))
        lengths = torch.stack([piece.cu_seqlens.diff() for piece, _ in pieces])
        assert ((lengths == 0) & (batch.cu_seqlens.diff() > 0)).any()


def everything():
    return [pytest.param(config, per_token, id=label(config, per_token)) for config, per_token in configs()]


@pytest.mark.parametrize(("config", "per_token"), everything())
def test_order_and_micro_batches_and_padding_change_nothing(config: PolicyLossConfig, per_token: bool):
    batch = make_batch(11)
    normalizer = counted(Normalizer.from_lengths(batch.unmasked_lengths, 16.0), config, [(batch, None)])
    expected, metrics = gradient(batch, config, normalizer, per_token)
    for parts in ([[8, 3, 1, 0, 7, 2, 6, 4, 5]], [[4], [7, 1], [0, 2, 3], [8], [5, 6]]):
        total, sums = torch.zeros_like(expected), MetricSums()
        for numbers in parts:
            part, at = select_sequences(batch, numbers)
            found, part_metrics = gradient(part, config, normalizer, per_token)
            total[at] = found
            sums = sums + part_metrics
        torch.testing.assert_close(total, expected, rtol=0, atol=TOLERANCE)
        assert difference(sums.finalize(), metrics.finalize()) < 1e-9
    padded, at = padded_batch(batch)
    found, part_metrics = gradient(padded, config, normalizer, per_token)
    torch.testing.assert_close(found[at], expected, rtol=0, atol=TOLERANCE)
    assert float(found.abs().sum()) == pytest.approx(float(expected.abs().sum()), rel=1e-12)
    assert difference(part_metrics.finalize(), metrics.finalize()) < 1e-9


def padded_batch(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """The same sequences, each padded to the longest with masked garbage; and where the packed tokens went."""
    lengths = batch.cu_seqlens.diff()
    width = int(lengths.max()) + 2
    at = batch.segment_ids * width + batch.positions
    num = batch.num_sequences * width

    def pad(values: torch.Tensor, fill: float | bool) -> torch.Tensor:
        return torch.full((num,), fill, dtype=values.dtype).index_copy_(0, at, values)

    return (
        Batch(
            pad(batch.log_probs, -7.0),
            pad(batch.behavior_log_probs, torch.inf),
            pad(batch.old_log_probs, torch.nan),
            batch.advantages,
            torch.arange(0, num + 1, width),
            pad(batch.mask, False),
            pad(batch.token_advantages, 3.0),
            torch.arange(num) % width,
            pad(batch.router_shift, 9.0),
        ),
        at,
    )


def test_the_call_for_other_trainers_takes_the_global_token_count():
    from vespo_megatron.losses import policy_loss

    batch = make_batch(1)
    whole = batch.leaf()
    policy_loss(whole, batch.behavior_log_probs, batch.advantages, batch.cu_seqlens, mask=batch.mask).loss.backward()
    total = torch.zeros_like(whole)
    for numbers in ([0, 1, 2, 3], [4, 5, 6, 7, 8]):
        part, at = select_sequences(batch, numbers)
        leaf = part.leaf()
        output = policy_loss(
            leaf,
            part.behavior_log_probs,
            part.advantages,
            part.cu_seqlens,
            mask=part.mask,
            num_tokens=int(batch.mask.sum()),
        )
        output.loss.backward()
        total[at] = leaf.grad
    torch.testing.assert_close(total, whole.grad, rtol=0, atol=1e-14)
