"""A small synchronous client of the gRPC endpoint.

with RecuaClient("127.0.0.1:50051") as client:
    print(client.chat([{"role": "user", "content": "2+3="}], max_tokens=8).text)
    for part in client.chat_stream([...]):
        print(part.text, end="")
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from serving.errors import RequestError
from serving.protocol import SERVICE, STREAM_METHODS, UNARY_METHODS, messages


@dataclass(frozen=True)
class Answer:
    """A whole answer or one part of a stream, e.g. text "5", token_ids (20, 4), "stop", 5, 2, "sha256:…", "recua".

    `finish_reason` is "stop", "length", "abort", or "" in a stream that has not ended. `token_ids` are set only on
    request. In a stream `completion_tokens` counts from its beginning.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    weight_version: str
    model: str
    request_id: str


@dataclass(frozen=True)
class ModelInfo:
    """The replica that answers: model, weight version, context in tokens, requests in its engine, engine version."""

    model: str
    weight_version: str
    max_model_len: int
    ongoing_requests: int
    engine: str


class RecuaClient:
    """A client of one endpoint; threads may share it. Calls raise RequestError with the gRPC status name in `code`.

    Sampling keywords of all calls: temperature (0 = greedy), top_p, top_k, max_tokens, seed, stop (strings),
    stop_token_ids, ignore_eos. The model's generation config gives the values of those left out.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        timeout_s: float = 120.0,
        tls_ca: bytes | None = None,
        tls_client: tuple[bytes, bytes] | None = None,
    ) -> None:
        """`address` is host:port. `tls_ca` (PEM) turns TLS on; `tls_client` is the client's (key, certificate)."""
        self._address = address
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        if tls_ca is None:
            self._channel = grpc.insecure_channel(address)
        else:
            key, certificate = tls_client or (None, None)
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(tls_ca, key, certificate))
        self._rpcs = {name: self._rpc(name) for name in (*UNARY_METHODS, *STREAM_METHODS)}

    def info(self, timeout_s: float | None = None) -> ModelInfo:
        reply = self._call("ModelInfo", messages().ModelInfoRequest(), timeout_s)
        return ModelInfo(reply.model, reply.weight_version, reply.max_model_len, reply.ongoing_requests, reply.engine)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        return_token_ids: bool = False,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """Continue a raw prompt: text (the server adds special tokens) or token ids (used unchanged)."""
        return _answer(self._call("Generate", _generate_request(prompt, return_token_ids, sampling), timeout_s))

    def generate_stream(
        self,
        prompt: str | Sequence[int],
        *,
        return_token_ids: bool = False,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Iterator[Answer]:
        """The same in parts. Closing the iterator cancels the request on the server."""
        return self._stream("GenerateStream", _generate_request(prompt, return_token_ids, sampling), timeout_s)

    def chat(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        return_token_ids: bool = False,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answer `[{"role": ..., "content": ...}, ...]`, rendered with the model's chat template."""
        return _answer(self._call("Chat", _chat_request(conversation, return_token_ids, sampling), timeout_s))

    def chat_stream(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        return_token_ids: bool = False,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Iterator[Answer]:
        """The same in parts. Closing the iterator cancels the request on the server."""
        return self._stream("ChatStream", _chat_request(conversation, return_token_ids, sampling), timeout_s)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "RecuaClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rpc(self, method: str) -> Any:
        connect = self._channel.unary_unary if method in UNARY_METHODS else self._channel.unary_stream
        request, response = messages().request_of(method), messages().response_of(method)
        return connect(
            f"/{SERVICE}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

    def _call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        try:
            return self._rpcs[method](request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._explain(error) from None

    def _stream(self, method: str, request: Any, timeout_s: float | None) -> Iterator[Answer]:
        call = self._rpcs[method](request, timeout=timeout_s or self._timeout_s, metadata=self._metadata)
        try:
            for reply in call:
                yield _answer(reply)
        except grpc.RpcError as error:
            raise self._explain(error) from None
        finally:
            call.cancel()

    def _explain(self, error: Any) -> RequestError:
        return RequestError(error.code().name, f"{self._address}: {error.details()}")


def _generate_request(prompt: str | Sequence[int], return_token_ids: bool, sampling: dict[str, Any]) -> Any:
    request = messages().GenerateRequest(sampling=_sampling(sampling), return_token_ids=return_token_ids)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    return request


def _chat_request(conversation: Sequence[Mapping[str, str]], return_token_ids: bool, sampling: dict[str, Any]) -> Any:
    turns = [messages().Message(role=turn["role"], content=turn["content"]) for turn in conversation]
    return messages().ChatRequest(messages=turns, sampling=_sampling(sampling), return_token_ids=return_token_ids)


def _sampling(given: dict[str, Any]) -> Any:
    known = messages().Sampling.DESCRIPTOR.fields_by_name
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"no sampling option {', '.join(unknown)}; known: {', '.join(known)}")
    return messages().Sampling(**{name: value for name, value in given.items() if value is not None})


def _answer(reply: Any) -> Answer:
    reason = messages().FinishReason.Name(reply.finish_reason).lower()
    return Answer(
        text=reply.text,
        token_ids=tuple(reply.token_ids),
        finish_reason="" if reason == "unfinished" else reason,
        prompt_tokens=reply.usage.prompt_tokens,
        completion_tokens=reply.usage.completion_tokens,
        weight_version=reply.weight_version,
        model=reply.model,
        request_id=reply.request_id,
    )
