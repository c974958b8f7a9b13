"""The in-process engine's dials against transformers, in which hooks and a loop make the same mismatch another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rollout_helpers import VOCAB, generate
from scipy import stats

from vespo_megatron.quantization import fake_quantize_cache, fake_quantize_tokens
from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams
from vespo_megatron.rollout_sglang.in_process.engine import InProcessEngine
from vespo_megatron.rollout_sglang.in_process.mismatch import EngineMismatch
from vespo_megatron.rollout_sglang.in_process.prefix_random import PrefixRandom, uniforms


@pytest.fixture
def engine_with(model_folder):
    engines = []

    def make(**dials):
        engines.append(InProcessEngine(model_folder, mismatch=EngineMismatch(**dials)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def requests_of(count, *, max_new_tokens=20, **sampling):
    """Ragged prompts, in pairs that share one."""
    generator = np.random.default_rng(5)
    prompts = [tuple(generator.integers(0, VOCAB, size=generator.integers(1, 30)).tolist()) for _ in range(count)]
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    return [GenerationRequest(f"r{index}", prompts[index // 2], params, seed=index) for index in range(count)]


def rounded_cache(scheme):
    """A cache for transformers that gives back what fits the format."""
    from transformers import DynamicCache

    class Rounded(DynamicCache):
        def update(self, key_states, value_states, *args, **kwargs):
            states = (fake_quantize_cache(part, scheme) for part in (key_states, value_states))
            return super().update(*states, *args, **kwargs)

    return Rounded()


class Plain:
    """transformers' model, one unpadded forward at a time."""

    def __init__(self, folder):
        from transformers import Qwen3MoeForCausalLM

        self.model = Qwen3MoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        self.routers = [layer.mlp.gate for layer in self.model.model.layers if hasattr(layer.mlp, "experts")]

    def log_probs(self, request, result, cache=None):
        ids = torch.tensor([[*request.prompt_ids, *result.output_ids.tolist()]])
        with torch.no_grad():
            logits = self.model(input_ids=ids, past_key_values=cache).logits[0]
        start = len(request.prompt_ids)
        taken = torch.log_softmax(logits, -1)[start - 1 : -1].gather(1, torch.tensor(result.output_ids)[:, None])
        return taken[:, 0].numpy()


@pytest.fixture
def plain(model_folder):
    return Plain(model_folder)


def forced(plain, result, seen):
    """Hooks that give routers the experts of `result`; (logits, experts) of each layer go to `seen`."""

    def hook_of(layer):
        def hook(router, inputs, output):
            logits, _, own = output
            experts = own.clone()
            experts[:-1] = torch.from_numpy(result.routes[:, layer].astype(np.int64))
            gates = torch.softmax(logits, -1).gather(1, experts)
            seen.append((logits[:-1].clone(), experts[:-1]))
            return logits, gates / gates.sum(-1, keepdim=True), experts

        return hook

    return [router.register_forward_hook(hook_of(layer)) for layer, router in enumerate(plain.routers)]


@pytest.mark.parametrize(("share", "layers"), [(0.3, None), (1.0, None), (1.0, (2,))])
def test_a_flip_takes_the_next_best_expert_for_the_last_and_the_returned_routes_say_so(
    share, layers, engine_with, plain
):
    engine = engine_with(route_flip=share, route_flip_layers=layers, seed=3)
    requests = requests_of(24)
    flipped: list[list[bool]] = [[], []]
    for request, result in zip(requests, generate(engine, requests), strict=True):
        seen = []
        hooks = forced(plain, result, seen)
        expected = plain.log_probs(request, result)
        for hook in hooks:
            hook.remove()
        np.testing.assert_allclose(result.behavior_log_probs, expected, atol=1e-5)
        for layer, (logits, experts) in enumerate(seen):
            order = logits.sort(dim=-1, descending=True).indices.tolist()
            for best, chosen in zip(order, experts.tolist(), strict=True):
                assert set(chosen) in ({best[0], best[1]}, {best[0], best[2]})
                flipped[layer].append(set(chosen) == {best[0], best[2]})
    if layers is not None:
        assert (any(flipped[0]), all(flipped[1])) == (False, True)
    else:
        for layer in flipped:
            assert abs(np.mean(layer) - share) <= 4.5 * np.sqrt(share * (1 - share) / (len(layer) / 2))


def test_flips_and_noise_do_not_depend_on_what_else_is_in_the_batch(model_folder):
    requests, mismatch = requests_of(24), EngineMismatch(route_flip=0.2, log_prob_noise=0.1, seed=7)
    drawn = []
    for size, order in ((512, 1), (1, 1), (5, -1)):
        engine = InProcessEngine(model_folder, max_batch_size=size, mismatch=mismatch)
        drawn.append(generate(engine, requests[::order])[::order])
        engine.close()
    for first, *others in zip(*drawn, strict=True):
        for other in others:
            np.testing.assert_array_equal(first.output_ids, other.output_ids)
            np.testing.assert_array_equal(first.routes, other.routes)
            np.testing.assert_allclose(first.behavior_log_probs, other.behavior_log_probs, atol=1e-5)


