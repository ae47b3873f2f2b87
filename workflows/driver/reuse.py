"""Calls that need not run: those committed in this run, and equal calls committed by earlier runs.

Within a run a call is identified by its id, and its step and inputs must match the commit record. Across runs it is
identified by its content key: step name, identity of its input values, code fingerprint, library versions. Inputs count
by value (an artifact by its digest and metadata), so that dependents stay valid if a step runs again with the same
result.

Earlier versions ignored an artifact's metadata (values.earlier_identity). Their records are resumed unchanged; a record
of another run is reused if the artifacts among its call's inputs have the same metadata.
"""

import contextlib
import inspect
import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra.errors import NonDeterminismError, StoreError
from infra.storage import Store
from workflows.driver.index_process import IndexProcess
from workflows.graph.artifacts import Artifact, read_manifest
from workflows.graph.inputs import Identities
from workflows.graph.steps import Step, StepOptions
from workflows.graph.values import artifact_records, differences, named_arguments
from workflows.identity.fingerprint import Fingerprint, Fingerprinter
from workflows.identity.keys import FORMAT, canonical, code_key, content_key, index_key, libraries_id, parameters_key
from workflows.runs.gc_marks import DriverMarks
from workflows.runs.journal import read_journal
from workflows.runs.records import Commit, Wait, index_entry

INDEX_PAUSE_S = 0.02
"""How long entries of the reuse index gather before they are sent as one message."""


@dataclass(frozen=True)
class Reusable:
    """What an equal call came to: `result`, encoded, after `seconds`, in `run`. `identity`: as in its commit."""

    run: str
    key: str
    result: Any
    seconds: float
    identity: int | None


