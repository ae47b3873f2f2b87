"""One real endpoint (Ray Serve, vLLM, gRPC gateway) for the whole module, with tokens and tight limits."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import ray
from serving_toy import save_toy_model

from infra.errors import ConfigError, ResourceError
from serving.app import Endpoint, deploy, shutdown
from serving.check import compare
from serving.client import RecuaClient
from serving.config import ServingEngineSettings, ServingSettings
from serving.errors import RequestError
from serving.gateway import Gateway
from serving.preflight import folder_digest
from tests.helpers.rays import local_ray

TOKEN = "a-token-for-tests"
CONTEXT = 4096
CHAT = [{"role": "user", "content": "the quick brown fox"}]
LONG = {"temperature": 0.0, "max_tokens": 2000, "ignore_eos": True}


@dataclass(frozen=True)
class Served:
    endpoint: Endpoint
    settings: ServingSettings
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_toy_model(tmp_path_factory.mktemp("model"), context=CONTEXT)
    tokens = tmp_path_factory.mktemp("auth") / "tokens"
    tokens.write_text(f"# accepted tokens\n{TOKEN}\n")
    settings = ServingSettings(
        grpc_port=0,
        http_port=0,
        auth_token_file=str(tokens),
        max_ongoing_requests=4,
        max_queued_requests=2,
        admission_timeout_s=2.0,
        health_period_s=2.0,
        drain_timeout_s=1.0,
        engine=ServingEngineSettings(kv_cache_gib=0.25, max_model_len=CONTEXT),
    )
    with local_ray(num_cpus=2):
        started = time.monotonic()
        endpoint = deploy(folder, folder_digest(folder), settings)
        yield Served(endpoint, settings, folder, time.monotonic() - started)
        shutdown(endpoint, 1.0)


@pytest.fixture
def client(served: Served) -> Iterator[RecuaClient]:
    with RecuaClient(served.endpoint.grpc_address, TOKEN) as connected:
        yield connected


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=served.endpoint.http_url, headers=headers, timeout=60, trust_env=False) as connected:
        yield connected


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """What plain transformers answers: greedy tokens up to and including a stop token."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count)
    return output[0, len(ids) :].tolist()


