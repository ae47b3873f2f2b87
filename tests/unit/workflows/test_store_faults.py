"""What the core does where the store, a helper process or another driver gets in its way."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.errors import FencedError, StoreError
from infra.processes import process_start, this_machine
from infra.storage import FolderStore
from workflows.driver import session
from workflows.driver.index_process import IndexProcess
from workflows.driver.loop import Loop
from workflows.driver.reuse import ReuseLookup
from workflows.driver.settings import RunSettings
from workflows.driver.stopped_drivers import StoppedDrivers, kill_stopped
from workflows.graph import event, workflow
from workflows.graph.values import encode
from workflows.identity.keys import index_key
from workflows.runs import journal
from workflows.runs.catalog import load_run
from workflows.runs.journal import GroupCommit, lease_key, read_journal, slot_key
from workflows.runs.signals import Poller
from workflows.worker.channel import LINE_LIMIT, Listener, Sender
from workflows.worker.failures import describe, rebuild

ROOT = Path(__file__).parents[3]


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@workflow
def stepless(store: str, trouble: str) -> str:
    """No step, so no Ray: only the lease and the end are written."""
    if trouble == "fenced":
        FolderStore(Path(store)).put_if_absent(slot_key("r", 2), b"{}")
    if trouble == "taken over":
        FolderStore(Path(store)).put(lease_key("r", 2), b"{}")
        raise RuntimeError("the connection to the cluster is broken")
    return "done"


@workflow
def endless() -> Any:
    return event("never").result()


def test_a_run_whose_end_another_driver_took_is_not_reported_as_finished(tmp_path: Path) -> None:
    settings = RunSettings(store=str(tmp_path), run_id="r")
    with pytest.raises(FencedError, match="another driver has taken over"):
        session.run(stepless, str(tmp_path), "fenced", settings=settings)


def test_a_driver_that_was_replaced_says_so_whatever_it_stumbles_over(tmp_path: Path) -> None:
    settings = RunSettings(store=str(tmp_path), run_id="r", lease_s=3600)
    with pytest.raises(FencedError, match="another driver has taken over") as caught:
        session.run(stepless, str(tmp_path), "taken over", settings=settings)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert read_journal(FolderStore(tmp_path), "r").end is None


def test_a_run_whose_end_could_not_be_written_is_not_finished_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RunSettings(store=str(tmp_path), run_id="r")
    put = FolderStore.put_if_absent

    def full(store: FolderStore, key: str, data: bytes) -> bool:
        if b'"end"' in data:
            raise StoreError(f"--store {store.url}: cannot use {key}: No space left on device")
        return put(store, key, data)

    monkeypatch.setattr(FolderStore, "put_if_absent", full)
    with pytest.raises(StoreError, match="No space left"):
        session.run(stepless, str(tmp_path), "", settings=settings)
    assert read_journal(FolderStore(tmp_path), "r").end is None
    monkeypatch.setattr(FolderStore, "put_if_absent", put)
    monkeypatch.setattr(journal, "driver_is_gone", lambda lease: True)  # it was this process
    result = session.run(stepless, str(tmp_path), "", settings=settings)
    assert result.value == "done" and not result.already_finished
    assert load_run(FolderStore(tmp_path), "r").status == "finished"


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class NoCause(Exception):
    @property
    def cause(self) -> Any:
        raise RuntimeError("no cause")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoText(), "a[0]: NoText: it cannot say what it is about: RuntimeError in its __str__"),
        (NoCause("x"), "a[0]: NoCause: x"),
        (ValueError(), "a[0]: ValueError"),
        (SystemExit(0), "a[0]: SystemExit: the body called sys.exit(0); a step ends by returning"),
        (SystemExit(), "a[0]: SystemExit: the body called sys.exit(); a step ends by returning"),
        (SystemExit("bad configuration"), "a[0]: SystemExit: bad configuration"),
        (KeyboardInterrupt(), "a[0]: KeyboardInterrupt"),
        (OSError(os.fsdecode(b"caf\xe9.txt: gone")), r"a[0]: OSError: caf\udce9.txt: gone"),
        (ExceptionGroup("two", [ValueError("a"), KeyError("b")]), "a[0]: ExceptionGroup: two (2 sub-exceptions)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_body_raises_becomes_one_clear_line(error: BaseException, said: str) -> None:
    record = describe(error)
    json.dumps(record, ensure_ascii=False).encode()
    assert record["kind"] == "user" and str(rebuild("a[0]", record)) == said


def test_an_error_of_twenty_megabytes_keeps_its_beginning_and_its_end() -> None:
    record = describe(ValueError(f"begin {'x' * 20_000_000} end"))
    assert len(record["message"]) < 11_000 and len(record["traceback"]) < 101_000
    assert record["message"].startswith("begin x") and record["message"].endswith(" end")
    assert "ValueError: begin x" in record["traceback"] and record["traceback"].rstrip().endswith(" end")


def test_half_an_index_entry_is_as_good_as_none(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    known = ReuseLookup(store, {}, True, (), lambda *_: None)
    for left in (b"", b'{"format": 1, "run": "r", "resu'):
        store.put(index_key("ab12"), left)
        assert known.reusable("ab12") is None


def test_half_a_heartbeat_is_no_error(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    session.run(stepless, str(tmp_path), "", settings=RunSettings(store=str(tmp_path), run_id="r"))
    store.delete(slot_key("r", 2))  # its end
    store.put(journal.lease_key("r", 1), b"")
    assert load_run(store, "r").status == "running", "by the time in the lease itself"


def test_a_worker_knows_that_its_driver_has_ended() -> None:
    listener = Listener("127.0.0.1", lambda message: None)
    sender, late = Sender(listener.address), Sender(listener.address)
    assert sender.open() and sender.open()
    listener.close()
    wait_for(lambda: not sender.open(), "the closed connection was not noticed")
    assert not late.open()
    late.send({"kind": "log"})


def test_a_line_that_is_too_long_is_cut_and_costs_no_later_one() -> None:
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    listener = Listener("127.0.0.1", told.put)
    sender = Sender(listener.address)
    try:
        sender.send({"kind": "log", "message": "ü" * 2_000_000})
        sender.send({"kind": "ended", "outcome": "x" * 2_000_000})  # it comes with the task's result
        sender.send({"kind": "log", "message": "after"})
        cut, after = (told.get(timeout=60)["message"] for _ in range(2))
        assert cut.startswith("üüü") and cut.endswith("[cut here: 2,000,000 letters in all, which the step's log has]")
        assert len(json.dumps(cut)) < LINE_LIMIT and after == "after"
    finally:
        listener.close()


def test_a_worker_reconnects_to_its_driver_after_a_drop() -> None:
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    listener = Listener("127.0.0.1", told.put)
    sender = Sender(listener.address)
    try:
        sender.send({"kind": "log", "message": "before"})
        assert told.get(timeout=60)["message"] == "before" and sender.open()
        assert sender._socket is not None
        sender._socket.sendall(b"no JSON\n")  # the driver drops whoever sends that
        wait_for(lambda: not sender._is_open(), "the driver did not drop the connection")
        sender.send({"kind": "log", "message": "after"})
        assert told.get(timeout=60)["message"] == "after"
        assert not sender.open(), "who listens there now may be another driver: the store has to be asked"
    finally:
        listener.close()


@pytest.mark.parametrize(("kind", "part"), [(Loop, "_until_due"), (Poller, "_look"), (GroupCommit, "_gather")])
def test_a_thread_of_the_driver_that_breaks_ends_the_run_with_its_error(
    kind: type, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("its clock is broken")

    monkeypatch.setattr(kind, part, broken)
    with pytest.raises(RuntimeError, match="its clock is broken"):
        session.run(endless, settings=RunSettings(store=str(tmp_path), run_id="r"))
    end = read_journal(FolderStore(tmp_path), "r").end
    assert kind is GroupCommit or (end is not None and end["status"] == "failed")


def test_the_reaper_does_its_work_although_it_was_killed_or_its_worker_ends_its_children(tmp_path: Path) -> None:
    """A Ray worker that is told to end kills its direct children first, the reaper was one of them."""
    program = """
