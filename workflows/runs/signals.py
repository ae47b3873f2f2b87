"""Waits for approvals and events from outside the workflow.

    go = approval("deploy", "Ship it?", show={"score": score}, timeout=86_400)
    deploy(model, go)                               # an edge: deployed only after the approval
    batch = event("labels-ready").result()          # the JSON value that was sent

A wait is a call like any other: it begins when its inputs are committed, other branches run meanwhile, and its answer
is committed. It holds no resources of the cluster. The answer is one object in the store, written once
(`put_if_absent`): the first answer counts. It may come while there is no driver; the next driver finds it.

Who waits for whom: the executor's loop passes waits to the Poller and does not wait; the Poller's one thread polls the
store for all answers, and notifies the loop.
"""

import getpass
import hashlib
import json
import shlex
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from infra.errors import Denied, NonDeterminismError, StepTimeout, StoreError, UserError, nearest
from infra.storage import Store, default_store
from workflows.graph.inputs import IDENTITY
from workflows.graph.steps import StepOptions
from workflows.graph.values import brief, decode, identity, readable
from workflows.graph.waits import Approval
from workflows.runs import records
from workflows.runs.fold import JournalState
from workflows.runs.journal import read_journal
from workflows.runs.records import Json

FORMAT = 1
FOLDER_PERIOD_S = 0.2
REMOTE_PERIOD_S = 2.0


# --- the driver's side ---


def wait_record(
    call_id: str, step: str, needs: Sequence[str], options: StepOptions, arguments: Any, inputs: str
) -> records.Wait:
    """The journal's record of a wait; `deadline` in seconds since the epoch, or None."""
    now = time.time()
    message, show = decode(arguments["args"][0]), arguments["args"][1]
    return records.Wait(
        call_id,
        step,
        needs,
        message=readable(str(message)),
        time=now,
        deadline=None if options.timeout is None else now + options.timeout,
        inputs=inputs,
        identity=IDENTITY,
        show=brief(identity(show)),
    )


def check_question(record: records.Wait, same_inputs: bool, message: str) -> None:
    """Raises NonDeterminismError if a resumed workflow asks another question under an old name: the answer to the old
    question does not answer the new one."""
    if not same_inputs:
        raise NonDeterminismError(
            f"{record.call} asked {record.message!r} before, showing {record.show}, and asks {message!r} or "
            "shows something else now; start another run with --new"
        )


def answer(record: records.Wait, signal: Json) -> Any:
    """The result of an answer.

    Raises:
        Denied: the approval was denied.
        StepTimeout: no answer came in time.
    """
    call, value = record.call, signal["value"]
    if signal.get("timeout"):
        assert record.deadline is not None, "nobody waits too long without one"
        waited = record.deadline - record.time
        raise StepTimeout(f"{call}: no answer within {waited:g} s (timeout= of the wait)")
    if not record.step.endswith(":approval"):
        return value
    if not value["approve"]:
        comment = f": {value['comment']}" if value["comment"] else ""
        raise Denied(f"{call}: denied by {signal['who']}{comment}")
    return Approval(signal["who"], signal["time"], value["comment"])


