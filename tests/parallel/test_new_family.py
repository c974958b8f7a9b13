"""A family that this package does not know, added by one file of somebody else's: trained and generated with."""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys

import layout_work
import numpy as np
import pytest
import torch

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine

ONE_FILE = '''
"""Mistral 7B without its sliding window."""

from vespo_megatron.families.decoder import decoder_shape
from vespo_megatron.families.family import Family


def read(keys):
    keys.refuse(keys.config.get("sliding_window"), "uses a sliding window", "full attention")
    return decoder_shape(keys, architecture="MistralForCausalLM", qk_norm="none", max_position_embeddings=131_072)


FAMILY = Family(read, ties_head_when_served=True)
'''
METADATA = "Metadata-Version: 2.1\nName: somebodys-models\nVersion: 1\n"


def installed_at(path: str, folder: str, store: str):
    """In a worker that has the package: log-probs of `layout_work`'s batch."""
    if path not in sys.path:
        sys.path.insert(0, path)
    importlib.invalidate_caches()
    return layout_work.log_probs(folder, {}, store)


@pytest.fixture
def package(tmp_path):
    """What `pip install` of one file and an entry point leaves in site-packages."""
    site = tmp_path / "site"
    (site / "somebodys_models-1.dist-info").mkdir(parents=True)
    (site / "somebodys_mistral.py").write_text(ONE_FILE)
    (site / "somebodys_models-1.dist-info" / "METADATA").write_text(METADATA)
    (site / "somebodys_models-1.dist-info" / "entry_points.txt").write_text(
        "[vespo_megatron.families]\nmistral = somebodys_mistral:FAMILY\n"
    )
    return str(site)


@pytest.fixture
def mistral(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=126,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        sliding_window=None,
    )
    model = MistralForCausalLM(config).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.ndim > 1 else parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "mistral")
    return str(tmp_path / "mistral"), model


def test_one_file_is_a_family(package, mistral, workers, monkeypatch):
    folder, model = mistral
    with pytest.raises(UserError, match="has model_type 'mistral'"):
        read_shape(folder)
    monkeypatch.syspath_prepend(package)
    assert read_shape(folder).architecture == "MistralForCausalLM"

    samples = {sample.sample_id: sample for sample in layout_work.ragged_batch().samples}
    (shards,) = workers.run(installed_at, 1, path=package, folder=folder)
    for layout, sample_ids, output in shards:
        for sample_id, found in zip(sample_ids, layout.merge_response_values([output[0]]), strict=False):
            expected = log_probs(model, samples[sample_id].token_ids, samples[sample_id].response_ids, 0.9)
            np.testing.assert_allclose(found, expected, atol=1e-4)

    engine = InProcessEngine(folder)
    try:
        (result,) = asyncio.run(engine.generate([GenerationRequest("r", (3, 4, 5), SamplingParams(9), seed=1)]))
    finally:
        engine.close()
    expected = log_probs(model, np.array([3, 4, 5, *result.output_ids]), result.output_ids, 1.0)
    np.testing.assert_allclose(result.behavior_log_probs, expected, atol=1e-5)


def log_probs(model, tokens, response, temperature: float) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None]).logits[0, -len(response) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.from_numpy(np.asarray(response))[:, None])[:, 0].numpy()