import os, subprocess, sys, time
from infra.reaper import Reaper
reaper = Reaper()
reaper.begin(None, sys.argv[1], "", "")
os.mkdir(sys.argv[1])
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(child.pid, flush=True)
sys.stdin.readline()
reaper.begin(None, sys.argv[1], "", "")
print("again", flush=True)
time.sleep(600)
"""
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-c", program, str(scratch)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        child = int(worker.stdout.readline())
        wait_for(lambda: reapers(worker.pid), "the reaper did not start")
        (first,) = reapers(worker.pid)
        assert Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1] != str(worker.pid)
        os.kill(first, signal.SIGKILL)
        # its command line is empty a moment before its pipes are closed
        wait_for(lambda: process_start(first) is None, "the reaper did not die")
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "again\n"
        worker.kill()
    wait_for(lambda: not scratch.exists(), "the scratch folder was left")
    wait_for(lambda: process_start(child) is None, "the child was left")


def reapers(worker: int) -> list[int]:
    """Reaper processes of a worker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if len(command) > 3 and command[-3] == str(worker).encode() and any(b"reaper.py" in part for part in command):
            found.append(int(folder.name))
    return [pid for pid in found if process_start(pid) is not None]


def test_a_lost_log_leaves_the_bodys_end_as_it_was(s3_url: str, tmp_path: Path) -> None:
    """Good or bad: neither a result nor the user's error is replaced by the trouble with the log."""
    program = """
import json
import sys
from infra.errors import StoreError
from workflows.worker import attempt as worker

def fail(key, source):
    raise StoreError(f"--store: {key}: unreachable")

store = worker._store(sys.argv[1])
store.upload_file = fail
for task in sys.argv[2:]:
    print(worker.run_attempt("{}", json.loads(task)))
"""
    tasks = [payload(s3_url, tmp_path, step, number) for number, step in enumerate(("says", "says_and_fails"))]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    command = [sys.executable, "-c", program, s3_url, *tasks]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    good, bad = (json.loads(line) for line in done.stdout.splitlines())
    assert good["ok"] and good["result"] == 7 and "log.txt: unreachable" in good["warning"]
    assert not bad["ok"] and bad["error"]["type"] == "ValueError" and bad["error"]["kind"] == "user"


