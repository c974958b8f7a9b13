"""A run as a study starts it: `python forked_run.py RECIPE`."""

from __future__ import annotations

import sys
from pathlib import Path

from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.study.compare import environment
from vespo_megatron.study.run_process import RunForker


def main(recipe_file: Path) -> int:
    """Its exit status."""
    log = recipe_file.with_name("forked.log")
    run = RunForker(environment(load_recipe(recipe_file))).start(recipe_file, log)
    run.wait(100)
    print(log.read_text())
    status = run.poll()
    return 1 if status is None else status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
