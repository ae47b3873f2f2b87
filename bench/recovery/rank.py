"""One rank of any peer: the step, the state on disk, the log. Recovery is the peer's own."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.recovery.job import BATCH, CLIP, LEARNING_RATE, RANKS, STEPS, THREADS, TOKENS
from data.tokenized import TokenWindows
from models.llama import Llama, LlamaConfig

BUCKET_MIB = 1
"""Size of DDP's buckets: with several buckets, as for a model larger than the default of 25 MiB, gradients are
exchanged throughout the backward pass."""


class Rank:
    """Rank `number` of RANKS; every rank starts from the same weights."""

    def __init__(self, folder: Path, number: int) -> None:
        torch.set_num_threads(THREADS)
        self.folder, self.number = folder, number
        self.network = Llama(LlamaConfig(**json.loads((folder / "model.json").read_text()))).init_weights(seed=0)
        self._windows = TokenWindows(folder / "tokens", TOKENS)
        self._log = os.open(folder / STEPS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def backward(self, model: torch.nn.Module, step: int) -> None:
        """Gradients of this rank's rows of the batch; DDP averages them."""
        rows = BATCH // RANKS
        first = step * BATCH + self.number * rows
        windows = [self._windows[index % len(self._windows)] for index in range(first, first + rows)]
        tokens = torch.from_numpy(np.stack(windows))  # [B, T + 1]
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    def done(self, step: int, ranks: int) -> None:
        """Log that `ranks` ranks completed step `step`. One write, so that lines do not mix."""
        line = {"time": time.time(), "step": step, "rank": self.number, "pid": os.getpid(), "ranks": ranks}
        os.write(self._log, (json.dumps(line) + "\n").encode())


def save(file: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save the whole state; the file appears only when it is complete."""
    draft = file.with_suffix(".draft")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, draft)
    draft.replace(file)


def load(file: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the state and return its step; 0 if there is none."""
    if not file.exists():
        return 0
    state: dict[str, Any] = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
