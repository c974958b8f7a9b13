"""`vespo-megatron kernels`: the table and the picture of any objectives."""

import argparse
import math

import pytest

from vespo_megatron.cli import kernels
from vespo_megatron.errors import UserError
from vespo_megatron.losses import objective_names


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
    with pytest.raises(UserError, match=r"log_w.txt:2: 'abc' is no number"):
        run(tmp_path, "--weights", str(file))


def test_an_unknown_objective_is_named_with_its_nearest(tmp_path):
    with pytest.raises(UserError, match="nearest is 'sapo'"):
        run(tmp_path, "--compare", "vespo,sapoo")
