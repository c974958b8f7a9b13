"""The commands that the pages tell people to type: out of their blocks for a shell, and what becomes of each here."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "examples").rglob("*.md") if "build" not in page.parts)

_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (vespo-megatron .*)$", re.MULTILINE)

QUICK, NIGHTLY, ELSEWHERE = "in the suite", "nightly", "not here"
"""`QUICK` and `NIGHTLY` ones are executed as they stand, in order. Of all others options and recipe are judged."""

_GRID, _MISMATCH = "examples/qwen3_30b_a3b/grid/vespo_n8.yaml", "examples/qwen3_30b_a3b/mismatch"
_TINY = "vespo-megatron train examples/tiny_moe"

KNOWN = {
    "README.md": {
        "make train": ELSEWHERE,  # installs; its own command is what follows
        "make test": ELSEWHERE,
        f"{_TINY}/vespo.yaml loss_fn.name=grpo grpo.seed=7": NIGHTLY,
        f"{_TINY}/vespo.yaml policy.router_replay.mode=R2": NIGHTLY,
        f"{_TINY}/in_process.yaml": NIGHTLY,
        f"{_TINY}/cp2.yaml": NIGHTLY,
        "vespo-megatron recipe show examples/tiny_moe/cp2.yaml": QUICK,
        "vespo-megatron report runs/tiny_moe/version_0 runs/tiny_moe/version_1": NIGHTLY,
        "vespo-megatron eval examples/tiny_moe/vespo.yaml --checkpoint runs/tiny_moe/version_0 --samples 4": NIGHTLY,
        f"vespo-megatron plan {_GRID} --gpu h100-80": QUICK,
        "vespo-megatron predict examples/tiny_moe/vespo.yaml --k3 1.5e-3 --tokens 500,6000": QUICK,
        "vespo-megatron compare examples/studies/mismatch.yaml": ELSEWHERE,  # two hours
        "srun python -m vespo_megatron.slurm.node_agent $HEAD:29500 recipe.yaml "
        "exp_manager.version=$SLURM_JOB_ID": ELSEWHERE,  # a cluster: tests/slurm
    },
    "CONTRIBUTING.md": {"make train": ELSEWHERE, "make lint": ELSEWHERE, "make test": ELSEWHERE},
    "docs/checkpoints.md": {
        "vespo-megatron train recipe.yaml checkpointing.save_period=10 exp_manager.version=main "
        "exp_manager.resume_if_exists=true": ELSEWHERE,  # tests/launch/test_stop_and_resume.py
    },
    "docs/data.md": {
        "vespo-megatron data show examples/tiny_moe/vespo.yaml --row 3": QUICK,
        "vespo-megatron data stats examples/tiny_moe/vespo.yaml": QUICK,
    },
    "docs/environments.md": {"make calculator": ELSEWHERE},  # tests/examples/test_calculator.py
    "docs/guide.md": {
        "git clone … && cd vespo_megatron": ELSEWHERE,
        "python3.11 -m venv .venv && . .venv/bin/activate": ELSEWHERE,
        "pip install torch && pip install -e '.[train]'": ELSEWHERE,
        "vespo-megatron doctor --exp-dir $SCRATCH/runs": NIGHTLY,
        f"vespo-megatron preflight {_GRID} --fake-gpu h100-80x8": NIGHTLY,
        "vespo-megatron data prepare dapo_math aime24 aime25 amc23 math500 --output $DATA": ELSEWHERE,  # the hub
        "vespo-megatron data prepare math500 --from copy/math500.jsonl --output data": ELSEWHERE,  # tests/data
        "cat data/math500.json": ELSEWHERE,
        "vespo-megatron convert examples/tiny_moe/build/model tiny_dist": NIGHTLY,
        f"vespo-megatron recipe diff {_MISMATCH}/vespo.yaml {_MISMATCH}/vespo_r2.yaml": QUICK,
        "vespo-megatron recipe check examples/tiny_moe/vespo.yaml": QUICK,
        "vespo-megatron recipe keys on_weight_update": QUICK,
        "vespo-megatron recipe schema > recipe.schema.json": QUICK,
        f"vespo-megatron plan {_MISMATCH}/vespo_r2.yaml --gpu h100-80 --compare 3 --response-tokens 6000": QUICK,
        f"vespo-megatron train --scale-down examples/tiny_moe/build {_MISMATCH}/vespo_r2.yaml": NIGHTLY,
        "vespo-megatron simulate examples/qwen3_30b_a3b/async/vespo.yaml --gpu h100-80 --response-tokens 6000": NIGHTLY,
        "cat mine.yaml": ELSEWHERE,
        "vespo-megatron slurm mine.yaml --compare policy.router_replay.mode=none,R2 --submit": ELSEWHERE,  # tests/slurm
        "squeue": ELSEWHERE,
        "cat slurm_logs/report_3.log": ELSEWHERE,
        "vespo-megatron eval examples/tiny_moe/in_process.yaml --checkpoint examples/tiny_moe/build/model "
        "--samples 4": NIGHTLY,
        f"vespo-megatron eval --table 1 {_MISMATCH}/vespo_r2.yaml --checkpoint $RUN --best "
        "--sets $DATA": ELSEWHERE,  # GPUs
    },
    "docs/losses.md": {
        "vespo-megatron predict examples/qwen3_30b_a3b/async/vespo.yaml policy.model_name=Qwen3-30B-A3B-Base "
        "--staleness-k3 5e-5 --tokens 500,2000,6000": QUICK,
    },
    "docs/performance.md": {
        "vespo-megatron plan examples/qwen3_30b_a3b/async/vespo.yaml --gpu h100-80 loss_fn.behavior=version": QUICK,
    },
    "docs/rollouts.md": {
        f"vespo-megatron plan {_GRID} --gpu h100-80 policy.generation.sglang_cfg.colocated=true "
        "policy.generation.sglang_cfg.weight_transport=tensor policy.generation.sglang_cfg.mem_fraction_static=0.85": (
            QUICK
        ),
        "python tests/tiny_model.py /shared/tiny": ELSEWHERE,  # a server of one's own
        "python -m sglang.launch_server --model-path /shared/tiny --dtype float32 --context-length 136 "
        "--skip-tokenizer-init --enable-return-routed-experts --port 30000": ELSEWHERE,
        "pytest tests/rollout_sglang/test_engine_conformance.py tests/rollout_sglang/test_contract.py -k sglang "
        "--sglang-url http://127.0.0.1:30000 --sglang-model /shared/tiny": ELSEWHERE,
    },
    "docs/studies/README.md": {
        "vespo-megatron compare examples/studies/mismatch.yaml": ELSEWHERE,
        "vespo-megatron compare examples/studies/mismatch.yaml --seeds 1,2": ELSEWHERE,
        "vespo-megatron compare examples/studies/mismatch.yaml --slurm": ELSEWHERE,
    },
    "examples/qwen3_30b_a3b/README.md": {
        "export MODEL=/models/Qwen3-30B-A3B-Base DATA=/data RUNS=/runs": QUICK,
        f"vespo-megatron recipe show {_GRID}": QUICK,
        f"vespo-megatron recipe check {_GRID}": ELSEWHERE,  # the model
        f"vespo-megatron recipe diff {_MISMATCH}/{{grpo,grpo_r2}}.yaml": QUICK,
        "python examples/tiny_moe/prepare.py --output examples/tiny_moe/build": ELSEWHERE,  # make example
        f"vespo-megatron train --scale-down examples/tiny_moe/build {_MISMATCH}/vespo_r3.yaml": NIGHTLY,
        "vespo-megatron data prepare aime24 aime25 amc23 math500 humaneval_plus mbpp_plus livecodebench_v6 "
        "--output $DATA": ELSEWHERE,  # the hub
        "vespo-megatron eval --table 2 examples/qwen3_30b_a3b/grid/vespo_n16.yaml --checkpoint $RUN --best "
        "--sets $DATA": ELSEWHERE,  # GPUs: tests/launch/test_evaluate_table.py
    },
}
"""Page → command → what becomes of it, in the page's order."""


def commands_of(page: str) -> list[str]:
    """In the page's order, each in one line, without its comment."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[str] = _INDENTED.findall(_BLOCK.sub("", text))
    for language, body in _BLOCK.findall(text):
        lines = re.sub(r" *\\\n\s*", " ", body).splitlines()
        typed = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
        if not typed and language in ("bash", "sh", "shell"):
            typed = lines
        bare = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in typed]
        found += [command for command in bare if command]
    return found
