"""What Transformer Engine's attention and rotary embedding are given of a packed micro-batch."""

from __future__ import annotations

import pytest
import te_work
import torch
from test_layout_parity import CP, SP, TP

pytestmark = pytest.mark.parallel
LAYERS = 4
LAYOUTS = {
    "one": (1, {}),
    "tp2_sp": (2, {TP: 2, SP: True}),
    "cp2": (2, {CP: 2}),
    "fused": (1, {"apply_rope_fusion": True}),
    "fused cp2": (2, {"apply_rope_fusion": True, CP: 2}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def seen(request, te_workers, checkpoint):
    world_size, layout = LAYOUTS[request.param]
    run = {"layers": "te", "work": te_work.attention_calls, "folder": checkpoint, "layout": layout}
    return layout, te_workers.run(te_work.with_layers, world_size, **run)


def test_offsets_are_whole_int32_and_multiples_of_twice_the_context_ranks(seen):
    layout, answers = seen
    for answer in answers:
        assert len(answer["attention"]) == LAYERS * len(answer["cu_seqlens"])
        for index, call in enumerate(answer["attention"]):
            expected = answer["cu_seqlens"][index // LAYERS]
            assert torch.equal(call["cu_seqlens"], expected) and call["cu_seqlens"].dtype == torch.int32
            assert expected[-1] == answer["tokens"][index // LAYERS] * layout.get(CP, 1)
            assert call["max_seqlen"] == expected.diff().max()
            assert layout.get(CP, 1) == 1 or not (expected % (2 * layout[CP])).any()


def test_the_mask_is_causal_inside_each_sequence(seen):
    assert {call["mask"] for answer in seen[1] for call in answer["attention"]} == {"padding_causal"}


def test_no_layer_compares_offsets_or_fetches_them(seen):
    """Unfused rotary embedding that sees them is switched off in `te_work`; the fused one has them on the device."""
    layout, answers = seen
    for answer in answers:
        assert not any(call["compares_offsets"] for call in answer["attention"])
        fused = 2 * len(answer["attention"]) if layout.get("apply_rope_fusion") else 0  # of queries and of keys
        assert len(answer["rope"]) == fused


def test_routers_multiply_by_its_gemm_forward_and_backward(seen):
    assert all(answer["products"] == {"TN", "NN", "NT"} for answer in seen[1])
