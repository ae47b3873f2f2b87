"""A driver that pretrains on a shared cluster: `python detached_program.py SETTINGS CORPUS STEPS`.

Prints every event as a line of JSON.
"""

import json
import os
import shutil
import sys
from typing import Any

from actors.pretrain.config import PretrainSettings
from engines.config import LearnerSettings
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import Artifact, context, step, workflow
from workflows.recipes.settings import ModelSettings
from workflows.recipes.training import pretrain
from workflows.runs.events import Event

PATIENT = {"hang_floor_s": 60, "pulse_timeout_s": 30, "abort_timeout_s": 20, "start_timeout_s": 600}


@step(num_cpus=0)
def given(folder: str) -> Artifact:
    out = context().artifact("data")
    shutil.copytree(folder, out.path, dirs_exist_ok=True)
    return out.seal()


@workflow
def training(corpus: str, steps: int) -> Any:
    section = PretrainSettings(
        optimizer=LearnerSettings(learning_rate=1e-3, warmup_steps=2, timeout=120),
        steps=steps,
        batch_size=4,
        sequence_length=16,
        micro_batch_size=2,
        save_every=1000,
        num_cpus=0.5,
        elastic=PATIENT,
    )
    model = ModelSettings(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, context=16)
    tokens = given.options(name="tokens")(f"{corpus}/tokens")
    tokenizer = given.options(name="tokenizer")(f"{corpus}/tokenizer")
    return pretrain(tokens, tokenizer, model, section, 7).summary.result()


def tell(event: Event) -> None:
    if event.kind != "progress":
        line = json.dumps({"kind": event.kind, "step": event.step, **event.data}, default=str)
        os.write(1, f"{line}\n".encode())  # in one piece: Ray prints from threads of its own


if __name__ == "__main__":
    settings = RunSettings(**json.loads(sys.argv[1]))
    session.run(training, sys.argv[2], int(sys.argv[3]), settings=settings, observers=[tell])
