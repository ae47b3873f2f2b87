"""The behaviour of most trainers under the same simulated faults: any fault ends the whole job, which restarts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.simulation.assumptions import SimulatedCluster
from cluster.simulation.failure_tables import DAY, Fault


@dataclass(frozen=True)
class RestartBaseline:
    """Seconds; every one is an assumption that the report repeats. Generous: the best interval, spares at hand."""

    hang_detection_s: float = 600.0
    """NCCL's default watchdog timeout: until then a hang is unnoticed."""
    relaunch_s: float = 120.0
    """Scheduling, new processes, imports on every rank."""
    load_s: float = 60.0
    """Reading the newest checkpoint from storage."""
    checkpoint_stall_s: float = 10.0
    """Training stands still for one asynchronous checkpoint."""

    def restart_s(self, cluster: SimulatedCluster) -> float:
        """From the end of the old job to the first new step; process groups cost what they cost recua."""
        return self.relaunch_s + self.load_s + cluster.pause.join_s(cluster.gpus)

    def interval_s(self, faults: int, wall_s: float) -> float:
        """Young's optimum, sqrt(2 x stall x mean time between faults)."""
        return math.sqrt(2 * self.checkpoint_stall_s * wall_s / max(1, faults))


def baseline_goodput(cluster: SimulatedCluster, faults: Sequence[Fault], baseline: RestartBaseline) -> float:
    """Useful share of the capacity (spares included), with the same spare nodes and replacement times as recua.

    A notice checkpoints first and loses no work; every other fault loses the work since the last checkpoint. A fault
    while the job is down begins its restart again. Without a spare the job waits for the replacement node.
    """
    wall = cluster.days * DAY
    interval = baseline.interval_s(len(faults), wall)
    useful, up_since = 0.0, baseline.restart_s(cluster)
    away: list[float] = []

    def productive(seconds: float) -> float:
        """Seconds of training within `seconds` up, checkpoints taken out."""
        return seconds * interval / (interval + baseline.checkpoint_stall_s)

    for fault in sorted(faults, key=lambda fault: fault.time):
        if fault.time >= wall:
            break
        up = max(0.0, fault.time - up_since)
        kept = up if fault.kind == "notice" else up - up % (interval + baseline.checkpoint_stall_s)
        useful += productive(kept)
        down = fault.time + (baseline.hang_detection_s if fault.kind in ("hang", "fabric") else 0.0)
        away = [back for back in away if back > down]
        if fault.replaced:
            away.append(down + cluster.node_replacement_s)
        ready = down if len(away) <= cluster.spare_nodes else sorted(away)[-cluster.spare_nodes - 1]
        up_since = max(up_since, ready + baseline.restart_s(cluster))
    useful += productive(max(0.0, wall - up_since))
    ranks = cluster.gpus + cluster.spare_nodes * cluster.gpus_per_node
    return useful * cluster.gpus / (wall * ranks)
