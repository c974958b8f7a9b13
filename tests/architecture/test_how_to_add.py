"""Each recipe under "How to add" of docs/architecture.md, done. A transport is added in test_weight_transports.py."""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import torch
from model_config import CONFIG, write_config

from tests.losses.batches import make_batch
from tests.rewards.scoring import score
from vespo_megatron.cli import main
from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.environments import EnvironmentPool, Turn
from vespo_megatron.errors import UserError
from vespo_megatron.losses import policy_loss, registry
from vespo_megatron.losses.registry import objective
from vespo_megatron.metrics import table
from vespo_megatron.metrics.merging import merge
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.recipe.schema import EnvConfig, SGLangConfig
from vespo_megatron.recipe.schema.base import Section, key
from vespo_megatron.run.records import RunLogger

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_page_has_a_recipe_for_each_of_the_seven():
    assert re.findall(r"^\*\*An? ([a-z ]+)\.\*\*", PAGE.partition("## How to add")[2], re.MULTILINE) == [
        "objective",
        "reward",
        "environment",
        "transport of weights",
        "model",
        "metric",
        "recipe key",
    ]


# ---- an objective ------------------------------------------------------------------------------------------------


def half_way(ratios, *, power: float = 0.5):
    """φ(W) = W^power: a sequence objective."""
    return ratios.sequence_log_ratio.exp() ** power


half_way.level = "sequence"


def check_is_half_way(name):
    batch = make_batch()
    log_probs = batch.leaf()
    found = policy_loss(
        log_probs,
        batch.behavior_log_probs,
        batch.advantages,
        batch.cu_seqlens,
        mask=batch.mask,
        name=name,
        power=0.25,
    )
    found.loss.backward()
    log_ratio = torch.where(batch.mask, batch.log_probs - batch.behavior_log_probs, 0.0).clamp(-20, 20)
    log_w = torch.zeros(batch.num_sequences, dtype=log_ratio.dtype).index_add_(0, batch.segment_ids, log_ratio)
    weight = (0.25 * log_w).exp() * batch.advantages
    expected = torch.where(batch.mask, -weight[batch.segment_ids], 0.0) / batch.mask.sum()
    torch.testing.assert_close(log_probs.grad, expected)


def test_an_objective_by_decorator_and_by_path(monkeypatch):
    monkeypatch.setattr(registry, "_OBJECTIVES", dict(registry._OBJECTIVES))
    objective("half_way", level="sequence", aggregation="seq-mean-token-sum", source="made up")(half_way)
    check_is_half_way("half_way")
    check_is_half_way(f"{__name__}:half_way")


# ---- a reward ----------------------------------------------------------------------------------------------------


def length_reward(data_source, solution_str, ground_truth, extra_info):
    """Its length, and a part of its own."""
    return {"score": float(len(solution_str)), "vowels": float(sum(solution_str.count(letter) for letter in "aeiou"))}


def test_a_reward_by_path_and_its_parts_are_metrics():
    first, second = score(EnvConfig(reward=f"{__name__}:length_reward", num_workers=1), "aeo", "x")
    assert (first.reward, first.parts) == (3.0, {"vowels": 3.0}) and second.reward == 1.0
    assert table.metric("reward/vowels").merge is table.WHOLE


# ---- an environment --------------------------------------------------------------------------------------------


class Guess:
    """Says whether a turn is longer than its prompt."""

    def __init__(self, longer="longer"):
        self.longer = longer

    def reset(self, record):
        self.asked = len(record.prompt_ids)

    async def step(self, turn):
        return (self.longer if len(turn.token_ids) > self.asked else "shorter"), 0.25, False


def test_an_environment_by_path_and_its_options():
    env = EnvConfig(**{"class": f"{__name__}:Guess", "options": {"longer": "more"}, "num_environments": 1})
    pool = EnvironmentPool(env)

    async def play():
        async with pool.episodes(1) as (episode,):
            assert await episode.reset(PromptRecord("p", (1, 2), "s", "4")) is None
            return await episode.step(Turn(0, (3, 4, 5), "text"))

    try:
        assert asyncio.run(play()) == ("more", 0.25, False, 0)
    finally:
        pool.close()