class ReuseLookup:
    """Looks calls up. `warn(text)` gets one line per committed call whose code has changed since."""

    def __init__(
        self,
        store: Store,
        commits: dict[str, Commit],
        reuse: bool,
        rerun: tuple[str, ...],
        warn: Callable[[str, str], None],
    ) -> None:
        self.store = store
        self.marks = DriverMarks(store)
        self.commits = dict(commits)
        self._reuse = reuse
        self._rerun = rerun
        self._not_called = set(rerun)
        self._warn = warn
        self._fingerprinter = Fingerprinter()
        self._fingerprints: dict[tuple[object, tuple[str, ...]], Fingerprint] = {}
        self._saved: dict[str, str] = {}
        self._identities = Identities()
        self._read: tuple[str, dict[str, list[Commit]]] = ("", {})

    def fingerprint(self, step: Step[..., Any], options: StepOptions) -> Fingerprint:
        """A step's fingerprint. Its parts are stored for `recua show --why`."""
        name = (step.fn, options.libraries)
        if name in self._fingerprints:
            return self._fingerprints[name]
        found = self._fingerprints[name] = self._fingerprinter.of(step.fn, options.libraries)
        if found.code not in self._saved:
            self._saved[found.code] = libraries_id(found.libraries)
            self.store.put_if_absent(code_key(found.code), json.dumps(found.parts).encode())
            self.store.put_if_absent(code_key(self._saved[found.code]), json.dumps(found.libraries).encode())
        names = json.dumps(list(inspect.signature(step.fn).parameters)).encode()
        self.store.put(parameters_key(found.code, step.name), names, durable=False)
        return found

    def libraries_of(self, code: str) -> str:
        """Under which id the library versions of a fingerprint are kept; empty for code that was not asked for."""
        return self._saved.get(code, "")

    def committed(self, call_id: str, step: Step[..., Any], options: StepOptions, arguments: Any) -> Commit | None:
        """This run's own commit record of a call.

        Raises:
            NonDeterminismError: the record has another step or other inputs; the message names both.
        """
        self._not_called -= {call_id, step.short_name}
        record = self.commits.get(call_id)
        if record is None:
            return None
        if record.step != step.name:
            raise NonDeterminismError(
                f"{call_id} was committed as {record.step} and is now {step.name}: the workflow took another path; "
                "start another run with --new"
            )
        if not self.same_inputs(record, arguments):
            digests = f"digest {record.inputs[:12]}, now {self._identities.digest(arguments)[:12]}"
            changes = self._changed_inputs(step, record, arguments) or digests
            raise NonDeterminismError(
                f"{call_id} was committed with other inputs ({changes}); start another run with --new"
            )
        fingerprint = self.fingerprint(step, options)
        if record.code != fingerprint.code:
            changed = ", ".join(self._changes(record.code, fingerprint.parts)) or "its code"
            self._warn(call_id, f"keeps its committed result although {changed} changed since (--rerun)")
        return record

    def same_inputs(self, record: Commit | Wait, arguments: Any) -> bool:
        """Whether a commit or a wait on record, of whatever version, is of these arguments."""
        if record.inputs == self._identities.digest(arguments):
            return True
        return record.identity is None and record.inputs == self._identities.earlier_digest(arguments)

    def shown_arguments(self, arguments: Any) -> Any:
        """As `Identities.shown`."""
        return self._identities.shown(arguments)

    def forget(self, call_id: str) -> None:
        """Drop a commit record that was used and is not needed again."""
        self.commits.pop(call_id, None)

    def identify(self, step: Step[..., Any], options: StepOptions, arguments: Any) -> tuple[str, str, str]:
        """(digest of the inputs, fingerprint of the code, content key) of a call whose inputs are all known."""
        fingerprint = self.fingerprint(step, options)
        inputs = self._identities.digest(arguments)
        return inputs, fingerprint.code, content_key(step.name, inputs, fingerprint)

    def key(self, step: Step[..., Any], options: StepOptions, arguments: Any) -> str:
        """The content key alone."""
        return self.identify(step, options, arguments)[2]

    def not_rerun(self) -> list[str]:
        """Messages about names in `rerun` that no call had."""
        return [f"--rerun {name}: this run calls no step of that name" for name in sorted(self._not_called)]

    def may_reuse(self, call_id: str, step: Step[..., Any], options: StepOptions) -> bool:
        return self._reuse and options.reuse and step.short_name not in self._rerun and call_id not in self._rerun

    def find(self, step: Step[..., Any], options: StepOptions, arguments: Any, key: str) -> Reusable | None:
        """What an equal call came to in any run, of an earlier version too. `key`: the call's content key."""
        found = self.reusable(key)
        if found is None:
            inputs = self._identities.earlier_digest(arguments)
            earlier = content_key(step.name, inputs, self.fingerprint(step, options))
            found = self.reusable(earlier) if earlier != key else None
            found = None if found is None or found.identity is not None else found
        if found is None or found.identity is not None:
            return found
        return found if self._had_same_metadata(found, arguments) else None

    def _had_same_metadata(self, entry: Reusable, arguments: Any) -> bool:
        """Whether the artifacts that the calls under an earlier version's key were given, in the results of the calls
        that they needed, had the metadata of those in `arguments`: the key does not say so."""
        wanted = artifact_records(arguments)
        commits = self._commits_of(entry.run) if wanted else {}
        for needs in [commit.needs for commit in commits.get(entry.key, ())] or [()]:
            needed = [each for call in needs for each in commits.get(call, ())]
            given = artifact_records([each.result for each in needed])
            for record in wanted:
                before = {canonical(each["meta"]) for each in given if each["digest"] == record["digest"]}
                if before != {canonical(record["meta"])}:
                    return False
        return True

    def _commits_of(self, run_id: str) -> dict[str, list[Commit]]:
        """The commits of another run by call id, and by content key; none where its journal cannot be read."""
        if self._read[0] != run_id:
            found: dict[str, list[Commit]] = {}
            with contextlib.suppress(StoreError):
                for record in read_journal(self.store, run_id).commits.values():
                    found.setdefault(record.key, []).append(record)
                    found[record.call] = [record]
            self._read = (run_id, found)
        return self._read[1]

    def reusable(self, key: str) -> Reusable | None:
        """The result under a content key, of any run, if all its artifacts are in the store and will stay there."""
        raw = self.store.get(index_key(key))
        if raw is None:
            return None
        try:
            entry = json.loads(raw)
        except ValueError:  # entries are not flushed: a power cut may leave half an entry, which counts as none
            return None
        if entry.get("format") != FORMAT or not self.marks.allow(entry["result"]):
            return None
        for record in artifact_records(entry["result"]):
            artifact = Artifact.from_record(record, None)
            if self.store.get(f"{artifact.location}/manifest.json") is None:
                return None
            read_manifest(self.store, artifact)
        return Reusable(entry["run"], entry["key"], entry["result"], entry["seconds"], entry.get("identity"))

    def _changes(self, code: str, parts: dict[str, str]) -> list[str]:
        raw = self.store.get(code_key(code))
        before = json.loads(raw) if raw is not None else parts
        names = sorted(name for name in before.keys() | parts.keys() if before.get(name) != parts.get(name))
        return names[:5] + (["..."] if len(names) > 5 else [])

    def _changed_inputs(self, step: Step[..., Any], record: Commit, arguments: Any) -> str:
        before, now = record.arguments, self._identities.shown(arguments)
        if before is None or now is None:
            return ""
        return "; ".join(differences(named_arguments(step.fn, before), named_arguments(step.fn, now)))


class ReuseIndex:
    """Publishes commit records by content key in the background: an index entry may be late but never wrong.

    Who waits for whom: one thread takes the new records and passes them to a process (for a folder) or the store (S3).
    """

    def __init__(self, store: Store, on_error: Callable[[BaseException], None]) -> None:
        self._store = store
        self._on_error = on_error
        self._queue: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._indexer: IndexProcess | None = None
        self._thread = threading.Thread(target=self._run, name="recua-index", daemon=True)
        self._thread.start()

    def add(self, run_id: str, record: Commit) -> None:
        entry = index_entry(record.reused_from or run_id, record)
        self._queue.put((index_key(record.key), json.dumps(entry)))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            closing = False
            while not closing:
                batch = [self._queue.get()]
                while not self._queue.empty():
                    batch.append(self._queue.get())
                closing = batch[-1] is None
                self._write([entry for entry in batch if entry is not None])
                if not closing:
                    time.sleep(INDEX_PAUSE_S)
            if self._indexer is not None:
                self._indexer.close()
        except OSError as error:
            self._on_error(StoreError(f"--store {self._store.url}: {error}"))
        except BaseException as error:
            self._on_error(error)

    def _write(self, entries: list[tuple[str, str]]) -> None:
        if entries and (folder := self._store.local_path("index")) is not None:
            self._indexer = self._indexer or IndexProcess()
            self._indexer.put([(str(folder.parent / key), text) for key, text in entries])
            return
        for key, text in entries:
            self._store.put(key, text.encode(), durable=False)
