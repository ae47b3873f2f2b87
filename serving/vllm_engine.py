"""A vLLM engine from settings: its arguments, its environment, and a health probe that generates a token.

Imports vLLM only inside functions, so that drivers can build the environment without it.
"""

import asyncio
import itertools
import time
from argparse import Namespace
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from infra.addresses import use_sockets_at
from serving.config import ServingSettings


def replica_environment(settings: ServingSettings) -> dict[str, str]:
    """Environment variables that must be set before vLLM is imported in a replica's process."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }
    if settings.num_gpus == 0:
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.engine.threads),
            # The engine then computes in its own process instead of in a third one: half the start time, and 1.6 times
            # the tokens per second of a toy model on two cores.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return environment


def engine_arguments(model_folder: Path, weight_version: str, settings: ServingSettings) -> Namespace:
    """Arguments of vLLM's OpenAI server; `system_fingerprint` of its responses is the weight version.

    Raises:
        ValueError: vLLM refuses an argument in `engine.extra_args`.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine = settings.engine
    words = ["--model", str(model_folder), "--served-model-name", settings.model_name]
    words += ["--max-num-seqs", str(engine.max_num_seqs), "--seed", "0"]
    words += ["--fingerprint-mode", "custom", "--fingerprint-value", weight_version]
    if engine.max_model_len is not None:
        words += ["--max-model-len", str(engine.max_model_len)]
    if engine.enforce_eager:
        words.append("--enforce-eager")
    if settings.num_gpus == 0:
        words += ["--dtype", "float32" if engine.dtype == "auto" else engine.dtype]
        words += ["--kv-cache-memory-bytes", str(int(engine.kv_cache_gib * 2**30))]
        words += ["--distributed-executor-backend", "uni"]
    else:
        words += ["--dtype", engine.dtype, "--tensor-parallel-size", str(settings.num_gpus)]
        words += ["--gpu-memory-utilization", str(engine.gpu_memory_utilization)]
    words += engine.extra_args
    try:
        return make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    except SystemExit:
        raise ValueError(f"serving.engine.extra_args: vLLM refuses {' '.join(engine.extra_args)}") from None


def start_engine(arguments: Namespace, address: str) -> Any:
    """An AsyncLLM that remembers when it last produced a token; its sockets use `address`, the node's address. Blocks
    while the model loads (about 15 s on a CPU).

    Under load the health check skips its probe, which would only queue behind requests.
    """
    use_sockets_at(address)  # before vLLM is imported
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    class WatchedEngine(AsyncLLM):
        last_token_at = 0.0

        async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            outputs = super().generate(*args, **kwargs)
            try:
                async for output in outputs:
                    self.last_token_at = time.monotonic()
                    yield output
            finally:
                await outputs.aclose()

    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    return WatchedEngine.from_vllm_config(
        config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=engine_args.disable_log_stats
    )


class HealthProbe:
    """Generates one token, because vLLM's own health check passes after some worker crashes."""

    def __init__(self, engine: Any, fresh_s: float, timeout_s: float) -> None:
        self._engine = engine
        self._fresh_s = fresh_s
        self._timeout_s = timeout_s
        self._ids = itertools.count()
        self._one_at_a_time = asyncio.Lock()

    async def check(self) -> None:
        """Return at once if a token came within `fresh_s`.

        Raises:
            RuntimeError: the engine is dead or gave no token within `timeout_s`.
        """
        async with self._one_at_a_time:
            if time.monotonic() - self._engine.last_token_at < self._fresh_s and not self._engine.errored:
                return
            try:
                await asyncio.wait_for(self._generate_one_token(), self._timeout_s)
            except TimeoutError:
                raise RuntimeError(f"no token within {self._timeout_s:g} s (serving.health_timeout_s)") from None

    async def _generate_one_token(self) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": [0]}
        async for _ in self._engine.generate(prompt, parameters, f"health-{next(self._ids)}"):
            pass