# ---- a transport -------------------------------------------------------------------------------------------------


def test_transports_are_the_choices_of_their_key():
    from vespo_megatron.rollout_sglang.weight_sync.factory import TRANSPORTS

    assert tuple(TRANSPORTS) == get_args(SGLangConfig.model_fields["weight_transport"].annotation)


# ---- a model -----------------------------------------------------------------------------------------------------


def test_another_qwen3_moe_is_another_config(tmp_path):
    """The tensors that its mapping expects are those transformers has, whatever the sizes and the dense layers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from vespo_megatron.megatron.hf_mapping import expected_tensors

    changes = {"num_experts": 3, "head_dim": 24, "mlp_only_layers": [1], "vocab_size": 77, "tie_word_embeddings": True}
    write_config(tmp_path, **changes)
    config = Qwen3MoeConfig(**{name: value for name, value in (CONFIG | changes).items() if name != "model_type"})
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    names = {re.sub(r"\.experts\..*", ".experts", name) for name in model.state_dict() if name != "lm_head.weight"}
    expected = expected_tensors(read_shape(tmp_path))
    assert {re.sub(r"\.experts\..*", ".experts", name) for name in expected} - {"lm_head.weight"} == names
    for name, tensor in model.state_dict().items():
        assert name not in expected or tuple(tensor.shape) == expected[name]


def test_a_published_model_is_planned_without_its_folder(monkeypatch, capsys):
    from vespo_megatron.plan import published

    smaller = replace(
        published.PUBLISHED["Qwen3-30B-A3B"], num_hidden_layers=24, is_moe_layer=(True,) * 24, num_experts=64
    )
    monkeypatch.setitem(published.PUBLISHED, "Half-8B", smaller)
    recipe = str(ROOT / "examples/qwen3_30b_a3b/grid/vespo_n8.yaml")
    main(["plan", recipe, "policy.model_name=/models/Half-8B-Base", "--gpu", "h100-80"])
    assert "8.3B parameters" in capsys.readouterr().out


# ---- a metric ----------------------------------------------------------------------------------------------------


def test_a_metric_is_a_row(tmp_path, monkeypatch):
    row = table.Metric("reward_model/seconds_max", "Longest call of the reward model.", "s", table.MAX)
    with RunLogger(tmp_path, total_steps=1, tensorboard=False, progress=False) as logger:
        with pytest.raises(UserError, match="is no metric"):
            logger.log_step(1, {row.name: 2.0})
        monkeypatch.setitem(table.METRICS, row.name, row)
        logger.log_step(1, {row.name: 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())[row.name] == 2.0
    assert merge(row.name, [1.0, 3.0, 2.0]) == 3.0


# ---- a recipe key ------------------------------------------------------------------------------------------------


class Cooling(Section):
    """Keys of a made-up section."""

    rate: float = key(0.5, "Share that is kept each step.", gt=0, le=1, ours=True)


def test_a_recipe_key_is_a_line(monkeypatch, tmp_path):
    """Its error, its documentation and its place in the JSON Schema come of that line."""
    from vespo_megatron.recipe.schema.describe import expected_text, keys_of

    ((name, field),) = keys_of(Cooling)
    assert name == "rate" and field.description.startswith("Share") and "1" in expected_text(field)
    assert Cooling().with_values({"rate": "0.25"}).rate == 0.25
    with pytest.raises(UserError, match=r"rate.*\n?.*is 1\.5|1\.5"):
        Cooling().with_values({"rate": 1.5})
    with pytest.raises(UserError, match="rate"):
        Cooling().with_values({"rte": 1.0})
    schema = Cooling.model_json_schema()
    jsonschema.validate({"rate": 1.0}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"rate": math.pi}, schema)
