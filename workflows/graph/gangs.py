"""Gangs: steps that need several bundles of resources at the same time, all or none.

    @step(gang=Gang(bundles=[{"CPU": 1}] * 4, strategy="SPREAD"))     # or gang=4: four times the step's own request
    def train(corpus): ...

Every attempt gets a Ray placement group of its own. The body runs in bundle 0; tasks and actors that it starts run in
the group, or in one bundle of `context().placement_group()`. The group is removed after every end of the attempt. It
belongs to the driver's job, so that Ray removes it if the driver dies.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infra.capacity import STRATEGIES, check_amount, show_bundle
from infra.errors import ConfigError

Done = Callable[[bytes | None, BaseException | None], None]


@dataclass(frozen=True)
class Gang:
    """`bundles`: sets of resources by Ray's names, each on one node ({"CPU": 4, "GPU": 1, "memory":
    bytes}). `strategy`: PACK, SPREAD (best effort), STRICT_PACK (one node) or STRICT_SPREAD (one node per bundle)."""

    bundles: Sequence[Mapping[str, float]]
    strategy: str = "PACK"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"gang.strategy={self.strategy!r}: use one of {', '.join(STRATEGIES)}")
        if not self.bundles:
            raise ConfigError("gang.bundles: there must be at least one")
        for number, bundle in enumerate(self.bundles):
            for name, amount in bundle.items():
                check_amount(f"gang.bundles[{number}]: {name}", name, amount)
            if not any(bundle.values()):
                raise ConfigError(f"gang.bundles[{number}]: {dict(bundle)} must ask for something")
        object.__setattr__(self, "bundles", tuple({k: float(v) for k, v in each.items() if v} for each in self.bundles))

    def __str__(self) -> str:
        alike = all(bundle == self.bundles[0] for bundle in self.bundles)
        shown = (
            f"{len(self.bundles)} x ({show_bundle(self.bundles[0])})"
            if alike
            else " + ".join(f"({show_bundle(bundle)})" for bundle in self.bundles)
        )
        return f"{shown}, {self.strategy}"


def resolve_gang(gang: Gang | int, body: Mapping[str, float]) -> Gang:
    """A step's complete `gang=`; a number means that many bundles of the body's own request.

    Raises:
        ConfigError: the body does not fit into bundle 0.
    """
    if not isinstance(gang, Gang):
        if not isinstance(gang, int) or isinstance(gang, bool):
            raise ConfigError(f"gang={gang!r}: must be a Gang, a whole number, or None")
        if gang < 1:
            raise ConfigError(f"gang={gang}: must be at least 1, or None")
        return Gang([body] * gang)
    for name, amount in body.items():
        if amount > gang.bundles[0].get(name, 0.0):
            raise ConfigError(
                f"gang.bundles[0] has {show_bundle(gang.bundles[0])}, and the body, which runs there, asks for "
                f"{show_bundle({name: amount})}: make the bundle larger, or num_cpus, num_gpus or memory smaller"
            )
    return gang


class GangAttempt:
    """An attempt that runs on a placement group, which may not exist yet."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._lock = threading.Lock()
        self._reference: Any = None
        self._cancelled = False

    def begin(self, start: Callable[[], Any]) -> Any:
        """Submit by `start()`; None if the attempt was cancelled before."""
        with self._lock:
            if not self._cancelled:
                self._reference = start()
            return self._reference

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._reference is not None:
                with contextlib.suppress(Exception):  # it may have ended by itself
                    self._ray.cancel(self._reference, force=True, recursive=True)


class Gangs:
    """Creates and removes the groups on a thread of its own, so that the executor's loop never waits for Ray's head.
    `is_lost()`: whether the Ray cluster is gone with its groups, so that it must not be called."""

    def __init__(self, ray: Any, is_lost: Callable[[], bool]) -> None:
        self._ray = ray
        self._is_lost = is_lost
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="recua-gangs")

    def submit(self, name: str, gang: Gang, task: Any, arguments: tuple[Any, ...], done: Done) -> GangAttempt:
        """Start `task.remote(*arguments)` in bundle 0 of a new group. `done(outcome, error)` is called once, after the
        group is removed."""
        attempt = GangAttempt(self._ray)
        self._pool.submit(self._begin, name, gang, task, arguments, done, attempt)
        return attempt

    def close(self) -> None:
        """Return when every group is removed."""
        self._pool.shutdown(wait=True)

    def _begin(
        self, name: str, gang: Gang, task: Any, arguments: tuple[Any, ...], done: Done, attempt: GangAttempt
    ) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group: Any = None
        try:
            if self._is_lost():
                raise self._ray.exceptions.LocalRayletDiedError
            group = placement_group([dict(bundle) for bundle in gang.bundles], strategy=gang.strategy, name=name)
            where = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
            reference = attempt.begin(lambda: task.options(name=name, scheduling_strategy=where).remote(*arguments))
        except Exception as error:
            self._end(group, done, None, error)
            return
        if reference is None:
            self._end(group, done, None, self._ray.exceptions.TaskCancelledError())
            return
        reference.future().add_done_callback(lambda future: self._on_ended(group, done, future))

    def _on_ended(self, group: Any, done: Done, future: Any) -> None:
        error = future.exception()
        outcome = None if error else future.result()
        try:
            self._pool.submit(self._end, group, done, outcome, error)
        except RuntimeError:  # closed: the driver ends, and Ray removes the groups of its job
            done(outcome, error)

    def _end(self, group: Any, done: Done, outcome: bytes | None, error: BaseException | None) -> None:
        from ray.util.placement_group import remove_placement_group

        if group is not None and not self._is_lost():
            with contextlib.suppress(Exception):  # Ray's head is gone: the group is removed with the job
                remove_placement_group(group)
        done(outcome, error)
