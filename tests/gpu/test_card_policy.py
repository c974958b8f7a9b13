"""The whole policy on the card: log-probs, gradients, replay and updates as on the host, in every setting it has."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import layout_work
import policy_work
import pytest
import torch

from vespo_megatron.megatron.policy import RouteUse

HERE = Path(__file__).parent
TOLERANCE = 1e-4
"""Of float32, as between layouts on the host."""


@pytest.fixture(scope="module")
def on_the_device(checkpoint, device):
    return policy_work.everything(checkpoint[0], device)


@pytest.fixture(scope="module")
def on_the_host(checkpoint, tmp_path_factory):
    """Of a process that sees no card."""
    output = tmp_path_factory.mktemp("host") / "answers.pt"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "policy_work.py"), checkpoint[0], str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(output, weights_only=False)


def worst(found, wanted):
    """The largest relative error of any tensor; what is zero there has to be zero here."""
    assert found.keys() == wanted.keys()
    errors = {}
    for name, tensor in wanted.items():
        scale = float(tensor.double().norm())
        errors[name] = float((found[name].double() - tensor.double()).norm()) / (scale or 1.0)
    return max(errors.values())


@pytest.mark.parametrize("routes", ["live", "R2", "R3"])
def test_loss_and_gradients_are_the_host_s(routes, on_the_device, on_the_host, note):
    error = worst(on_the_device[routes]["gradients"], on_the_host[routes]["gradients"])
    loss = abs(on_the_device[routes]["loss"] / on_the_host[routes]["loss"] - 1)
    note(gradients=error, loss=loss)
    assert error < TOLERANCE and loss < 10 * TOLERANCE


def test_an_update_moves_every_weight_as_on_the_host(on_the_device, on_the_host, note):
    error = worst(on_the_device["update"], on_the_host["update"])
    note(update=error, norm=abs(on_the_device["grad_norm"] / on_the_host["grad_norm"] - 1))
    # Where a gradient is all but zero, Adam's first step follows its rounding.
    assert error < 1e-2 and on_the_device["grad_norm"] == pytest.approx(on_the_host["grad_norm"], rel=TOLERANCE)


def log_probs_of(folder, device, precision, transformers_model):
    """Ours of every response token, transformers' in the same precision, and transformers' in float64."""
    batch = layout_work.ragged_batch()
    with policy_work.policy(folder, device, precision=precision) as policy:
        batches = layout_work.micro_batches(policy, batch)
        ours = [answer[0].double().cpu() for answer in policy.log_probs(batches)]
        samples = [sample for each in batches for sample in each.batch.samples]
    found = {"ours": torch.cat(ours)}
    transformers_model.set_experts_implementation("eager")  # its grouped products know no float64
    dtypes = {"same": getattr(torch, precision), "exact": torch.float64}
    for name, dtype in dtypes.items():
        model, parts = transformers_model.to(device, dtype), []
        for sample in samples:
            ids = torch.tensor(sample.token_ids, device=device)[None]
            with torch.no_grad():
                logits = model(ids).logits[0].double() / 0.9
            first = len(sample.prompt_ids)
            parts.append(logits[first - 1 : -1].log_softmax(-1).gather(1, ids[0, first:, None])[:, 0])
        found[name] = torch.cat(parts).cpu()
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_log_probs_are_as_near_to_float64_as_those_of_transformers(precision, checkpoint, device, note):
    """In bfloat16 a token near a border may take another expert: the median token is compared, not the worst."""
    found = log_probs_of(checkpoint[0], device, precision, checkpoint[1])
    checkpoint[1].to("cpu", torch.float32)
    ours, theirs = ((found[name] - found["exact"]).abs() for name in ("ours", "same"))
    note(ours=float(ours.median()), theirs=float(theirs.median()), ours_mean=float(ours.mean()))
    assert float(ours.median()) < 1.5 * float(theirs.median()) + 1e-6
    if precision == "float32":
        assert float(ours.max()) < 1e-3


SETTINGS = {
    "plain": {},
    "distributed optimizer": {"optimizer.use_distributed_optimizer": True},
    "overlaps": {
        "optimizer.use_distributed_optimizer": True,
        "distributed_data_parallel_config.overlap_grad_reduce": True,
        "distributed_data_parallel_config.overlap_param_gather": True,
    },
    "recompute": {"recompute_granularity": "full"},
    "selective recompute": {"recompute_granularity": "selective"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}
ON_A_CARD = {
    "offload": {
        "optimizer.optimizer_cpu_offload": True,
        "optimizer.optimizer_offload_fraction": 1.0,
        "optimizer.use_distributed_optimizer": True,
    },
}


def two_updates(folder, device, layout, precision):
    with policy_work.policy(folder, device, layout, precision=precision) as policy:
        batches = layout_work.micro_batches(policy, layout_work.ragged_batch())
        norms = [policy.update(batches, layout_work.weighted_loss).grad_norm for _ in range(2)]
        return norms, {name: tensor.float().cpu() for name, tensor in layout_work.weights(policy).items()}


@pytest.fixture(scope="module")
def plain(checkpoint, device):
    return {precision: two_updates(checkpoint[0], device, {}, precision) for precision in ("float32", "bfloat16")}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "setting", [*list(SETTINGS)[1:], *(pytest.param(name, marks=pytest.mark.cuda) for name in ON_A_CARD)]
)
def test_settings_that_change_no_number_change_none(setting, precision, checkpoint, device, plain, note):
    found = two_updates(checkpoint[0], device, (SETTINGS | ON_A_CARD)[setting], precision)
    wanted = plain[precision]
    error = worst(found[1], wanted[1])
    note(norm=abs(found[0][1] / wanted[0][1] - 1), weights=error)
    rounding = 1e-5 if precision == "float32" else 2e-2
    assert found[0] == pytest.approx(wanted[0], rel=rounding) and error < rounding


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replaying_its_own_routes_changes_nothing(precision, checkpoint, device, note):
    use = RouteUse("replay", lambda each: (each.trainer_routes, None))
    with policy_work.policy(checkpoint[0], device, precision=precision) as policy:
        batches = layout_work.micro_batches(policy, layout_work.ragged_batch())
        for each in batches:
            each.trainer_routes = policy.empty_routes(each)
        recorded = torch.cat(policy.log_probs(batches, routes=RouteUse("record", use.tables)), dim=1)
        replayed = torch.cat(policy.log_probs(batches, routes=use), dim=1)
        live = torch.cat(policy.log_probs(batches), dim=1)
    note(replayed=float((replayed - live).abs().max()), recorded=float((recorded - live).abs().max()))
    torch.testing.assert_close(recorded, live, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(replayed, live, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("setting", ["plain", "recompute"])
def test_no_micro_batch_waits_for_the_card(setting, checkpoint, device):
    """Of one expert parallel rank, in bfloat16: from its tensors to its gradients the host only asks."""
    with policy_work.policy(checkpoint[0], device, SETTINGS[setting], precision="bfloat16") as policy:
        batches = layout_work.micro_batches(policy, layout_work.ragged_batch())
        policy.compute_gradients(batches, layout_work.weighted_loss)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                policy._run(
                    batches,
                    lambda output, each: layout_work.weighted_loss(output[0], output[1], each),
                    RouteUse(),
                    forward_only=False,
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in said if "synchroniz" in str(each.message)})
    assert places == []


@pytest.mark.cuda
def test_a_checkpoint_of_the_card_is_read_on_the_host(checkpoint, device, tmp_path):
    """And gives the same weights, to the last bit."""
    from vespo_megatron.megatron import hf_weights

    with policy_work.policy(checkpoint[0], device, precision="bfloat16") as policy:
        batches = layout_work.micro_batches(policy, layout_work.ragged_batch())
        policy.update(batches, layout_work.weighted_loss)
        hf_weights.save(policy.exporter, tmp_path / "hf", copy_from=policy.model_folder)
        wanted = {name: tensor.cpu() for name, tensor in layout_work.weights(policy).items()}
    from safetensors.torch import load_file

    found = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
