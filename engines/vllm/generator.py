"""`VllmGenerator`: vLLM behind the `Generator` protocol, in a process of its own.

The engine's process (engines/vllm/process.py) keeps vLLM's threads, signal handlers, process groups and environment
away from the caller, who may sit in a Ray actor and hold a learner too. Calls are synchronous and one at a time: a
second thread waits at a lock, so a weight update never meets a request in flight. The engine's process dies with its
parent, a SIGKILL included. A call that finds the process dead raises `SystemFault`; the owner then builds a new one.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engines.base import Completion, Sampling, WeightUpdate
from engines.config import GeneratorSettings
from engines.weight_transfer import check_same_architecture, read_shapes
from infra.addresses import sockets_at
from infra.code_root import code_root
from infra.errors import SystemFault


class VllmGenerator:
    """Samples token ids with vLLM; implements `engines.base.Generator`.

    `logprobs` of a completion are fp32 and those of the distribution that was sampled from: after temperature and
    top_p (vLLM's "processed_logprobs"); greedy answers carry the model's own at temperature 1.

    With `sampling.seed` an answer depends on the weights, the seed, the prompt and its number among equal prompts of
    the call, not on the order of the batch nor on earlier calls (up to rounding, which varies with batch shapes).
    """

    def __init__(
        self, folder: Path, settings: GeneratorSettings, version: str = "initial", address: str | None = None
    ) -> None:
        """Start the engine on the HF model in `folder`; returns when it has generated a token. `address`: of this
        machine, where others reach it; None: what vLLM finds by itself.

        Raises:
            CheckpointError: `folder` has no weights.
            SystemFault: the engine did not start; the message ends with the last lines of its log.
        """
        self._shapes = read_shapes(Path(folder))
        self._lock = threading.Lock()
        self._version = version
        self._log = tempfile.TemporaryFile(prefix="recua-vllm-")  # noqa: SIM115  (closed in close())
        self._connection, self._process, self._keeper = _spawn(settings, self._log, address)
        info = self._exchange((Path(folder), settings, version), settings.start_timeout)
        self.max_model_len: int = info["max_model_len"]
        self.vocab_size: int = info["vocab_size"]
        self.health(settings.start_timeout)  # some models start and cannot run, e.g. heads of 16 on CPU

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """`prompts` [P][T_p] -> completions [P][n], in order.

        An answer ends at a stop token, at `max_tokens`, or where the engine's `max_model_len` is full ("length").

        Raises:
            ValueError: a prompt is empty, leaves no room for one token, or has ids outside the vocabulary.
            SystemFault: the engine's process died.
        """
        self._check(prompts)
        if not prompts:
            return []
        version, groups = self._call("generate", [list(map(int, prompt)) for prompt in prompts], sampling)
        return [[Completion(tuple(ids), tuple(lps), why, version) for ids, lps, why in group] for group in groups]

    def connect(self, info: dict[str, Any]) -> None:
        """Join a sender's group (`WeightSender.receiver_info`); needed once, for the nccl and ipc backends."""
        self._call("connect", info)

    def update_weights(self, update: WeightUpdate) -> None:
        """Swap the weights in place, drop cached prefixes, carry `update.version`.

        Raises:
            CheckpointError: other tensors than this model's, or a file that is gone or damaged; nothing was changed.
            SystemFault: the swap failed half-way; the engine was stopped, because its weights are a mixture.
        """
        check_same_architecture(self._shapes, dict(zip(update.names, update.shapes, strict=True)), update.version)
        if update.backend == "shared_memory":
            check_same_architecture(self._shapes, read_shapes(Path(update.location["path"])), update.version)
        self._swap("update_weights", update.version, update)

    def load_weights(self, folder: Path, version: str) -> None:
        """The same from a saved HF folder of the same architecture; same errors."""
        check_same_architecture(self._shapes, read_shapes(Path(folder)), str(folder))
        self._swap("load_weights", version, Path(folder).absolute(), version)

    @property
    def weight_version(self) -> str:
        return self._version

    @property
    def pid(self) -> int:
        """Process id of the engine (for fault injection and for `ps`)."""
        return self._process.pid

    def health(self, timeout: float = 60.0) -> None:
        """Generate one token for real.

        Raises:
            TimeoutError: another call held the engine all that time.
            SystemFault: the engine is dead, or was free and did not answer; it is stopped then.
        """
        self._call("generate", [[0]], Sampling(temperature=0.0, max_tokens=1), timeout=timeout)

    def close(self) -> None:
        """Stop the engine; no process stays behind. Idempotent."""
        try:
            if self._process.poll() is None and not self._connection.closed and self._lock.acquire(timeout=5):
                self._connection.send(("close", ()))
                self._connection.poll(5)
                self._lock.release()
        except OSError:
            pass  # it is already gone
        self._kill()
        self._log.close()

    def _swap(self, method: str, version: str, *arguments: Any) -> None:
        try:
            self._call(method, *arguments)
        except Exception as error:
            self._kill()
            raise SystemFault(f"updating the generator to weights {version!r} failed half-way: {error}") from error
        self._version = version

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.max_model_len:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; between 1 and max_model_len - 1 = "
                    f"{self.max_model_len - 1} are possible"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise ValueError(f"prompt {index} has token ids outside the vocabulary of {self.vocab_size}")

    def _call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            raise TimeoutError(f"the generator was busy for {timeout} s")
        try:
            return self._exchange((method, arguments), timeout)
        finally:
            self._lock.release()

    def _exchange(self, message: Any, timeout: float | None) -> Any:
        """Send and wait for the answer. Whatever interrupts this leaves no half-read answer: the engine is stopped."""
        try:
            self._connection.send(message)
            if timeout is not None and not self._connection.poll(timeout):
                raise SystemFault(f"the vLLM engine (pid {self.pid}) did not answer within {timeout} s")
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._kill()
            raise SystemFault(
                f"the vLLM engine (pid {self.pid}) died, exit status {self._process.returncode}\n{self._last_lines()}"
            ) from error
        except BaseException:
            self._kill()
            raise
        if answer[0] == "ok":
            return answer[1]
        _, kind, text, trace = answer
        started = not isinstance(message[0], Path)
        if started and kind == "ValueError":  # refused before anything was queued
            raise ValueError(text)
        self._kill()  # requests may be left in its queue, weights half loaded
        raise SystemFault(f"vLLM {'failed' if started else 'did not start'}: {kind}: {text}\n{trace}")

    def _kill(self) -> None:
        """End the engine's whole session and reap it."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._keeper.join()
        self._connection.close()

    def _last_lines(self, count: int = 15) -> str:
        if self._log.closed:
            return ""
        self._log.seek(0)
        return b"\n".join(self._log.read().splitlines()[-count:]).decode(errors="replace")


def _spawn(
    settings: GeneratorSettings, log: Any, address: str | None
) -> tuple[Connection, "subprocess.Popen[bytes]", threading.Thread]:
    """Start the engine's process from a thread that lives exactly as long as it does.

    The kernel's parent-death signal fires when the *thread* that started a process ends; callers may be short-lived.
    """
    ours, theirs = Pipe()
    started: list[subprocess.Popen[bytes]] = []
    failed: list[BaseException] = []
    ready = threading.Event()

    def keep() -> None:
        try:
            command = [sys.executable, "-m", "engines.vllm.process", str(theirs.fileno()), str(os.getpid())]
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=_environment(settings, address),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            started.append(process)
        except BaseException as error:
            failed.append(error)
            return
        finally:
            theirs.close()
            ready.set()
        process.wait()

    keeper = threading.Thread(target=keep, name="vllm-keeper", daemon=True)
    keeper.start()
    ready.wait()
    if failed:
        raise SystemFault(f"the vLLM engine could not be started: {failed[0]}") from failed[0]
    return ours, started[0], keeper


def _environment(settings: GeneratorSettings, address: str | None) -> dict[str, str]:
    paths = [str(code_root()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | ({} if address is None else sockets_at(address))
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(settings.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are shared with learners; binding would stack engines on one
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if settings.tensor_parallel > 1 else "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # kv_cache_gib says it
    return environment
