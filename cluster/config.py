"""Settings of elastic training. Every decision of cluster.policies names one of these keys. No torch, no ray."""

from pathlib import Path

from pydantic import Field, model_validator

from infra.config import Pause, Seconds, Settings
from infra.notices import NoticeSettings


class HealthSettings(Settings):
    """How each node's error counters and temperatures are read (see cluster.node.health)."""

    period_s: Seconds = 10
    """Seconds between two readings."""
    root: Path = Path("/")
    """Folder above the node's /sys and /proc: another one in a container that mounts the host's there."""


class ElasticSettings(Settings):
    """How a worker group shrinks, grows, recovers and gives up. All times are in seconds."""

    min_workers: int = Field(default=1, ge=1)
    """Fewest ranks that train; with fewer the run waits for capacity. A whole number of blocks."""
    max_workers: int = Field(default=2, ge=1)
    """Ranks of the full group; a whole number of blocks."""
    spares: int = Field(default=0, ge=0)
    """Warm workers kept on standby beyond `max_workers`; they take a lost rank's place within the same pause."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share one layer's matrices."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Stages of the pipeline. tensor_parallel x pipeline_parallel ranks are one block, the unit of capacity."""

    max_faults_without_progress: int = Field(default=8, ge=0)
    """Faults in a row without a new committed step before the run fails."""
    capacity_wait_s: Seconds = 3600
    """How long a run with fewer than `min_workers` waits for workers before it fails."""
    start_timeout_s: Seconds = 300
    """How long the first generation waits for all `max_workers`; after that it starts with those that are ready."""
    respawn_backoff_s: Seconds = 10
    """Pause before workers are ordered again after the platform refused some, and before machines that could not reach
    each other are tried again; the latter doubles every time, up to half an hour."""
    abort_timeout_s: Seconds = 2
    """A worker that has not left its collectives by then is killed by its node agent."""
    join_timeout_s: Seconds = 60
    """If no rank makes progress for this long in a re-forming (rendezvous, process groups, restore), the generation is
    given up and formed again. A large state may take longer to load: every few MiB count as progress."""
    join_stall_s: Seconds = 15
    """A joining rank without progress for this long, while others wait for it, hangs. Time without a processor does not
    count, nor does waiting for storage or for another node's memory."""
    boundary_timeout_s: Seconds = 120
    """Longest wait for a requested step boundary; after that the step is abandoned."""
    adopt_timeout_s: Seconds = 5
    """How long a restarted controller waits for node agents to name their living workers before it asks again."""
    orphan_s: Seconds = 300
    """How long ranks train on without a controller before they end: the time for replacing a lost driver. The ranks of
    a cancelled or failed run end within seconds."""
    growth_must_pay: bool = True
    """Grow only if the ranks gained until the next expected re-forming outweigh the pause of all ranks."""

    node_timeout_s: Seconds = 2.5
    """A node without a beat for this long is lost."""
    pulse_timeout_s: Seconds = 1.0
    """A process whose beacon pulse stands still for this long is stopped or locked."""
    hang_factor: float = Field(default=5, gt=1)
    """No progress for this many of the run's own median step times is a hang."""
    flush_timeout_s: Seconds = 1800
    """How long writing the last snapshot to storage may take before its rank counts as hung."""
    hang_floor_s: Seconds = 5
    """The shortest time without progress that counts as a hang, however short the steps."""
    first_step_grace_s: Seconds = 120
    """A generation's first step (compilation, lazy set-up) may take this long before it counts as a hang."""

    straggler_ratio: float = Field(default=1.25, gt=1)
    """A rank whose own computing time exceeds the median rank's by this factor is slow."""
    straggler_window: int = Field(default=16, ge=3)
    """Steps over which a rank's median computing time is taken."""
    straggler_evict_after: int = Field(default=3, ge=1)
    """Windows in a row in which a rank is slow before it is evicted; it is reported after the first."""
    straggler_evict: bool = True
    """Evict slow ranks; otherwise they are only reported."""
    straggler_crowding: bool = False
    """Count the time in which a rank has no processor, because others use it, as its own slowness. For ranks that have
    their processors to themselves."""

    nonfinite_patience: int = Field(default=2, ge=1)
    """NaN or Inf steps in a row (none is applied) before rolling back."""
    spike_window: int = Field(default=64, ge=8, le=96)
    """Number of past losses that a new loss is compared with."""
    spike_sigmas: float = Field(default=8, gt=0)
    """A loss this many robust standard deviations (1.4826 x MAD) above the window's median is a spike."""
    spike_patience: int = Field(default=3, ge=1)
    """Spiking steps in a row before rolling back; fewer pass as noise."""
    max_rollbacks: int = Field(default=10, ge=0)
    """Rollbacks for NaN, spikes and corruption in one run before it fails."""

    verify_every: int = Field(default=50, ge=1)
    """Steps between comparisons of the ranks' digests, each with one replayed micro-batch: the most steps that a silent
    corruption costs."""
    snapshot_every: int = Field(default=1, ge=1)
    """Steps between snapshots into host memory: the most steps that an infrastructure fault costs."""
    snapshot_replicas: int = Field(default=1, ge=0)
    """Copies of each shard in other nodes' memory; 0 keeps it only on its own node."""
    drain_margin_s: Pause = 2
    """Margin between the departure of drained ranks and a preemption deadline, on top of the measured pause."""
    notices: NoticeSettings = NoticeSettings()
    """The sources of preemption and maintenance notices that the nodes poll."""

    quarantine_faults: int = Field(default=3, ge=1)
    """A node with this many faults within `quarantine_window_s` is taken out of use."""
    quarantine_window_s: Seconds = 24 * 3600
    """How long a node's fault is remembered."""
    burn_in_speed_ratio: float = Field(default=0.7, gt=0, le=1)
    """A node whose compute speed is below this share of the fleet's median fails its burn-in."""
    burn_in_bandwidth_ratio: float = Field(default=0.5, gt=0, le=1)
    """The same for memory, loopback and peer bandwidth."""
    predicted_risk: float = Field(default=0.5, gt=0, le=1)
    """A node whose predicted risk of failing reaches this is drained before it fails."""
    health: HealthSettings = HealthSettings()
    """How signs of a coming failure are read."""

    @property
    def block(self) -> int:
        """Ranks of one model-parallel block."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def min_blocks(self) -> int:
        return self.min_workers // self.block

    @property
    def max_blocks(self) -> int:
        return self.max_workers // self.block

    @model_validator(mode="after")
    def _whole_blocks(self) -> "ElasticSettings":
        for name in ("min_workers", "max_workers"):
            if getattr(self, name) % self.block:
                blocks = f"tensor_parallel x pipeline_parallel = {self.block}"
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of {blocks}")
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} exceeds max_workers {self.max_workers}")
        return self
