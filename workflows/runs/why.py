"""Why a call ran, was reused, or would run again: compares a commit with the last comparable one and with the present
code.

The store says why a call ran: each commit has the digest of its inputs (and the inputs themselves if they are small),
the parts of its code's fingerprint and its library versions. Whether it would run again also depends on the present
code; if that cannot be imported, the answer is unknown.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from infra.errors import RecuaError
from infra.storage import Store
from workflows.graph.artifacts import Artifact
from workflows.graph.steps import Step, step_behind
from workflows.graph.values import artifact_records, differences, named_arguments
from workflows.identity.fingerprint import FILE, Fingerprint, Fingerprinter
from workflows.identity.keys import code_key, content_key, index_key
from workflows.identity.names import load_name
from workflows.runs.catalog import StepView, find_metadata
from workflows.runs.fold import JournalState
from workflows.runs.gc_marks import read_marks
from workflows.runs.journal import read_journal
from workflows.runs.records import Commit, Json

NAMED = 5
Loader = Callable[[str], Any]


@dataclass(frozen=True)
class Comparison:
    """Differences between a commit and an earlier one, or between the present code and a commit's. Empty lists:
    equal."""

    inputs: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not (self.inputs or self.code or self.libraries)


@dataclass(frozen=True)
class Why:
    """`happened`: one sentence on what happened in the run. `compared_with`: run, call and end of the earlier commit.
    `again`: whether an equal call in a new run would run; None where that cannot be said. `because`: why.
    `data_files`: files that the step's code names and that count as part of it; `products`: those that it names and
    writes, which do not (workflows.identity.fingerprint)."""

    call_id: str
    status: str
    happened: str
    compared_with: Json | None
    differs: Comparison | None
    again: bool | None
    because: list[str]
    data_files: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What to print."""
        word = {None: "unknown, ", True: "yes, because ", False: "no: "}[self.again]
        lines = [self.happened, f"would run again in a new run: {word}{'; '.join(self.because)}"]
        if self.data_files:
            lines.append(f"data files that its code names, which count: {_listed(self.data_files)}")
        if self.products:
            lines.append(f"files that its code writes, which do not count: {_listed(self.products)}")
        return lines


