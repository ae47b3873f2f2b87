"""NaN, Inf, loss spikes and corruption: how far to go back, and which data to leave out.

The batch of step k is number k + skipped_before(k) of the data order (data position is a function of the step). A
rollback to step s that drops the batches of steps s to b - 1 adds their window to the list.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cluster.config import ElasticSettings
from cluster.policies.decision import Decision, key

MAD_TO_SIGMA = 1.4826
"""The ratio of a normal distribution's standard deviation to its median absolute deviation."""
LOOKED_BACK = 32
"""Steps that ranks may still take before the group's controller rolls them back."""


@dataclass(frozen=True)
class DataWindow:
    """Batches that training leaves out: `first` to `last`, both included, by their numbers in the data order."""

    first: int
    last: int


@dataclass(frozen=True)
class SavedState:
    """A loadable state from before step `step`; `verified`: its digests agreed across replicas."""

    step: int
    verified: bool = True


@dataclass(frozen=True)
class Rollback:
    """`decision.action` is go-on, skip-update, roll-back or fail. `to_step` and `skip` are set for roll-back only."""

    decision: Decision
    to_step: int | None = None
    skip: DataWindow | None = None


def spike_score(losses: Sequence[float], window: int) -> float:
    """How many robust standard deviations the last loss lies above the median of up to `window` finite ones before it.

    0 while there are fewer than 8 of them. The deviation has a floor of 0.1% of the median, so that a flat stretch does
    not turn noise into spikes.
    """
    past = [loss for loss in losses[:-1][-window:] if math.isfinite(loss)]
    if len(past) < 8:
        return 0.0
    middle = median(past)
    deviation = MAD_TO_SIGMA * median(abs(loss - middle) for loss in past)
    return (losses[-1] - middle) / max(deviation, 1e-3 * abs(middle), 1e-12)


def judged_loss(row: Mapping[str, Any]) -> float:
    """The loss in a step's outcome; NaN if the update was not applied because the gradient was not finite."""
    return float(row["loss"]) if row["committed"] else math.nan


def judge_step(
    losses: Sequence[float],
    step: int,
    saved: Sequence[SavedState],
    skipped: Sequence[DataWindow],
    rollbacks: int,
    settings: ElasticSettings,
) -> Rollback:
    """The decision after step `step` (0-based), whose loss is `losses[-1]`; NaN also stands for a non-finite gradient.

    Args:
        losses: of the steps up to `step`, oldest first, without those that a rollback undid.
        saved: states that can be loaded. skipped: windows left out so far. rollbacks: so far in this run.
    """
    doubt = doubt_of(losses, step, settings)
    if doubt is None:
        return Rollback(Decision("go-on", f"step {step}: loss {losses[-1]:.4g}", key("spike_sigmas")))
    if not math.isfinite(losses[-1]):
        what, name, mild = "the loss or gradient is not finite", "nonfinite_patience", "skip-update"
    else:
        score = spike_score(losses, settings.spike_window)
        what = f"loss {losses[-1]:.4g} is {score:.1f} robust sigmas above the last {settings.spike_window}"
        name, mild = "spike_patience", "go-on"
    text = f"step {step}: {what} ({step + 1 - doubt.first} in a row)"
    if not doubt.sure:
        return Rollback(Decision(mild, text, key(name)))
    return _roll_back(text, doubt.first, step, saved, skipped, rollbacks, name, settings)


@dataclass(frozen=True)
class Doubt:
    """Steps from `first` on may have to be undone, judged by those up to `last`: the state before them must stay.
    `sure`: they will be undone."""

    first: int
    last: int
    sure: bool


