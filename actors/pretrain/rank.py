"""One rank of pretraining, which survives the loss of others: the loop that all ranks run in lockstep.

Who waits for whom: the training thread waits for the controller's order (`join`), and then for its peers in
collectives. The actor's methods only leave messages and return at once; `abort` also wakes the training thread from any
wait. The outcome is in the beacon, for the controller that leads the group then. Tests break a rank at the points that
`actors.pretrain.fault_points` names.
"""

import contextlib
import json
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import psutil
import ray
import torch

from actors.pretrain.batches import BatchLoader, Texts, mean_loss, next_token_loss, open_texts
from actors.pretrain.burn_in import BurningIn
from actors.pretrain.fault_points import FaultPoints
from actors.pretrain.handover import hand_over
from actors.pretrain.job import Order, PretrainJob, recipe_of
from actors.pretrain.loss_doubts import LossDoubts
from actors.pretrain.proofs import Prover
from actors.pretrain.rank_time import Aborted, RankTime
from cluster.goodput.own_time import OwnTime
from cluster.goodput.stopwatch import Stopwatch
from cluster.node.beacons import SUFFIX, BeaconWriter
from cluster.node.host_memory import BEACONS, end_when_unwatched, group_folder, node_root
from cluster.node.wire_speed import SinkAddress
from engines.collectives.join_signs import JoinSigns
from engines.collectives.process_groups import Rendezvous, StoreAddress
from engines.elastic.learner import ElasticLearner
from engines.elastic.torch_learner import TorchLearner
from engines.snapshots import Peer, StoreSource
from infra.errors import NodeLost, PeersUnreachable, RecuaError, ResourceError, StepError, StoreError
from infra.storage import open_store
from infra.telemetry import hide_secrets_in_logs

log = logging.getLogger(__name__)

REFUSED = "refused"
"""The file in the state with copies of snapshots that were refused, and why."""


