"""Advantages of single turns reach the tokens of their turn on every layout, and no other token."""

from __future__ import annotations

import layout_work
import numpy as np
import pytest
from test_layout_parity import LAYOUTS, worst

from vespo_megatron.losses import Normalizer
from vespo_megatron.recipe.schema import LossConfig
from vespo_megatron.trainer.objective import Objective


def batch_in_turns():
    """The ragged batch, its masked tokens observed, so that what stands between them are turns of their own."""
    generator = np.random.default_rng(2)
    batch = layout_work.ragged_batch()
    for sample in batch.samples:
        drawn = sample.loss_mask
        number = np.cumsum(np.diff(drawn.astype(int), prepend=0) == 1) - 1
        sample.turns = np.where(drawn, number, -1)
        sample.turn_advantages = generator.normal(0, 1, max(0, int(sample.turns.max()) + 1)).astype(np.float32)
    assert max(len(sample.turn_advantages) for sample in batch.samples) >= 3
    return batch


def loss_and_gradients(folder, layout, store, name):
    policy = layout_work.build(folder, layout, store)
    batch = batch_in_turns()
    normalizer = Normalizer.from_lengths([int(sample.loss_mask.sum()) for sample in batch.samples])
    of_micro_batch = Objective(LossConfig(name=name), "rollout").loss_function(normalizer)

    def loss(log_probs, entropies, micro_batch):
        value, _ = of_micro_batch(log_probs, entropies, micro_batch)
        return value, value.detach().clone()

    return layout_work.gradients(policy, layout_work.micro_batches(policy, batch), loss)


@pytest.fixture(scope="module")
def one_process(workers, checkpoint):
    return {
        name: workers.run(loss_and_gradients, 1, folder=checkpoint[0], layout={}, name=name)[0]
        for name in ("reinforce", "vespo")
    }


def test_the_loss_is_the_sum_of_every_token_s_own_advantage(workers, checkpoint, one_process):
    """−Σ (A of the response + A of the turn)·log π over the drawn tokens, by hand, for φ = 1."""
    batch = batch_in_turns()
    log_probs = {}
    for layout, ids, output in workers.run(layout_work.log_probs, 1, folder=checkpoint[0], layout={})[0]:
        log_probs |= dict(zip(ids, layout.merge_response_values([output[0]]), strict=True))
    total, tokens = 0.0, 0
    for sample, advantage in zip(batch.samples, batch.advantages, strict=True):
        for place, turn in enumerate(sample.turns):
            if turn >= 0:
                total -= (float(advantage) + float(sample.turn_advantages[turn])) * log_probs[sample.sample_id][place]
                tokens += 1
    assert one_process["reinforce"]["loss"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("name", ["reinforce", "vespo"])
@pytest.mark.parametrize("layout", ["dp2", "cp2", "tp2_cp2"])
def test_every_layout_has_the_gradients_of_one_process(layout, name, workers, checkpoint, one_process):
    world_size, sizes = LAYOUTS[layout]
    answers = workers.run(loss_and_gradients, world_size, folder=checkpoint[0], layout=sizes, name=name)
    assert worst(answers[0]["gradients"], one_process[name]["gradients"]) <= 1e-4
