"""Pools that outlive a step: vLLM engines and learner ranks, started once per run and lent from step to step.

One detached keeper actor per run owns all members, so that ending the keeper ends them all. A borrower (a step's body)
holds a lease, which a thread renews; no other borrower gets the pool meanwhile. If a lease is not renewed, the borrower
died while using the pool, and the pool is discarded and rebuilt. A pool without borrowers ends after its
`idle_timeout_s`, or `ORPHAN_S` after its driver was killed; until then the driver that resumes the run finds it warm. A
keeper without pools ends itself, so that nothing leaks. A job that is submitted again with other code gets a keeper of
that code.

Who waits for whom: `borrow` waits for the pool to be free, then for its processes to start. Only other borrowers wait
for the borrower, at most as long as its lease.
"""

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.pools.config import GeneratorPoolSettings, LearnerPoolSettings
from cluster.workers.gather import gather
from engines.config import GeneratorSettings
from infra.errors import NodeLost
from infra.ray_internals import has_ended
from infra.telemetry import hide_secrets_in_logs

if TYPE_CHECKING:  # they import torch, which takes seconds: the keeper and the driver need none
    from actors.pools.generators import Generators
    from actors.pools.learners import Learners

NAMESPACE = "recua"
LEASE_S = 20.0
"""A borrower that has not renewed its lease for this long counts as dead."""
ORPHAN_S = 60.0
"""How long a pool whose driver is gone waits for another driver of its run."""
ORPHAN_CHECK_S = 2.0


@dataclass
class _Pool:
    key: str = ""
    idle_timeout_s: float = 0.0
    members: list[Any] = field(default_factory=list)
    group: Any = None
    borrower: str | None = None
    job: str = ""
    used: float = field(default_factory=time.monotonic)
    checked: float = field(default_factory=time.monotonic)


class PoolKeeper:
    """Owns the members and lends them to one borrower at a time. A threaded actor: `borrow` may block."""

    def __init__(self, name: str, code: str, lease_s: float, orphan_s: float) -> None:
        hide_secrets_in_logs()
        self._name, self._code, self._lease_s, self._orphan_s = name, code, lease_s, orphan_s
        self._pools = {"generators": _Pool(), "learners": _Pool()}
        self._free = threading.Condition()
        threading.Thread(target=self._end_when_idle, daemon=True, name="pool-idle").start()

    def code(self) -> str:
        """The code of this keeper and its members; see `_code`. The caller is about to borrow, so the keeper stays."""
        with self._free:
            for pool in self._pools.values():
                if pool.borrower is None and not pool.members:
                    pool.used = time.monotonic()
        return self._code

    def borrow_generators(
        self, borrower: str, job: str, pool: GeneratorPoolSettings, engine: GeneratorSettings, folder: str
    ) -> list[Any]:
        """The engines for `folder`'s architecture; started if there are none, or only ones of another kind."""
        from actors.pools.generators import GeneratorWorker

        key = repr((pool, engine, _architecture(folder)))

        def start(made: _Pool) -> None:
            worker = ray.remote(GeneratorWorker).options(
                num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, max_restarts=0, max_task_retries=0
            )
            made.members = [worker.remote(folder, engine) for _ in range(pool.replicas)]
            ray.get([member.ready.remote() for member in made.members])

        return self._borrow("generators", borrower, job, key, pool.idle_timeout_s, start)

    def borrow_learners(self, borrower: str, job: str, pool: LearnerPoolSettings) -> list[Any]:
        """The learner ranks; started if there are none, or only ones of another kind."""

        def start(made: _Pool) -> None:
            from actors.pools.learner_group import start_learners

            made.group = start_learners(pool, f"{self._name}-learners-{uuid.uuid4().hex[:6]}")
            made.members = list(made.group.workers)

        return self._borrow("learners", borrower, job, repr(pool), pool.idle_timeout_s, start)

    def renew(self, kind: str, borrower: str) -> bool:
        """Renew a lease; False if the caller no longer holds it."""
        pool = self._pools[kind]
        if pool.borrower != borrower:
            return False
        pool.used = time.monotonic()
        return True

    def give_back(self, kind: str, borrower: str, broken: bool) -> None:
        """End a lease; a pool whose borrower failed while using it is not lent again."""
        with self._free:
            pool = self._pools[kind]
            if pool.borrower == borrower:
                if broken:
                    self._discard(kind)
                self._pools[kind].borrower = None
                self._pools[kind].used = time.monotonic()
                self._free.notify_all()

    def close(self) -> None:
        """End every member."""
        for kind in self._pools:
            self._discard(kind)

    def _borrow(self, kind: str, borrower: str, job: str, key: str, idle_timeout_s: float, start: Any) -> list[Any]:
        with self._free:
            while self._held(kind):
                self._free.wait(timeout=1.0)
            if self._pools[kind].borrower is not None or self._pools[kind].key != key or not self._alive(kind):
                self._discard(kind)
            pool = self._pools[kind]
            # The lease cannot lapse while the members start: the borrower renews it only once it has them.
            pool.borrower, pool.used, pool.idle_timeout_s = borrower, float("inf"), idle_timeout_s
            pool.job = job
        try:
            if not pool.members:
                start(pool)
                pool.key = key
        except BaseException:
            self.give_back(kind, borrower, broken=True)
            raise
        pool.used = time.monotonic()
        return pool.members

    def _held(self, kind: str) -> bool:
        pool = self._pools[kind]
        return pool.borrower is not None and time.monotonic() - pool.used < self._lease_s

    def _alive(self, kind: str) -> bool:
        try:
            ray.get([member.__ray_ready__.remote() for member in self._pools[kind].members], timeout=10)
            return True
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return False

    def _discard(self, kind: str) -> None:
        pool = self._pools[kind]
        self._pools[kind] = _Pool()
        if pool.group is not None:
            pool.group.shutdown()
        for member in pool.members:
            ray.kill(member)

    def _end_when_idle(self) -> None:
        """Discard idle pools; end the keeper once it has had no pool for the duration of a lease."""
        while True:
            time.sleep(0.5)
            with self._free:
                now = time.monotonic()
                for kind, pool in self._pools.items():
                    if pool.members and not self._held(kind) and self._over(pool, now):
                        self._discard(kind)
                if all(not pool.members and now - pool.used > self._lease_s for pool in self._pools.values()):
                    os._exit(0)

    def _over(self, pool: _Pool, now: float) -> bool:
        """Whether a free pool has been idle for too long, or its run's driver is gone."""
        idle_s = now - pool.used
        if idle_s > pool.idle_timeout_s:
            return True
        if idle_s < self._orphan_s or now - pool.checked < ORPHAN_CHECK_S:
            return False
        pool.checked = now
        return has_ended(ray, pool.job)


