"""The report: one file, no network, whatever a run directory lacks."""

from __future__ import annotations

import base64
import json
import math
import re

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.study.measures import by_layer, late_mean
from vespo_megatron.study.report import PANELS, load_runs, write_report


def make_run(folder, *, steps=6, offset=0.0, extra=None):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps + 1):
            share = min(1.0, 0.3 + 0.1 * step + offset)
            record = {
                "step": step,
                "reward/mean": share if step else None,
                "vespo/w_mean": 1.0 + 0.01 * step,
                "vespo/phi_mean": 1.0 - 0.01 * step,
                "vespo/ess": 0.9,
                "loss/grad_norm": 0.5 / (step + 1),
                "mismatch/k3": 1e-6 * step,
                "time/generate": 1.0,
                "time/train": 2.0,
                "throughput/tokens_per_second": 4000.0,
                "response/length_mean": 15.0,
            }
            if step % 3 == 0:
                record["eval/validation/avg@1"] = share
            file.write(json.dumps({**record, **(extra or {})}) + "\n")
    return folder


def pictures(page):
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_a_report_is_one_file_with_its_pictures_inside_and_asks_nothing_of_the_network(tmp_path):
    run = make_run(tmp_path / "vespo" / "version_0")
    (run / "recipe.yaml").write_text("grpo: {seed: 7}\nloss_fn: {name: vespo}\n")
    (run / "summary.json").write_text(json.dumps({"facts": {"rollout": "SGLang 0.5.23"}}))
    page = write_report([run], tmp_path / "out" / "report.html").read_text()
    assert len(pictures(page)) == 10
    assert all(png.startswith(b"\x89PNG") for png in pictures(page))
    without_pictures = re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", without_pictures)
    assert "SGLang 0.5.23" in page
    assert "grpo.seed" in page
    assert ">0.300<" in page and ">0.900<" in page
    assert 'name="viewport"' in page


def test_a_name_that_reads_like_mathematics_is_a_name(tmp_path):
    odd = {r"eval/$\frac{/avg@1": 0.5, "eval/a$b_{/avg@1": 0.25}
    runs = [make_run(tmp_path / name, extra=odd) for name in (r"cost_$x^{", r"$\nothing$")]
    assert pictures(write_report(runs, tmp_path / "report.html").read_text())


def test_metrics_that_are_missing_leave_their_panels_out(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "vespo/ess": null}\n{"step": 2, "rewa')
    page = write_report([run], tmp_path / "report.html").read_text()
    assert len(pictures(page)) == 1
    assert "Reward" in page
    assert "Effective sample size" not in page
    assert "Settings" not in page


def test_runs_are_compared_under_labels_that_tell_them_apart(tmp_path):
    runs = [make_run(tmp_path / name / "version_0", offset=offset) for name, offset in (("vespo", 0.1), ("grpo", 0.0))]
    runs.append(make_run(tmp_path / "other" / "vespo" / "version_0", steps=0))
    assert len({run.label for run in load_runs(runs)}) == 3
    page = write_report(runs, tmp_path / "report.html").read_text()
    assert "vespo/version_0" in page and "grpo/version_0" in page


def test_what_a_model_wrote_cannot_change_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "samples").mkdir()
    (run / "samples" / "step_000003.md").write_text("<script>alert(1)</script>")
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_broken_recipes_and_summaries_do_not_stop_a_report(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("a: [")
    (run / "summary.json").write_text("{")
    write_report([run], tmp_path / "report.html")


def test_a_report_of_nothing_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished step"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run directory given"):
        write_report([], tmp_path / "report.html")


def test_every_panel_says_what_its_numbers_are():
    for panel in PANELS:
        assert panel.caption.endswith(".")


def test_layers_are_drawn_in_their_order_by_what_they_were_late_in_the_run(tmp_path):
    names = [f"routes/agreement_layer_{layer}" for layer in (1, 2, 10)]
    history = [{"step": 0}] + [{"step": step, names[0]: 0.5, names[2]: step / 8} for step in range(1, 9)]
    assert by_layer(history, names) == {1: 0.5, 10: 7.5 / 8}
    assert list(by_layer(history, names[::-1])) == [1, 10]
    assert math.isnan(late_mean(history, names[1]))
    run = make_run(tmp_path / "run", extra={names[0]: 0.99, names[2]: 0.9, "policy/entropy": 1.0, "loss/kl": 0.1})
    page = write_report([run], tmp_path / "report.html").read_text()
    assert all(title in page for title in ("Route agreement by layer", "Entropy", "KL to the reference"))


def test_the_step_as_a_whole_is_not_stacked_on_its_phases(tmp_path, monkeypatch):
    from vespo_megatron.study import report

    drawn = []
    monkeypatch.setattr(report, "_draw_stacked", lambda axes, run, names: drawn.append(list(names)))
    record = {"step": 1, "time/generate": 1.0, "time/train": 2.0, "time/step": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    report.write_report([tmp_path], tmp_path / "report.html")
    assert drawn == [["time/generate", "time/train"]]
