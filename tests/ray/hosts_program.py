"""Pools and an endpoint over two hosts, driven from the one that is not the head: `python hosts_program.py ORDER_JSON`.

ORDER: {"address", "folder"}; what came of it goes to FOLDER/found.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import ray

from actors.pools.config import GeneratorPoolSettings, LearnerPoolSettings
from actors.pools.keeper import Pools
from actors.pools.weight_sync import WeightSync
from actors.posttrain.config import SftSettings
from actors.posttrain.conversation import supervised_row
from actors.posttrain.sft import fine_tune
from engines.base import Sampling
from engines.chat import ChatTokenizer
from engines.config import GeneratorSettings, LearnerSettings
from serving.app import deploy, on_head, shutdown
from serving.check import compare
from serving.config import ServingEngineSettings, ServingSettings
from serving.preflight import folder_digest
from tests.ray.serving_toy import save_toy_model

TOGETHER = LearnerPoolSettings(workers=2, num_cpus=0.3, threads=1)
APART = TOGETHER.model_copy(update={"num_cpus": 0.6})
"""Two of its ranks find no room on one host."""
QUESTION, LENGTH = "the quick brown fox", 8


def main(order: dict[str, Any]) -> None:
    ray.init(address=order["address"], log_to_driver=False)
    folder = Path(order["folder"])
    toy = save_toy_model(folder / "toy")
    tokenizer = ChatTokenizer.load(toy)
    pools, found = Pools("hosts"), {}
    try:
        for name, pool in (("together", TOGETHER), ("apart", APART)):
            found[name] = tune(pools, pool, toy, tokenizer, folder / name)
        found["answers"] = sample(pools, toy, folder / "apart", tokenizer)
    finally:
        pools.close()
    asked = {"prompt": QUESTION, "prompt_ids": prompt_of(tokenizer), "ids": found["answers"][0]}
    found["served"] = serve(folder / "apart", asked)
    (folder / "found.json").write_text(json.dumps(found))


def prompt_of(tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.prompt([{"role": "user", "content": QUESTION}])


def tune(pools: Pools, pool: LearnerPoolSettings, toy: Path, tokenizer: ChatTokenizer, out: Path) -> dict[str, Any]:
    """SFT on both ranks: on how many nodes they were, and every step's loss."""
    rows = []
    for number in range(32):
        said = [{"role": "user", "content": f"the fox {number}"}, {"role": "assistant", "content": f"dog {number}"}]
        rows.append(supervised_row(said, "toy", tokenizer, "all"))
    settings = SftSettings(batch_size=8, epochs=1, optimizer=LearnerSettings(learning_rate=1e-2, timeout=120))
    curve: list[dict[str, Any]] = []
    with pools.learners(pool) as learners:
        nodes = {info.node_id for info in ray.get([worker.describe.remote() for worker in learners.workers])}
        fine_tune(learners, toy, rows, settings, out, 0, curve.append)
    return {"nodes": len(nodes), "losses": [row["loss"] for row in curve]}


def sample(pools: Pools, before: Path, tuned: Path, tokenizer: ChatTokenizer) -> list[list[int]]:
    """Every engine's greedy answer with the learners' weights: one engine a host, and weights that were pushed."""
    greedy = Sampling(temperature=0.0, max_tokens=LENGTH, stop_token_ids=tokenizer.stop_ids)
    engine = GeneratorSettings(kv_cache_gib=0.1, max_model_len=128, max_num_batched_tokens=512)
    with (
        pools.generators(GeneratorPoolSettings(replicas=2, num_cpus=0.4), engine, before, "before") as generators,
        pools.learners(APART) as learners,
    ):
        learners.open("policy", tuned)
        sync = WeightSync(learners, generators, "policy", engine)
        sync.connect()
        sync.push("tuned")
        asked = [worker.generate.remote([prompt_of(tokenizer)], greedy) for worker in generators.workers]
        return [list(answer[0][0].token_ids) for answer in ray.get(asked)]


def serve(model: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Whether an endpoint, which listens on the head's loopback, answers what was sampled; two replicas, one a host."""
    settings = ServingSettings(
        grpc_port=0, http_port=0, replicas=2, num_cpus=0.6,
        engine=ServingEngineSettings(kv_cache_gib=0.1, max_model_len=128),
    )  # fmt: skip
    endpoint = deploy(model, folder_digest(model), settings)
    compared = on_head(compare, endpoint, settings, [asked] * 6, LENGTH)
    shutdown(endpoint, 1.0)
    return {"grpc": compared.grpc, "openai": compared.openai, "answers": compared.answers}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