@dataclass(frozen=True)
class Pools:
    """A step's handle on its run's pools. Frozen and small, because it is passed in a step's arguments."""

    run_id: str
    lease_s: float = LEASE_S
    orphan_s: float = ORPHAN_S

    @contextmanager
    def generators(
        self, pool: GeneratorPoolSettings, engine: GeneratorSettings, folder: Path, version: str
    ) -> Iterator["Generators"]:
        """Borrow the generators, with `folder`'s weights as `version` and empty caches."""
        from actors.pools.generators import Generators

        with self._lease("generators", "borrow_generators", pool, engine, str(folder)) as members:
            generators = Generators(members)
            generators.load_weights(folder, version)
            yield generators

    @contextmanager
    def learners(self, pool: LearnerPoolSettings) -> Iterator["Learners"]:
        """Borrow the learner ranks without models; all models are closed on return."""
        from actors.pools.learners import Learners

        with self._lease("learners", "borrow_learners", pool) as members:
            learners = Learners(members, pool)
            learners.close()
            yield learners
            learners.close()

    @contextmanager
    def _lease(self, kind: str, method: str, *arguments: Any) -> Iterator[list[Any]]:
        keeper = self._keeper()
        borrower, job = uuid.uuid4().hex, ray.get_runtime_context().get_job_id()
        members = gather([getattr(keeper, method).remote(borrower, job, *arguments)], f"{kind} keeper")[0]
        stop = threading.Event()
        renewal = (keeper, kind, borrower, self.lease_s / 5, stop)
        thread = threading.Thread(target=_renew, args=renewal, daemon=True)
        thread.start()
        broken = True
        try:
            yield members
            broken = False
        finally:
            stop.set()
            with suppress(ray.exceptions.RayActorError):  # a keeper that died took its members with it
                ray.get(keeper.give_back.remote(kind, borrower, broken))

    def _keeper(self) -> Any:
        """This run's keeper with this job's code. An earlier job's keeper with other code is replaced."""
        name, code = f"pools-{self.run_id}", _code()
        actor: Any = ray.remote(PoolKeeper)
        actor = actor.options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=16,
            max_restarts=0,
        )
        for _ in range(3):
            keeper = actor.remote(name, code, self.lease_s, self.orphan_s)
            with suppress(ray.exceptions.RayActorError):  # it has just ended itself: the next one is new
                if ray.get(keeper.code.remote()) == code:
                    return keeper
                ray.kill(keeper)
        raise NodeLost(f"{name}: its keeper died three times in a row")

    def close(self) -> None:
        """End the run's pools, if there are any."""
        if not ray.is_initialized():
            return
        try:
            keeper = ray.get_actor(f"pools-{self.run_id}", namespace=NAMESPACE)
        except ValueError:
            return
        with suppress(ray.exceptions.RayError):
            ray.get(keeper.close.remote(), timeout=10)
        ray.kill(keeper)


def _code() -> str:
    """The package that a job runs from, which is named by a hash of its content; empty outside of jobs."""
    return str(ray.get_runtime_context().runtime_env.get("working_dir") or "")


def _renew(keeper: Any, kind: str, borrower: str, pause_s: float, stop: threading.Event) -> None:
    while not stop.wait(pause_s):
        if not ray.get(keeper.renew.remote(kind, borrower)):
            return  # another borrower has the lease: our members are gone, and the next call on them raises


def _architecture(folder: str) -> str:
    """A digest of the files that a running engine cannot change: config and tokenizer. Weights can be replaced."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"):
        file = Path(folder) / name
        if file.exists():
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()