def test_greedy_answers_equal_transformers_over_every_way_in(
    served: Served, client: RecuaClient, http: httpx.Client
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    raw = tokenizer("the quick").input_ids
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    raw_expected, chat_expected = greedy(served.folder, raw, 24), greedy(served.folder, rendered, 24)
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "return_token_ids": True}

    by_text = client.generate("the quick", **options)
    assert list(by_text.token_ids) == raw_expected
    assert by_text.prompt_tokens == len(raw)
    assert by_text.completion_tokens == len(raw_expected)
    assert by_text.text == tokenizer.decode(raw_expected, skip_special_tokens=True)
    assert list(client.generate(raw, **options).token_ids) == raw_expected
    parts = list(client.generate_stream(raw, **options))
    assert [token for part in parts for token in part.token_ids] == raw_expected
    assert "".join(part.text for part in parts) == by_text.text
    assert [bool(part.finish_reason) for part in parts] == [False] * (len(parts) - 1) + [True]

    assert list(client.chat(CHAT, **options).token_ids) == chat_expected
    streamed = list(client.chat_stream(CHAT, **options))
    assert [token for part in streamed for token in part.token_ids] == chat_expected

    common = {"model": "recua", **options}
    completion = http.post("/v1/completions", json={"prompt": "the quick", **common}).json()["choices"][0]
    assert completion["token_ids"] == raw_expected
    answer = http.post("/v1/chat/completions", json={"messages": CHAT, **common}).json()["choices"][0]
    assert answer["token_ids"] == chat_expected
    with http.stream("POST", "/v1/chat/completions", json={"messages": CHAT, "stream": True, **common}) as events:
        lines = [line for line in events.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 3


def test_compare_accepts_the_evaluated_answers_and_nothing_else(served: Served) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    prompt_ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    ids = greedy(served.folder, prompt_ids, 12)
    sample = {"prompt": CHAT[0]["content"], "prompt_ids": prompt_ids, "ids": ids}
    same = compare(served.endpoint, served.settings, [sample], 12)
    assert (same.grpc, same.openai) == (True, True)
    other = compare(served.endpoint, served.settings, [sample, {**sample, "ids": [*ids[:-1], 7]}], 12)
    assert (other.grpc, other.openai) == (False, False)
    assert [record["grpc"] for record in other.answers] == [True, False]
    nothing = compare(served.endpoint, served.settings, [], 12)
    assert (nothing.grpc, nothing.openai) == (False, False)


def test_every_response_names_model_and_weights(served: Served, client: RecuaClient, http: httpx.Client) -> None:
    version = folder_digest(served.folder)
    info = client.info()
    assert (info.model, info.weight_version, info.max_model_len) == ("recua", version, CONTEXT)
    assert client.generate("a", max_tokens=1).weight_version == version
    assert {part.weight_version for part in client.chat_stream(CHAT, max_tokens=3)} == {version}
    response = http.post("/v1/completions", json={"model": "recua", "prompt": "a", "max_tokens": 1})
    assert response.headers["x-recua-weight-version"] == version
    assert response.json()["system_fingerprint"] == version
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["recua"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ("", {}, "prompt must not be empty"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"max_tokens": 0}, "max_tokens"),
        ([5] * (CONTEXT + 1), {}, str(CONTEXT)),
        ([10**6], {}, "vocab"),
    ],
)
def test_a_bad_request_is_the_clients_mistake(client: RecuaClient, prompt: Any, sampling: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        client.generate(prompt, **sampling)
    assert caught.value.code == "INVALID_ARGUMENT"
    with pytest.raises(RequestError) as streamed:
        list(client.generate_stream(prompt, **sampling))
    assert streamed.value.code == "INVALID_ARGUMENT"


def test_tokens_are_asked_for_except_for_health(served: Served, http: httpx.Client) -> None:
    for token in (None, "wrong", TOKEN + "x"):
        with RecuaClient(served.endpoint.grpc_address, token) as stranger:
            with pytest.raises(RequestError) as unary:
                stranger.info()
            with pytest.raises(RequestError) as stream:
                list(stranger.chat_stream(CHAT))
        assert unary.value.code == stream.value.code == "UNAUTHENTICATED"
    url = served.endpoint.http_url
    assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
    assert httpx.get(f"{url}/health", trust_env=False, timeout=60).status_code == 200
    assert http.post("/scale_elastic_ep", json={}).status_code == 404


def test_standard_health_and_reflection(served: Served) -> None:
    from google.protobuf.descriptor_pool import DescriptorPool
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    with grpc.insecure_channel(served.endpoint.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "recua.v1.Recua"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING

        class WithToken(grpc.StreamStreamClientInterceptor):
            def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
                return continuation(details._replace(metadata=[("authorization", f"Bearer {TOKEN}")]), requests)

        database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, WithToken()))
        assert "recua.v1.Recua" in database.get_services()
        service = DescriptorPool(database).FindServiceByName("recua.v1.Recua")
        assert {method.name for method in service.methods} >= {"Generate", "ChatStream", "ModelInfo"}