def payload(store: str, tmp_path: Path, step: str, number: int) -> str:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    task = {"run": "r", "call": f"{step}[0]", "step": f"driver_steps:{step}", "attempt": 1, "attempt_id": f"a{number}"}
    task |= {"arguments": encode({"args": [], "kwargs": {}}, "arguments"), "timeout": None, "store": store}
    task |= {"cache": str(tmp_path), "channel": ["127.0.0.1", port, "token"], "faults": {}, "driver_pid": os.getpid()}
    return json.dumps({**task, "lease_until": 0.0, "lease_slot": 0})


def test_only_stopped_drivers_of_this_machine_are_killed_and_other_machines_are_asked_rarely() -> None:
    with subprocess.Popen(["sleep", "600"]) as stopped, subprocess.Popen(["sleep", "600"]) as busy:
        os.kill(stopped.pid, signal.SIGSTOP)
        wait_for(lambda: psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED, "it does not stop")
        pids = {process.pid: process_start(process.pid) for process in (stopped, busy)}
        here = [{"machine": this_machine(), "pid": pid, "process_start": start} for pid, start in pids.items()]
        reborn = {**here[0], "process_start": "1"}
        asked: list[Any] = []
        killed: list[int] = []
        other = {**here[1], "machine": "another"}
        drivers = StoppedDrivers([reborn, other], lambda *question: asked.append(question[1]), killed.append)
        drivers.kill()
        drivers.kill()
        assert not killed and asked == [[other]]
        StoppedDrivers(here, lambda *question: asked.append(question), killed.append).kill()
        assert killed == [stopped.pid] and stopped.wait(timeout=60) == -signal.SIGKILL and len(asked) == 1
        assert kill_stopped([other]) == [] and busy.poll() is None
        busy.kill()


def test_the_index_writer_is_replaced_where_it_was_killed_and_a_full_disk_is_an_error(tmp_path: Path) -> None:
    indexer = IndexProcess()
    indexer.put([(str(tmp_path / "ab" / "one.json"), "1")])
    wait_for((tmp_path / "ab" / "one.json").exists, "the entry was not written")
    indexer._process.kill()
    indexer._process.wait()
    indexer.put([(str(tmp_path / "ab" / "two.json"), "2")])
    indexer.close()
    assert (tmp_path / "ab" / "two.json").read_text() == "2"
    blocked = IndexProcess()
    blocked.put([(str(tmp_path / "ab" / "one.json" / "below"), "3")])
    with pytest.raises(OSError, match="reuse index"):
        blocked.close()
