"""What a rank measures of its machine before it says that it is ready: right answers, speed of computing and memory.

About 0.1 s on a CPU. Every rate is the best of several short tries: what else runs on the machine makes some tries
slow, a broken part makes all of them slow. How much a rank had to wait for a processor meanwhile is measured too, so
that nobody calls a crowded machine a slow one.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from infra.processes import starved_s

SIZE = {"cpu": 384, "cuda": 4096}
"""Rows of the square matrices that are multiplied."""
TRIES = 8
MEMORY_BYTES = 16 << 20
PATTERNS = (0x55, 0xAA)
PERIODS = (7, 5)


@dataclass(frozen=True)
class Machine:
    """`compute_rate` in GFLOP/s, `memory_rate` in GB/s (read and written), `crowded`: share of the time in which this
    thread waited for a processor.

    Example: Machine(True, True, 61.2, 11.8, 0.02, 0.09).
    """

    answer_correct: bool
    memory_correct: bool
    compute_rate: float
    memory_rate: float
    crowded: float
    seconds: float


def examine(device: torch.device) -> Machine:
    """Multiply small integers (exact in float32, in any order) and write patterns; check every result."""
    started, starved = time.monotonic(), starved_s(os.getpid(), threading.get_native_id())
    right, compute_rate = _multiply(device)
    kept, memory_rate = _write(device)
    seconds = time.monotonic() - started
    crowded = (starved_s(os.getpid(), threading.get_native_id()) - starved) / seconds
    return Machine(right, kept, compute_rate, memory_rate, crowded, seconds)


def known_product(size: int) -> torch.Tensor:
    """What `_multiply` must give, [35 possible values] by (row mod 7, column mod 5), in integer arithmetic alone."""
    rows, columns = PERIODS
    table = [[sum(_left(i, k) * _right(k, j) for k in range(size)) for j in range(columns)] for i in range(rows)]
    return torch.tensor(table, dtype=torch.float32)


def _left(i: int, k: int) -> int:
    return (i + k) % PERIODS[0] - 3


def _right(k: int, j: int) -> int:
    return (k * k + j) % PERIODS[1] - 1


def _multiply(device: torch.device) -> tuple[bool, float]:
    size = SIZE[device.type]
    index = torch.arange(size, device=device)
    left = (index[:, None] + index[None, :]).remainder(PERIODS[0]).sub(3).float()
    right = (index[:, None] ** 2 + index[None, :]).remainder(PERIODS[1]).sub(1).float()
    known = known_product(size).to(device)[index.remainder(PERIODS[0])][:, index.remainder(PERIODS[1])]
    correct, best = True, float("inf")
    product = torch.empty_like(left)
    for _ in range(TRIES):
        best = min(best, _seconds(lambda: torch.mm(left, right, out=product), device))
        correct &= torch.equal(product, known)
    return correct, 2 * size**3 / best / 1e9


def _write(device: torch.device) -> tuple[bool, float]:
    memory = torch.empty(MEMORY_BYTES, dtype=torch.uint8, device=device)
    copy = torch.empty_like(memory)
    correct, best = True, float("inf")
    for pattern in PATTERNS:
        memory.fill_(pattern)
        for _ in range(TRIES // 4):
            best = min(best, _seconds(lambda: copy.copy_(memory), device))
        words = torch.tensor([pattern] * 8, dtype=torch.uint8, device=device).view(torch.int64)
        correct &= bool((copy.view(torch.int64) == words).all())
    return correct, 2 * MEMORY_BYTES / best / 1e9


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
