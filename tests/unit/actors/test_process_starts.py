"""What the processes of a pretraining import before they work: most of what a start costs."""

import subprocess
import sys
from pathlib import Path


def loads(code: str, modules: tuple[str, ...], repository: Path) -> list[str]:
    """Which of the modules a new process has after `code`."""
    script = f"import sys\n{code}\nprint(*[name for name in {modules} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=repository, check=True)
    return done.stdout.split()


def test_a_node_agent_and_what_it_is_told_come_without_torch(repository: Path) -> None:
    told = "import actors.pretrain.agent, cluster.workers.named_actors, workflows.runs.status"
    assert loads(told, ("torch", "transformers", "pandas", "vllm"), repository) == []


LIFE = """
import sys
from pathlib import Path
import torch
import actors.pretrain.rank
from engines.config import LearnerSettings, SnapshotSettings
from engines.elastic.learner import TINY, ElasticLearner, Recipe
from engines.collectives.process_groups import Rendezvous, host_store
from infra.storage import open_store

served, address = host_store("127.0.0.1")
folder = Path(sys.argv[1])
recipe = Recipe(TINY, LearnerSettings(), SnapshotSettings(flush_every=1), fsdp=sys.argv[2] == "fsdp")
elastic = ElasticLearner(
    recipe, "run", Rendezvous(address), address="127.0.0.1", shared=folder, store=open_store(folder / "store")
)
elastic.warm_up()
warm = set(sys.modules)
tokens = {"input_ids": torch.zeros(1, TINY.context, dtype=torch.long)}
for generation in (1, 2):
    elastic.join(generation, 0, 1, fresh=generation == 1)
    for _ in range(2):
        elastic.train_step([tokens], lambda module, batch: (module(batch["input_ids"]).sum(), {}))
    elastic.flush_last()
elastic.learner.save_hf(folder / "out")
elastic.leave()
late = [name for name in set(sys.modules) - warm if name.partition(".")[0] in ("torch", "sympy", "engines", "models")]
heavy = [name for name in ("sympy", "torch._dynamo", "torch.distributed.tensor") if name in sys.modules]
print(sorted(late), heavy)
"""


def test_a_warm_rank_has_all_that_its_work_needs_and_no_more(repository: Path, tmp_path: Path) -> None:
    """From the first join to the saved model, a recovery between them; DTensors and torch's compiler are for ranks that
    shard."""
    found = {}
    for kind in ("replicate", "fsdp"):
        command = [sys.executable, "-c", LIFE, str(tmp_path / kind), kind]
        (tmp_path / kind).mkdir()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=repository, check=True)
        found[kind] = done.stdout.splitlines()[-1]
    assert found == {"replicate": "[] []", "fsdp": "[] ['sympy', 'torch._dynamo', 'torch.distributed.tensor']"}
