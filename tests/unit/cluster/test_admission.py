"""Burn-in: what a machine measures, who is let in, and that a crowded or lonely machine is not called slow."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import ElasticSettings, HealthSettings
from cluster.core.history import GroupJournal
from cluster.guard.admission import Admission
from cluster.guard.fitness import ATTEMPTS
from cluster.guard.guard import Guard
from cluster.node.health_watch import HealthWatch, Reading
from cluster.node.rank_watch import Beat
from cluster.node.wire_speed import Sink, SinkAddress, measure
from engines.elastic import burn_in
from infra.storage import open_store
from tests.helpers.guarded_group import running

SETTINGS = ElasticSettings()


def note(rate: float = 100.0, number: int = 1, attempt: int = 1, **changes: Any) -> dict[str, Any]:
    bandwidths = {"memory": 10.0, "loopback": 2.0}
    return {
        "number": number, "attempt": attempt, "kind": "cpu", "crowded": 0.0, "answer_correct": True,
        "memory_correct": True, "compute_rate": rate, "bandwidths": bandwidths, **changes,
    }  # fmt: skip


def test_guard_machine_that_answers_rightly_says_so_and_one_wrong_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    found = burn_in.examine(cpu)
    assert found.answer_correct and found.memory_correct and min(found.compute_rate, found.memory_rate) > 0
    right = torch.mm

    def wrong(left: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        right(left, other, out=out)
        out.view(torch.int32)[17, 3] ^= 1
        return out

    monkeypatch.setattr(torch, "mm", wrong)
    assert not burn_in.examine(cpu).answer_correct


def test_guard_known_product_is_what_integers_give() -> None:
    size = burn_in.SIZE["cpu"]
    index = torch.arange(size)
    left = (index[:, None] + index[None, :]).remainder(7) - 3
    right = (index[:, None] ** 2 + index[None, :]).remainder(5) - 1
    assert torch.equal(burn_in.known_product(size).long(), (left @ right)[:7, :5])


def test_guard_bytes_on_their_way_are_timed_and_strangers_sent_away() -> None:
    sink = Sink("127.0.0.1")
    assert measure(sink.address) > 0
    stranger = SinkAddress(sink.address.host, sink.address.port, bytes(16))
    with pytest.raises(OSError):
        measure(stranger)
    sink.close()
    with pytest.raises(OSError):
        measure(sink.address)


def test_guard_wrong_answers_are_final_and_slow_ones_measured_again() -> None:
    admission = Admission(SETTINGS)
    for node in "abc":
        assert admission.ask(f"w{node}", node, note(), 0).decision.action == "accept"
    wrong = admission.ask("wd", "d", note(answer_correct=False), 0).decision
    assert wrong.action == "quarantine" and "known answer" in wrong.reason
    slow = admission.ask("we", "e", note(50.0), 0)
    assert slow.decision.action == "measure" and slow.again
    assert admission.ask("we", "e", note(50.0), 1).decision.action == "wait"
    assert admission.ask("we", "e", note(90.0, 2, 2), 2).decision.action == "accept", "the best of its tries counts"
    for attempt in range(1, ATTEMPTS):
        assert admission.ask("wf", "f", note(50.0, attempt, attempt), attempt).decision.action == "measure"
    decision = admission.ask("wf", "f", note(50.0, ATTEMPTS, ATTEMPTS), 9).decision
    assert (decision.action, decision.key) == ("quarantine", "elastic.burn_in_speed_ratio")
    assert "50, the fleet's median is 100" in decision.reason


def test_guard_slow_network_is_found_and_an_answer_that_never_comes_is_not_waited_for_forever() -> None:
    admission = Admission(SETTINGS)
    fast = {"memory": 10.0, "loopback": 2.0, "peer": 1.0}
    for node in "abc":
        admission.ask(f"w{node}", node, note(bandwidths=fast), 0)
    first = admission.ask("wd", "d", note(bandwidths={**fast, "peer": 0.1}), 0)
    assert first.decision.action == "measure" and first.decision.key == "elastic.burn_in_bandwidth_ratio"
    assert admission.ask("wd", "d", note(bandwidths={**fast, "peer": 0.1}), 100).decision.action == "accept"


def test_guard_crowded_machines_few_nodes_and_other_kinds_say_nothing_about_speed() -> None:
    admission = Admission(SETTINGS)
    assert admission.ask("wa", "a", note(), 0).decision.action == "accept"
    assert admission.ask("wb", "b", note(10.0), 0).decision.action == "accept", "one other node is no fleet"
    for node in "cde":
        admission.ask(f"w{node}", node, note(), 0)
    assert admission.ask("wf", "f", note(10.0, crowded=0.5), 0).decision.action == "accept"
    assert admission.ask("wg", "g", note(10.0, kind="older"), 0).decision.action == "accept"
    assert admission.ask("wh", "h", None, 0).decision.action == "accept", "a kind of worker that measures nothing"


def test_guard_the_way_to_another_node_is_measured_once_there_is_one() -> None:
    admission = Admission(SETTINGS)
    admission.heard("a", SinkAddress("a", 1, b"t"))
    assert admission.ask("w0", "a", note(), 0).decision.action == "accept", "the only sink is its own"
    answer = admission.ask("w1", "b", note(), 0)
    assert answer.decision.action == "measure" and not answer.again and answer.peer == SinkAddress("a", 1, b"t")
    with_peer = {"memory": 10.0, "loopback": 2.0, "peer": 1.0}
    assert admission.ask("w1", "b", note(number=2, bandwidths=with_peer), 1).decision.action == "accept"
    admission.lose("a", ["w0"])
    assert admission.ask("w2", "b", note(), 0).decision.action == "accept"


def test_guard_a_node_is_not_to_blame_for_another_that_is_gone() -> None:
    """Whoever measures the way to a node that dies meanwhile asks the next one; without a next one it says nothing."""
    admission = Admission(SETTINGS)
    fast = {"memory": 10.0, "loopback": 2.0, "peer": 1.0}
    for node in "abc":
        admission.ask(f"w{node}", node, note(bandwidths=fast), 0)
        admission.heard(node, SinkAddress(node, 1, b"t"))
    unreached = {**fast, "peer": 0.0}
    assert admission.ask("wd", "d", note(), 0).peer == SinkAddress("a", 1, b"t")
    other = admission.ask("wd", "d", note(number=2, bandwidths=unreached), 1)
    assert other.decision.action == "measure" and other.peer == SinkAddress("b", 1, b"t") and not other.again
    assert admission.ask("wd", "d", note(number=3, bandwidths=fast), 2).decision.action == "accept"

    asked = [admission.ask("we", "e", note(number=number, bandwidths=unreached), number) for number in (1, 2, 3)]
    assert [answer.decision.action for answer in asked] == ["measure"] * 3
    assert [answer.peer.host for answer in asked if answer.peer] == ["a", "b", "c"]
    last = note(number=4, attempt=ATTEMPTS, bandwidths=unreached)
    assert admission.ask("we", "e", last, 4).decision.key == "elastic.burn_in_bandwidth_ratio"

    assert admission.ask("wf", "f", note(), 0).peer == SinkAddress("a", 1, b"t")
    for node in "abc":
        admission.lose(node, [])
    alone = admission.ask("wf", "f", note(number=2, attempt=ATTEMPTS, bandwidths=unreached), 1)
    assert alone.decision.action == "accept", "all of them are gone"


def test_guard_a_node_with_uncorrected_errors_is_drained_once(tmp_path: Path) -> None:
    core = running(ElasticSettings(max_workers=2), ["a", "b"])
    guard = Guard(core.settings, core, GroupJournal(open_store(tmp_path), "x"), list)

    def hear(node: str, number: int, errors: float) -> list:
        reading = Reading(number, {"ecc_uncorrected": errors})
        return list(guard.saw(Beat(node, number, health=reading), 60.0 * number))

    for node in "ab":
        assert hear(node, 1, 4) == [] and hear(node, 2, 4) == [] and hear(node, 2, 9) == []
    (found,) = hear("a", 3, 6)
    assert [kind for kind, _ in found.said] == ["detected", "decided"] and "ecc_uncorrected" in found.said[0][1]["what"]
    assert found.event is not None
    core.handle(found.event, 200)
    assert list(core.roster.draining) == ["a"] and hear("a", 4, 8) == [] and hear("b", 3, 4) == []


def test_guard_health_is_read_below_the_root_that_is_set(tmp_path: Path) -> None:
    counter = tmp_path / "sys/devices/system/edac/mc/mc0/ue_count"
    counter.parent.mkdir(parents=True)
    counter.write_text("7")
    watch = HealthWatch(HealthSettings(period_s=0.01, root=tmp_path))
    deadline = time.monotonic() + 60
    while watch.latest().number < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert watch.latest().signals == {"ecc_uncorrected": 7.0}
    watch.close()
