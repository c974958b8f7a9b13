"""`vespo-megatron kernels`: the table and the picture of any objectives."""

import argparse
import math
import re

import pytest
import torch

from vespo_megatron.cli import kernels
from vespo_megatron.errors import UserError
from vespo_megatron.losses import objective_names
from vespo_megatron.losses.phi_table import FIGURES
from vespo_megatron.losses.theory import objective_phi, surrogate, vespo_surrogate_limit


def run(tmp_path, *options):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    return kernels.run(parser.parse_args([*options, "--output", str(tmp_path / "deep" / "kernels.png")])) or 0


def rows(text):
    table = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {(row[0], row[1]): dict(zip(table[0], row, strict=False)) for row in table[2:]}


def test_comparison_draws_a_picture_and_prints_the_phi_table(tmp_path, capsys):
    assert run(tmp_path, "--compare", "vespo,grpo,gspo,sapo") == 0
    assert (tmp_path / "deep" / "kernels.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = rows(capsys.readouterr().out)
    assert list(table) == [(n, s) for n in ("vespo", "grpo", "gspo", "sapo") for s in ("≥ 0", "< 0")]
    vespo = table["vespo", "≥ 0"]
    assert (vespo["φ(.1)"], vespo["φ(.5)"], vespo["φ(2)"], vespo["φ(4)"]) == ("0.1488", "1.1204", "0.1991", "0.0020")
    assert float(vespo["E φ²"]) <= float(vespo["Z·K·C"])


def test_every_objective_can_be_drawn(tmp_path, capsys):
    run(tmp_path, "--compare", ",".join(objective_names()), "--length", "3")
    assert len(rows(capsys.readouterr().out)) == 2 * len(objective_names())


def test_empirical_weights_come_from_a_file_of_log_w(tmp_path, capsys):
    file = tmp_path / "log_w.txt"
    file.write_text("0.0\n-0.5\n\n0.5\n")
    run(tmp_path, "--compare", "topr", "--weights", str(file))
    negative = rows(capsys.readouterr().out)["topr", "< 0"]
    assert float(negative["Z = E φ"]) == pytest.approx((1 + math.exp(-0.5) + 1) / 3, abs=1e-4)
    file.write_text("0.0\nabc\n")
    with pytest.raises(UserError, match=r"log_w.txt:2: 'abc' is no finite number"):
        run(tmp_path, "--weights", str(file))


def test_an_unknown_objective_is_named_with_its_nearest(tmp_path):
    with pytest.raises(UserError, match="nearest is 'sapo'"):
        run(tmp_path, "--compare", "vespo,sapoo")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--length", "1000000000"], "--length: is 1000000000, of 20001 responses"),
        (["--length", "10000"], "at most 3355 for so many responses"),
        (["--compare", ""], "--compare: names no objective"),
        (["--compare", " , "], "--compare: names no objective"),
        (["--compare", "vepso"], "nearest is 'vespo'"),
        (["--weights", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--weights", "."], "cannot be read"),
    ],
)
def test_what_cannot_be_drawn_is_one_error(tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        run(tmp_path, *options)


def test_a_picture_that_cannot_be_written_and_a_line_that_is_no_number_are_errors(tmp_path):
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    (tmp_path / "file").write_text("0.1\n")
    (tmp_path / "folder.png").mkdir()
    for output, says in (
        (tmp_path / "file" / "kernels.png", "cannot write .*file is no folder"),
        (tmp_path / "folder.png", "cannot write .*it is a folder"),
        (tmp_path / "kernels.nothing", "is .*kernels.nothing$"),
        (".", "is .$"),
    ):
        with pytest.raises(UserError, match=re.compile(f"^--output: {says}", re.MULTILINE)):
            kernels.run(parser.parse_args(["--compare", "vespo", "--output", str(output)]))
    for line in ("nan", "inf", "one"):
        (tmp_path / "log_w.txt").write_text(f"0.1\n{line}\n")
        with pytest.raises(UserError, match=f"log_w.txt:2: '{line}' is no finite number"):
            run(tmp_path, "--weights", str(tmp_path / "log_w.txt"))


def test_the_papers_figure_2_is_drawn_by_name_with_f_of_zero_at_zero(tmp_path, capsys):
    run(tmp_path, "--figure", "paper-2")
    assert [name for name, _ in rows(capsys.readouterr().out)][::2] == ["sapo", "vespo", "grpo"]
    axes = FIGURES["paper-2"][1]
    zero = torch.tensor([axes.f_at_zero], dtype=torch.float64)

    def f(name, w):
        def phi(at):
            return objective_phi(name, at, positive=True)

        return float(surrogate(phi, torch.tensor([w], dtype=torch.float64)) - surrogate(phi, zero))

    assert f("vespo", 50.0) == pytest.approx(vespo_surrogate_limit(2.0, 3.0), abs=1e-3)  # 2.2317
    assert f("grpo", 1.0) == pytest.approx(1.0, abs=1e-3) and f("grpo", 2.5) == pytest.approx(1.28, abs=1e-2)
    with pytest.raises(UserError, match="given with --figure"):
        run(tmp_path, "--figure", "paper-2", "--compare", "vespo")