class PretrainRank:
    """The actor class; `cluster.controller.fleet.Fleet` makes one per rank.

    Args:
        name: of this worker. group: the name of its shards in shared memory.
        ordered_at: seconds since the epoch; Ray may have kept the process for a while before.
        store: the meeting point of ranks while the controller that started this worker leads.
    """

    def __init__(self, name: str, group: str, ordered_at: float, job: PretrainJob, store: StoreAddress) -> None:
        hide_secrets_in_logs()
        self.name, self.group = name, group
        settings = job.settings
        self.node = ray.get_runtime_context().get_node_id()
        self._state = open_store(job.state)
        there = self._state.local_path("")
        if there is not None and not there.exists():
            what = f"node {self.node[:12]} does not see {job.state}"
            raise ResourceError(
                f"{what}: ranks on several nodes need a --store in a folder that all nodes share, or s3://bucket/prefix"
            )
        self.job = job = job.here()
        self.shared = node_root(self.node)
        born = time.monotonic() - (time.time() - max(ordered_at, psutil.Process().create_time()))
        folder = group_folder(self.node, group)
        self.beacon = BeaconWriter(folder / BEACONS / f"{name}{SUFFIX}")
        end_when_unwatched(folder, settings.elastic.orphan_s)
        self.fetched = folder / "fetched"
        self.ledger = RankTime(Stopwatch(born=born, memory=self.beacon.account))
        self.ledger.enter("init")
        self.points = FaultPoints(job.faults or "", (there or folder) / "faults")
        self._store = store
        self._words: queue.SimpleQueue[Order | Aborted | None] = queue.SimpleQueue()
        self._stop_generation = -1
        self._failure: Exception | None = None
        self._texts: Texts | None = None
        torch.set_num_threads(settings.threads)
        self._snapshot_store = open_store(job.snapshot_store)
        self.elastic = ElasticLearner(
            recipe_of(job),
            group,
            Rendezvous(store),
            device=torch.device("cuda", 0) if settings.num_gpus > 0 else torch.device("cpu"),
            address=ray.util.get_node_ip_address(),
            shared=self.shared,
            store=self._snapshot_store,
            reach=self.points.reach,
            progress=self.beacon.tick,
            signs=JoinSigns(stage=self.beacon.enter, moved=self.beacon.stir),
        )
        self._doubts = LossDoubts(self.elastic.milestones, settings.elastic)
        self.burning_in = BurningIn(self.beacon, self.elastic.device)
        threading.Thread(target=self._live, name="training", daemon=True).start()

    # ---- orders of the controller

    def describe(self) -> tuple[int, str]:
        """(pid, node id); the answer shows that the process is up."""
        return os.getpid(), self.node

    def join(self, order: Order | None) -> None:
        """Take a place in a new generation, once this rank has left the last one. None: there is no place for it."""
        self._words.put(order)

    def abort(self, generation: int, deadline_s: float, fault_age_s: float = 0.0) -> None:
        """Leave the collectives of this generation and of older ones. `fault_age_s`: seconds since the fault began."""
        now = time.monotonic()
        self._words.put(Aborted(generation, now, now - fault_age_s))
        self.elastic.abort(generation, deadline_s)

    def stop_at_boundary(self, generation: int) -> None:
        """Ask the others to stop after the same step; see `Ranks.should_commit`."""
        self._stop_generation = max(self._stop_generation, generation)

    def burn_in(self, again: bool, peer: SinkAddress | None) -> None:
        """Measure this machine again, and the way to another node."""
        self.burning_in.run(again, peer)

    def failure(self) -> Exception | None:
        """The error that this rank raised by itself, if any."""
        return self._failure

    # ---- the training thread

    def _live(self) -> None:
        self.beacon.set(thread=threading.get_native_id())
        try:
            self.elastic.warm_up()
            self._meet()
            self.burning_in.run(again=True, peer=None)
            self.beacon.set(state="standby")
            self.ledger.enter("idle")
            while True:
                word = self._words.get()
                if word is None:
                    self.ledger.enter("idle")
                elif isinstance(word, Aborted):
                    self.ledger.heard(word)
                else:
                    self._serve(word)
        except Exception as error:
            self._fail(error)

    def _meet(self) -> None:
        """Connect to the ranks' meeting point, which can take seconds. If the controller is gone by now, the next one's
        order names another one."""
        try:
            if (missing := self.elastic.rendezvous.missing_way()) is not None:
                log.warning("worker %s: no connection to %s", self.name, missing)
                return
            self.elastic.rendezvous.store()
        except RuntimeError as error:
            log.warning("worker %s: %s", self.name, error)

    def _serve(self, order: Order) -> None:
        """One generation, from its order to its end."""
        try:
            state = self._train(order)
            self.ledger.enter("idle" if state == "finished" else "re_forming")
            self.elastic.leave()
        except Exception as error:
            waits = None if self.elastic.learner is None else self.elastic.learner.ranks.waits
            self.ledger.broken(order.generation, waits)
            groups = self.elastic.groups
            lost = isinstance(error, NodeLost) or (groups is not None and groups.aborted)
            self.elastic.leave()
            if not lost:
                self._fail(error)
                return
            if isinstance(error, PeersUnreachable):
                self._failure = error
                self.beacon.set(state="aborted", phase="apart")
                return
            state = "aborted"
        self.beacon.set(state=state, phase="wait")

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, RecuaError):
            text = f"worker {self.name}: {type(error).__name__}: {error}".strip().splitlines()[0]
            error = StepError(text, user_traceback=traceback.format_exc())
        self._failure = error
        self.beacon.set(state="failed", phase="wait")

    def _train(self, order: Order) -> str:
        """(collective) Train; returns how the generation ended here: "finished" or "boundary"."""
        seat = {"generation": order.generation, "rank": order.rank, "world_size": order.world_size}
        self.beacon.set(state="joining", phase="join", ticks=0, **seat)
        self.ledger.enter("re_forming")
        self.points.sit(order.world_size)
        self.points.reach("join", order.rank, order.generation)
        learner = self._join(order)
        self.beacon.stir("fetch")
        self._texts = self._texts or open_texts(self.job)
        loader = BatchLoader(self.job, learner.ranks, order.skipped, self._texts)
        gpu, crowding = learner.ranks.device.type == "cuda", self.job.settings.elastic.straggler_crowding
        own, own_s = OwnTime(crowding, beside=gpu), 0.0
        prover = Prover(self.beacon, self.elastic, self.job.settings.elastic, self.job.settings.steps)
        if learner.last_step:
            self.beacon.enter("wait")
            self._say(learner, order, loader, loader.tokens(learner.step - 1))
        self.beacon.set(state="joined", phase="wait", ticks=0, start=learner.step, step=learner.step, own_s=own_s)
        steps = self.job.settings.steps
        while learner.step < steps:
            step, started = learner.step, time.perf_counter()
            self.beacon.enter("data")
            self.ledger.enter("data_wait")
            self.points.reach("data", order.rank, step)
            own.begin()
            data = loader.micro_batches(step)
            own.fetched()
            self.points.count_step(order.rank, order.generation)
            self.beacon.enter("collective")
            learner.ranks.stop_asked = self._stop_generation >= order.generation
            ask = self.points.in_answer(
                next_token_loss(data.tokens, self.beacon.tick), order.rank, order.generation, step
            )
            with self.ledger.step(learner.ranks.waits, again=step < order.high_step):
                self.elastic.train_step(data.micro_batches, self.points.in_loss(ask, order.rank, step, data.window))
            self._doubts.saw(learner.losses, learner.step)
            own_s += own.end(self.ledger.waited_s) / data.weight
            rate = round(data.tokens / (time.perf_counter() - started), 1)
            self._say(learner, order, loader, data.tokens, tokens_per_s=rate)
            self.beacon.set(step=learner.step, phase="wait", own_s=own_s)
            prover.leave()
            if (replica := prover.wants_replay(learner.step)) is not None:
                self.beacon.enter("collective")
                self.ledger.enter("detection")
                prover.prove(loader.sample(step, replica), ask)
                self.beacon.set(phase="wait")
            if learner.ranks.stop_agreed and learner.step < steps:
                self.ledger.enter("checkpoint_stall")
                self.elastic.take_last()
                prover.leave()
                return "boundary"
            self.points.flip_weight(self.elastic, order.rank, order.generation)
        self._finish(learner, order)
        prover.leave()
        return "finished"

    def _join(self, order: Order) -> TorchLearner:
        if order.store != self._store:
            self._store, self.elastic.rendezvous = order.store, Rendezvous(order.store)
        self.elastic.milestones.verified = order.verified
        joined = self.elastic.join(
            order.generation,
            order.rank,
            order.world_size,
            sources=[Peer(p.host, p.port, p.token, self.group) for p in order.sources],
            stores=[StoreSource(self._snapshot_store, self.group, self.fetched)],
            holders=[
                Peer(p.host, p.port, p.token, self.group, milestones=self.elastic.milestones) for p in order.holders
            ],
            at_most=order.at_most,
            fresh=order.at_most is None,
        )
        if joined.refused:
            self._note_refused(order, joined.refused)
        learner = self.elastic.learner
        assert learner is not None
        self._doubts.begin(learner.losses, learner.step)
        learner.ranks.on_vote = self.beacon.tick
        return learner

    def _note_refused(self, order: Order, refused: Sequence[str]) -> None:
        """Record copies of shards that were damaged or could not be reached."""
        note = {"generation": order.generation, "rank": order.rank, "refused": refused, "time": round(time.time(), 3)}
        key, content = f"{REFUSED}/{order.generation:05d}-{order.rank}.json", json.dumps(note).encode()

        def write() -> None:  # for people: training does not wait for it
            with contextlib.suppress(StoreError):
                self._state.put(key, content, durable=False)

        threading.Thread(target=write, name="refused", daemon=True).start()

    def _say(self, learner: TorchLearner, order: Order, loader: BatchLoader, tokens: int, **more: Any) -> None:
        """(collective) Write the outcome of the last step into the beacon."""
        step = learner.step - 1
        if held_out := loader.held_out(learner.step):
            assert self.elastic.groups is not None
            with self.elastic.groups.naming_lost_peers():
                more["held_out_loss"] = mean_loss(learner, held_out, loader.held_out_tokens())
        row = {"step": step, "steps": self.job.settings.steps, **learner.last_step, "tokens": tokens, **more}
        self.beacon.say(step, {**row, "time": round(time.time(), 4), "generation": order.generation})

    def _finish(self, learner: TorchLearner, order: Order) -> None:
        """(collective) Write the last state to storage, and the model to its folder."""
        self.beacon.enter("save")
        self.ledger.enter("checkpoint_stall")
        self.points.reach("finish", order.rank, order.generation)
        deadline = time.monotonic() + self.job.settings.elastic.flush_timeout_s

        def moving() -> None:  # so that this does not count as a hang
            if time.monotonic() < deadline:
                self.beacon.tick()

        self.elastic.flush_last(moving)
        self.beacon.tick()
        assert self.elastic.groups is not None
        with self.elastic.groups.naming_lost_peers():
            if self.job.out is not None:
                learner.save_hf(self.job.out)
            else:
                hand_over(learner.save_hf, self._state, learner.rank == 0)
