"""The gRPC methods on a replica: protobuf bytes in, vLLM's own rendering and sampling rules, protobuf bytes out.

Requests become vLLM's `CompletionRequest` or `ChatCompletionRequest`, so that prompts, chat templates and defaults mean
the same over gRPC and over HTTP.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from serving.protocol import messages


@dataclass(frozen=True)
class Reply:
    """One message of an answer, or the error that ends it: (b"...", "OK", "") or (b"", "INVALID_ARGUMENT", "why")."""

    body: bytes
    code: str = "OK"
    detail: str = ""


class BadRequest(Exception):
    """An invalid request; becomes INVALID_ARGUMENT."""


class Calls:
    """Answers rpcs on one engine. `state` is the state of vLLM's HTTP application (see `openai.py`)."""

    def __init__(self, engine: Any, state: Any, model_name: str, weight_version: str, stream_interval_s: float) -> None:
        self._engine = engine
        self._state = state
        self._model_name = model_name
        self._weight_version = weight_version
        self._stream_interval_s = stream_interval_s

    async def unary(self, method: str, request: bytes) -> Reply:
        """Generate, Chat or ModelInfo."""
        if method == "ModelInfo":
            return Reply(self._model_info().SerializeToString())
        replies = [reply async for reply in self._answer(method, request, stream=False)]
        return replies[-1] if replies else Reply(b"", "INTERNAL", "the engine ended without an answer")

    async def stream(self, method: str, request: bytes) -> AsyncIterator[Reply]:
        """GenerateStream or ChatStream: parts, at most one per stream interval; an error ends the stream."""
        sent_at = 0.0
        async for reply in self._answer(method.removesuffix("Stream"), request, stream=True):
            yield reply
            # While we sleep the engine merges its tokens into the next part.
            pause = self._stream_interval_s - (time.monotonic() - sent_at)
            if sent_at and pause > 0:
                await asyncio.sleep(pause)
            sent_at = time.monotonic()

    def _model_info(self) -> Any:
        import vllm

        return messages().ModelInfoResponse(
            model=self._model_name,
            weight_version=self._weight_version,
            max_model_len=self._engine.model_config.max_model_len,
            ongoing_requests=self._engine.get_num_unfinished_requests(),
            engine=f"vllm {vllm.__version__}",
        )

    async def _answer(self, method: str, body: bytes, stream: bool) -> AsyncIterator[Reply]:
        from google.protobuf.message import DecodeError
        from vllm.exceptions import GracefulHTTPError, VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        request_id = f"grpc-{uuid.uuid4().hex}"
        try:
            request = messages().request_of(method).FromString(body)
            prompt, parameters = await self._render(method, request, stream)
            outputs = self._engine.generate(prompt, parameters, request_id)
            try:
                async for response in self._responses(outputs, request.return_token_ids, request_id):
                    yield Reply(response.SerializeToString())
            finally:
                await outputs.aclose()  # a cancelled caller frees its slot in the batch now, not at garbage collection
        except (BadRequest, DecodeError, VLLMClientError, ValueError, TypeError) as error:
            yield Reply(b"", "INVALID_ARGUMENT", str(error))
        except GracefulHTTPError as error:
            yield Reply(b"", "RESOURCE_EXHAUSTED", str(error))
        except EngineDeadError:
            yield Reply(b"", "UNAVAILABLE", "the engine of this replica died; it is being replaced")

    async def _responses(self, outputs: Any, return_token_ids: bool, request_id: str) -> AsyncIterator[Any]:
        produced = prompt_tokens = 0
        async for output in outputs:
            answer = output.outputs[0]
            produced += len(answer.token_ids)
            prompt_tokens = prompt_tokens or len(output.prompt_token_ids or ())
            reason = {None: "UNFINISHED", "stop": "STOP", "length": "LENGTH"}.get(answer.finish_reason, "ABORT")
            yield messages().GenerateResponse(
                text=answer.text,
                token_ids=answer.token_ids if return_token_ids else (),
                finish_reason=reason,
                usage={"prompt_tokens": prompt_tokens, "completion_tokens": produced},
                weight_version=self._weight_version,
                model=self._model_name,
                request_id=request_id,
            )

    async def _render(self, method: str, request: Any, stream: bool) -> tuple[Any, Any]:
        from pydantic import ValidationError
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

        try:
            openai_request = self._as_openai(method, request, stream)
        except ValidationError as error:
            raise BadRequest("; ".join(str(problem["msg"]) for problem in error.errors())) from None
        renderer = self._state.online_renderer
        if method == "Chat":
            rendered = await renderer.render_chat(openai_request)
            prompts = rendered if isinstance(rendered, ErrorResponse) else rendered[1]
        else:
            prompts = await renderer.render_completion(openai_request)
        if isinstance(prompts, ErrorResponse):
            raise BadRequest(prompts.error.message)
        (prompt,) = prompts
        defaults = self._engine.model_config.get_diff_sampling_param()
        room = get_max_tokens(
            self._engine.model_config.max_model_len,
            request.sampling.max_tokens if request.sampling.HasField("max_tokens") else None,
            len(prompt["prompt_token_ids"]),
            defaults,
        )
        if room < 1:
            raise BadRequest(f"the prompt of {len(prompt['prompt_token_ids'])} tokens leaves no room for an answer")
        return prompt, openai_request.to_sampling_params(room, defaults)

    def _as_openai(self, method: str, request: Any, stream: bool) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        sampling = request.sampling
        optional = ("temperature", "top_p", "top_k", "max_tokens", "seed")
        fields = {name: getattr(sampling, name) for name in optional if sampling.HasField(name)}
        if fields.get("max_tokens", 1) < 1:
            raise BadRequest("sampling.max_tokens must be at least 1")
        fields |= {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
        fields |= {"ignore_eos": sampling.ignore_eos, "stream": stream, "model": self._model_name}
        if method == "Chat":
            if not request.messages:
                raise BadRequest("messages must not be empty")
            conversation: Any = [{"role": message.role, "content": message.content} for message in request.messages]
            return ChatCompletionRequest(messages=conversation, **fields)
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise BadRequest("prompt must be set: text or token_ids")
        prompt = request.text if kind == "text" else list(request.token_ids.ids)
        if not prompt:
            raise BadRequest("prompt must not be empty")
        return CompletionRequest(prompt=prompt, **fields)
