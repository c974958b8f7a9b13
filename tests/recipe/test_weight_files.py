"""Headers and indexes of weight files are taken or refused by one message, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.weight_files import INDEX, check_safetensors, weight_files

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({"data_offsets": st.lists(ANY_JSON, max_size=3) | ANY_JSON})
DEEP = b"[" * 100_000


def refused_or_taken(look, path):
    try:
        look(path)
    except UserError as error:
        assert str(path) in str(error) or path.name in str(error)


@given(
    content=ANY_JSON | st.dictionaries(st.text(max_size=5), ENTRY | ANY_JSON, max_size=3), rest=st.binary(max_size=9)
)
def test_any_header_and_index_is_taken_or_refused(tmp_path_factory, content, rest):
    folder = tmp_path_factory.getbasetemp()
    header = json.dumps(content).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + rest)
    refused_or_taken(check_safetensors, path)
    for index in (content, {"weight_map": content}):
        (folder / INDEX).write_text(json.dumps(index))
        refused_or_taken(lambda path: weight_files(path.parent), folder / INDEX)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", ".", "..", "a/b"])
def test_an_index_names_files_beside_it(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="weight_map: tensor → name of a file beside it"):
        weight_files(tmp_path)


def test_a_claim_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    """3 GiB of header in a file that has them, as a hole."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((3 << 30).to_bytes(8, "little"))
        file.truncate((3 << 30) + 8)
    monkeypatch.setattr("vespo_megatron.recipe.weight_files.parse_json", lambda text: pytest.fail("it was read"))
    with pytest.raises(UserError, match="a header of 3221225472 bytes, where 100000000 are the most"):
        check_safetensors(path)


@pytest.mark.parametrize("content", [DEEP, b"\xff\xfe", b"", b"{"])
def test_what_is_no_json_is_damaged(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(UserError, match="is damaged"):
        check_safetensors(path)
    Path(tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        weight_files(tmp_path)
