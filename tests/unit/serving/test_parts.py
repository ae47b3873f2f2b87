"""Serving without Ray or vLLM: settings, tokens, the proto, the HTTP door, preflight checks, errors."""

import asyncio
import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from infra.config import validate
from infra.errors import CheckpointError, ConfigError, ResourceError
from serving.auth import TokenAuthority, accepted_tokens, token_digests
from serving.client import RecuaClient
from serving.config import ServingEngineSettings, ServingSettings
from serving.errors import RequestError
from serving.openai import AuthenticatedApp
from serving.preflight import check_model_folder, folder_digest, pick_ports, without_chat
from serving.protocol import SERVICE, STREAM_METHODS, UNARY_METHODS, messages


def test_settings_import_neither_ray_nor_torch_nor_vllm(repository: Path) -> None:
    script = "import sys, serving.config; print([n for n in ('ray', 'torch', 'vllm', 'grpc') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.strip() == "[]"


def test_a_misspelt_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting grpc_prot; did you mean grpc_port\?"):
        validate({"grpc_prot": 1}, ServingSettings)
    with pytest.raises(ConfigError, match="grpc_port"):
        validate({"grpc_port": 70000}, ServingSettings)


def test_proto_is_compiled_from_any_folder_and_nothing_is_written(tmp_path: Path, repository: Path) -> None:
    before = sorted(path.name for path in (repository / "serving").iterdir())
    script = (
        f"import sys; sys.path.insert(0, {str(repository)!r})\n"
        "from serving.protocol import messages\n"
        "request = messages().GenerateRequest(text='a', sampling={'temperature': 0.0})\n"
        "assert request.sampling.HasField('temperature') and not request.sampling.HasField('top_p')\n"
        "assert messages().GenerateRequest.FromString(request.SerializeToString()) == request\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []
    assert [name for name in before if "pb2" in name] == []
    assert sorted(path.name for path in (repository / "serving").iterdir()) == before


def test_the_service_lists_exactly_the_methods_that_are_answered() -> None:
    from google.protobuf import descriptor_pool

    messages()
    service = descriptor_pool.Default().FindServiceByName(SERVICE)
    streaming = {method.name: method.server_streaming for method in service.methods}
    assert streaming == dict.fromkeys(UNARY_METHODS, False) | dict.fromkeys(STREAM_METHODS, True)
    for method in service.methods:
        assert messages().request_of(method.name).DESCRIPTOR is method.input_type
        assert messages().response_of(method.name).DESCRIPTOR is method.output_type


def test_tokens_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    file.write_text("# team\nalpha\n\n  beta \n")
    monkeypatch.setenv("SERVING_TOKEN_FOR_TEST", "gamma")
    settings = ServingSettings(auth_token_file=str(file), auth_token_env="SERVING_TOKEN_FOR_TEST")
    assert accepted_tokens(settings) == ["alpha", "beta", "gamma"]
    digests = token_digests(settings)
    assert not any(token in digest for token in ("alpha", "beta", "gamma") for digest in digests)
    authority = TokenAuthority(digests)
    assert all(authority.accepts(f"Bearer {token}") for token in ("alpha", "beta", "gamma"))
    refused = (None, "", "alpha", "Bearer", "Bearer ", "Bearer alph", "Basic alpha", "Bearer alphabeta")
    assert not any(authority.accepts(value) for value in refused)
    assert TokenAuthority(()).accepts(None)


def test_token_settings_that_protect_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serving\.auth_token_file: cannot read"):
        accepted_tokens(ServingSettings(auth_token_file=str(tmp_path / "none")))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no token"):
        accepted_tokens(ServingSettings(auth_token_file=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match=r"serving\.auth_token_env"):
        accepted_tokens(ServingSettings(auth_token_env="SERVING_TOKEN_THAT_IS_NOT_SET"))


async def _inner(scope: Any, receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-inner", b"1")]})
    await send({"type": "http.response.body", "body": b"inner"})


def knock(path: str, authorization: str | None = None, healthy: bool = True) -> tuple[int, dict[str, str], bytes]:
    async def check() -> None:
        if not healthy:
            raise RuntimeError("no token within 1 s")

    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    authority = TokenAuthority(token_digests_of("secret"))
    door = AuthenticatedApp(_inner, authority, check, "toy", "v7")
    headers = [(b"authorization", authorization.encode())] if authorization else []
    asyncio.run(door({"type": "http", "path": path, "headers": headers, "method": "GET"}, receive, send))
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(message.get("body", b"") for message in sent)


def token_digests_of(token: str) -> tuple[str, ...]:
    import hashlib

    return (hashlib.sha256(token.encode()).hexdigest(),)


def test_the_door_opens_few_paths_to_token_holders_and_stamps_every_answer() -> None:
    status, head, body = knock("/v1/models", "Bearer secret")
    assert (status, body) == (200, b"inner")
    assert (head["x-inner"], head["x-recua-model"], head["x-recua-weight-version"]) == ("1", "toy", "v7")
    assert knock("/v1/models")[0] == 401
    assert knock("/metrics", "Bearer wrong")[0] == 401
    for path in ("/scale_elastic_ep", "/invocations", "/update_weights", "/", "/v1"):
        assert knock(path, "Bearer secret")[0] == 404
    assert knock("/health")[0] == 200
    status, head, body = knock("/health", healthy=False)
    assert status == 503
    assert head["x-recua-weight-version"] == "v7"
    assert b"no token within 1 s" in body


def test_incomplete_model_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        check_model_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="safetensors"):
        check_model_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say which file holds each tensor"):
        check_model_folder(tmp_path)
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"missing: model-2\.safetensors$"):
        check_model_folder(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="tokenizer"):
        check_model_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_model_folder(tmp_path)
    (tmp_path / "model-2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is a Git LFS pointer"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        check_model_folder(tmp_path)


def test_a_folder_without_a_chat_template_names_the_file_to_add(tmp_path: Path) -> None:
    said = without_chat(tmp_path, ServingSettings())
    assert str(tmp_path / "chat_template.jinja") in said and "completions work" in said and "\n" not in said
    given = ServingEngineSettings(extra_args=("--chat-template", "x.jinja"))
    assert without_chat(tmp_path, ServingSettings(engine=given)) == ""

    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "{{ messages }}"}]}))
    assert "names no default, only tool_use: chats will be refused" in without_chat(tmp_path, ServingSettings())
    config.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert without_chat(tmp_path, ServingSettings()) == ""
    config.write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert without_chat(tmp_path, ServingSettings()) == ""


