"""SGLang's scores of a prompt: what is asked for, and every way the reply can be wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.client.check import Check
from vespo_megatron.rollout_sglang.client.scoring import parse_scores, scoring_body

RESPONSE = [7, 41, 2]
REPLY = {
    "output_ids": [],
    "meta_info": {"input_token_logprobs": [[None, 4, None], [-0.25, 7, None], [-2.5, 41, None], [0, 2, None]]},
}
"""As 0.5.23 gave it, for a prompt that ends in token 4."""


def test_the_whole_sequence_is_a_prompt_and_nothing_is_drawn():
    body = scoring_body([3, 20, 4], RESPONSE)
    assert body["input_ids"] == [3, 20, 4, 7, 41, 2] and body["sampling_params"]["max_new_tokens"] == 0
    assert body["logprob_start_len"] == 2 and body["return_logprob"] is True
    scores = parse_scores(Check("x"), REPLY, RESPONSE, 100)
    assert scores.dtype == np.float32 and scores.tolist() == [-0.25, -2.5, 0.0]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda entries: entries.pop(), "the number of"),
        (lambda entries: entries[2].__setitem__(1, 40), "the token of input_token_logprobs 2"),
        (lambda entries: entries[1].__setitem__(0, None), "input_token_logprobs 1 has no log-prob"),
        (lambda entries: entries.__setitem__(3, 5), "input_token_logprobs 3 is a int"),
        (lambda entries: entries.__setitem__(3, [1.0]), "is short"),
    ],
)
def test_a_wrong_reply_is_named(change, said):
    reply = copy.deepcopy(REPLY)
    change(reply["meta_info"]["input_token_logprobs"])
    with pytest.raises(UserError, match=said):
        parse_scores(Check("x"), reply, RESPONSE, 100)


def test_the_last_token_of_the_vocabulary_has_no_score():
    reply = copy.deepcopy(REPLY)
    reply["meta_info"]["input_token_logprobs"][2] = [-9.0, 0, None]
    np.testing.assert_array_equal(parse_scores(Check("x"), reply, RESPONSE, 42), np.float32([-0.25, np.nan, 0.0]))


@pytest.mark.parametrize("reply", [None, [], {}, {"meta_info": 3}, {"meta_info": {"input_token_logprobs": {}}}])
def test_a_reply_of_another_shape_is_named(reply):
    with pytest.raises(UserError, match="an object|a list"):
        parse_scores(Check("x"), reply, RESPONSE, 100)
