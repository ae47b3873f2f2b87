"""The records of a journal: six kinds, each a JSON object with a `type` in a slot.

    Lease    a driver has taken the run
    Start    an attempt of a call begins
    Failed   an attempt has failed; `final`: no other follows
    Wait     a call waits for an outside answer (an approval, an event)
    Commit   a call has its result, made here or reused from another run
    End      the run is over, until another driver takes it

Fields that an older record lacks take their default. Fields and types that a newer version added are ignored.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from workflows.identity.keys import FORMAT

Json = dict[str, Any]
APPROVAL = "workflows.waits:approval"


@dataclass(frozen=True)
class Record:
    """One record. It can also be read like its stored JSON object: `record["call"]`, `record.get("needs")`."""

    TYPE: ClassVar[str]
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    """Fields that are stored only if they are not empty."""

    def to_json(self) -> Json:
        """The record's object in a slot."""
        tree: Json = {"type": self.TYPE}
        for name in FIELDS[type(self)]:
            value = getattr(self, name)
            if value or name not in self.OPTIONAL:
                tree[name] = value
        return tree

    def __getitem__(self, name: str) -> Any:
        return self.to_json()[name]

    def __contains__(self, name: str) -> bool:
        return name in self.to_json()

    def get(self, name: str, default: Any = None) -> Any:
        return self.to_json().get(name, default)

    def keys(self) -> list[str]:
        return list(self.to_json())


@dataclass(frozen=True)
class Lease(Record):
    """`machine`, `pid` and `process_start` name the driver's process; `ttl_s`: how long its heartbeat may stand still.
    `time` here and in the other records: seconds since the epoch."""

    TYPE: ClassVar[str] = "lease"
    owner: str = ""
    host: str = ""
    machine: str = ""
    pid: int = 0
    process_start: str | None = None
    time: float = 0.0
    ttl_s: float = 0.0


@dataclass(frozen=True)
class End(Record):
    """`status`: finished, failed or cancelled. A finished run has a `result`, encoded; any other an `error`."""

    TYPE: ClassVar[str] = "end"
    status: str
    time: float = 0.0
    result: Any = None
    error: Json | None = None

    def to_json(self) -> Json:
        outcome = {"result": self.result} if self.error is None else {"error": self.error}
        return {"type": self.TYPE, "status": self.status, "time": self.time, **outcome}


@dataclass(frozen=True)
class CallRecord(Record):
    """Of one call. `needs`: ids of the calls whose results it takes."""

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"needs"})
    call: str
    step: str
    needs: Sequence[str] = ()

    @property
    def status(self) -> str:
        """The call's status if this is its last record and a driver works on the run."""
        raise NotImplementedError


@dataclass(frozen=True)
class Start(CallRecord):
    TYPE: ClassVar[str] = "start"
    attempt: int = 1
    attempt_id: str = ""
    time: float = 0.0

    @property
    def status(self) -> str:
        return "running"


@dataclass(frozen=True)
class Failed(CallRecord):
    """`error`: {kind, type, message, traceback}. A wait that ends in an error has no attempt."""

    TYPE: ClassVar[str] = "attempt-failed"
    attempt: int = 0
    attempt_id: str = ""
    error: Json | None = None
    final: bool = False
    time: float = 0.0

    @property
    def status(self) -> str:
        return "failed" if self.final else "waiting"


@dataclass(frozen=True)
class Wait(CallRecord):
    """`inputs` and `identity`: as in a Commit. `show`: readable data for the person who answers. `deadline`: None if
    there is none."""

    TYPE: ClassVar[str] = "wait"
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"needs", "identity"})
    message: str = ""
    time: float = 0.0
    deadline: float | None = None
    inputs: str = ""
    identity: int | None = None
    show: Any = None

    @property
    def status(self) -> str:
        return "waiting-for-approval" if self.step == APPROVAL else "waiting-for-event"


@dataclass(frozen=True)
class Commit(CallRecord):
    """`key`: the content key. `code`, `libraries`, `inputs`: digests of what it is made of; `identity`: by which rules
    (workflows.graph.inputs; None in records of earlier versions). `arguments`: the inputs for people, None where they
    are large. `result`: encoded. `of`: how many items the map has that the call belongs to. `started`, `ended`,
    `seconds`: of the body that won, `seconds` also of the one in another run (`reused_from`). `by`: who answered a
    wait."""

    TYPE: ClassVar[str] = "commit"
    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"needs", "identity", "of", "attempt_id", "reused_from", "by"})
    key: str = ""
    code: str = ""
    libraries: str = ""
    inputs: str = ""
    identity: int | None = None
    arguments: Any = None
    result: Any = None
    of: int | None = None
    started: float = 0.0
    seconds: float = 0.0
    node: str = ""
    attempt: int = 0
    attempt_id: str = ""
    ended: float = 0.0
    reused_from: str | None = None
    by: str | None = None

    @property
    def status(self) -> str:
        return "reused" if self.reused_from else "committed"


KINDS: dict[str, type[Record]] = {kind.TYPE: kind for kind in (Lease, Start, Failed, Wait, Commit, End)}
FIELDS = {kind: [field.name for field in fields(kind)] for kind in KINDS.values()}
NEEDED = {kind: [field.name for field in fields(kind) if field.default is MISSING] for kind in KINDS.values()}


def from_json(tree: Json) -> Record | None:
    """The record of a slot's object; None for a type that this version does not know. The record uses `tree` itself: a
    journal has many records, and their constructors would take as long as reading the file.

    Raises:
        KeyError, TypeError: it is not a record.
    """
    kind = KINDS.get(tree["type"])
    if kind is None:
        return None
    if missing := [name for name in NEEDED[kind] if name not in tree]:
        raise KeyError(f"a {kind.TYPE} without {', '.join(missing)}")
    record = object.__new__(kind)
    object.__setattr__(record, "__dict__", tree)
    return record


def index_entry(run_id: str, record: Commit) -> Json:
    """A commit's entry in the index; `run_id`: the run that executed its body."""
    entry = {name: getattr(record, name) for name in ("key", "call", "step", "result", "seconds")}
    identity = {} if record.identity is None else {"identity": record.identity}
    return {"format": FORMAT, **identity, "run": run_id, **entry}