def test_folder_digest_follows_content_and_names_only(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a").write_text("x")
    assert folder_digest(one) == folder_digest(two)
    (two / "a").write_text("y")
    assert folder_digest(one) != folder_digest(two)
    (two / "a").rename(two / "b")
    (two / "b").write_text("x")
    assert folder_digest(one) != folder_digest(two)


def test_ports_are_checked_and_chosen_together() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"serving\.http_port: cannot listen on 127\.0\.0\.1:{port}"):
            pick_ports("127.0.0.1", 0, port)
        with pytest.raises(ResourceError, match=r"serving\.grpc_port"):
            pick_ports("127.0.0.1", port, None)
    first, second = pick_ports("127.0.0.1", 0, 0)
    assert 0 < first != second > 0
    assert pick_ports("127.0.0.1", None, port) == (0, port)


def test_the_client_explains_an_endpoint_that_is_not_there() -> None:
    port, _ = pick_ports("127.0.0.1", 0, None)
    with RecuaClient(f"127.0.0.1:{port}") as client:
        with pytest.raises(RequestError, match=f"127.0.0.1:{port}") as caught:
            client.info(timeout_s=60)
        with pytest.raises(TypeError, match="no sampling option temprature; known: temperature"):
            client.generate("a", temprature=0)
    assert caught.value.code == "UNAVAILABLE"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.code, str(again)) == (caught.value.code, str(caught.value))
