"""What must hold after a run of the campaign: by the raw slots, the marks of the bodies, and the process table."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from infra.storage import Store
from tests.chaos.campaign_run import ANSWERS, EXPECTED, Run, alive
from workflows.graph.artifacts import Artifact, ArtifactSource, read_manifest
from workflows.graph.values import artifact_records
from workflows.runs.catalog import load_run

CLOCK_S = 0.02  # the kernel stamps files with a clock that may be some ticks behind
GONE_S = 40.0
Record = dict[str, Any]


def check(run: Run, store: Store, expected: Record | None) -> Iterator[str]:
    """The violations. `expected`: the fault-free run's result and calls, None where this is that run."""
    slots = _slots(store)
    yield from _drivers(run, expected)
    yield from _records(slots, expected)
    yield from _order(run, slots, _times(run, store, slots))
    yield from _artifacts(slots, store)
    view = load_run(store, "r")
    if view.status != "finished":
        yield f"the run shows as {view.status}"
    yield from _left_behind(run)


def outcome(run: Run, store: Store) -> Record:
    """What later runs of the variant are compared with."""
    result = next(driver.result() for driver in run.drivers if driver.code() == 0)
    return {"result": result, "calls": sorted(record["call"] for record in _of("commit", _slots(store)))}


def _slots(store: Store) -> list[list[Record]]:
    """The records of each slot, in order; slot numbers have no gap."""
    keys = list(store.list("runs/r/journal"))
    assert [key.rsplit("/", 1)[-1] for key in keys] == [f"{number:08d}.json" for number in range(1, len(keys) + 1)]
    return [json.loads(store.get(key) or b"")["records"] for key in keys]


def _of(kind: str, slots: list[list[Record]]) -> list[Record]:
    return [
        {**record, "slot": number} for number, slot in enumerate(slots, 1) for record in slot if record["type"] == kind
    ]


def _drivers(run: Run, expected: Record | None) -> Iterator[str]:
    """Each ended in a way that can be explained, and whoever finished has the fault-free result."""
    for number, driver in enumerate(run.drivers):
        code, text = driver.code(), driver.log.read_text()
        if code == 0:
            if expected is not None and driver.result() != expected["result"]:
                yield f"driver {number}: result {driver.result()}, fault-free {expected['result']}"
        elif code == 3:
            last = text.strip().splitlines()[-1]
            if not last.startswith(EXPECTED):
                yield f"driver {number} ended with {last[:300]}"
        elif code != -9 and not (run.injected["node-kill"] and "raylet" in text.lower()):
            yield f"driver {number} ended with code {code}: {text.strip()[-600:]}"


def _records(slots: list[list[Record]], expected: Record | None) -> Iterator[str]:
    counts = Counter(record["call"] for record in _of("commit", slots))
    for call, number in counts.items():
        if number != 1:
            yield f"{call} has {number} commit records"
    if expected is not None and sorted(counts) != expected["calls"]:
        yield f"other calls than in the fault-free run: {set(counts) ^ set(expected['calls'])}"


def _times(run: Run, store: Store, slots: list[list[Record]]) -> dict[int, tuple[float, float]]:
    """For each slot, between which moments it came to be."""
    if run.schedule.kind == "s3":
        written = run.place.faults()["written"]
        found = {}
        for path, (before, after) in written.items():
            if "/journal/" in path and "/r/" in path:
                found[int(path.rpartition("/")[2].partition(".")[0])] = (before, after)
        return found
    folder = store.local_path("runs/r/journal")
    assert folder is not None
    stats = {number: (folder / f"{number:08d}.json").stat() for number in range(1, len(slots) + 1)}
    return {number: (stat.st_mtime, stat.st_ctime) for number, stat in stats.items()}


def _order(run: Run, slots: list[list[Record]], times: dict[int, tuple[float, float]]) -> Iterator[str]:
    """No body begins after its call's commit or before the commits of what it needs; the winner has run whole."""
    commits = {record["call"]: record for record in _of("commit", slots)}
    began, ended = run.lines("began"), {line["attempt"] for line in run.lines("ended")}
    for line in began:
        commit = commits.get(line["call"])
        if commit is None:
            continue
        if (late := line["time"] - times[commit["slot"]][1]) > CLOCK_S:
            yield f"{line['call']}: a body began {late:.3f} s after the commit (attempt {line['attempt']})"
        for need in commit.get("needs", []):
            needed = [commits[call] for call in commits if call == need or call.startswith(f"{need}/")]  # a map's calls
            early = max(times[record["slot"]][0] for record in needed) - line["time"]
            if early > 0:
                yield f"{line['call']}: a body began {early:.3f} s before the commit of {need}"
        if line["call"].startswith("half[") and times[commits["approval[go]"]["slot"]][0] > line["time"]:
            yield f"{line['call']}: a body began before the approval was committed"
    winners = {line["attempt"] for line in began} & ended
    for call, commit in commits.items():
        if call not in ANSWERS and commit["attempt_id"] not in winners:
            yield f"{call}: the committed attempt {commit['attempt_id']} has not run from begin to end"
    for start in _of("start", slots):
        if (commit := commits.get(start["call"])) is not None and start["slot"] > commit["slot"]:
            yield f"{start['call']}: a start is on record in slot {start['slot']}, after the commit in {commit['slot']}"


def _artifacts(slots: list[list[Record]], store: Store) -> Iterator[str]:
    """What was committed is there, whole."""
    source = ArtifactSource(store.url, "")
    for record in _of("commit", slots):
        for entry in artifact_records(record["result"]):
            artifact = Artifact.from_record(entry, source)
            for file in read_manifest(store, artifact):
                data = store.get(f"{artifact.location}/data/{file.path}")
                if data is None or len(data) != file.size:
                    yield f"{record['call']}: artifact file {file.path} is not whole"


def _left_behind(run: Run) -> Iterator[str]:
    """Nothing that the run started is still there: workers, children of bodies, actors, scratch folders."""
    scratch = run.place.folder / "scratch"

    checks: dict[str, Callable[[], list[Any]]] = {
        "workers": lambda: [line for line in run.lines("began") if alive(line)],
        "children of bodies": lambda: [line for line in run.lines("child") if alive(line)],
        "actors": run.place.actors,
    }
    if not run.injected["reaper-kill"]:
        checks["scratch folders"] = lambda: [path.name for path in scratch.glob("recua-*")]
    deadline = time.monotonic() + GONE_S
    left = {name: found for name, found in ((name, look()) for name, look in checks.items()) if found}
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = {name: found for name, found in ((name, look()) for name, look in checks.items()) if found}
    for name, found in left.items():
        yield f"left behind: {name}: {str(found)[:300]}"
