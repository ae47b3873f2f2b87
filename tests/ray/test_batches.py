"""Several short calls in one Ray task, on a real local Ray: each call is on its own whatever becomes of the others."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import batches_program as program
import pytest

from infra.storage import open_store
from tests.helpers.rays import local_ray
from workflows.driver import pace, session
from workflows.driver.settings import RunSettings
from workflows.runs.catalog import read_log
from workflows.runs.fold import JournalState
from workflows.runs.journal import read_journal

CHAINS, LENGTH = 40, 8
SPECIAL = 17_005
"""What a step in the middle of the 18th chain is given."""
ODD = 17_000 + LENGTH
TOTAL = sum(1000 * chain + LENGTH for chain in range(CHAINS)) - ODD


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


@pytest.fixture(autouse=True)
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs here, bodies count as short."""
    monkeypatch.setattr(pace, "SHORT_S", 1.0)
    monkeypatch.setattr(pace, "TOGETHER_S", 1.0)


@dataclass
class Ran:
    """What a crowd left behind. `bodies`: (x, attempt, attempt id, Ray task) of each one."""

    value: dict[str, object]
    state: JournalState
    bodies: list[tuple[int, int, str, str]]
    url: str
    run_id: str

    def of(self, x: int) -> list[tuple[int, int, str, str]]:
        return [body for body in self.bodies if body[0] == x]

    @property
    def tasks(self) -> Counter[str]:
        return Counter(task for *_, task in self.bodies)


def run(folder: Path, how: str) -> Ran:
    url = str(folder / "store")
    settings = RunSettings(store=url, backoff_s=0.01)
    done = session.run(program.crowd, str(folder), CHAINS, LENGTH, SPECIAL, how, settings=settings)
    lines = [line.split() for line in (folder / "trace").read_text().splitlines()]
    bodies = [(int(x), int(attempt), attempt_id, task) for x, attempt, attempt_id, task in lines]
    state = read_journal(open_store(url), done.run_id)
    return Ran(done.value, state, bodies, url, done.run_id)


def check(ran: Ran, committed: int) -> None:
    """One commit each, of an attempt that was started and ran once."""
    assert len(ran.state.commits) == committed
    ids = Counter(attempt_id for *_, attempt_id, _ in ran.bodies)
    assert set(ids.values()) == {1}, "an attempt ran twice"
    begun = ran.state.starts
    for call, record in ran.state.commits.items():
        starts = [start["attempt_id"] for start in begun[call]]
        assert record["attempt_id"] == starts[-1] and len(starts) == record["attempt"]
    assert max(ran.tasks.values()) > 1, "no calls shared a task"


def test_engine_a_crowd_of_short_calls_shares_tasks_and_each_is_its_own(tmp_path: Path) -> None:
    ran = run(tmp_path, "says")
    assert ran.value == {"total": TOTAL, "odd": ODD}
    check(ran, CHAINS * LENGTH + 1)
    assert len(ran.bodies) == CHAINS * LENGTH and len(ran.tasks) < len(ran.bodies)
    assert {len(starts) for starts in ran.state.starts.values()} == {1} and not ran.state.failures
    store = open_store(ran.url)
    said = {x: read_log(store, ran.run_id, attempt_id) for x, _, attempt_id, _ in ran.bodies}
    assert {x: text for x, text in said.items() if text} == {SPECIAL: f"this is {SPECIAL}\n"}


def test_engine_an_error_in_a_batch_is_one_calls_own(tmp_path: Path) -> None:
    ran = run(tmp_path, "raises")
    assert ran.value["total"] == TOTAL and f"ValueError: {SPECIAL} is no good" in str(ran.value["odd"])
    left = ODD - SPECIAL
    check(ran, CHAINS * LENGTH - left + 1)
    assert len(ran.bodies) == CHAINS * LENGTH - left + 1, "nobody else ran again"
    ((failure,),) = ran.state.failures.values()
    assert failure["final"] and failure["attempt_id"] == ran.of(SPECIAL)[0][2]


def test_engine_calls_lost_with_their_worker_run_again_alone(tmp_path: Path) -> None:
    for number in range(8):  # whether the special one has company is up to the machine
        (folder := tmp_path / str(number)).mkdir()
        ran = run(folder, "kills")
        if len(ran.state.failures) > 1:
            break
    assert ran.value == {"total": TOTAL, "odd": ODD}
    check(ran, CHAINS * LENGTH + 1)
    assert [attempt for _, attempt, *_ in ran.of(SPECIAL)] == [1, 2]
    failed = {failure["attempt_id"] for failures in ran.state.failures.values() for failure in failures}
    twice = [call for call, starts in ran.state.starts.items() if len(starts) == 2]
    assert 1 < len(failed) == len(twice) < CHAINS, "only calls of the lost task, which was a shared one"
    assert all(ran.tasks[task] == 1 for _, attempt, _, task in ran.bodies if attempt == 2)


def test_engine_a_body_that_blocks_holds_up_nobody_in_its_batch(tmp_path: Path) -> None:
    """It goes on only when all others have ended and were used: with any of them behind it, or before it and not told,
    there would be a deadlock."""
    ran = run(tmp_path, "blocks")
    assert ran.value == {"total": TOTAL, "odd": ODD}
    check(ran, CHAINS * LENGTH + 1)
    assert len(ran.bodies) == CHAINS * LENGTH and not ran.state.failures
    assert {len(starts) for starts in ran.state.starts.values()} == {1}, "what was handed back counts no attempt"
