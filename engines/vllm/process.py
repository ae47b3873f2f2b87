"""The process behind a `VllmGenerator`: one vLLM engine that answers one call at a time over a socket.

Started as `python -m engines.vllm.process FD PARENT_PID`. The parent waits for each answer; this side waits for the
next call. On CPU the whole engine lives in this process (one import of vLLM, no hop per decoding step); on GPUs vLLM
adds its own workers, which end with this process.
"""

import ctypes
import hashlib
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.base import Sampling, WeightUpdate
from engines.config import GeneratorSettings
from infra.telemetry import hide_secrets_in_logs

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

Row = tuple[list[int], list[float], str]
"""One answer on the wire: token ids [T], log-probs [T], "stop" | "length"."""


class Engine:
    """vLLM's `LLM` with versioned weights. Every public method is a call that the parent may make."""

    def __init__(self, folder: Path, settings: GeneratorSettings, version: str) -> None:
        self._settings = settings
        self._llm = _build(folder, settings)
        self._llm.llm_engine.set_weight_version(version)

    def describe(self) -> dict[str, Any]:
        config = self._llm.llm_engine.model_config
        return {"vocab_size": config.get_vocab_size(), "max_model_len": config.max_model_len}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> tuple[str, list[list[Row]]]:
        """(weight version, one list of `n` rows per prompt)."""
        greedy = sampling.temperature == 0
        repeats = 1 if greedy else sampling.n
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(repeats)]
        outputs = self._llm.generate(inputs, _params(prompts, sampling, repeats), use_tqdm=False)  # type: ignore[arg-type]
        rows = [_row(output) for output in outputs]
        grouped = [rows[i * repeats : (i + 1) * repeats] for i in range(len(prompts))]
        if greedy:
            grouped = [group * sampling.n for group in grouped]
        return self.version(), grouped

    def version(self) -> str:
        return str(self._llm.llm_engine.get_weight_version())

    def connect(self, info: dict[str, Any]) -> None:
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def update_weights(self, update: WeightUpdate) -> None:
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", kwargs={"update_info": _update_info(update)})
        self._llm.collective_rpc("finish_weight_update")
        self._carry(update.version)

    def load_weights(self, folder: Path, version: str) -> None:
        self._llm.collective_rpc("reload_from_folder", args=(str(folder),))
        self._carry(version)

    def _carry(self, version: str) -> None:
        """Cached prefixes belong to the old weights; nothing is in flight, because calls come one at a time."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept cached prefixes of the old weights")
        self._llm.llm_engine.set_weight_version(version)


def _build(folder: Path, settings: GeneratorSettings) -> "LLM":
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    many = settings.tensor_parallel > 1
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        generation_config="vllm",  # sampling comes from the caller alone
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        enforce_eager=settings.enforce_eager,
        tensor_parallel_size=settings.tensor_parallel,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30) or None,
        seed=settings.seed,
        disable_log_stats=True,
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="mp" if many else "uni",
        worker_extension_cls="engines.vllm.worker.WorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend=settings.weight_backend),
    )


def _params(prompts: Sequence[Sequence[int]], sampling: Sampling, repeats: int) -> "list[SamplingParams]":
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    common: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    if sampling.seed is None or sampling.temperature == 0:
        return [SamplingParams(**common)] * (len(prompts) * repeats)
    return [SamplingParams(seed=seed, **common) for seed in request_seeds(prompts, sampling.seed, repeats)]


def request_seeds(prompts: Sequence[Sequence[int]], seed: int, repeats: int) -> list[int]:
    """One 63-bit seed per request from (seed, the prompt's tokens, how often this prompt came before, answer number).

    It depends on neither the prompt's place in the batch nor on which engine got it, so a batch may be reordered or
    split over engines (copies of one prompt kept together) without changing its answers.
    """
    seen: Counter[bytes] = Counter()
    seeds = []
    for prompt in prompts:
        key = hashlib.blake2b(repr((seed, tuple(prompt))).encode(), digest_size=16).digest()
        for answer in range(repeats):
            text = key + repr((seen[key], answer)).encode()
            seeds.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1)
        seen[key] += 1
    return seeds


def _row(output: "RequestOutput") -> Row:
    answer = output.outputs[0]
    token_ids = list(answer.token_ids)
    assert answer.logprobs is not None
    logprobs = [place[token].logprob for token, place in zip(token_ids, answer.logprobs, strict=True) if place]
    if answer.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {output.request_id} with {answer.finish_reason!r}")
    return token_ids, logprobs, answer.finish_reason


def _update_info(update: WeightUpdate) -> dict[str, Any]:
    """What each backend's own update record asks for."""
    if update.backend == "shared_memory":
        return {"path": update.location["path"], "names": list(update.names)}
    info: dict[str, Any] = {
        "names": list(update.names),
        "dtype_names": list(update.dtypes),
        "shapes": [list(shape) for shape in update.shapes],
    }
    return info | update.location


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends, SIGKILL included (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)


def serve(connection: Connection) -> None:
    """Answer each (method, arguments) with ("ok", value) or ("error", kind, text, trace), until the peer is gone."""
    folder, settings, version = connection.recv()
    engine = _answer(connection, lambda: Engine(folder, settings, version), reply=False)
    if engine is None:
        return
    connection.send(("ok", engine.describe()))
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        if method == "close":
            connection.send(("ok", None))
            return
        _answer(connection, lambda m=method, a=arguments: getattr(engine, m)(*a))


def _answer(connection: Connection, call: Any, reply: bool = True) -> Any:
    try:
        value = call()
    except Exception as error:
        connection.send(("error", type(error).__name__, str(error), traceback.format_exc()))
        return None
    if reply:
        connection.send(("ok", value))
    return value


def main() -> None:
    hide_secrets_in_logs()
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)
    os._exit(0)  # vLLM's exit handlers can hang, and there is nothing left to save


if __name__ == "__main__":
    main()
