"""The grid of `test_fault_grid` over two real servers, weights by broadcast: nightly."""

from __future__ import annotations

import time

import numpy as np
import pytest
from fault_proxy import FAULTS, FaultProxy
from rollout_helpers import generate, make_requests
from rollout_rounds import a_round, push

from vespo_megatron.rollout_sglang import connect, launch_servers
from vespo_megatron.rollout_sglang.client.client import SGLangClient
from vespo_megatron.rollout_sglang.pool import membership

pytestmark = [pytest.mark.sglang, pytest.mark.nightly, pytest.mark.timeout(3600)]

DEADLINE_S = 15.0
PATHS = (
    "/generate",
    "/server_info",
    "/pause_generation",
    "/end_weight_update",
    "/freeze_gc",
    "/weights_checker",
    "/init_weights_update_group",
    "/begin_weight_update",
    "/update_weights_from_distributed",
    "/update_weight_version",
    "/flush_cache",
    "/continue_generation",
    "/destroy_weights_update_group",
)
IN_EVERY_ROUND = set(PATHS) - {"/freeze_gc", "/init_weights_update_group", "/destroy_weights_update_group"}


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    settings = {
        "num_servers": 2,
        "weight_update_timeout": DEADLINE_S,
        "request_timeout": DEADLINE_S,
        "recovery_timeout": 30.0,
        "health_timeout": 0.0,
    }
    return tiny_recipe.with_values({f"policy.generation.sglang_cfg.{key}": value for key, value in settings.items()})


@pytest.fixture(scope="module")
def servers(recipe, tmp_path_factory):
    with launch_servers(recipe, tmp_path_factory.mktemp("run")) as servers:
        yield servers


@pytest.mark.parametrize("path", PATHS)
def test_a_run_goes_on_with_the_other_server_and_the_spoiled_one_is_back(servers, recipe, reference, monkeypatch, path):
    monkeypatch.setattr(SGLangClient, "control_timeout_s", DEADLINE_S)
    monkeypatch.setattr(membership, "_UP_TIMEOUT_S", DEADLINE_S)
    with FaultProxy(servers.urls[0]) as proxy:
        engine = connect(recipe, [proxy.url, servers.urls[1]])
        version = engine.weight_version
        for fault in FAULTS:
            proxy.spoil(path, fault)
            start = time.monotonic()
            a_round(engine, version, reference.named_tensors)
            assert proxy.spoiled == 1 or path not in IN_EVERY_ROUND, fault
            proxy.spoil("", "")
            version += 2
            push(engine, version, reference.named_tensors)
            assert len(engine.pool.membership.serving) == 2, fault
            assert time.monotonic() - start < 10 * DEADLINE_S, fault
        engine.close()
    engine = connect(recipe, servers.urls)  # nobody is locked out, and the weights are right
    requests = make_requests(8)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        np.testing.assert_allclose(result.behavior_log_probs, reference.score(request, result)[0], atol=1e-4, rtol=0)
    engine.close()


def test_a_trainer_killed_in_an_update_locks_no_server(servers, recipe, reference):
    """What it leaves: both paused, a session open, a part of the tensors taken."""
    left = connect(recipe, servers.urls)
    version = left.weight_version + 1

    def half():
        for number, item in enumerate(reference.named_tensors(0.5, seed=4)):
            if number == 20:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        left.update_weights(half(), version)
    engine = connect(recipe, servers.urls)
    push(engine, version + 1, reference.named_tensors)
    requests = make_requests(8)
    for request, result in zip(requests, generate(engine, requests), strict=True):
        np.testing.assert_allclose(result.behavior_log_probs, reference.score(request, result)[0], atol=1e-4, rtol=0)
    engine.close()
    left.close()