def wait_until_idle(client: RecuaClient, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while client.info().ongoing_requests:
        assert time.monotonic() < deadline, "the engine still works on a request that nobody waits for"
        time.sleep(0.02)


def test_cancelled_and_late_requests_leave_the_engine(client: RecuaClient) -> None:
    started = time.monotonic()
    stream = client.generate_stream([0, 5, 6], **LONG)
    next(stream)
    assert client.info().ongoing_requests == 1
    stream.close()  # type: ignore[attr-defined]  # a generator
    wait_until_idle(client, 30.0)
    with pytest.raises(RequestError) as late:
        client.generate([0, 5, 6], timeout_s=0.3, **LONG)
    assert late.value.code == "DEADLINE_EXCEEDED"
    wait_until_idle(client, 30.0)
    freed_after = time.monotonic() - started
    started = time.monotonic()
    assert client.generate([0, 5, 6], **LONG).completion_tokens == 2000
    assert freed_after < time.monotonic() - started, "waiting for the natural end would have looked the same"


def test_overload_is_refused_not_buffered(served: Served, client: RecuaClient, http: httpx.Client) -> None:
    """Those who may wait get in; how many more do depends on how fast the slots are given out."""

    def over_grpc(index: int) -> str:
        try:
            client.generate([0, 5, index + 6], temperature=0.0, max_tokens=400, ignore_eos=True)
        except RequestError as error:
            return error.code
        return "OK"

    def over_http(index: int) -> int:
        body = {"model": "recua", "prompt": [0, 5, index + 6], "max_tokens": 400, "ignore_eos": True}
        return http.post("/v1/completions", json=body).status_code

    with ThreadPoolExecutor(24) as pool:
        codes = list(pool.map(over_grpc, range(24)))
        statuses = list(pool.map(over_http, range(24)))
    assert codes.count("OK") >= served.settings.max_queued_requests
    assert codes.count("RESOURCE_EXHAUSTED") >= 1
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    assert statuses.count(200) >= served.settings.max_queued_requests
    assert set(statuses) == {200, 429}


def test_a_taken_port_is_named_before_any_model_is_loaded(served: Served) -> None:
    taken = int(served.endpoint.grpc_address.rsplit(":", 1)[1])
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"serving\.grpc_port"):
        deploy(served.folder, "v", served.settings.model_copy(update={"app_name": "other", "grpc_port": taken}))
    with pytest.raises(ConfigError, match=r"serving\.http_port"):
        deploy(served.folder, "v", served.settings.model_copy(update={"app_name": "other", "http_port": 1}))
    with pytest.raises(ResourceError, match=r"serving\.num_cpus"):
        deploy(served.folder, "v", served.settings.model_copy(update={"app_name": "other", "num_cpus": 64}))
    assert time.monotonic() - started < served.seconds / 2


def replica_process() -> psutil.Process:
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::ServeReplica:recua")
    ]
    return found


def test_a_killed_replica_comes_back_and_nobody_hangs(client: RecuaClient, http: httpx.Client) -> None:
    replica = replica_process()
    engines = replica.children(recursive=True)
    stream = client.generate_stream([0, 5, 6], **LONG)
    next(stream)
    os.kill(replica.pid, signal.SIGKILL)
    with pytest.raises(RequestError) as cut:
        list(stream)
    assert cut.value.code == "UNAVAILABLE"

    started = time.monotonic()
    with pytest.raises(RequestError) as refused:
        client.chat(CHAT, max_tokens=2)
    assert refused.value.code == "UNAVAILABLE"
    assert time.monotonic() - started < 30.0

    deadline = time.monotonic() + 300
    while True:
        try:
            assert client.chat(CHAT, max_tokens=2).completion_tokens == 2
            break
        except RequestError as error:
            assert error.code == "UNAVAILABLE"
            assert time.monotonic() < deadline, "the replica was not replaced"
    assert http.get("/health").status_code == 200
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert not alive, "the dead replica's engine process lives on"


def test_a_gateway_that_was_drained_is_not_used_again(served: Served) -> None:
    """A deploy that is killed while it cleans up leaves a drained gateway behind; the next deploy must not take it."""
    gateway: Any = ray.remote(Gateway)
    gateway = gateway.options(num_cpus=0).remote(served.settings, 0, ())
    assert not ray.get(gateway.matches.remote(served.settings, ())), "not started"
    ray.get(gateway.start.remote())
    assert ray.get(gateway.matches.remote(served.settings, ()))
    ray.get(gateway.drain.remote(0.0))
    assert not ray.get(gateway.matches.remote(served.settings, ()))
    ray.kill(gateway)
