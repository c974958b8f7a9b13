"""Coverage-guided fuzzing of the reply parser: any JSON a server may send is a result or a `UserError`, nothing else.

`python tests/fuzz/fuzz_reply.py -max_total_time=600 CORPUS` (libFuzzer's options; `make fuzz` runs it). A finding is
written as `crash-*`; pass that file as the only argument to run it again.
"""

from __future__ import annotations

import base64
import json
import sys

import atheris

with atheris.instrument_imports(include=["vespo_megatron"]):
    from vespo_megatron.errors import UserError
    from vespo_megatron.recipe.model_shape import shape_of_config
    from vespo_megatron.rollout_sglang.client.reply import parse_reply
    from vespo_megatron.rollout_sglang.engine import GenerationRequest, SamplingParams

import numpy as np

SHAPE = shape_of_config(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 16,
        "max_position_embeddings": 16,
        "num_hidden_layers": 2,
        "hidden_size": 4,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 4,
        "moe_intermediate_size": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
)
REQUESTS = [GenerationRequest("r", (5, 6), SamplingParams(max_new_tokens=3, top_k=top_k)) for top_k in (-1, 2)]
ROUTES = base64.b64encode(np.array([[[0, 1], [2, 3]]] * 3, dtype="<i4").tobytes()).decode()
GOOD = {
    "output_ids": [3, 4],
    "meta_info": {
        "id": "r",
        "finish_reason": {"type": "stop"},
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "weight_version": "1",
        "weight_versions": [{"version": "1", "start": 0, "end": 2}],
        "output_token_logprobs": [[-0.5, 3, None], [-1.5, 4, None]],
        "routed_experts": ROUTES,
        "output_token_sampling_mask": [[3, 7], [4]],
        "output_token_sampling_logprobs": [-0.25, 0.0],
    },
}
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    15,
    16,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.5,
    1e308,
    -1e39,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "1",
    "1.0",
    "x",
    "stop",
    "length",
    "abort",
    ROUTES,
    ROUTES[:-4],
    "AAAA",
    "\udc80",
    [],
    [[]],
    {},
    [None],
    [0],
    [3, 4],
    [-0.5, 3],
    {"type": "stop"},
    {"type": []},
    {"type": {}},
)
"""What a JSON decoder can hand over and a parser may not expect."""


def mutate(value, data: atheris.FuzzedDataProvider):
    """A copy of `value` with parts replaced, dropped, doubled or reordered, as the bytes say."""
    choice = data.ConsumeIntInRange(0, 15)  # 0, also once the bytes have run out, and what is not named: no change
    if choice == 1:
        return VALUES[data.ConsumeIntInRange(0, len(VALUES) - 1)]
    if choice == 2:
        return data.ConsumeUnicode(8)
    if choice == 3:
        return data.ConsumeInt(9)
    if choice == 4:
        return data.ConsumeFloat()
    if isinstance(value, dict):
        copy = {name: mutate(part, data) for name, part in value.items()}
        if choice == 5:
            copy.pop(list(copy)[data.ConsumeIntInRange(0, len(copy) - 1)])
        return copy
    if isinstance(value, list):
        copy = [mutate(part, data) for part in value]
        return {6: copy * 2, 7: copy[:-1], 8: copy[::-1]}.get(choice, copy)
    return value


def one_input(raw: bytes) -> None:
    """Half the inputs are JSON of their own, half are a good reply with parts changed."""
    data = atheris.FuzzedDataProvider(raw)
    return_routes, keep_bad_numbers, truncated = data.ConsumeBool(), data.ConsumeBool(), data.ConsumeBool()
    if data.ConsumeBool():
        reply = mutate(GOOD, data)
    else:
        try:
            reply = json.loads(data.ConsumeUnicodeNoSurrogates(1 << 16))
        except (ValueError, RecursionError):
            return
    try:
        result = parse_reply(
            reply,
            REQUESTS[truncated],
            SHAPE,
            sent_as="r",
            server="http://127.0.0.1:1",
            return_routes=return_routes,
            context_length=16,
            keep_bad_numbers=keep_bad_numbers,
        )
    except UserError:
        return
    length = len(result.output_ids)
    assert length == len(result.behavior_log_probs) == len(result.weight_versions) <= 3
    assert keep_bad_numbers or np.isfinite(result.behavior_log_probs).all()
    assert result.routes is None or result.routes.shape == (length + 1, 2, 2)
    assert (result.sampling_mask is not None) == truncated
    assert not truncated or result.sampling_mask.contains(result.output_ids).all()


if __name__ == "__main__":
    np.seterr(all="ignore")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
