"""What is simulated, and what comes out of it: assumptions and simulated results, no measurement."""

from dataclasses import dataclass, fields
from typing import Any

from cluster.config import ElasticSettings
from cluster.goodput.accounts import Pause
from cluster.goodput.buckets import Goodput
from cluster.simulation.failure_tables import DAY
from cluster.simulation.pauses import PauseModel


@dataclass(frozen=True)
class SimulatedCluster:
    """What is simulated. Every number is an assumption that the report repeats."""

    pause: PauseModel
    """How long a re-forming takes at which size."""
    gpus: int = 16384
    days: float = 54.0
    gpus_per_node: int = 8
    tensor_parallel: int = 8
    pipeline_parallel: int = 16
    spare_nodes: int = 4
    """Warm nodes on standby; they count as capacity asked for."""
    step_s: float = 6.2
    """A fault-free step at full size: 6 x 405e9 x 16M tokens at 400 TFLOP/s per GPU on 16,384 GPUs."""
    snapshot_stall_s: float = 0.012
    """Per step: 0.3 GB of state per GPU over PCIe at 25 GB/s, as if nothing of it overlapped."""
    snapshot_lag_s: float = 0.5
    """From a step's commit until all copies of its snapshot are acknowledged."""
    flush_every: int = 50
    """Steps between verified states in storage: how far a corruption reaches back."""
    process_detection_s: float = 0.1
    process_warm_s: float = 60.0
    """A new process on a living node until it is on standby."""
    node_replacement_s: float = 600.0
    """A replacement node from the pool until its processes are on standby, burn-in included."""

    def assumptions(self) -> dict[str, Any]:
        """Every field with its value; the pause model's summary instead of its parts."""
        model, largest = self.pause, self.gpus
        pause = {"source": model.source, "seconds_at_full_size": round(model.pause_s(largest), 3), **model.to_json()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"pause": pause}

    def elastic(self) -> ElasticSettings:
        """The settings that the real controller would run with; half the group is the least that trains on."""
        block = self.tensor_parallel * self.pipeline_parallel
        blocks = self.gpus // block
        longest = 10 * (self.pause.pause_s(self.gpus) + 10)
        return ElasticSettings(
            min_workers=max(1, blocks // 2) * block,
            max_workers=blocks * block,
            spares=self.spare_nodes * self.gpus_per_node,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            abort_timeout_s=max(2.0, 10 * self.pause.abort_s(self.gpus)),
            join_timeout_s=longest,
            boundary_timeout_s=longest + 10 * self.step_s,
            capacity_wait_s=self.days * DAY,
            start_timeout_s=3600,
        )


@dataclass
class SimulatedRun:
    """One simulated run."""

    account: Goodput
    steps: int
    lost_steps: int
    """Committed steps that an infrastructure fault undid."""
    rolled_back_steps: int
    """Committed steps that corruption undid."""
    restarts: int
    """Times that training stopped and re-formed, for whatever reason."""
    storage_restores: int
    ended: str
    handled: int
    """Events that the core handled."""
    core_s: float
    """Measured CPU seconds that the core took for them."""
    pauses: list[float]
    """Simulated seconds from a fault (or boundary) until training went on."""
    decisions: tuple[Pause, ...]
    """The same pauses as the controller's own record has them, each with its decision."""
