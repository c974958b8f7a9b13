"""`vespo-megatron predict` and the warning of `recipe check`: what they say of recipes, runs and mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vespo_megatron.cli import main
from vespo_megatron.losses.expected_mismatch import PUBLISHED_K3, PUBLISHED_K3_R3, expected_mismatch, scaled_away
from vespo_megatron.losses.predicted import Divergence, predict
from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.run.run_directory import RECIPE_FILE

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "qwen3_30b_a3b").rglob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("policy: {model_name: some/model, generation: {max_new_tokens: 4096}}\n")
    return str(path)


def of_30b(path, *overrides):
    return load_recipe(path, ["policy.model_name=some/model", *overrides])


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if "---" not in line]


def make_run(folder, behavior, steps, **overrides):
    folder.mkdir()
    recipe = of_30b(EXAMPLES / "qwen3_30b_a3b/objectives/vespo.yaml", f"loss_fn.behavior={behavior}")
    save_recipe(recipe.with_values(overrides), folder / RECIPE_FILE)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, **step}) + "\n" for n, step in enumerate(steps, 1))
    )
    return folder


STEP = {
    "mismatch/k3": 2e-3,
    "mismatch/k2": 2.1e-3,
    "mismatch/k3_first_update": 1.5e-3,
    "response/length_mean": 1000.0,
    "response/length_std": 400.0,
    "response/length_max": 3000,
    "vespo/phi_mean_positive": 0.4,
    "vespo/phi_mean_negative": 0.2,
}


# ---- the command -------------------------------------------------------------------------------------------------


def test_the_known_table_comes_out_of_a_recipe(recipe, capsys):
    assert main(["predict", recipe, "--k3", "5e-4", "--tokens", "500,1000,2000,6000"]) == 0
    printed = capsys.readouterr().out
    found = [row[1:5] for row in rows(printed) if row[0] == "rollout"]
    assert [row[:2] for row in found] == [["500", "0.826"], ["1000", "0.704"], ["2000", "0.535"], ["6000", "0.228"]]
    assert [row[3] for row in found] == ["0.607", "0.368", "0.135", "0.00248"]
    assert all(row[2:4] == ["1.000", "1.000"] for row in rows(printed) if row[0] == "recompute, version")


def test_without_a_k3_it_is_what_is_published_or_what_the_recipe_says(recipe, capsys):
    assert main(["predict", recipe]) == 0
    printed = capsys.readouterr().out
    assert f"k3 = {PUBLISHED_K3:g} per token (published for Qwen3-30B-A3B, arXiv 2510.11370)" in printed
    assert [row[1] for row in rows(printed)[1:6]] == ["256", "512", "1024", "2048", "4096"]
    assert main(["predict", recipe, "loss_fn.expected_k3=1e-4"]) == 0
    assert "k3 = 0.0001 per token (loss_fn.expected_k3)" in capsys.readouterr().out


def test_staleness_is_what_recompute_leaves_in_w(recipe, capsys):
    assert main(["predict", recipe, "--k3", "1e-3", "--staleness-k3", "5e-4", "--tokens", "1000"]) == 0
    first, second = rows(capsys.readouterr().out)[1:]
    assert second[2] == "0.704" and second[4] == "0.368"
    assert first[2] == f"{predict('vespo', Divergence(1.5e-3), 1000).phi_positive:.3f}"


def test_any_objective_with_the_recipe_s_hyperparameters(recipe, capsys):
    assert main(["predict", recipe, "loss_fn.name=decoupled_ppo", "--k3", "1e-3", "--tokens", "9"]) == 0
    assert {row[0] for row in rows(capsys.readouterr().out)} == {"W", "recompute, version"}
    overrides = ["loss_fn.name=dppo_tv", "loss_fn.behavior=recompute"]
    assert main(["predict", recipe, *overrides, "--k3", "1e-2", "--tokens", "9"]) == 0
    rollout, recompute = rows(capsys.readouterr().out)[1:]
    assert rollout[1:] == recompute[1:], "DPPO compares with μ whatever the behaviour"
    both = ["loss_fn.hyperparameters={normalization: sqrt, opsm_delta: 0.1}", "loss_fn.correction={veto: 1e-4}"]
    assert main(["predict", recipe, *both, "--tokens", "4000"]) == 0
    printed = capsys.readouterr().out
    assert "loss_fn.correction, loss_fn.hyperparameters.opsm_delta left out" in printed
    assert float(rows(printed)[1][2]) > 0.9


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_picture_is_what_its_name_says(recipe, tmp_path, capsys, suffix, magic):
    output = tmp_path / "deep" / f"phi{suffix}"
    assert main(["predict", recipe, "--out", str(output)]) == 0
    assert output.read_bytes().startswith(magic) and f"picture: {output}" in capsys.readouterr().out


# ---- from what was measured --------------------------------------------------------------------------------------


def test_a_rollout_run_s_first_updates_tell_the_engines_from_staleness(recipe, tmp_path, capsys):
    run = make_run(tmp_path / "run", "rollout", [STEP, STEP | {"mismatch/k3": None}, STEP])
    assert main(["predict", recipe, "--from", str(run), "--tokens", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "k3 = 0.0015, k2 = 0.0016 per token" in printed and "mean of 2 steps with behavior rollout" in printed
    assert "staleness: k3 = 0.0005 per token (measured)" in printed
    assert ["rollout", "1000 ± 400"] in [row[:2] for row in rows(printed)]
    check = {row[0]: row[1:] for row in rows(printed)[-2:]}
    assert check["φ, A ≥ 0"][0] == "0.400" and check["φ, A < 0"][0] == "0.200"
    likely = [predict("vespo", Divergence(2e-3), length).phi_positive for length in (500, 1000, 1500)]
    assert float(check["φ, A ≥ 0"][1]) == pytest.approx(sum(likely) / 3, abs=0.04)


@pytest.mark.parametrize("behavior", ["recompute", "version"])
def test_the_mismatch_of_a_run_with_pi_old_is_the_engines_alone(recipe, tmp_path, capsys, behavior):
    run = make_run(tmp_path / "run", behavior, [STEP | {"staleness/k3": 1e-4}] * 3)
    assert main(["predict", recipe, "--from", str(run), "--tokens", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "k3 = 0.002, k2 = 0.0021 per token" in printed and "staleness: k3 = 0.0001 per token" in printed
    assert rows(printed)[3][:2] == ["recompute, version", "1000"]
    assert rows(printed)[3][2] == f"{predict('vespo', Divergence(1e-4), 1000).phi_positive:.3f}"
    assert main(["predict", recipe, "--from", str(run), "--staleness-k3", "7e-4"]) == 0
    assert "staleness: k3 = 0.0007 per token (as given)" in capsys.readouterr().out


def test_what_a_run_did_not_measure_is_said(recipe, tmp_path, capsys):
    old = make_run(tmp_path / "old", "recompute", [STEP])
    assert main(["predict", recipe, "--from", str(old)]) == 0
    assert "note: it has no staleness/k3" in capsys.readouterr().out
    stale = make_run(tmp_path / "stale", "rollout", [STEP], **{"grpo.async_grpo.enabled": True})
    assert main(["predict", recipe, "--from", str(stale)]) == 0
    assert "first updates are stale already" in capsys.readouterr().out


def test_one_token_that_gives_an_impossible_k2_leaves_k3(recipe, tmp_path, capsys):
    run = make_run(
        tmp_path / "run", "recompute", [STEP | {"mismatch/k3": 0.5, "mismatch/k2": 0.1, "staleness/k3": 0.0}]
    )
    assert main(["predict", recipe, "--from", str(run)]) == 0
    assert "engine and trainer: k3 = 0.5 per token" in capsys.readouterr().out


def test_the_table_of_mismatch_gives_the_mode_that_the_recipe_replays(recipe, tmp_path, capsys):
    values = {"none": 2e-3, "R3": 5e-4}
    table = [{"batch": 1, "replay": mode, "mismatch/k3": k3, "mismatch/k2": k3} for mode, k3 in values.items()]
    (tmp_path / "mismatch.json").write_text(json.dumps(table))
    for overrides, k3 in (([], "0.002"), (["policy.router_replay.mode=R3"], "0.0005")):
        assert main(["predict", recipe, *overrides, "--from", str(tmp_path)]) == 0
        assert f"engine and trainer: k3 = {k3}" in capsys.readouterr().out


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k3", "1", "--k2", "0.2"], "k2: is 0.2 beside k3"),
        (["--k2", "1e-3"], "--k2: is given alone"),
        (["--k3", "1e-3", "--from", "."], "--k3 and --from: both are given"),
        (["--from", "absent"], "absent: is no folder"),
        (["--from", "."], r"\.: has neither a finished step in metrics\.jsonl nor mismatch\.json"),
        (["--out", "phi.bmp"], r"--out: is phi\.bmp"),
        (["--out", "phi"], "--out: is phi"),
        (["loss_fn.name=vesppo"], "the nearest is 'vespo'"),
        (["loss_fn.hyperparameters={c9: 1}"], "c9"),
    ],
)
def test_a_mistake_is_one_clear_error(recipe, tmp_path, monkeypatch, capsys, options, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["predict", recipe, *options]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and captured.out == "" and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metrics.jsonl": '{"step": 1, "reward/mean": 1}\n'}, r"no step has mismatch/k3 among 1"),
        ({"metrics.jsonl": '{"step": 1, "mismatch/k3": 1e-3}\n'}, r"has no recipe\.yaml"),
        ({"metrics.jsonl": ""}, "has neither a finished step"),
        ({"mismatch.json": "[]"}, r"mismatch\.json: is damaged"),
        ({"mismatch.json": "{"}, r"mismatch\.json: is damaged"),
    ],
)
def test_a_run_that_measured_nothing_is_refused(recipe, tmp_path, capsys, files, message):
    run = tmp_path / "run"
    run.mkdir()
    for name, text in files.items():
        (run / name).write_text(text)
    assert main(["predict", recipe, "--from", str(run)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["predict"], ["predict", "--k3", "1e-3"], ["predict", "a.yaml", "--k3", "x"]])
def test_a_recipe_and_numbers_are_asked_for(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage: vespo-megatron predict" in capsys.readouterr().err
    assert main(["predict", "absent.yaml"]) == 2


# ---- the warning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_of_the_30b_recipes_those_are_warned_of_that_scale_their_gradient_away(path):
    """Sequence-level objectives against the engine's log-probs: of the reference too, where it is asynchronous."""
    recipe = of_30b(path)
    warned = scaled_away(recipe) is not None
    assert warned == (recipe.behavior == "rollout" and recipe.loss_fn.name in ("vespo", "gspo"))
    assert warned == (path.parent.name == "async" and path.stem in ("async", "vespo", "gspo"))


