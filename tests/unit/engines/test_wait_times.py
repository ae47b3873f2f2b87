"""What real ranks count as waiting, and for what: one is slow, or dies, and the other's waits must show it."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.pretrain.batches import next_token_loss
from actors.pretrain.rank_time import Aborted, RankTime
from cluster.goodput.stopwatch import Stopwatch
from engines.collectives.process_groups import ProcessGroups, Rendezvous, StoreAddress, host_store
from engines.collectives.ranks import Ranks
from engines.elastic.torch_learner import TorchLearner, build
from infra.errors import NodeLost
from tests.helpers.elastic_ranks import MODEL, SETTINGS, micro_batch
from tests.helpers.forks import FORKS

SLOW_S = 1.0
NOTICED_S = 0.3
"""Of those at least; the rest is for a machine that many share."""
DEADLINE = 120.0


def learner_of(ranks: Ranks, fsdp: bool) -> TorchLearner:
    return build(MODEL, SETTINGS, ranks, fsdp=fsdp, seed=3)


def one_step(learner: TorchLearner) -> None:
    learner.train_step([micro_batch([0, 1]), micro_batch([2, 3])], next_token_loss(64))


def once(action: Callable[[], None]) -> Callable[..., None]:
    left = [action]
    return lambda *_: left.pop()() if left else None


def be_slow(learner: TorchLearner, in_backward: bool) -> None:
    """Once, in the middle of the next step."""
    block: Any = next(iter(learner.module.layers.values()))  # type: ignore[union-attr,operator]
    sleep = once(lambda: time.sleep(SLOW_S))
    if in_backward:
        block.register_forward_hook(lambda module, inputs, output: output.register_hook(sleep) and None)
    else:
        block.register_forward_pre_hook(sleep)


def waited(groups: ProcessGroups, form: Callable[[], Ranks], slow: int, fsdp: bool, in_backward: bool) -> Any:
    """One rank's waits in a step in which rank `slow` is slow."""
    learner = learner_of(groups.form(form), fsdp)
    waits = learner.ranks.waits
    one_step(learner)
    learner.ranks.barrier()
    waits.take()
    if groups.rank == slow:
        be_slow(learner, in_backward)
    wait, wait_tensor = vars(dist.Work)["wait"], dist._functional_collectives.wait_tensor
    one_step(learner)
    assert vars(dist.Work)["wait"] is wait and dist._functional_collectives.wait_tensor is wait_tensor
    found = waits.take()
    assert sum(waits.take().values()) == 0
    learner.close()
    groups.leave()
    return found


CASES: dict[str, tuple[Callable[[], Ranks], int, bool, bool]] = {
    "fsdp": (Ranks.over_all, 1, True, False),
    "replicas": (Ranks.over_all, 0, False, True),
    "tensor parallel": (lambda: Ranks.over_all(2), 1, True, True),
    "first stage": (lambda: Ranks.over_all(1, None, 2), 0, False, False),
    "first stage, at the end": (lambda: Ranks.over_all(1, None, 2), 0, False, True),
    "last stage": (lambda: Ranks.over_all(1, None, 2), 1, False, False),
}


def all_cases(rank: int, address: StoreAddress, pipe: Any) -> None:
    torch.set_num_threads(1)
    rendezvous = Rendezvous(address)
    for generation, (form, slow, fsdp, in_backward) in enumerate(CASES.values()):
        groups = ProcessGroups(generation, rank, 2, rendezvous)
        pipe.send(waited(groups, form, slow, fsdp, in_backward))


@pytest.fixture
def two() -> Any:
    """Starts two ranks; returns their ends of pipes."""
    store, address = host_store()
    started = []

    def start(target: Callable[..., None]) -> list[Any]:
        ours = []
        for rank in range(2):
            end, theirs = FORKS.Pipe()
            process = FORKS.Process(target=target, args=(rank, address, theirs))
            process.start()
            theirs.close()
            started.append(process)
            ours.append(end)
        return ours

    yield start
    for process in started:
        process.kill()
        process.join()
    del store


def hear(pipe: Any) -> Any:
    assert pipe.poll(DEADLINE), "a rank is silent"
    return pipe.recv()


def test_ledger_waits_are_of_the_right_kind(two: Any) -> None:
    pipes = two(all_cases)
    for name, (_, slow, _, _) in CASES.items():
        found = [hear(pipe) for pipe in pipes]
        fast = found[1 - slow]
        kind, other = "exposed_communication", "pipeline_bubble"
        if "stage" in name:
            kind, other = other, kind
        assert fast[kind] > NOTICED_S, (name, found)
        assert fast[other] < fast[kind] / 2 and fast["checkpoint_stall"] == 0, (name, found)
        assert found[slow][kind] < fast[kind], (name, found)
        assert "stage" in name or found[slow]["pipeline_bubble"] == 0, (name, found)


def loses_its_peer(rank: int, address: StoreAddress, pipe: Any) -> None:
    """Rank 1 dies in the middle of its second step, while rank 0 waits for it."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    ledger = RankTime(watch)
    ledger.enter("re_forming")
    groups = ProcessGroups(5, rank, 2, Rendezvous(address))
    learner = learner_of(groups.form(Ranks.over_all), fsdp=True)
    waits = learner.ranks.waits
    with ledger.step(waits, again=False), groups.naming_lost_peers():
        one_step(learner)
    if rank == 1:
        be_slow(learner, in_backward=False)
        block: Any = next(iter(learner.module.layers.values()))  # type: ignore[union-attr,operator]

        def die(*_: Any) -> None:
            pipe.send(time.monotonic())
            os.kill(os.getpid(), signal.SIGKILL)

        block.register_forward_hook(once(lambda: die()))
    ledger.enter("data_wait")
    before = watch.ledger()
    pipe.send("in the step")
    try:
        with ledger.step(waits, again=False), groups.naming_lost_peers():
            one_step(learner)
    except NodeLost:
        ledger.broken(5, waits)
    died = pipe.recv()
    ledger.heard(Aborted(5, time.monotonic(), died))
    heard = time.monotonic()
    groups.leave()
    pipe.send((died, heard, before, watch.ledger(), waits.last))


def test_ledger_of_a_rank_whose_peer_dies_in_a_step(two: Any) -> None:
    """What it waited until the death is exposed communication, from then to the word detection, and no second twice."""
    survivor, victim = two(loses_its_peer)
    assert hear(survivor) == hear(victim) == "in the step"
    died = hear(victim)
    survivor.send(died)
    died, heard, before, after, last = hear(survivor)
    assert last.kind == "exposed_communication" and last.began < died <= last.ended <= heard
    assert after.unattributed_s == pytest.approx(before.unattributed_s, abs=1e-6)
    grown = {name: after.seconds[name] - before.seconds[name] for name in after.seconds}
    assert last.ended - died - 1e-6 <= grown["detection"] <= heard - died + 1e-6
    assert grown["exposed_communication"] >= died - last.began - 1e-3 > NOTICED_S
    assert grown["recomputed"] > 0 and grown["compute"] == 0 and grown["re_forming"] >= 0