def doubt_of(losses: Sequence[float], step: int, settings: ElasticSettings) -> Doubt | None:
    """The rollback that `judge_step` may ask for after `step` or a few more steps; None: none."""
    if not losses:
        return None
    if not math.isfinite(losses[-1]):
        bad, patience = _nonfinite_streak(losses), settings.nonfinite_patience
    elif spike_score(losses, settings.spike_window) > settings.spike_sigmas:
        bad, patience = _spike_streak(losses, settings), settings.spike_patience
    else:
        return None
    return Doubt(step + 1 - bad, step, bad >= patience)


def sure_doubt(losses: Sequence[float], step: int, settings: ElasticSettings) -> Doubt | None:
    """The first sure doubt within the last `LOOKED_BACK` steps up to `step`: training had to go back and has not yet,
    because losses of undone steps are no longer among `losses`."""
    for later in range(min(LOOKED_BACK, len(losses)) - 1, -1, -1):
        doubt = doubt_of(losses[: len(losses) - later], step - later, settings)
        if doubt is not None and doubt.sure:
            return doubt
    return None


def after_corruption(
    step: int,
    guilty: Sequence[int],
    saved: Sequence[SavedState],
    rollbacks: int,
    settings: ElasticSettings,
) -> Rollback:
    """Digests disagree at `step`: back to the newest verified state, no data left out (the data is not at fault).
    Without `guilty` ranks all of them go back."""
    ranks = ", ".join(str(rank) for rank in guilty)
    who = f"guilty ranks: {ranks}" if guilty else "and no third can tell who is right: nobody is named"
    what = f"step {step}: state digests disagree, {who}"
    verified = [state for state in saved if state.verified]
    rolled = _roll_back(what, step + 1, step, verified, (), rollbacks, "verify_every", settings)
    return Rollback(rolled.decision, rolled.to_step, None)


def leave_out(skipped: Sequence[DataWindow], window: DataWindow) -> tuple[DataWindow, ...]:
    """The journaled list with one more window: disjoint, in order, touching ones merged."""
    merged: list[DataWindow] = []
    for one in sorted((*skipped, window), key=lambda one: one.first):
        if merged and one.first <= merged[-1].last + 1:
            merged[-1] = DataWindow(merged[-1].first, max(merged[-1].last, one.last))
        else:
            merged.append(one)
    return tuple(merged)


def batch_of(step: int, skipped: Sequence[DataWindow]) -> int:
    """The number in the data order of the batch of step `step`: the step-th one outside the (disjoint) windows."""
    batch = step
    for window in sorted(skipped, key=lambda window: window.first):
        if window.first <= batch:
            batch += window.last - window.first + 1
    return batch


def _roll_back(
    what: str,
    first_bad: int,
    step: int,
    saved: Sequence[SavedState],
    skipped: Sequence[DataWindow],
    rollbacks: int,
    name: str,
    settings: ElasticSettings,
) -> Rollback:
    if rollbacks >= settings.max_rollbacks:
        return Rollback(Decision("fail", f"{what}, and {rollbacks} rollbacks are used up", key("max_rollbacks")))
    good = [state.step for state in saved if state.step <= first_bad]
    if not good:
        text = f"{what}, and no state from before step {first_bad} is left"
        return Rollback(Decision("fail", text, key("snapshot_every")))
    target = max(good)
    window = DataWindow(batch_of(min(first_bad, step), skipped), batch_of(step, skipped))
    text = f"{what}: back {step + 1 - target} steps to {target}"
    return Rollback(Decision("roll-back", text, key(name)), target, window)


def _nonfinite_streak(losses: Sequence[float]) -> int:
    count = 0
    while count < len(losses) and not math.isfinite(losses[-1 - count]):
        count += 1
    return count


def _spike_streak(losses: Sequence[float], settings: ElasticSettings) -> int:
    """Spiking steps in a row up to the last one, each judged by the losses before it."""
    count = 1
    while count < len(losses):
        earlier = losses[: len(losses) - count]
        if not math.isfinite(earlier[-1]) or spike_score(earlier, settings.spike_window) <= settings.spike_sigmas:
            break
        count += 1
    return count
