"""One driver of a pretraining of the campaign: `python elastic_program.py ORDER_JSON LOG`.

Every row and event becomes a line of LOG at once: {"row": ...}, {"event": ...}, at the end {"result": ...} or
{"error": ...}; the exit code is 0 or 3.
"""

import functools
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from actors.pretrain.config import PretrainSettings
from actors.pretrain.job import PretrainJob
from actors.pretrain.lead import pretrain
from infra.errors import RecuaError
from models.llama import LlamaConfig

MODEL = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 64, "context": 16, "tied": True}
SEED = 7


def main(order: dict[str, Any], log: Path) -> int:
    with log.open("w", buffering=1) as stream:

        def say(kind: str, value: Any) -> None:
            stream.write(json.dumps({kind: value, "at": round(time.time(), 3)}) + "\n")

        ray.init(address=order["address"], log_to_driver=False)
        corpus, folder = Path(order["corpus"]), Path(order["folder"])
        try:
            job = PretrainJob(
                corpus / "tokens",
                corpus / "tokenizer",
                LlamaConfig(**MODEL, vocab_size=order["vocab_size"]),
                PretrainSettings.model_validate(order["settings"]),
                str(folder / "state"),
                SEED,
                order["faults"],
            )
            on_event = functools.partial(say, "event")
            result = pretrain(job, folder / "out", functools.partial(say, "row"), on_event=on_event)
        except RecuaError as error:
            say("error", f"{type(error).__name__}: {error}")
            return 3
        say("result", asdict(result))
        return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), Path(sys.argv[2])))
