"""`vespo-megatron serve`: servers that are ready, and how others learn of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from fake_node import NODE, write_interpreter

from vespo_megatron.run.run_directory import READY_FILE

SERVERS = "policy.generation.sglang_cfg"


@pytest.mark.timeout(200)
def test_a_file_has_the_urls_as_long_as_the_servers_are_there(folder):
    command = [
        *(sys.executable, "-m", "vespo_megatron.cli", "serve", str(folder / "recipe.yaml")),
        "policy.generation.backend=sglang",
        "cluster.device=cuda",
        f"exp_manager.exp_dir={folder}/runs",
        "exp_manager.name=served",
        "exp_manager.version=one",
        f"{SERVERS}.python={write_interpreter(folder, gpus=2)}",
        f"{SERVERS}.num_servers=2",
        f"{SERVERS}.mem_fraction_static=0.5",
        f"{SERVERS}.weight_transport=disk",
    ]
    environment = os.environ | {NODE: str(folder)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=folder) as serve:
        try:
            told = next(line for line in serve.stdout if line.startswith(f"{SERVERS}.urls="))
            file = folder / "runs" / "served" / "one" / READY_FILE
            urls = file.read_text().split()
            assert len(urls) == 2 and told.strip() == f"{SERVERS}.urls=[{','.join(urls)}]"
            serve.send_signal(signal.SIGTERM)
            serve.wait(30)
            assert not file.exists()
        finally:
            serve.kill()
