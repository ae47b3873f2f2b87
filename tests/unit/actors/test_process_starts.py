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
    told = "import actors.pretrain.agent, cluster.workers.named_actors, workflows.status"
    assert loads(told, ("torch", "transformers", "pandas", "vllm"), repository) == []
