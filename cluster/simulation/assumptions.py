"""Assumptions of a simulation and its results; nothing here is measured."""

from dataclasses import dataclass, fields
from typing import Any

from cluster.config import ElasticSettings
from cluster.goodput.accounts import Pause
from cluster.goodput.buckets import Goodput
from cluster.simulation.failure_tables import DAY
from cluster.simulation.pauses import PauseModel


@dataclass(frozen=True)
class SimulatedCluster:
    """The simulated cluster. Every number is an assumption that the report repeats."""

    pause: PauseModel
    """Seconds of a re-forming by group size."""
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
    """Seconds per step: 0.3 GB of state per GPU over PCIe at 25 GB/s, without any overlap."""
    snapshot_lag_s: float = 0.5
    """Seconds from a step's commit until all copies of its snapshot are acknowledged."""
    flush_every: int = 50
    """Steps between verified states in storage: the most steps that a corruption costs."""
    process_detection_s: float = 0.1
    process_warm_s: float = 60.0
    """Seconds from starting a process on a live node until it is on standby."""
    node_replacement_s: float = 600.0
    """Seconds from requesting a replacement node until its processes are on standby, burn-in included."""

    def assumptions(self) -> dict[str, Any]:
        """Every field with its value; the pause model's summary instead of its parts."""
        model, largest = self.pause, self.gpus
        pause = {"source": model.source, "seconds_at_full_size": round(model.pause_s(largest), 3), **model.to_json()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"pause": pause}

    def elastic(self) -> ElasticSettings:
        """The settings of the real controller; at least half of the group must be left to train on."""
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
    """Times that training stopped and re-formed, for any reason."""
    storage_restores: int
    ended: str
    handled: int
    """Events that the core handled."""
    core_s: float
    """Measured CPU seconds that the core took for them."""
    pauses: list[float]
    """Simulated seconds from a fault (or boundary) until training resumed."""
    decisions: tuple[Pause, ...]
    """The same pauses in the controller's own record, each with its decision."""
