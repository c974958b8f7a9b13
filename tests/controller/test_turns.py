"""The turn loop: tokens stay as they are from first to last, and every token is known as drawn or observed."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer, template
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine, recipe, record, request

from vespo_megatron.controller.sampler import to_sample
from vespo_megatron.controller.turns import TurnLoop, describe_turns
from vespo_megatron.environments import EnvironmentPool
from vespo_megatron.errors import UserError

THINKING = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- if loop.last %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content }}
    {%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
"""Qwen3's form with thinking: what earlier turns thought is left out of a later prompt, and only a last turn has a mark
of having thought nothing. Tokenised again, an earlier turn would be another one."""
TEMPLATES = {name: template(name) for name in ("qwen3", "llama3", "glm")} | {"thinking": THINKING}
END_OF = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "glm": "<|end|>", "thinking": "<|im_end|>"}
TOKENIZERS = {name: byte_tokenizer(text) for name, text in TEMPLATES.items()}


def draw(recipe, tokenizer, script, names, records=None, prompt=(5, 6)):
    engine, pool = ScriptedEngine(script), EnvironmentPool(recipe.env)
    loop = TurnLoop(recipe, tokenizer, pool, engine.generate)
    longest = recipe.policy.generation.max_new_tokens
    records = records or [record(prompt) for _ in names]
    try:
        requests = [request(name, prompt, longest) for name in names]
        return asyncio.run(asyncio.wait_for(loop.draw(requests, records), 60)), engine
    finally:
        pool.close()


def ended(tokenizer, name, text):
    return tokenizer(text + END_OF[name], add_special_tokens=False)["input_ids"]


words = st.text(st.sampled_from("ab \n☂{<|"), max_size=6)
thinking = st.tuples(words, words).map(lambda pair: f"<think>\n{pair[0]}\n</think>\n\n{pair[1]}")
drawn_text = st.one_of(words, thinking, st.just("<think>never ends"), st.just("</think>"))
drawn_ids = st.lists(st.integers(0, 262), min_size=1, max_size=8)


@given(
    st.sampled_from(sorted(TEMPLATES)), st.lists(st.one_of(drawn_text, drawn_ids), min_size=1, max_size=4), st.data()
)
def test_every_turn_s_prompt_is_all_that_was_before_it_token_by_token(name, turns, data):
    """Whatever was drawn: thinking, tokens no text has, marks of templates; ended by the template's mark or another."""
    tokenizer = TOKENIZERS[name]
    script = []
    for turn in turns:
        ids = tokenizer(turn, add_special_tokens=False)["input_ids"] if isinstance(turn, str) else turn
        end = data.draw(st.sampled_from([END_OF[name], "<|end|>", "<|bos|>"]))
        script.append(([*ids, tokenizer.convert_tokens_to_ids(end)], "stop"))
    role = data.draw(st.sampled_from(["tool", "user"]))
    settings = recipe(env__options={"turns": len(turns), "role": role}, grpo__max_rollout_turns=9)
    (dialogue,), engine = draw(settings, tokenizer, {"r": script}, ["r"])
    prompts, expected, mask, turn_of = engine.prompts("r"), [5, 6], [], []
    assert len(prompts) == len(turns)
    for number, (prompt, (ids, _)) in enumerate(zip(prompts, script, strict=True)):
        assert list(prompt[: len(expected)]) == expected
        observed = len(prompt) - len(expected)
        assert (observed > 0) == (number > 0)
        mask += [False] * observed + [True] * len(ids)
        turn_of += [-1] * observed + [number] * len(ids)
        expected = [*prompt, *ids]
    sample = to_sample(dialogue, record())
    assert [*sample.prompt_ids.tolist(), *sample.response_ids.tolist()] == expected
    assert sample.loss_mask.tolist() == sample.drawn.tolist() == mask and sample.turns.tolist() == turn_of
    assert sample.behavior_log_probs.tolist() == [-0.25 if drawn else 0.0 for drawn in mask]
    assert sample.turn_rewards.tolist() == list(range(len(turns)))


