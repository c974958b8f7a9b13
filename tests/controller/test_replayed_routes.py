"""R3 beside training: what is replayed of a token is what the forward that drew the next one chose, in every mode."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from forward_recorder import ForwardRecorder
from listed_prompts import ListedPrompts
from test_controller import Logger, Rewards, Tokenizer

from vespo_megatron.controller.controller import Controller
from vespo_megatron.data.layout import SequenceLayout
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.data.prompt_stream import PromptStream
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
from vespo_megatron.routing_replay.table import row_versions, slice_routes

UPDATES, LENGTH, LAYERS, TOPK, EXPERTS = 6, 48, 3, 2, 8


def weights(engine, version):
    """Those of the engine, moved."""
    generator = torch.Generator().manual_seed(version)
    return [
        (name, tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator))
        for name, tensor in engine._views.items()
    ]


@pytest.fixture(params=["abort_and_continue", "in_place", "drain"])
def drawn(request, tiny_recipe, tiny_qwen3_moe_folder):
    """(mode, samples that an asynchronous run would train on, the recorder)."""
    recipe = tiny_recipe.with_values(
        {
            "grpo.async_grpo.enabled": True,
            "grpo.async_grpo.max_staleness": 2.0,
            "grpo.async_grpo.on_weight_update": request.param,
            "grpo.num_prompts_per_step": 2,
            "grpo.num_generations_per_prompt": 2,
            "policy.router_replay.mode": "R3",
            "policy.generation.backend": "in_process",
            "policy.generation.max_new_tokens": LENGTH,
        }
    )
    engine = InProcessEngine(tiny_qwen3_moe_folder, context_length=128)
    recorder, at_speed = ForwardRecorder(engine), engine._between_steps
    engine._between_steps = lambda: time.sleep(0.001) is None and at_speed()
    prompts = PromptStream(ListedPrompts([PromptRecord(f"p{i}", (5, 6 + i), "s", "4") for i in range(32)]), seed=1)
    scores = Rewards(lambda n: float(n % 2))
    controller = Controller(recipe, engine, Tokenizer(), prompts, [], scores, Logger())
    samples = []
    for version in range(1, UPDATES + 1):
        samples += controller.collect(version).batch.samples
        time.sleep(0.02)
        controller.update_weights(iter(weights(engine, version)), version)
    controller.close()
    return request.param, samples, recorder


def test_every_replayed_row_is_that_of_the_forward_that_drew_the_token_after_it(drawn):
    mode, samples, recorder = drawn
    partial, distinct = 0, 0
    for sample in samples:
        layout = SequenceLayout.of_samples([sample])
        table = slice_routes([sample], layout, range(LAYERS), topk=TOPK, num_experts=EXPERTS)
        assert table.live_rows.tolist() == [sample.num_tokens - 1], "the last token alone is the router's"
        partial += len(set(sample.weight_versions.tolist())) > 1
        for row, version in enumerate(row_versions(sample)):
            forwards = recorder.seen[tuple(sample.token_ids[: row + 1].tolist())]
            replayed = np.sort(table.experts[row], -1)
            own = [np.array_equal(chosen, replayed) for drew, chosen in forwards if drew == version]
            assert any(own), f"{sample.sample_id}, row {row}"
            distinct += any(not np.array_equal(chosen, replayed) for drew, chosen in forwards if drew != version)
    assert (partial == 0) == (mode == "drain")
    assert mode != "abort_and_continue" or distinct > 0, "no later forward of a token chose others"
