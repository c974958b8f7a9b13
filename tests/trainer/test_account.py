"""The account of log π/μ: against transformers' own scores, with causes that dials make, on one process and two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vespo_megatron.cli import main
from vespo_megatron.launch import launcher
from vespo_megatron.study.account_page import part_rows, read_account
from vespo_megatron.trainer.account import PARTS

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny_moe" / "build" / "model"
ENGINES = 1e-5
"""Two programs in float32, one token."""
RUNS = {
    "control": ("in_process", []),
    "flips": ("in_process", ["policy.generation.mismatch.route_flip=0.2"]),
    "int4": ("in_process", ["policy.generation.mismatch.weights=int4", "--updates"]),
    "int4, both": ("in_process", ["policy.quantization.scheme=int4", "policy.quantization.where=both"]),
    "int4, TP2·EP2": (
        "vespo",
        ["policy.generation.backend=in_process", "policy.generation.mismatch.weights=int4", "--updates"],
    ),
    "int4, SGLang": ("vespo", ["policy.generation.mismatch.weights=int4", "--updates"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Name of a run → (its folder, the lines of its account, what it printed); each is made once."""
    made = {}

    def make(name, capfd):
        if name not in made:
            recipe, options = RUNS[name]
            folder = tmp_path_factory.mktemp("runs")
            settings = [f"exp_manager.exp_dir={folder}", "exp_manager.version=one", "grpo.num_prompts_per_step=8"]
            settings += ["logger.tensorboard_enabled=false"]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(ROOT)
                assert (
                    main(["mismatch", f"examples/tiny_moe/{recipe}.yaml", "--batches", "1", *settings, *options]) == 0
                )
            run_dir = next(folder.rglob("one"))
            lines = [json.loads(line) for line in (run_dir / "account.jsonl").read_text().splitlines()]
            made[name] = run_dir, lines, capfd.readouterr().out
        return made[name]

    return make


def sizes(lines):
    """The largest size of each part."""
    return {part: max(max(map(abs, line["parts"][part])) for line in lines) for part in PARTS}


def distances(lines):
    """Layer → relative distances of the two programs' outputs, token by token."""
    found = {}
    for line in lines:
        for layer, values in line["hidden_distances"].items():
            assert len(values) == len(line["response_ids"])
            found.setdefault(layer, []).extend(values)
    assert list(found) == ["1", "2", "3"]
    return found


def log_probs(model, line):
    """transformers' log-probs of a response."""
    ids = torch.tensor(line["prompt_ids"] + line["response_ids"])
    with torch.no_grad():
        scores = model(ids[None]).logits[0].double().log_softmax(-1)
    rows = torch.arange(len(line["prompt_ids"]) - 1, len(ids) - 1)
    return scores[rows, ids[rows + 1]].numpy()


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["control", "flips"])
def test_the_parts_add_up_to_what_transformers_finds(name, run, model, capfd):
    _, lines, printed = run(name, capfd)
    assert len(lines) == 64
    for line in lines[:24]:
        total = np.sum([line["parts"][part] for part in PARTS], axis=0)
        np.testing.assert_allclose(total, log_probs(model, line) - line["behavior_log_probs"], atol=2e-5)
    assert "| routing |" in printed and "account.html" in printed


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["control", "int4, both"])
def test_without_a_cause_there_is_nothing_but_the_rest(name, run, capfd):
    _, lines, _ = run(name, capfd)
    assert max(sizes(lines).values()) < ENGINES and not any(any(line["differing_layers"]) for line in lines)
    for layer, values in distances(lines).items():
        assert 0 < max(values) < (ENGINES if name == "control" else 1), layer


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_flipped_routes_do_is_routing(run, capfd):
    _, lines, _ = run("flips", capfd)
    found = sizes(lines)
    assert found["precision"] == found["staleness"] == 0 and found["rest"] < ENGINES < 0.05 < found["routing"]
    by_layer = distances(lines)
    flipped = [1 in layers for line in lines for layers in line["differing_layers"]]
    for far, differs in zip(by_layer["1"], flipped, strict=True):
        assert differs or far < 0.5, "the first layer's own token and what it attends to"
    assert np.mean(by_layer["3"]) > np.mean(by_layer["1"]) > 0.01, "it adds up from layer to layer"
    differ = [bool(layers) for line in lines for layers in line["differing_layers"]]
    assert 0.3 < np.mean(differ) < 0.8, "three layers, each flipped one time in five, and what follows from it"


@pytest.mark.slow
@pytest.mark.timeout(360)
@pytest.mark.parametrize("name", ["int4", "int4, TP2·EP2", pytest.param("int4, SGLang", marks=pytest.mark.nightly)])
def test_rounded_weights_and_updates_are_told_apart_whatever_the_layout_and_the_engine(name, run, capfd):
    _, lines, _ = run(name, capfd)
    found = sizes(lines)
    assert found["rest"] < (0.02 if "SGLang" in name else ENGINES), "the trainer had the engine's weights and routes"
    assert min(found["precision"], found["routing"], found["staleness"]) > 0.05
    if name == "int4, TP2·EP2":
        _, alone, _ = run("int4", capfd)
        for one, other in zip(alone, lines, strict=True):
            assert one["response_ids"] == other["response_ids"]
            assert one["differing_layers"] == other["differing_layers"]
            for layer, values in one["hidden_distances"].items():
                np.testing.assert_allclose(values, other["hidden_distances"][layer], atol=1e-4)
            for part in PARTS:
                np.testing.assert_allclose(one["parts"][part], other["parts"][part], atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_page_shows_the_worst_tokens_first_and_needs_no_network(run, capfd):
    run_dir, lines, _ = run("flips", capfd)
    page = (run_dir / "account.html").read_text()
    responses = read_account(run_dir)
    worst = max((token for response in responses for token in response.tokens), key=lambda token: abs(token.total))
    assert page.index(worst.where) < page.index("<h2>Responses</h2>")
    assert "src=" not in page and "href=" not in page and worst.hover.split(" = ")[0] in page
    assert sum(row.share for row in part_rows(responses)) == pytest.approx(1.0)
    assert len(responses) == len(lines)


def test_a_run_can_be_measured_instead_of_the_recipes_model(monkeypatch):
    told = []
    monkeypatch.setattr(launcher, "train", lambda recipe, overrides, work: told.extend([*overrides, work]))
    recipe = str(ROOT / "examples/tiny_moe/in_process.yaml")
    assert main(["mismatch", recipe, "--run", str(MODEL), "grpo.seed=3", "--updates"]) == 0
    assert told == ["grpo.seed=3", f"policy.model_name={MODEL}", "grpo.max_num_steps=3", "mismatch-updates"]
    assert main(["mismatch", recipe, "--run", str(ROOT)]) == 2