class Reasons:
    """Answers for the calls of one run; journals and fingerprints are read once."""

    def __init__(self, store: Store, run_id: str, load: Loader = load_name) -> None:
        self._store = store
        self._run_id = run_id
        self._load = load
        self._metadata = find_metadata(store, run_id) or {}
        self._state = read_journal(store, run_id)
        self._others: dict[str, JournalState] = {}
        self._fingerprinter = Fingerprinter()
        self._again: dict[str, tuple[bool | None, list[str]]] = {}

    def of(self, view: StepView) -> Why:
        """Why this call of the run ran or was reused."""
        commit = self._state.commits.get(view.call_id)
        if commit is None:
            became = "failed" if view.status == "failed" else f"is {view.status}"
            happened = f"{view.call_id} {became}: it has no result yet"
            if view.error:
                happened += f" ({view.error.get('type', 'error')}: {str(view.error.get('message')).splitlines()[0]})"
            return Why(view.call_id, view.status, happened, None, None, None, ["it was never committed"])
        earlier = self._earlier(commit) if not commit.reused_from else None
        differs = None if earlier is None else self._compare(earlier[1], commit)
        again, because = self.again(view.call_id)
        compared = None
        if earlier is not None:
            compared = {"run": earlier[0], "call": earlier[1].call, "ended": earlier[1].ended}
        happened = self._happened(commit, earlier, differs)
        now = self._fingerprint(commit)
        named = ([], []) if now is None else (now.data_files, list(now.products))
        return Why(view.call_id, view.status, happened, compared, differs, again, because, *named)

    # --- what happened ---

    def _happened(self, commit: Commit, earlier: tuple[str, Commit] | None, differs: Comparison | None) -> str:
        call, lease = commit.call, self._state.lease
        kept = ""
        if lease is not None and self._state.drivers > 1 and commit.ended < lease.time:
            kept = "; later drivers of this run kept it, as they keep every committed call"
        if commit.reused_from:
            return (
                f"{call} was reused from run {commit.reused_from}: "
                f"its inputs, its code and the libraries are equal{kept}"
            )
        if earlier is None or differs is None:
            return f"{call} ran because no earlier run in this store had committed {commit.step}{kept}"
        run_id, before = earlier
        other = "" if before.call == call else f" ({before.call} there)"
        where = f"run {run_id}{other}, {_ago(before.ended)}"
        if differs.equal:
            return f"{call} ran although it is equal to that of {where}: {self._why_not_reused(commit)}{kept}"
        changed = [*differs.code, *differs.libraries, *differs.inputs]
        equal = [
            word
            for word, lines in (("inputs", differs.inputs), ("code", differs.code), ("libraries", differs.libraries))
            if not lines
        ]
        also = f"; its {' and '.join(equal)} are equal" if equal else ""
        return f"{call} ran because {'; '.join(changed)} since {where}{also}{kept}"

    def _why_not_reused(self, commit: Commit) -> str:
        name = commit.step.rpartition(":")[2]
        rerun = self._metadata.get("rerun") or []
        if name in rerun or commit.call in rerun:
            return f"--rerun {name if name in rerun else commit.call}"
        if not self._metadata.get("reuse", True):
            return "the run was started to reuse nothing (--new)"
        step = self._step(commit)
        if isinstance(step, Step) and not step.default.reuse:
            return "the step is never reused (reuse=False)"
        return "its earlier result could not be used then (an artifact of it was gone, or it was not in the index yet)"

    def _earlier(self, commit: Commit) -> tuple[str, Commit] | None:
        """The last commit of the same step before this one: an equal one, else one under the same id, else any."""
        best: tuple[tuple[bool, bool, float], str, Commit] | None = None
        for run_id, state in self._journals():
            for other in state.commits.values():
                if other.step != commit.step or other.ended > commit.started:
                    continue
                rank = (other.key == commit.key, other.call == commit.call, float(other.ended))
                if best is None or rank > best[0]:
                    best = (rank, run_id, other)
        return None if best is None else best[1:]

    def _journals(self) -> Iterator[tuple[str, JournalState]]:
        """This run, then all other runs that can be read."""
        yield self._run_id, self._state
        for run_id in self._store.folders("runs"):
            if run_id == self._run_id:
                continue
            if run_id not in self._others:
                try:
                    self._others[run_id] = read_journal(self._store, run_id)
                except RecuaError:
                    self._others[run_id] = JournalState()
            yield run_id, self._others[run_id]

    def _compare(self, before: Commit, now: Commit) -> Comparison:
        inputs: list[str] = []
        if before.inputs != now.inputs:
            inputs = self._changed_inputs(before, now)
        code: list[str] = []
        if before.code != now.code:
            code = _changed_parts(self._parts(before.code), self._parts(now.code))
        libraries: list[str] = []
        if before.libraries != now.libraries:
            libraries = _changed_libraries(self._parts(before.libraries), self._parts(now.libraries))
        return Comparison(inputs, code, libraries)

    def _changed_inputs(self, before: Commit, now: Commit) -> list[str]:
        old, new = before.arguments, now.arguments
        if old is None or new is None:
            return ["its inputs changed (they are too large to be stored)"]
        step = self._step(now)
        if isinstance(step, Step):
            old, new = named_arguments(step.fn, old), named_arguments(step.fn, new)
        lines = differences(old, new, NAMED)
        makers = self._makers(now)
        return [f"input {line}{_made_by(line, makers)}" for line in lines] or ["its inputs changed"]

    def _makers(self, commit: Commit) -> dict[str, str]:
        """Digest (short, as shown) -> the call whose result holds it."""
        found: dict[str, str] = {}
        for need in commit.needs:
            upstream = self._state.commits.get(need)
            for record in artifact_records(upstream.result) if upstream else ():
                found[record["digest"][:12]] = need
        return found

    def _parts(self, name: str | None) -> dict[str, str] | None:
        raw = self._store.get(code_key(name)) if name else None
        parts: dict[str, str] | None = None if raw is None else json.loads(raw)
        return parts

    # --- what would happen ---

    def again(self, call_id: str) -> tuple[bool | None, list[str]]:
        """Whether a new run would run this call again, and why (or why not)."""
        if call_id not in self._again:
            self._again[call_id] = (None, ["it depends on itself"])
            self._again[call_id] = self._would_run(self._state.commits[call_id])
        return self._again[call_id]

    def _would_run(self, commit: Commit) -> tuple[bool | None, list[str]]:
        upstream = [need for need in commit.needs if need in self._state.commits and self.again(need)[0]]
        step = self._step(commit)
        if not isinstance(step, Step):
            return None, [f"because {commit.step} cannot be imported here ({step})"]
        if not step.default.reuse:
            return True, ["the step is never reused (reuse=False)"]
        now = self._fingerprint(commit)
        assert now is not None, "of a step"
        reasons = self._changed_since(commit, now)
        if not reasons:
            reasons = self._lost(content_key(commit.step, commit.inputs, now))
        if reasons:
            return True, reasons
        if upstream:
            return None, [f"because {_listed(upstream)} would run again: only if its result differs"]
        return False, ["inputs, code and libraries are unchanged, and its result is in the store"]

    def _changed_since(self, commit: Commit, now: Fingerprint) -> list[str]:
        reasons = []
        if now.code != commit.code:
            reasons += _changed_parts(self._parts(commit.code), now.parts)
        libraries = self._parts(commit.libraries)
        if libraries is not None and libraries != now.libraries:
            reasons += _changed_libraries(libraries, now.libraries)
        return [f"{reason} since it was committed" for reason in reasons]

    def _lost(self, key: str) -> list[str]:
        """Why an equal call's result can no longer be reused; empty if it can."""
        raw = self._store.get(index_key(key))
        try:
            result = json.loads(raw or b"")["result"]
        except (ValueError, KeyError, TypeError):
            return ["its result is not in the index (any more)"]
        marks = read_marks(self._store)
        for record in artifact_records(result):
            artifact = Artifact.from_record(record, None)
            if not self._store.exists(f"{artifact.location}/manifest.json"):
                return [f"artifact {artifact.name} {artifact.digest[:12]} of its result is gone"]
            if marks.cover(artifact.location):
                return [f"artifact {artifact.name} {artifact.digest[:12]} of its result is about to be removed"]
        return []

    def _fingerprint(self, commit: Commit) -> Fingerprint | None:
        """The present fingerprint of the step; None if it cannot be imported."""
        step = self._step(commit)
        return self._fingerprinter.of(step.fn, step.default.libraries) if isinstance(step, Step) else None

    def _step(self, commit: Commit) -> Any:
        """The present step, or the error of its import."""
        try:
            found = self._load(commit.step)
        except Exception as error:  # importing runs the user's modules
            return str(error).partition("\n")[0]
        return step_behind(found) or f"{commit.step} is no longer a step"