def test_the_warning_says_where_its_number_is_from_and_what_to_do():
    recipe = of_30b(EXAMPLES / "qwen3_30b_a3b/async/vespo.yaml")
    text = str(scaled_away(recipe))
    assert "loss_fn.behavior: is rollout" in text and "k3 = 0.0015 per token" in text and "arXiv 2510.11370" in text
    assert "15360 tokens have a mean φ of 0.00 where A ≥ 0" in text and "version" in text and "expected_k3" in text
    assert "recompute" in str(
        scaled_away(of_30b(EXAMPLES / "qwen3_30b_a3b/objectives/vespo.yaml", "loss_fn.behavior=rollout"))
    )


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, True),
        ({"loss_fn.behavior": "recompute"}, False),
        ({"loss_fn.behavior": "auto"}, False),
        ({"loss_fn.behavior": "version"}, False),
        ({"loss_fn.name": "grpo"}, False),
        ({"loss_fn.name": "topr", "policy.generation.max_new_tokens": 2000}, True),
        ({"loss_fn.hyperparameters": {"normalization": "linear"}}, False),
        ({"loss_fn.expected_k3": 1e-6}, False),
        ({"policy.generation.max_new_tokens": 300}, False),
        ({"policy.router_replay.mode": "R3", "policy.generation.max_new_tokens": 600}, False),
        ({"policy.generation.max_new_tokens": 600}, True),
        ({"policy.precision": "float32"}, False),
        ({"policy.precision": "float32", "policy.generation.backend": "in_process"}, False),
        ({"policy.precision": "float32", "policy.generation.sglang_cfg.dtype": "bfloat16"}, True),
    ],
)
def test_what_changes_the_ratio_changes_the_warning(change, warned):
    recipe = of_30b(EXAMPLES / "qwen3_30b_a3b/objectives/vespo.yaml", "loss_fn.behavior=rollout")
    assert (scaled_away(recipe.with_values(change)) is not None) == warned


def test_with_replayed_routes_half_the_mismatch_is_expected():
    recipe = of_30b(EXAMPLES / "qwen3_30b_a3b/mismatch/vespo_r3.yaml")
    assert expected_mismatch(recipe).k3 == PUBLISHED_K3_R3


@pytest.mark.parametrize("name", ["tiny_moe/vespo", "tiny_moe/in_process"])
def test_an_engine_in_float32_is_not_warned_of(name):
    assert scaled_away(load_recipe(EXAMPLES / f"{name}.yaml", ["loss_fn.behavior=rollout"])) is None


def test_recipe_check_warns_and_finds_nothing_wrong(recipe, monkeypatch, capsys):
    from vespo_megatron.launch import preflight

    monkeypatch.setattr(preflight, "check", lambda recipe: [])
    assert main(["recipe", "check", recipe, "loss_fn.behavior=rollout"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{recipe}: nothing wrong found, 1 to look at\n"
    assert captured.err.startswith("vespo-megatron: warning: loss_fn.behavior: is rollout")
    assert main(["recipe", "check", recipe]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{recipe}: nothing wrong found\n" and captured.err == ""
