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
    """Where the node's own /sys and /proc are: below another folder in a container that has the host's there."""


class ElasticSettings(Settings):
    """How a worker group shrinks, grows, recovers and gives up. Seconds everywhere."""

    min_workers: int = Field(default=1, ge=1)
    """Training continues with so many ranks or more; below it the run waits for capacity. A whole number of blocks."""
    max_workers: int = Field(default=2, ge=1)
    """Ranks of the full group. A whole number of blocks."""
    spares: int = Field(default=0, ge=0)
    """Warm workers kept on standby beyond `max_workers`; they take a lost rank's place within the same pause."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share one layer's matrices."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Stages of the pipeline. tensor_parallel x pipeline_parallel ranks are one block, the unit of capacity."""

    max_faults_without_progress: int = Field(default=8, ge=0)
    """Faults in a row without one new committed step, before the run fails."""
    capacity_wait_s: Seconds = 3600
    """How long a run with fewer than `min_workers` waits for workers before it fails."""
    start_timeout_s: Seconds = 300
    """How long the first generation waits for all `max_workers`; after that it starts with what is there."""
    respawn_backoff_s: Seconds = 10
    """Pause before workers are ordered again after the platform refused some, and before machines that had no way to
    each other are tried again; that doubles every time, up to half an hour."""
    abort_timeout_s: Seconds = 2
    """A worker that has not left its collectives by then is killed by its node agent."""
    join_timeout_s: Seconds = 60
    """When nobody gets on for so long in a re-forming (rendezvous, process groups, restore), the generation is given up
    and tried again. A large state may take longer to load: every few MiB of it count as getting on."""
    join_stall_s: Seconds = 15
    """A rank that gets on with nothing for so long on its way into a generation, while others wait for it, hangs. Time
    without a processor does not count, nor does waiting for storage or for another node's memory."""
    boundary_timeout_s: Seconds = 120
    """Longest wait for a step boundary that was asked for; after that the step is abandoned."""
    adopt_timeout_s: Seconds = 5
    """How long a restarted controller waits for node agents to name their living workers before it asks again."""
    orphan_s: Seconds = 300
    """How long ranks train on without a controller before they end: the time that a lost driver has to be replaced in.
    A run that was cancelled or has failed ends its ranks within seconds."""
    growth_must_pay: bool = True
    """Grow only if the ranks gained, over the time until the next expected re-forming, outweigh the pause of all."""

    node_timeout_s: Seconds = 2.5
    """A node without a beat for this long is lost."""
    pulse_timeout_s: Seconds = 1.0
    """A process whose beacon pulse stands still for this long is stopped or locked."""
    hang_factor: float = Field(default=5, gt=1)
    """No progress for this many of the run's own median step times is a hang."""
    flush_timeout_s: Seconds = 1800
    """How long the last snapshot's way to storage may take before its rank counts as hung."""
    hang_floor_s: Seconds = 5
    """Never call a hang sooner than this, however short the steps."""
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
    """Time in which a rank has no processor, because others use it, counts as its own slowness: for ranks that have
    their processors to themselves."""

    nonfinite_patience: int = Field(default=2, ge=1)
    """NaN or Inf steps in a row (none is applied) before rolling back."""
    spike_window: int = Field(default=64, ge=8, le=96)
    """Past losses that define what is normal."""
    spike_sigmas: float = Field(default=8, gt=0)
    """A loss this many robust standard deviations (1.4826 x MAD) above the window's median is a spike."""
    spike_patience: int = Field(default=3, ge=1)
    """Spiking steps in a row before rolling back; fewer pass as noise."""
    max_rollbacks: int = Field(default=10, ge=0)
    """Rollbacks for NaN, spikes and corruption in one run before it fails."""

    verify_every: int = Field(default=50, ge=1)
    """Steps between comparisons of the ranks' digests, with one replayed micro-batch each: how far a silent corruption
    reaches back."""
    snapshot_every: int = Field(default=1, ge=1)
    """Steps between snapshots into host memory: what an infrastructure fault can cost at most."""
    snapshot_replicas: int = Field(default=1, ge=0)
    """Copies of each shard in other nodes' memory; 0 keeps it only on its own node."""
    drain_margin_s: Pause = 2
    """How long before a preemption deadline the drained ranks must have left, on top of the measured pause."""
    notices: NoticeSettings = NoticeSettings()
    """Which notices of preemption and maintenance the nodes listen for."""

    quarantine_faults: int = Field(default=3, ge=1)
    """Faults of one node within `quarantine_window_s` that take it out of use."""
    quarantine_window_s: Seconds = 24 * 3600
    """How long a node's fault is remembered."""
    burn_in_speed_ratio: float = Field(default=0.7, gt=0, le=1)
    """A node whose compute speed is below this share of the fleet's median fails its burn-in."""
    burn_in_bandwidth_ratio: float = Field(default=0.5, gt=0, le=1)
    """The same for memory, loopback and peer bandwidth."""
    predicted_risk: float = Field(default=0.5, gt=0, le=1)
    """A node whose predicted risk of failing reaches this is drained before it fails."""
    health: HealthSettings = HealthSettings()
    """How the signs of a coming failure are read."""

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
