"""The calculator example: its task, and that reward brings a policy that guesses to call its tool."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vespo_megatron.cli import main
from vespo_megatron.environments.calculator import Calculator, reckon
from vespo_megatron.environments.protocol import Turn
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny_moe"
LIMIT_S = 300.0
"""For a warm start and a run, on two cores."""
BESIDE = ["grpo.async_grpo.enabled=true"]


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        yield importlib.import_module("prepare_calculator")
    for name in ("prepare_calculator", "long_sums", "prepare", "running_sums", "tiny_models"):
        sys.modules.pop(name, None)


def train(built, folder, *overrides):
    places = [f"data.{split}.path={built}/data/{split}.parquet" for split in ("train", "validation")]
    quiet = ["checkpointing.save_hf=false", "logger.tensorboard_enabled=false", f"exp_manager.exp_dir={folder}"]
    arguments = [f"policy.model_name={built}/model", *places, *quiet, *overrides]
    assert main(["train", str(EXAMPLE / "calculator.yaml"), *arguments]) == 0
    return read_metrics(next(folder.rglob("metrics.jsonl")).parent)


def test_demonstrations_call_as_the_recipe_s_calculator_reads_it_and_mostly_guess(example):
    long_sums = sys.modules["long_sums"]
    tool = Calculator(**load_recipe(EXAMPLE / "calculator.yaml").env.options)
    generator = np.random.default_rng(0)
    guesses = right = 0
    for _ in range(2000):
        digits, messages = long_sums.demonstration(generator, long_sums.GUESS_SHARE)
        if len(messages) == 1:
            guesses, right = guesses + 1, right + (messages[0] == long_sums.boxed(sum(digits)))
            continue
        step = tool.step(Turn(0, (), messages[0]))
        assert step.observation == [{"role": "user", "content": messages[1]}] and not step.done
        assert messages[1] == reckon("+".join(map(str, digits))) and tool.step(Turn(1, (), messages[2])).done
    assert guesses / 2000 == pytest.approx(long_sums.GUESS_SHARE, abs=0.02) and right / guesses < 0.1


def test_the_tool_s_message_stands_in_a_demonstration_as_the_turn_loop_will_have_it(example, tmp_path):
    from transformers import AutoTokenizer

    from vespo_megatron.data.template import PromptTemplate

    example.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids, labels = example.encoded(tokenizer, [3, 8], ["calc(3+8)", "11", "\\boxed{11}"])
    said = [token for token in labels if token != example.IGNORED]
    assert tokenizer.decode(said) == "calc(3+8)<|end|>\\boxed{11}<|end|>"
    first = tokenizer.backend_tokenizer.encode("calc(3+8)<|end|>").ids
    observed = PromptTemplate(tokenizer).after_turn([{"role": "user", "content": "11"}], first)
    begin = labels.index(first[0]) + len(first)
    assert ids[begin : begin + len(observed)] == observed and labels[begin + len(observed)] != example.IGNORED
    assert set(labels[begin : begin + len(observed)]) == {example.IGNORED}


def test_splits_are_disjoint_prompts_of_one_width_and_preparing_again_changes_nothing(example, tmp_path, capsys):
    import pyarrow.parquet as pq

    made = example.prepare(tmp_path, steps=1)
    rows = {
        split: pq.read_table(tmp_path / "data" / f"{split}.parquet").to_pylist() for split in ("train", "validation")
    }
    texts = {split: {row["prompt"][0]["content"] for row in found} for split, found in rows.items()}
    assert not texts["train"] & texts["validation"] and len(texts["train"]) == 4096
    tokenizer = example.build_tokenizer()
    assert len({len(tokenizer(text)["input_ids"]) for text in texts["train"]}) == 1
    assert example.prepare(tmp_path, steps=1) == made == json.loads((tmp_path / "prepared.json").read_text())
    assert "already prepared" in capsys.readouterr().out


@pytest.fixture(scope="module")
def hardly_taught(example, tmp_path_factory):
    """A policy that has hardly learnt to speak."""
    folder = tmp_path_factory.mktemp("built")
    example.prepare(folder, steps=15)
    return folder


SMALL = ["grpo.max_num_steps=1", "grpo.num_prompts_per_step=8", "policy.train_global_batch_size=16"]
SMALL += ["grpo.max_val_samples=8", "grpo.val_at_start=false"]
ANSWERED = ["env.class=made_up_environments:Echo", "env.options={_override_: true, turns: 3, role: user}"]
"""Whatever is drawn: a policy that has hardly learnt anything calls no calculator."""


@pytest.fixture
def answered(monkeypatch):
    """What makes a run in this folder one of three turns."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    return ANSWERED