def _changed_parts(before: dict[str, str] | None, now: dict[str, str] | None) -> list[str]:
    """The functions, files and modules that differ, in words."""
    if before is None or now is None:
        return ["its code changed (the parts of the earlier code are not in the store)"]
    changed = [f"{_part(name)} changed" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    changed += [f"{_part(name)} is reached now" for name in sorted(now.keys() - before.keys())]
    changed += [f"{_part(name)} is no longer reached" for name in sorted(before.keys() - now.keys())]
    return [*changed[:NAMED], f"and {len(changed) - NAMED} more"] if len(changed) > NAMED else changed


def _part(name: str) -> str:
    if name.startswith(FILE):
        return f"data {name}"
    module, _, thing = name.partition(":")
    return {"*": f"module {module}", "import": f"what importing {module} does"}.get(thing, name)


def _changed_libraries(before: dict[str, str] | None, now: dict[str, str] | None) -> list[str]:
    if before is None or now is None:
        return []
    return [
        f"library {name} went from {before.get(name, 'not used')} to {now.get(name, 'not used')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _made_by(line: str, makers: dict[str, str]) -> str:
    return next((f" (made by {call})" for digest, call in makers.items() if f"now artifact {digest}" in line), "")


def _listed(calls: list[str]) -> str:
    return ", ".join(calls[:NAMED]) + (f" and {len(calls) - NAMED} more" if len(calls) > NAMED else "")


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
