"""The fault-free run to compare with: `python elastic_reference.py ORDER_JSON`.

As many processes as the full group has ranks train on the windows that are left, one after the other: no Ray, no
controller, nothing is snapshot to go back to, and bad data is left out from the start.
"""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from actors.pretrain.batches import BatchLoader, next_token_loss
from actors.pretrain.config import PretrainSettings
from actors.pretrain.job import PretrainJob, recipe_of
from engines.collectives.process_groups import Rendezvous, host_store
from engines.elastic.learner import ElasticLearner
from models.llama import LlamaConfig
from tests.chaos.elastic_program import MODEL, SEED
from tests.chaos.elastic_run import settings_of
from tests.chaos.elastic_schedule import Schedule

ROOT = Path(__file__).resolve().parents[2]
COMPUTING = ("actors", "data", "engines", "models")
TIMEOUT_S = 300.0
ROWS = "rows.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """How the fault-free run ended."""

    rows: list[Row]
    weights: dict[str, torch.Tensor]


def reference(schedule: Schedule, corpus: Path, vocab_size: int, kept: Path) -> Reference:
    """Of the variant and the data of a schedule; taken from the folder `kept` as long as the code that computes stays
    the same."""
    settings = settings_of(schedule, 1.0, "")
    del settings["elastic"]
    order = {"settings": settings, "skipped": schedule.skipped, "vocab_size": vocab_size}
    made_of = hashlib.sha256(json.dumps(order).encode() + Path(__file__).read_bytes())
    for package in COMPUTING:
        for path in sorted((ROOT / package).rglob("*.py")):
            made_of.update(path.read_bytes())
    folder = kept / f"{schedule.variant.name}-{made_of.hexdigest()[:16]}"
    if not folder.is_dir():
        draft = folder.with_suffix(f".{os.getpid()}")
        draft.mkdir(parents=True)
        command = [sys.executable, __file__, json.dumps({**order, "corpus": str(corpus), "folder": str(draft)})]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, env={**os.environ, "OMP_NUM_THREADS": "1"})
        draft.rename(folder)
    return Reference(json.loads((folder / ROWS).read_text()), weights_of(folder / "out"))


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def main(order: dict[str, Any]) -> int:
    settings = PretrainSettings.model_validate(order["settings"])
    context = multiprocessing.get_context("fork")  # torch is imported once
    ends, ranks = [], []
    for rank in range(settings.workers):
        ours, theirs = context.Pipe()
        ranks.append(context.Process(target=_train, args=(order, settings, rank, theirs)))
        ranks[-1].start()
        ends.append(ours)
    _host, address = host_store()
    for end in ends:
        end.send(address)
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


def _train(order: dict[str, Any], settings: PretrainSettings, rank: int, end: Connection) -> None:
    folder, corpus = Path(order["folder"]), Path(order["corpus"])
    torch.set_num_threads(settings.threads)
    model = LlamaConfig(**MODEL, vocab_size=order["vocab_size"])
    out = folder / "out"
    job = PretrainJob(corpus / "tokens", corpus / "tokenizer", model, settings, str(folder), SEED, out=out)
    elastic = ElasticLearner(recipe_of(job), "reference", Rendezvous(end.recv()), shared=folder / "memory")
    elastic.join(1, rank, settings.workers, fresh=True)
    learner, rows = elastic.learner, []
    assert learner is not None
    loader = BatchLoader(job, learner.ranks, tuple(order["skipped"]))
    while learner.step < settings.steps:
        step = learner.step
        data = loader.micro_batches(step)
        elastic.train_step(data.micro_batches, next_token_loss(data.tokens))
        rows.append({"step": step, **learner.last_step, "tokens": data.tokens})
    if rank == 0:
        out.mkdir(exist_ok=True)
        (folder / ROWS).write_text(json.dumps(rows))
    learner.ranks.gather(None)
    learner.save_hf(out)
    elastic.leave()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
