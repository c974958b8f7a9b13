"""One process writes to a run at a time, and a resumed run says what it does otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import save_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.run_directory import RECIPE_FILE, changed_keys, claimed

HOLD = """
import sys, time
from pathlib import Path
from vespo_megatron.run.run_directory import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_by_name_until_the_first_is_gone_however_it_went(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another run writes to it .process {holder.pid} on "), claimed(tmp_path):
            pass
        holder.kill()
        holder.wait(10)
        with claimed(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_changed_keys_are_told(tmp_path):
    recipe = Recipe().with_values({"policy.model_name": "m"})
    assert changed_keys(tmp_path, recipe) == []
    save_recipe(recipe, tmp_path / RECIPE_FILE)
    recipe = recipe.with_values({"policy.generation.sglang_cfg.urls": ["http://127.0.0.1:1"], "grpo.max_num_steps": 7})
    assert changed_keys(tmp_path, recipe) == ["grpo.max_num_steps: 100 → 7"]