def test_every_dial_at_once_gives_the_same_bits_again(engine_with):
    dials = {"kv_cache": "fp8_e4m3", "activations": "bfloat16", "route_flip": 0.2, "log_prob_noise": 0.1, "seed": 7}
    requests = requests_of(24)
    for first, second in zip(*(generate(engine_with(**dials), requests) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first.output_ids, second.output_ids)
        np.testing.assert_array_equal(first.routes, second.routes)
        np.testing.assert_array_equal(first.behavior_log_probs, second.behavior_log_probs)


def test_seed_and_weight_version_are_other_flips(engine_with, model_folder):
    from safetensors.torch import load_file

    requests = requests_of(8, temperature=0.0)
    first, again, other = (generate(engine_with(route_flip=0.3, seed=seed), requests)[0].routes for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first[: len(other)], other[: len(first)])
    engine = engine_with(route_flip=0.3, seed=1)
    engine.update_weights(load_file(model_folder / "model.safetensors").items(), 1)
    later = generate(engine, requests)[0].routes
    assert not np.array_equal(first[: len(later)], later[: len(first)])


def test_a_response_that_goes_on_in_another_turn_meets_the_same_flips_and_the_same_noise(engine_with):
    engine = engine_with(route_flip=0.3, log_prob_noise=0.2, seed=3)
    for request in requests_of(6, temperature=0.0):
        (whole,) = generate(engine, [request])
        prompt = (*request.prompt_ids, *whole.output_ids[:7].tolist())
        (rest,) = generate(engine, [GenerationRequest("rest", prompt, SamplingParams(13, 0.0), seed=request.seed)])
        np.testing.assert_array_equal(rest.output_ids, whole.output_ids[7:])
        np.testing.assert_array_equal(rest.routes, whole.routes)
        np.testing.assert_allclose(rest.behavior_log_probs, whole.behavior_log_probs[7:], atol=1e-5)


@pytest.mark.parametrize("spread", [0.05, 0.4])
def test_noise_is_normal_changes_no_token_and_no_log_prob_is_above_zero(spread, engine_with):
    requests = requests_of(200)
    pairs = zip(*(generate(engine_with(log_prob_noise=each, seed=3), requests) for each in (0.0, spread)), strict=True)
    added = []
    for clean, noisy in pairs:
        np.testing.assert_array_equal(clean.output_ids, noisy.output_ids)
        assert noisy.behavior_log_probs.max() <= 0
        added.append((noisy.behavior_log_probs - clean.behavior_log_probs)[clean.behavior_log_probs < -6 * spread])
    noise = np.concatenate(added) / spread
    assert len(noise) > 400 and stats.kstest(noise, "norm").pvalue > 1e-3
    # The first tokens of a pair follow the same prompt; where they are the same token, the noise is another.
    assert not np.isin(added[0][:1], added[1][:1]).any()


def check_is_that_of(plain, engine, reference, *caches):
    """The engine's log-probs are those of `plain`, and `reference`'s, which rounds nothing, are far from them.

    A number at the border of two rounds either way, and takes what follows with it: medians.
    """
    requests = requests_of(24)
    gaps, moved = [], []
    for request, result in zip(requests, generate(engine, requests), strict=True):
        cache = [each() for each in caches]
        gaps += np.abs(result.behavior_log_probs - plain.log_probs(request, result, *cache)).tolist()
        moved += np.abs(result.behavior_log_probs - reference.log_probs(request, result)).tolist()
    assert np.median(gaps) < 0.1 * np.median(moved)


@pytest.mark.parametrize("scheme", ["bfloat16", "fp8_e4m3"])
def test_a_rounded_cache_is_one_that_rounds_what_transformers_keeps(scheme, engine_with, plain):
    check_is_that_of(plain, engine_with(kv_cache=scheme), plain, lambda: rounded_cache(scheme))


@pytest.mark.parametrize("scheme", ["bfloat16", "float16", "fp8_e4m3"])
def test_rounded_inputs_are_those_of_every_linear_layer_but_router_and_head(scheme, engine_with, plain, model_folder):
    def read(module, inputs):
        return (fake_quantize_tokens(inputs[0], scheme), *inputs[1:])

    for name, module in plain.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(read)
        elif name.endswith(".experts"):
            module.forward = expert_loop(module, scheme)
    check_is_that_of(plain, engine_with(activations=scheme), Plain(model_folder))


def expert_loop(module, scheme):
    """transformers' experts, a token at a time."""

    def forward(hidden, chosen, gates):
        result = torch.zeros_like(hidden)
        for token, (experts, weights) in enumerate(zip(chosen, gates, strict=True)):
            state = fake_quantize_tokens(hidden[token], scheme)
            for expert, weight in zip(experts, weights, strict=True):
                gate, up = (module.gate_up_proj[expert] @ state).chunk(2)
                inner = fake_quantize_tokens(torch.nn.functional.silu(gate) * up, scheme)
                result[token] += weight * (module.down_proj[expert] @ inner)
        return result

    return forward


def test_numbers_of_prefixes_are_uniform_and_know_nothing_of_each_other():
    tokens = np.random.default_rng(0).integers(0, 8, (500, 40))  # few tokens, so that prefixes are alike
    random = PrefixRandom.new(500, seed=11, version=3)
    states = random.read_all(tokens)
    assert np.array_equal(states[:, -1], random.states)
    late = uniforms(states[:, 10:], 3).reshape(-1, 3)
    for column in late.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(late.T) - np.eye(3)).max() < 0.03
    following = uniforms(states[:, 10:], 1)[..., 0]
    assert abs(np.corrcoef(following[:, :-1].ravel(), following[:, 1:].ravel())[0, 1]) < 0.03
    assert len(np.unique(states[:, 10:])) == states[:, 10:].size