class Poller:
    """Polls the store for the answers to all waits of a run, with one listing per round.

    `deliver(call_id, signal)` and `on_error(error)` are called on its thread, which lives as long as there are waits.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        deliver: Callable[[str, Json], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._deliver = deliver
        self._on_error = on_error
        self._period_s = REMOTE_PERIOD_S if store.local_path("runs") is None else FOLDER_PERIOD_S
        self._waits: dict[str, tuple[str, float, bool]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def add(self, call_id: str, deadline: float | None, final: bool) -> None:
        """Also wait for `call_id`. `final`: the passed deadline is an answer, after which no other counts."""
        with self._changed:
            self._waits[call_id] = (signal_key(self._run_id, call_id), deadline or float("inf"), final)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="recua-waits", daemon=True)
                self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        try:
            while self._look():
                pass
        except BaseException as error:
            self._on_error(error)

    def _look(self) -> bool:
        """One round: deliver answers and passed deadlines, then pause. False if nothing waits."""
        with self._changed:
            waits = dict(self._waits)
        there = set(self._store.list(f"runs/{self._run_id}/signals"))
        for call_id, (key, deadline, final) in waits.items():
            signal = self._signal(call_id, key, final, overdue=time.time() >= deadline, there=key in there)
            if signal is not None:
                with self._changed:
                    del self._waits[call_id]
                self._deliver(call_id, signal)
        with self._changed:
            if self._closing or not self._waits:
                self._thread = None
                return False
            due = min(deadline for _, deadline, _ in self._waits.values()) - time.time()
            self._changed.wait(min(self._period_s, max(due, 0.0)))
            return not self._closing

    def _signal(self, call_id: str, key: str, final: bool, overdue: bool, there: bool) -> Json | None:
        if not there and not overdue:
            return None
        if not there and final:
            _put(self._store, key, call_id, None, "timeout", timeout=True)
        return read_signal(self._store, key) or (_signal(call_id, None, "timeout", timeout=True) if overdue else None)


# --- every process's side ---


def signal_key(run_id: str, call_id: str) -> str:
    return f"runs/{run_id}/signals/{hashlib.sha256(call_id.encode()).hexdigest()[:32]}.json"


def read_signal(store: Store, key: str) -> Json | None:
    """The answer under a key: {"format", "call", "value", "who", "time"}.

    Raises:
        StoreError: it cannot be read.
    """
    raw = store.get(key)
    try:
        return None if raw is None else json.loads(raw)
    except ValueError as error:
        raise StoreError(f"--store {store.url}: {key} is damaged ({error}): remove it, and answer again") from None


def send(store: Store, run_id: str, call_id: str, value: Any, who: str) -> tuple[bool, Json]:
    """Answer a wait by its call id. The value is JSON; for an approval {"approve": bool, "comment": str}.

    Returns (whether this answer counts, the answer that counts): the first one counts.
    """
    key = signal_key(run_id, call_id)
    mine = _put(store, key, call_id, value, who)
    signal = read_signal(store, key)
    assert signal is not None, "an answer was written and is gone"
    return mine, signal


def waiting_calls(state: JournalState) -> list[records.Wait]:
    """The records of open waits, oldest first."""
    return [wait for call, wait in state.waits.items() if state.calls[call][-1] is wait]


def reply(store: Store, run_id: str, text: str, kind: str, value: Any, who: str) -> str:
    """Answer the wait that `text` names (a call id, or the workflow's name for it); returns a line with the outcome.

    Raises:
        UserError: nothing waits under that name (the message has the nearest one), it is of the other kind, or it has
            already been answered.
    """
    state = read_journal(store, run_id)
    record = find_wait(run_id, state, text, kind)
    mine, signal = send(store, run_id, record.call, value, who)
    if not mine:
        raise UserError(f"{record.call} was already {_said(record, signal)}; that answer counts")
    return f"{record.call} is {_said(record, signal)}"


def find_wait(run_id: str, state: JournalState, text: str, kind: str) -> records.Wait:
    """The record of the wait of this `kind` that `text` names. Raises as `reply`."""
    known = list(state.waits.values())
    found = [record for record in known if text == record.call]
    found = found or [record for record in known if text == short_name(record.call)]
    found = [record for record in found if record.step.endswith(f":{kind}")] or found
    waiting = [record for record in waiting_calls(state) if record in found] or found
    if len(waiting) == 1:
        record = waiting[0]
        if not record.step.endswith(f":{kind}"):
            other = "recua send" if kind == "approval" else "recua approve"
            raise UserError(f"{record.call} is not an {kind}: answer it with {other}")
        return record
    if waiting:
        raise UserError(f"{text} may be any of {', '.join(record.call for record in waiting)}: give the whole name")
    names = [record.call for record in waiting_calls(state)]
    hint = nearest(text, dict.fromkeys([*names, *map(short_name, names)]), there="waiting")
    raise UserError(f"nothing in run {run_id} waits as {text!r}{hint}")


def command(run_id: str, call_id: str, step: str, store_url: str) -> str:
    """The command that answers a wait."""
    name = short_name(call_id) if "/" not in call_id else call_id
    words = ["recua", "approve", run_id, name] if step.endswith(":approval") else ["recua", "send", run_id, name]
    value = [] if step.endswith(":approval") else ["JSON"]
    store = [] if store_url == default_store() else ["--store", store_url]
    return shlex.join([*words, *value, *store])


def short_name(call_id: str) -> str:
    """round[1]/approval[deploy] -> deploy"""
    return PurePosixPath(call_id).name.partition("[")[2].rstrip("]")


def me() -> str:
    """The user at this terminal: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "somebody"
    return f"{user}@{socket.gethostname()}"


def _said(record: records.Wait, signal: Json) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(signal["time"]))
    if signal.get("timeout"):
        return f"given up (no answer came in time) at {when}"
    word = "answered"
    if record.step.endswith(":approval"):
        word = "approved" if signal["value"]["approve"] else "denied"
    return f"{word} by {signal['who']} at {when}"


def _signal(call_id: str, value: Any, who: str, **more: Any) -> Json:
    return {"format": FORMAT, "call": call_id, "value": value, "who": who, "time": time.time(), **more}


def _put(store: Store, key: str, call_id: str, value: Any, who: str, **more: Any) -> bool:
    return store.put_if_absent(key, json.dumps(_signal(call_id, value, who, **more)).encode())
