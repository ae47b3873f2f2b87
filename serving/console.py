"""`recua serve` and `recua chat`, without their command-line parsing."""

import logging
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from infra.local_ray import connect
from infra.machine import require_ray
from serving.client import RecuaClient
from serving.config import ServingSettings
from serving.errors import RequestError

if TYPE_CHECKING:
    from serving.app import Endpoint

Say = Callable[[str], None]


def serve_forever(
    model_folder: Path,
    settings: ServingSettings,
    weight_version: str | None = None,
    ray_address: str = "local",
    local_ray_restarts: int = 3,
    restart_window_s: float = 600.0,
    say: Say = print,
) -> None:
    """Serve a model folder until Ctrl-C or SIGTERM, then drain and leave no process behind.

    `weight_version` defaults to a digest of the folder. `ray_address` "local" starts a local Ray, and another one if it
    dies, up to `local_ray_restarts` times (a Ray that ran for `restart_window_s` resets that count). Another address
    joins that cluster; Ctrl-C then stops only this endpoint.

    Raises:
        ConfigError: no Ray at the address. SystemFault: the local Ray died too often.
        KeyboardInterrupt: interrupted before the endpoint answered.
        Errors of `serving.app.deploy`.
    """
    from serving.preflight import check_model_folder, folder_digest, without_chat

    check_model_folder(model_folder)
    require_ray(ray_address, "--address")
    if warning := without_chat(model_folder, settings):
        say(f"warning: {warning}")
    version = weight_version or folder_digest(model_folder)

    def on_up(endpoint: "Endpoint") -> None:
        say(_greeting(endpoint.grpc_address, endpoint.http_url, endpoint.model, endpoint.weight_version, settings))

    if ray_address == "local":
        from serving.own_ray import LocalEndpoint

        LocalEndpoint(model_folder, version, settings, on_up, say).serve(local_ray_restarts, restart_window_s)
    else:
        _serve_on_cluster(model_folder, version, settings, ray_address, on_up, say)
    say("stopped")


def _serve_on_cluster(
    folder: Path,
    weight_version: str,
    settings: ServingSettings,
    ray_address: str,
    on_up: Callable[["Endpoint"], None],
    say: Say,
) -> None:
    import ray

    from serving.app import deploy, shutdown

    stop = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    connect(ray, f"--address {ray_address}", address=ray_address, logging_level=logging.WARNING)
    try:
        say(f"loading {folder} into {settings.replicas} replica(s) ...")
        endpoint = deploy(folder, weight_version, settings)

        def on_signal(number: int, frame: FrameType | None) -> None:
            stop.set()

        for number in previous:
            signal.signal(number, on_signal)
        on_up(endpoint)
        stop.wait()
        say("draining: new requests are refused, those in flight finish ...")
        shutdown(endpoint, settings.drain_timeout_s)
    finally:
        ray.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _greeting(grpc_address: str, http_url: str, model: str, weight_version: str, settings: ServingSettings) -> str:
    secured = bool(settings.auth_token_file or settings.auth_token_env)
    token_option = " --token-file FILE" if secured else ""
    token_header = " -H 'Authorization: Bearer TOKEN'" if secured else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return "\n".join(
        (
            f"{model} is served, weight version {weight_version}",
            f"  gRPC    {grpc_address}",
            f"  OpenAI  {http_url}/v1",
            "Try it:",
            f"  recua chat {grpc_address}{token_option}",
            f"  curl {http_url}/v1/chat/completions -H 'Content-Type: application/json'{token_header} -d '{body}'",
            "Ctrl-C drains and stops.",
        )
    )


def chat_loop(
    address: str,
    token: str | None = None,
    tls_ca: bytes | None = None,
    system: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    lines: Iterable[str] | None = None,
    say: Callable[..., None] = print,
) -> int:
    """A conversation in the terminal, streamed. Ends at end of input or `/exit`; `/new` starts a new conversation.

    `lines` replaces the keyboard. Returns the number of answers. Raises RequestError if the endpoint cannot be reached;
    a failed answer is reported, and the conversation continues.
    """
    opening = [{"role": "system", "content": system}] if system else []
    conversation = list(opening)
    answers = 0
    with RecuaClient(address, token, tls_ca=tls_ca) as client:
        info = client.info(timeout_s=10)
        say(f"{info.model}, weight version {info.weight_version[:19]}, context {info.max_model_len} tokens")
        for line in lines if lines is not None else _keyboard():
            text = line.strip()
            if text == "/exit":
                break
            if text == "/new":
                conversation = list(opening)
            elif text:
                conversation.append({"role": "user", "content": text})
                answers += _answer(client, conversation, max_tokens, temperature, say)
    return answers


def _answer(
    client: RecuaClient,
    conversation: list[dict[str, str]],
    max_tokens: int | None,
    temperature: float | None,
    say: Callable[..., None],
) -> int:
    parts: list[str] = []
    try:
        for part in client.chat_stream(conversation, max_tokens=max_tokens, temperature=temperature):
            parts.append(part.text)
            say(part.text, end="", flush=True)
    except KeyboardInterrupt:
        say(" [interrupted]")
    except RequestError as error:
        say(f"\n{error}")
        conversation.pop()
        return 0
    say("")
    conversation.append({"role": "assistant", "content": "".join(parts)})
    return 1


def _keyboard() -> Iterable[str]:
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return
