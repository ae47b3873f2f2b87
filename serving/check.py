"""Checks, token by token, that an endpoint answers over gRPC and OpenAI HTTP as the model did in evaluation."""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serving.app import Endpoint
from serving.auth import accepted_tokens
from serving.client import RecuaClient
from serving.config import ServingSettings
from serving.openai import WEIGHT_VERSION_HEADER

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Compared:
    """True for a protocol if all answers and the weight version are as expected; `answers`: one record per prompt."""

    grpc: bool
    openai: bool
    answers: tuple[dict[str, Any], ...]


def compare(
    endpoint: Endpoint, settings: ServingSettings, asked: Sequence[Mapping[str, Any]], max_tokens: int
) -> Compared:
    """Compare greedy chat answers with the recorded ones.

    `asked`: [{"prompt": "2+3=", "ids": [20, 4], "prompt_ids": [0, 2, ...], ...}]: a user message, the expected answer's
    tokens with their stop token, and the rendered prompt that they were sampled from. Without prompts nothing matches.
    """
    records = []
    with open_client(endpoint, settings) as client, _open_http(endpoint, settings) as http:
        for sample in asked:
            over_grpc = _ask_grpc(client, sample["prompt"], max_tokens)
            over_http = _ask_openai(http, endpoint.model, sample["prompt"], max_tokens)
            expected = (list(sample["ids"]), len(sample["prompt_ids"]), endpoint.weight_version)
            records.append(
                {
                    "prompt": sample["prompt"],
                    "expected_ids": list(sample["ids"]),
                    "grpc_text": over_grpc["text"],
                    "grpc_ids": over_grpc["ids"],
                    "grpc": _facts(over_grpc) == expected,
                    "openai_text": over_http["text"],
                    "openai_ids": over_http["ids"],
                    "openai": _facts(over_http) == expected,
                }
            )
    return Compared(
        grpc=bool(records) and all(record["grpc"] for record in records),
        openai=bool(records) and all(record["openai"] for record in records),
        answers=tuple(records),
    )


def open_client(endpoint: Endpoint, settings: ServingSettings) -> RecuaClient:
    """A gRPC client with the token and the certificate authority that `settings` name."""
    tokens = accepted_tokens(settings)
    authority = Path(settings.tls_cert_file).expanduser().read_bytes() if settings.tls_cert_file else None
    return RecuaClient(endpoint.grpc_address, tokens[0] if tokens else None, TIMEOUT_S, authority)


def _open_http(endpoint: Endpoint, settings: ServingSettings) -> httpx.Client:
    tokens = accepted_tokens(settings)
    headers = {"authorization": f"Bearer {tokens[0]}"} if tokens else {}
    verify = ssl.create_default_context(cafile=settings.tls_cert_file) if settings.tls_cert_file else True
    return httpx.Client(base_url=endpoint.http_url, headers=headers, verify=verify, timeout=TIMEOUT_S, trust_env=False)


def _ask_grpc(client: RecuaClient, prompt: str, max_tokens: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}]
    answer = client.chat(turns, temperature=0.0, max_tokens=max_tokens, return_token_ids=True)
    return {
        "text": answer.text,
        "ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "version": answer.weight_version,
    }


def _ask_openai(http: httpx.Client, model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "return_token_ids": True,
    }
    response = http.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    answer = response.json()
    return {
        "text": answer["choices"][0]["message"]["content"],
        "ids": answer["choices"][0]["token_ids"],
        "prompt_tokens": answer["usage"]["prompt_tokens"],
        "version": response.headers.get(WEIGHT_VERSION_HEADER),
    }


def _facts(answer: dict[str, Any]) -> tuple[list[int], int, str]:
    return answer["ids"], answer["prompt_tokens"], answer["version"]