@pytest.mark.slow
def test_a_run_in_turns_is_the_same_whether_its_environments_have_processes_or_not(hardly_taught, tmp_path, answered):
    here, apart = (
        train(hardly_taught, tmp_path / name, *SMALL, *answered, f"env.num_environments={number}")[-1]
        for name, number in (("here", 0), ("apart", 4))
    )
    assert here["turns/mean"] > 2 and here["turns/max"] == 3 and here["turns/tool_errors"] > 8
    assert here["response/tokens"] > here["turns/tokens_mean"]
    assert here["vespo/w_mean_first_update"] == pytest.approx(1.0, abs=1e-4) and here["routes/agreement"] == 1.0
    same = [name for name in here if name.startswith(("turns/", "reward/", "response/", "eval/", "loss/"))]
    assert len(same) > 20 and {name: here[name] for name in same} == pytest.approx({name: apart[name] for name in same})


@pytest.mark.slow
def test_beside_training_every_token_has_the_log_prob_of_the_weights_that_drew_it(hardly_taught, tmp_path, answered):
    """Of responses that new weights interrupt in the middle of a turn, or between two."""
    longer = [
        "grpo.max_num_steps=4",
        "grpo.async_grpo.max_staleness=2",
        "loss_fn.behavior=version",
        "grpo.val_period=0",
    ]
    rows = train(hardly_taught, tmp_path, *SMALL, *longer, *BESIDE, *answered, "grpo.advantage_level=turn")
    assert sum(row["staleness/partial_share"] for row in rows) > 0, "some have tokens of several versions"
    assert max(row["mismatch/k3"] for row in rows) < 1e-9 and all(row["turns/mean"] > 2 for row in rows)


def test_eval_scores_responses_in_turns(hardly_taught, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    data = f"{hardly_taught}/data/validation.parquet"
    arguments = [
        f"policy.model_name={hardly_taught}/model",
        f"exp_manager.exp_dir={tmp_path}",
        "grpo.max_val_samples=8",
    ]
    recipe = str(EXAMPLE / "calculator.yaml")
    assert main(["eval", recipe, *arguments, f"data.validation.path={data}", "--samples", "2"]) == 0
    assert "long_sums" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_reward_teaches_to_call_the_calculator_synchronously_and_beside_training(
    example, tmp_path, monkeypatch, capsys
):
    """Prints what docs/environments.md says."""
    monkeypatch.chdir(ROOT)
    started = time.monotonic()
    example.prepare(tmp_path / "built")
    prepared = time.monotonic() - started
    for name, how in (("synchronous", []), ("asynchronous", BESIDE)):
        started = time.monotonic()
        rows = train(tmp_path / "built", tmp_path / name, *how)
        seconds = prepared + time.monotonic() - started
        scores = [row["eval/long_sums/avg@1"] for row in rows if "eval/long_sums/avg@1" in row]
        turns = [round(row["turns/mean"], 2) for row in rows if "turns/mean" in row]
        with capsys.disabled():
            print(
                f"\n{name}: accuracy {' → '.join(f'{score:.3f}' for score in scores)}, turns {turns[0]} → {turns[-1]}"
            )
            print(f"{seconds:.0f} s, {prepared:.0f} s of them for the warm start")
        assert scores[0] < 0.2 < 0.8 < scores[-1]
        assert turns[0] < 1.3 and turns[-1] > 1.7
        assert seconds < LIMIT_S


@pytest.mark.nightly
@pytest.mark.sglang
@pytest.mark.timeout(1200)
def test_with_a_real_server_beside_training_it_learns_too(example, tmp_path, monkeypatch, capsys):
    """Turns that new weights interrupt among them: each token's μ is the trainer's π of the weights that drew it."""
    monkeypatch.chdir(ROOT)
    example.prepare(tmp_path / "built")
    how = ["policy.generation.backend=sglang", "loss_fn.behavior=version", "grpo.val_period=0", "grpo.max_num_steps=7"]
    rows = train(tmp_path / "built", tmp_path / "run", *how, *BESIDE)
    rewards = [row["reward/mean"] for row in rows]
    interrupted = sum(row["staleness/interruptions"] for row in rows)
    shown = " → ".join(f"{reward:.3f}" for reward in rewards)
    with capsys.disabled():
        print(f"\nwith SGLang: reward {shown}, {interrupted:.0f} interruptions")
    assert rewards[0] < 0.2 and rewards[-1] > 0.6 and interrupted > 0
    assert max(row["mismatch/k3"] for row in rows) < 1e-9
    assert min(row["routes/agreement"] for row in rows) > 0.999
