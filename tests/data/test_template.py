"""Token ids are those of `apply_chat_template` called by hand: Qwen3's, Llama-3's and GLM's forms, thinking, tools."""

from __future__ import annotations

import json

import pytest
from byte_tokenizer import byte_tokenizer, template
from model_config import write_config

from vespo_megatron.data.prompts import load_prompts
from vespo_megatron.data.template import PromptTemplate
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import DatasetConfig, Recipe

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 + 2?"}],
    [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 3 + 3? ☂"},
    ],
]


def load(tmp_path, rows, tokenizer, **values):
    write_config(tmp_path, vocab_size=512)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe().with_values({"policy.model_name": str(tmp_path)} | values)
    return load_prompts(DatasetConfig(path=str(tmp_path / "rows.jsonl")), recipe, tokenizer)


def row(prompt, **more):
    return {"prompt": prompt, "data_source": "s", "reward_model": {"ground_truth": "4"}} | more


def by_hand(tokenizer, messages, **kwargs):
    made = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **kwargs
    )
    return tuple(made)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "glm"])
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("system", [None, "You add numbers."])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_ids_are_those_of_the_template_by_hand(tmp_path, name, thinking, system, tools):
    tokenizer = byte_tokenizer(template(name))
    options = {} if thinking is None else {"enable_thinking": thinking}
    values = {"policy.tokenizer.chat_template_kwargs": options, "data.max_input_seq_length": 2000}
    if system:
        (tmp_path / "system.txt").write_text(system)
        values["data.system_prompt_file"] = str(tmp_path / "system.txt")
    more = {"tools": tools} if tools else {}
    found = load(tmp_path, [row(chat, **more) for chat in CHATS], tokenizer, **values)
    for record, chat in zip(found, CHATS, strict=True):
        whole = chat
        if system and chat[0]["role"] != "system":
            whole = [{"role": "system", "content": system}, *chat]
        wanted = by_hand(tokenizer, whole, **options, **({"tools": tools} if tools else {}))
        assert record.prompt_ids == wanted, tokenizer.decode(record.prompt_ids)


def test_some_rows_have_tools_and_some_are_texts(tmp_path):
    tokenizer = byte_tokenizer(template("qwen3"))
    rows = [row(CHATS[0], tools=json.dumps([TOOL])), row(CHATS[1], tools="[]"), row(CHATS[2])]
    found = load(tmp_path, rows, tokenizer, **{"data.max_input_seq_length": 2000})
    assert found[0].prompt_ids == by_hand(tokenizer, CHATS[0], tools=[TOOL])
    assert [found[1].prompt_ids, found[2].prompt_ids] == [by_hand(tokenizer, chat) for chat in CHATS[1:]]
    texts = load(tmp_path, [row("2 + 2"), row("☂")], tokenizer)
    assert [tokenizer.decode(record.prompt_ids) for record in texts] == ["2 + 2", "☂"]


def test_a_turn_that_calls_a_tool_and_says_nothing(tmp_path):
    tokenizer = byte_tokenizer(template("qwen3"))
    chat = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        {"role": "tool", "content": "4"},
    ]
    (record,) = load(tmp_path, [row(chat)], tokenizer)
    assert record.prompt_ids == by_hand(tokenizer, [chat[0], chat[1] | {"content": ""}, chat[2]])


def test_a_file_s_template_in_place_of_the_tokenizer_s(tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    tokenizer = byte_tokenizer(None)
    (record,) = load(
        tmp_path, [row(CHATS[1])], tokenizer, **{"policy.tokenizer.chat_template_file": str(tmp_path / "own.jinja")}
    )
    assert tokenizer.decode(record.prompt_ids) == "[be brief][2 + 2?]"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy.tokenizer.chat_template_file": "nowhere.jinja"}, "chat_template_file: nowhere.jinja: cannot be read"),
        ({"data.system_prompt_file": "nowhere.txt"}, "data.system_prompt_file: nowhere.txt: cannot be read"),
        ({"policy.tokenizer.chat_template_kwargs": {"a": 1}}, "prompts go through no template"),
    ],
)
def test_settings_that_nothing_takes_are_named(values, message):
    with pytest.raises(UserError, match=message):
        PromptTemplate.of(Recipe().with_values(values), byte_tokenizer(None))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a message has a part 'image'"),
        ([{"role": "user"}], "row 1: a message is"),
        ([{"role": "user", "content": None}], "row 1: a message is"),
        ([], r"row 1: the prompt is \[\]"),
    ],
)
def test_what_no_template_may_see_is_named_with_its_row(tmp_path, prompt, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [row(CHATS[0]), row(prompt)], byte_tokenizer(template("qwen3")))


def test_a_template_that_raises_names_the_row(tmp_path):
    picky = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(UserError, match="row 1: the tokenizer's chat template does not take the prompt .*users first"):
        load(tmp_path, [row(CHATS[0]), row(CHATS[1])], byte_tokenizer(picky))
