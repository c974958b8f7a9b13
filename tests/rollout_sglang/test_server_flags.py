"""From a recipe to SGLang's command line and environment; ports; and the processes, without SGLang in them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_shape import read_shape
from vespo_megatron.rollout_sglang import launch_servers
from vespo_megatron.rollout_sglang.server import supervisor
from vespo_megatron.rollout_sglang.server.environment import Environment, build_environment, probe_environment
from vespo_megatron.rollout_sglang.server.flags import build_flags, check_server_args
from vespo_megatron.rollout_sglang.server.ports import give_up, hold_ports
from vespo_megatron.rollout_sglang.server.server_process import ServerProcess, log_tail

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "active"}


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe


@pytest.fixture
def shape(tiny_qwen3_moe_folder):
    return read_shape(tiny_qwen3_moe_folder)


def found(device="cpu", folder=Path("/nowhere"), torchvision=False):
    return Environment(device, folder, torchvision)


def flag(flags, name):
    return flags[flags.index(name) + 1]


def test_flags_follow_the_recipe(recipe, shape):
    flags = build_flags(recipe, shape, found(), host="127.0.0.1", port=31000, index=1)
    assert flag(flags, "--model-path") == recipe.policy.model_name
    assert flag(flags, "--dtype") == "float32"
    assert flag(flags, "--random-seed") == str(recipe.grpo.seed + 1)
    assert int(flag(flags, "--context-length")) >= 128
    assert flag(flags, "--attention-backend") == "torch_native"
    assert "--enable-return-routed-experts" in flags and "--skip-tokenizer-init" in flags


def test_a_colocated_server_gives_back_graphs_as_well_and_has_no_segments_that_grow(recipe, shape):
    recipe = recipe.with_values({"policy.generation.sglang_cfg.colocated": True})
    assert "--enable-memory-saver" in build_flags(recipe, shape, found("cuda"), host="127.0.0.1", port=31000, index=0)
    settings = "max_split_size_mb:512,expandable_segments:True"
    base = {"PYTORCH_CUDA_ALLOC_CONF": settings, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    given = {"base": base, "threads": THREADS, "tensor_parallel_size": 1}
    shared = build_environment(found("cuda"), shape, **given, gives_memory_back=True)
    assert shared["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] == "1"
    assert shared["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512" and "PYTORCH_ALLOC_CONF" not in shared
    apart = build_environment(found("cuda"), shape, **given)
    assert apart["PYTORCH_CUDA_ALLOC_CONF"] == settings and "SGLANG_MEMORY_SAVER_CUDA_GRAPH" not in apart


def test_on_cuda_a_server_takes_its_own_devices_and_sglangs_own_backends(recipe, shape):
    recipe = recipe.with_values({"policy.generation.sglang_cfg.tensor_parallel_size": 2})
    flags = build_flags(recipe, shape, found("cuda"), host="127.0.0.1", port=31000, index=3)
    assert "--base-gpu-id" not in flags  # it sees its own ones alone, and they count from 0
    assert "--attention-backend" not in flags and "--max-total-tokens" not in flags
    given = {"base": {"PATH": "/bin"}, "threads": THREADS, "tensor_parallel_size": 2}
    assert build_environment(found("cuda"), shape, gpus=["6", "7"], **given)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert "CUDA_VISIBLE_DEVICES" not in build_environment(found("cuda"), shape, **given)


@pytest.mark.parametrize(("given", "index", "first"), [(4, 0, "4"), (4, 1, "6"), ([1, 5], 1, "5"), ([0, 2], 0, "0")])
def test_a_recipe_can_place_servers_itself(recipe, shape, given, index, first):
    settings = {"tensor_parallel_size": 2, "num_servers": 2, "server_args": {"base_gpu_id": given}}
    recipe = recipe.with_values({f"policy.generation.sglang_cfg.{name}": value for name, value in settings.items()})
    assert (
        flag(build_flags(recipe, shape, found("cuda"), host="127.0.0.1", port=31000, index=index), "--base-gpu-id")
        == first
    )


def test_a_place_for_every_server_or_for_none(recipe, shape):
    settings = {"num_servers": 2, "server_args": {"base-gpu-id": [3]}}
    recipe = recipe.with_values({f"policy.generation.sglang_cfg.{name}": value for name, value in settings.items()})
    with pytest.raises(UserError, match="base-gpu-id: has 1 entries"):
        build_flags(recipe, shape, found("cuda"), host="127.0.0.1", port=31000, index=0)


def test_further_server_args_pass_through(recipe, shape):
    recipe = recipe.with_values(
        {
            "policy.generation.sglang_cfg.server_args": {
                "schedule_policy": "lpm",
                "disable_radix_cache": True,
                "log": None,
            }
        }
    )
    flags = build_flags(recipe, shape, found(), host="127.0.0.1", port=1, index=0)
    assert flag(flags, "--schedule-policy") == "lpm"
    assert "--disable-radix-cache" in flags and "--log" not in flags


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model_path", "policy.model_name"),
        ("tp", "tensor_parallel_size"),
        ("quantization", "refused"),
        ("speculative_algorithm", "old weights"),
        ("dp_size", "num_servers"),
        ("enable-eplb", "physical copies"),
        ("kv_cache_dtype", "another model"),
        ("tokenizer_worker_num", "asks for no key"),
    ],
)
def test_flags_that_the_recipe_owns_or_that_break_rl_are_refused_with_the_reason(name, says):
    with pytest.raises(UserError, match=says) as caught:
        check_server_args({name: 1})
    assert f"server_args.{name}" in str(caught.value)


def test_a_context_the_model_has_not_is_refused(recipe, shape):
    recipe = recipe.with_values({"policy.max_total_sequence_length": 257})
    with pytest.raises(UserError, match="max_position_embeddings, 256"):
        build_flags(recipe, shape, found(), host="127.0.0.1", port=1, index=0)


def test_the_server_does_not_inherit_the_launchers_own_distributed_job(shape):
    base = {"RANK": "3", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "PYTHONPATH": "/p"}
    result = build_environment(found(), shape, base=base, threads=THREADS, tensor_parallel_size=1)
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & result.keys()
    assert result["HOME"] == "/h" and result["SGLANG_PLATFORM"] == "vespo_cpu" and result["CUDA_VISIBLE_DEVICES"] == ""
    assert result["PYTHONPATH"].endswith(":/p") and "stubs" in result["PYTHONPATH"]


def test_the_torchvision_stub_stays_away_from_a_real_one_and_from_cuda(shape):
    for environment in (found(torchvision=True), found("cuda")):
        result = build_environment(environment, shape, base={}, threads=THREADS, tensor_parallel_size=1)
        assert "PYTHONPATH" not in result
    assert "SGLANG_PLATFORM" not in result


def test_only_the_model_file_in_use_is_imported_by_sglangs_registry(shape, tmp_path):
    models = tmp_path / "srt" / "models"
    models.mkdir(parents=True)
    (models / "qwen3_moe.py").write_text("class Qwen3MoeForCausalLM(Base): ...")
    (models / "llama.py").write_text("class LlamaForCausalLM(Base): ...")
    result = build_environment(found(folder=tmp_path), shape, base={}, threads=THREADS, tensor_parallel_size=1)
    assert result["SGLANG_DISABLED_MODEL_ARCHS"] == "llama"


def test_a_model_with_dense_layers_is_refused_before_a_server_starts(recipe, tmp_path):
    config = (Path(recipe.policy.model_name) / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"mlp_only_layers": []', '"mlp_only_layers": [1]'))
    recipe = recipe.with_values({"policy.model_name": str(tmp_path)})
    with pytest.raises(UserError, match=r"layers \[1\] are dense"):
        launch_servers(recipe, tmp_path)


def test_a_folder_without_a_model_is_an_error_that_names_it(recipe, tmp_path):
    recipe = recipe.with_values({"policy.model_name": str(tmp_path / "no-model")})
    with pytest.raises(UserError, match=r"no-model/config\.json"):
        launch_servers(recipe, tmp_path)


def test_a_port_in_use_is_named_before_anything_starts(recipe, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        recipe = recipe.with_values({"policy.generation.sglang_cfg.port": port})
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use"):
            launch_servers(recipe, tmp_path)
    assert not (tmp_path / "servers").exists()


def test_free_ports_are_distinct():
    ports = hold_ports("127.0.0.1", 0, 8)
    assert len({port.number for port in ports}) == 8
    give_up(ports)


def test_urls_in_the_recipe_start_nothing(recipe, tmp_path):
    recipe = recipe.with_values({"policy.generation.sglang_cfg.urls": ["http://10.0.0.1:30000/"]})
    with launch_servers(recipe, tmp_path) as servers:
        assert servers.urls == ["http://10.0.0.1:30000"] and servers.servers == []


def test_an_interpreter_without_sglang_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no/such/python"):
        probe_environment("/no/such/python", "cpu")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match="has no sglang"):
        probe_environment(str(bare), "cpu")


def test_the_end_of_a_log_shows_the_error_and_not_what_follows(tmp_path):
    log = tmp_path / "log"
    log.write_text("start\n" * 50 + "Traceback\n  File x\nValueError: the reason\n" + "[vespo-megatron] ended\nbye\n")
    assert log_tail(log).endswith("ValueError: the reason")
    assert log_tail(tmp_path / "none") == "  (no log)"


def test_of_a_refused_flag_the_log_shows_the_flag_and_no_usage(tmp_path):
    log = tmp_path / "log"
    usage = "usage: sglang serve [--a]\n" + "    [--b {x,y}]\n" * 50
    log.write_text(usage + "sglang serve: error: argument --b: invalid\n")
    assert log_tail(log) == "  sglang serve: error: argument --b: invalid"


# ---- processes: a stand-in for SGLang that starts a child of its own and ignores SIGTERM ----------------------------


def a_port():
    (port,) = hold_ports("127.0.0.1", 0, 1)
    return port


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def running(pids):
    """Those of `pids` that run (a zombie does not)."""
    states = []
    for pid in pids:
        try:
            states.append((pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]))
        except OSError:
            continue
    return [pid for pid, state in states if state != "Z"]


def read_pids(path):
    wait_for(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def test_stop_leaves_nothing_of_a_server_that_ignores_sigterm(tmp_path):
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "pids")]
    server = ServerProcess(a_port(), command, dict(os.environ), tmp_path / "log")
    pids = [*read_pids(tmp_path / "pids"), server.process_group]
    server.stop()
    wait_for(lambda: running(pids) == [], 2)
    server.stop()


@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_of_a_server_outlives_its_launcher(tmp_path, end, forks):
    """Not even when a forked child of the launcher, which has the launcher's open files, does."""
    launcher = f"""
import os, sys, time
from pathlib import Path
from vespo_megatron.rollout_sglang.server.ports import hold_ports
from vespo_megatron.rollout_sglang.server.server_process import ServerProcess
(port,) = hold_ports("127.0.0.1", 0, 1)
ServerProcess(port, [sys.executable, "-c", {STUBBORN!r}, sys.argv[1] + "/pids"], dict(os.environ),
              Path(sys.argv[1]) / "log")
if {forks} and os.fork() == 0:
    time.sleep(8)
    os._exit(0)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", launcher, str(tmp_path)])
    pids = read_pids(tmp_path / "pids")
    process.send_signal(end)
    process.wait(10)
    wait_for(lambda: running(pids) == [], 6)


def test_nothing_of_a_server_outlives_its_supervisor(tmp_path):
    command = [
        sys.executable,
        "-c",
        "import sys, time, os; open(sys.argv[1], 'w').write(f'{os.getpid()} 1'); time.sleep(600)",
    ]
    server = ServerProcess(a_port(), [*command, str(tmp_path / "pids")], dict(os.environ), tmp_path / "log")
    pid, _ = read_pids(tmp_path / "pids")
    os.kill(server.process_group, signal.SIGKILL)
    wait_for(lambda: running([pid]) == [])
    server.stop()


def test_a_server_that_dies_while_starting_is_noticed_at_once_and_its_log_quoted(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('ValueError: no such model')"]
    server = ServerProcess(a_port(), command, dict(os.environ), tmp_path / "log")
    start = time.monotonic()
    with pytest.raises(UserError, match="no such model") as caught:
        server.wait_ready(start + 60)
    assert time.monotonic() - start < 5 and str(tmp_path / "log") in str(caught.value)
    server.stop()


def test_a_server_that_never_answers_is_given_up_at_the_deadline(tmp_path):
    server = ServerProcess(
        a_port(), [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), tmp_path / "log"
    )
    with pytest.raises(UserError, match="startup_timeout"):
        server.wait_ready(time.monotonic() + 0.5)
    server.stop()


def test_the_supervisor_needs_no_package():
    """It is run with -I -S, so that it starts in milliseconds and inherits no import of ours."""
    source = Path(supervisor.__file__).read_text()
    assert "vespo_megatron" not in source.replace("[vespo-megatron]", "")