BEHIND = {
    "qwen3": "\n<|im_start|>user\n<tool_response>\n2 tokens\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "thinking": "\n<|im_start|>user\n<tool_response>\n2 tokens\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n<think>\n",
    "llama3": "<|start_header_id|>tool<|end_header_id|>\n\n2 tokens<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "glm": "<|observation|>\n2 tokens<|assistant|>",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_is_observed_is_what_the_template_writes_behind_a_turn(name):
    tokenizer = TOKENIZERS[name]
    script = {"r": [(ended(tokenizer, name, "a"), "stop")] * 2}
    (dialogue,), _ = draw(recipe(env__options={"turns": 2}), tokenizer, script, ["r"])
    observed = dialogue.result.output_ids[dialogue.turns < 0]
    assert tokenizer.decode(observed) == BEHIND[name]


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_where_a_template_keeps_earlier_turns_all_is_as_it_would_be_written_at_once(name):
    tokenizer = TOKENIZERS[name]
    asked = [{"role": "user", "content": "how long?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    texts = ["one", "and two", "three."]
    script = {"r": [(ended(tokenizer, name, text), "stop") for text in texts]}
    (dialogue,), _ = draw(recipe(), tokenizer, script, ["r"], prompt=prompt)
    whole = [*asked]
    for text in texts:
        whole.append({"role": "assistant", "content": text})
        whole.append({"role": "tool", "content": f"{len(text) + 1} tokens"})
    ids = tokenizer.apply_chat_template(whole[:-1], tokenize=True, return_dict=False)
    found = [*prompt, *dialogue.result.output_ids.tolist()]
    assert found == ids[: len(found)] and len(ids) - len(found) <= 1, "but for the line's end behind the last mark"


def test_token_ids_and_texts_are_taken_as_they_are_and_an_environment_may_have_a_prompt_of_its_own():
    tokenizer = TOKENIZERS["qwen3"]
    script = {"r": [([4, 1], "stop"), ([3, 1], "stop")]}
    settings = recipe("made_up_environments:Ids", env__options={"prompt": [7, 7, 7], "said": [9, 8]})
    (dialogue,), engine = draw(settings, tokenizer, script, ["r"])
    assert dialogue.prompt_ids == (7, 7, 7) and dialogue.result.output_ids.tolist() == [4, 1, 9, 8, 3, 1]
    assert engine.prompts("r") == [(7, 7, 7), (7, 7, 7, 4, 1, 9, 8)] and dialogue.rewards.tolist() == [0.5, 0.5]
    sample = to_sample(dialogue, record())
    assert sample.prompt_ids.tolist() == [7, 7, 7] and sample.routes.shape[0] == 3 + 6 - 1


@pytest.mark.parametrize(
    ("values", "turns", "reason", "cut", "truncated"),
    [
        ({}, 3, "stop", 0, 0),
        ({"grpo.max_rollout_turns": 2}, 2, "length", 1, 0),
        ({"env.max_tokens_per_turn": 2}, 1, "length", 0, 1),
        ({"policy.generation.max_new_tokens": 7}, 3, "length", 0, 1),
        ({"policy.generation.max_new_tokens": 6}, 2, "length", 1, 0),
        ({"policy.max_total_sequence_length": 7, "data.max_input_seq_length": 2}, 1, "length", 1, 0),
    ],
    ids=["none", "turns", "tokens of a turn", "all tokens", "all tokens, between turns", "context"],
)
def test_whatever_limit_ends_a_response_it_is_truncated_and_nothing_is_observed_that_no_turn_follows(
    values, turns, reason, cut, truncated
):
    tokenizer = TOKENIZERS["qwen3"]
    script = {"r": [([4, 5, 1], "stop")] * 3}
    settings = recipe(env__options={"role": "user"}).with_values(values)
    (dialogue,), engine = draw(settings, tokenizer, script, ["r"])
    assert (len(engine.prompts("r")), dialogue.result.finish_reason) == (turns, reason)
    assert dialogue.facts == {"tool_errors": float(turns // 2), "truncated_turns": truncated, "ended_by_limit": cut}
    assert dialogue.turns[-1] == turns - 1 and len(dialogue.result.routes) == 2 + len(dialogue.turns) - 1


@pytest.mark.parametrize("backend", ["in_process", "sglang"])
def test_turns_are_taken_together_where_the_engine_answers_one_call_after_another(backend):
    tokenizer = TOKENIZERS["qwen3"]
    script = {"a": [([4, 1], "stop")] * 3, "b": [([4, 1], "stop")] * 3, "c": [([4, 1], "length")] * 3}
    settings = recipe(policy__generation__backend=backend)
    dialogues, engine = draw(settings, tokenizer, script, ["a", "b", "c"])
    sizes = [len(call) for call in engine.calls]
    assert sizes == ([3, 2, 2] if backend == "in_process" else [1] * 7)
    assert [len(dialogue.rewards) for dialogue in dialogues] == [3, 3, 1]
    seeds = [request.seed for call in engine.calls for request in call if request.request_id.partition("/")[2]]
    assert len(set(seeds)) == len(seeds) == 4, "every turn after the first has a seed of its own"


def test_no_more_conversations_are_under_way_than_there_are_environments():
    tokenizer = TOKENIZERS["qwen3"]
    names = list("abcde")
    script = {name: [([4, 1], "stop")] * 3 for name in names}
    settings = recipe(env__num_environments=2, policy__generation__backend="in_process")
    dialogues, engine = draw(settings, tokenizer, script, names)
    assert [len(call) for call in engine.calls] == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert [dialogue.result.request_id for dialogue in dialogues] == names


@pytest.mark.parametrize(
    ("what", "kind", "turns"), [("raise 1", "error", 2), ("raise reset", "error", 0), ("sleep 1", "timeout", 2)]
)
def test_an_environment_that_does_not_answer_ends_its_response_and_no_other(what, kind, turns):
    tokenizer = TOKENIZERS["qwen3"]
    script = {name: [([4, 1], "stop")] * 3 for name in ("bad", "good")}
    settings = recipe(
        "made_up_environments:Hostile",
        env__num_environments=2,
        env__turn_timeout=1.0,
        policy__generation__backend="in_process",
    )
    records = [record(truth=what), record(truth="", name="p1")]
    (bad, good), _ = draw(settings, tokenizer, script, ["bad", "good"], records)
    assert (bad.unscored, len(bad.rewards), bool(bad.failure)) == (kind, turns, kind == "error")
    assert (good.unscored, good.rewards.tolist(), good.result.finish_reason) == ("", [1.0, 1.0, 1.0], "stop")
    sample = to_sample(bad, records[0])
    assert sample.loss_mask.sum() == 2 * turns and sample.prompt_ids.tolist() == [5, 6]


def test_an_environment_that_raises_on_every_prompt_ends_the_run():
    settings = recipe("made_up_environments:Hostile", policy__generation__backend="in_process")
    records = [record(truth="raise reset", name=name) for name in ("p0", "p1")]
    with pytest.raises(UserError, match="made_up_environments:Hostile raised on each of 2 responses"):
        draw(settings, TOKENIZERS["qwen3"], {}, ["a", "b"], records)


def test_a_prompt_of_an_environment_that_is_too_long_is_an_error_that_names_it():
    settings = recipe("made_up_environments:Ids", data__max_input_seq_length=2)
    with pytest.raises(UserError, match="env.class, p0: the prompt has 3 tokens"):
        draw(settings, TOKENIZERS["qwen3"], {}, ["r"])


@pytest.mark.parametrize("prompt", [[], ""])
def test_an_empty_prompt_of_an_environment_is_an_error(prompt):
    settings = recipe("made_up_environments:Ids", env__options={"prompt": prompt})
    with pytest.raises(UserError, match="empty"):
        draw(settings, TOKENIZERS["qwen3"], {}, ["r"])


@pytest.mark.parametrize("said", [[], ""])
def test_an_environment_that_is_not_done_and_says_nothing_ends_the_response(said):
    settings = recipe("made_up_environments:Ids", env__options={"said": said})
    (dialogue,), engine = draw(settings, TOKENIZERS["qwen3"], {"r": [([4, 1], "stop")]}, ["r"])
    assert len(engine.calls) == 1 and dialogue.facts["ended_by_limit"] == 1


def test_metrics_of_turns_are_those_counted_by_hand():
    tokenizer = TOKENIZERS["qwen3"]
    script = {"a": [([4, 1], "stop"), ([4, 4, 1], "stop"), ([1], "stop")], "b": [([4, 4, 4], "length")]}
    dialogues, _ = draw(recipe("made_up_environments:Ids", env__options={"turns": 3}), tokenizer, script, ["a", "b"])
    metrics = describe_turns([to_sample(dialogue, record()) for dialogue in dialogues])
    assert metrics == {
        "turns/mean": 2.0,
        "turns/max": 3.0,
        "turns/tokens_mean": pytest.approx(9 / 4),
        "turns/observed_tokens_mean": 2.0,
        "turns/truncated_fraction": 0.25,
        "turns/limit_fraction": 0.0,
        "turns/tool_errors": 0.0,
    }
    assert describe_turns([]) == {} and np.isfinite(list(metrics.values())).all()
