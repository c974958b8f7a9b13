"""What must not leak, and what must not be let in."""

from __future__ import annotations

import ast
import base64
import os
import pickle
from itertools import chain
from pathlib import Path

import pytest
from fault_server import FaultServer
from rollout_helpers import generate, make_requests

import vespo_megatron.rollout_sglang
from vespo_megatron import cli
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe, save_recipe
from vespo_megatron.recipe.rules import problems
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.rollout_sglang import api_key as secrets
from vespo_megatron.rollout_sglang import connect
from vespo_megatron.rollout_sglang.server.flags import check_server_args

KEY = "a-key-nobody-may-see"


@pytest.fixture(autouse=True)
def no_key_left(monkeypatch):
    monkeypatch.setenv(secrets.VARIABLE, "")


def with_key(recipe, key=KEY):
    return recipe.with_values({"policy.generation.sglang_cfg.api_key": key})


def test_servers_listen_on_the_loopback_unless_told_otherwise():
    assert Recipe().policy.generation.sglang_cfg.host == "127.0.0.1"


def test_the_key_goes_from_the_recipe_to_the_environment_and_not_to_the_run_directory(tiny_recipe, tmp_path):
    recipe = secrets.hide_api_key(with_key(tiny_recipe))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert KEY not in (tmp_path / "recipe.yaml").read_text()
    worker = load_recipe(tmp_path / "recipe.yaml")
    assert secrets.api_key(worker.policy.generation.sglang_cfg) == KEY == os.environ[secrets.VARIABLE]


def test_the_key_is_sent_on_every_call_and_a_wrong_one_is_an_error_without_it(tiny_recipe):
    with FaultServer(api_key=KEY) as server:
        engine = connect(with_key(tiny_recipe), [server.url])
        generate(engine, make_requests(2, max_new_tokens=2))
        engine.close()
        with pytest.raises(UserError, match="401") as caught:
            connect(with_key(tiny_recipe, "wrong-key"), [server.url])
        assert "wrong-key" not in str(caught.value) and server.url in str(caught.value)


def test_a_redirect_is_not_followed_with_the_key(tiny_recipe):
    with FaultServer() as thief:

        class Redirects(FaultServer):
            def answer(self, handler, body):
                handler.send_response(307)
                handler.send_header("Location", thief.url + handler.path)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

        with Redirects() as server, pytest.raises(UserError, match="answered 307"):
            connect(with_key(tiny_recipe), [server.url])
        assert thief.calls == {}


def test_the_shown_recipe_has_no_key(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"policy: {{model_name: m, generation: {{sglang_cfg: {{api_key: {KEY}}}}}}}")
    assert cli.main(["recipe", "show", str(path)]) == 0
    assert KEY not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["api_key", "admin-api-key", "config"])
def test_a_key_does_not_reach_a_command_line(name):
    with pytest.raises(UserError):
        check_server_args({name: KEY})


def test_a_url_with_credentials_is_refused_without_showing_them(tiny_recipe):
    recipe = tiny_recipe.with_values({"policy.generation.sglang_cfg.urls": [f"http://me:{KEY}@127.0.0.1:30000"]})
    (found,) = [problem for problem in problems(recipe) if problem.where.endswith("urls")]
    assert KEY not in str(found) and "me:" not in str(found) and "api_key" in found.fix


def test_a_pickle_in_place_of_routes_is_an_error_and_is_not_loaded(tiny_recipe, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "boom"),))

    class Sends(FaultServer):
        def _reply(self, ids, count, fault):
            reply = super()._reply(ids, count, fault)
            reply["meta_info"]["routed_experts"] = base64.b64encode(pickle.dumps(Bomb())).decode()
            return reply

    with Sends() as server, pytest.raises(UserError, match="route[sd]") as caught:
        connect(tiny_recipe, [server.url])
    assert server.url in str(caught.value) and not (tmp_path / "boom").exists()


def test_nothing_that_talks_to_a_server_can_load_a_pickle():
    """The trainer's side of `rollout_sglang` decodes JSON and raw integers, and imports no loader of anything else."""
    folder = Path(vespo_megatron.rollout_sglang.__file__).parent
    rooms = [sorted((folder / room).glob("*.py")) for room in ("client", "pool", "weight_sync")]
    assert all(len(files) > 3 for files in rooms)
    for file in (folder / "sglang_engine.py", folder / "conversation.py", *chain.from_iterable(rooms)):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = [node.func.attr] if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else []
            assert not {"pickle", "dill", "marshal", "shelve", "cloudpickle"} & set(names), file
            assert not {"load", "recv_object_list", "broadcast_object_list"} & set(called), file
