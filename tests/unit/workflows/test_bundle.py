"""Export and import: a run as one file that another store can go on with."""

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from infra.errors import StoreError, UserError
from infra.storage import FolderStore, Store, open_store
from tests.helpers.stored_records import append
from workflows.cli import main
from workflows.graph import ArtifactWriter
from workflows.graph.artifacts import Artifact, ArtifactSource
from workflows.identity.keys import index_key
from workflows.runs.bundle import export_run, import_run, verify
from workflows.runs.catalog import list_runs, load_run, read_log
from workflows.runs.journal import Heartbeat, Journal, read_journal, removed_key
from workflows.runs.references import read_run


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """A run `r` that made one artifact and reused one that lies in the folder of run `old`."""
    store = FolderStore(tmp_path / "store")
    made = artifact(store, "runs/r/attempts/a1/model", {"config.json": "{}", "deep/weights.bin": "w" * 1000}, tmp_path)
    taken = artifact(store, "runs/old/attempts/b1/corpus", {"a.txt": "text"}, tmp_path)
    tree = {"workflow": "m:w", "recipe": {"args": []}, "created": 5.0}
    store.put("runs/r/submission.json", json.dumps({"package": "f" * 64}).encode())
    store.put("runs/r/run.json", json.dumps(tree).encode())
    journal = Journal.acquire(store, "r")
    append(journal, [commit("corpus[0]", taken, "k1", reused_from="old")])
    append(journal, [commit("train[0]", made, "k2", attempt_id="a1", needs=["corpus[0]"])])
    append(journal, [{"type": "end", "status": "finished", "time": 9.0, "result": {"$artifact": made.record()}}])
    store.put("runs/r/attempts/a1/log.txt", b"said\nAuthorization: Bearer abcdefghijklmnop1234567890\n")
    store.put("runs/r/attempts/lost/model/data/half.bin", b"half")
    store.put("runs/r/report.html", b"<html>")
    store.put("code/" + "c" * 64 + ".json", b'{"m:f": "1"}')
    store.put("code/" + "c" * 64 + ".f.json", b"[]")
    store.put("code/" + "d" * 64 + ".json", b"{}")
    store.put("packages/" + "f" * 64 + ".zip", b"zip")
    for key in ("k1", "k2"):
        store.put(index_key(key), b"{}")
    store.put("packages/" + "e" * 64 + ".zip", b"another")
    return store


def artifact(store: Store, location: str, files: dict[str, str], scratch: Path) -> Artifact:
    writer = ArtifactWriter(store, ArtifactSource(store.url, str(scratch)), location, scratch, lambda: None)
    for name, text in files.items():
        (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
        (writer.path / name).write_text(text)
    return writer.seal(kind="test")


def commit(call: str, made: Artifact, key: str, **more: Any) -> dict[str, Any]:
    record = {"type": "commit", "call": call, "step": "m:f", "result": {"$artifact": made.record()}, "key": key}
    record |= {"code": "c" * 64, "started": 6.0, "ended": 7.0, "seconds": 1.0, "node": "", "attempt": 1}
    return {**record, **more}


def names(bundle: Path) -> list[str]:
    with tarfile.open(bundle) as tar:
        return tar.getnames()


def test_a_bundle_has_all_that_the_run_refers_to_and_nothing_else(store: FolderStore, tmp_path: Path) -> None:
    bundle = tmp_path / "r.tar"
    assert export_run(store, "r", bundle) == bundle.stat().st_size
    found = names(bundle)
    assert found[0] == "recua-bundle.json" and found[-1] == "checksums.json" and found[1:-1] == sorted(found[1:-1])
    assert {
        "runs/r/attempts/a1/log.txt",
        "runs/r/attempts/a1/model/data/deep/weights.bin",
        "runs/old/attempts/b1/corpus/manifest.json",
        "code/" + "c" * 64 + ".f.json",
        "code/" + "c" * 64 + ".json",
        "packages/" + "f" * 64 + ".zip",
        index_key("k1"),
    } <= set(found)
    assert not [name for name in found if "lost" in name or "d" * 64 in name or "e" * 64 in name or "/lease/" in name]
    with tarfile.open(bundle) as tar:
        log = tar.extractfile("runs/r/attempts/a1/log.txt")
        assert log is not None and b"said" in (text := log.read()) and b"abcdefghijklmnop" not in text
        assert {(member.mtime, member.uid, member.mode) for member in tar} == {(0, 0, 0o644)}
    again = tmp_path / "again.tar"
    export_run(store, "r", again)
    assert again.read_bytes() == bundle.read_bytes(), "equal runs give equal bytes"
    export_run(store, "r", again, with_logs=False)
    assert not [name for name in names(again) if name.endswith("log.txt")]


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_an_imported_run_is_whole_and_can_be_reused(
    store: FolderStore, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    bundle = tmp_path / "r.tar"
    export_run(store, "r", bundle)
    other = open_store(tmp_path / "other" if kind == "folder" else request.getfixturevalue("s3_url"))
    other.put(removed_key("r"), b"{}")
    assert import_run(other, bundle) == "r"
    assert [run.run_id for run in list_runs(other)] == ["r"]
    before, after = load_run(store, "r"), load_run(other, "r")
    assert after == before and read_log(other, "r", "a1").startswith("said")
    for step in after.steps:
        source = ArtifactSource(other.url, str(tmp_path / "cache"))
        assert Artifact.from_record(step.result["$artifact"], source).path().is_dir(), "every checksum fits"
    entry = json.loads(other.get(index_key("k1")) or b"")
    assert entry["run"] == "r" and entry["result"] == after.steps[0].result
    assert read_run(other, "r").is_run, "a removed run that comes back is a run again"
    with pytest.raises(UserError, match="has a run r already"):
        import_run(other, bundle)
    exported, third = tmp_path / "second.tar.gz", FolderStore(tmp_path / "third")
    export_run(other, "r", exported)
    with gzip.open(exported) as stream:
        assert stream.read() == bundle.read_bytes(), "nothing was lost or added on the way"
    assert import_run(third, exported) == "r" and load_run(third, "r") == before


def test_only_results_is_enough_to_serve_and_to_show(store: FolderStore, tmp_path: Path) -> None:
    export_run(store, "r", tmp_path / "r.tar", only_results=True)
    other = FolderStore(tmp_path / "other")
    import_run(other, tmp_path / "r.tar")
    run = load_run(other, "r")
    assert run == load_run(store, "r"), "the whole lineage"
    model = Artifact.from_record(run.result["$artifact"], ArtifactSource(other.url, str(tmp_path / "cache")))
    assert (model.path() / "deep" / "weights.bin").read_text() == "w" * 1000
    assert not other.exists("runs/old/attempts/b1/corpus/manifest.json")
    assert other.exists(index_key("k2")) and not other.exists(index_key("k1")), "what is missing is not to be reused"
    with pytest.raises(StoreError, match=r"runs/old/attempts/b1/corpus\) is not in the store; .* with --only-results"):
        export_run(other, "r", tmp_path / "again.tar")
    store.put("runs/half/run.json", b'{"workflow": "m:w", "recipe": null, "created": 1.0}')
    with pytest.raises(UserError, match=r"--only-results: run half is .*, and needs its other artifacts to go on"):
        export_run(store, "half", tmp_path / "x.tar", only_results=True)


def test_a_damaged_artifact_is_not_exported(store: FolderStore, tmp_path: Path) -> None:
    store.put("runs/r/attempts/a1/model/data/config.json", b"[]")
    with pytest.raises(StoreError, match=r"model/data/config\.json is damaged: it is not what its manifest says"):
        export_run(store, "r", tmp_path / "r.tar")
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*"))


def test_what_the_other_store_has_of_others_stays(store: FolderStore, tmp_path: Path) -> None:
    export_run(store, "r", tmp_path / "r.tar")
    other = FolderStore(tmp_path / "other")
    other.put(index_key("k1"), b"mine")
    import_run(other, tmp_path / "r.tar")
    assert other.get(index_key("k1")) == b"mine"


def flip(data: bytes) -> bytes:
    place = data.index(b"w" * 1000) + 500
    return data[:place] + b"v" + data[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"weights\.bin' is not what its checksum says"),
        (lambda data: data[: len(data) // 2], "is no bundle of recua|is damaged|is cut off"),
        (lambda data: b"something else", "is no bundle of recua"),
        (lambda data: data.replace(b'{"format":1,"run"', b'{"format":9,"run"'), "has format 9, this recua reads 1"),
    ],
)
def test_a_damaged_bundle_leaves_nothing_behind(
    store: FolderStore, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    bundle = tmp_path / "r.tar"
    export_run(store, "r", bundle)
    bundle.write_bytes(damage(bundle.read_bytes()))
    other = FolderStore(tmp_path / "other")
    with pytest.raises(UserError, match=message):
        import_run(other, bundle)
    assert not list(other.list(""))


def tar_of(path: Path, *members: tuple[str, bytes], mode: Literal["w", "w:gz", "w:xz"] = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def bundle_of(path: Path, objects: dict[str, bytes], header: Any = None, checksums: Any = None) -> Path:
    """A file in the form of a bundle."""
    sums = {key: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for key, data in objects.items()}
    first = json.dumps({"format": 1, "run": "r", "workflow": "m:w"} if header is None else header).encode()
    last = json.dumps(sums if checksums is None else checksums).encode()
    return tar_of(path, ("recua-bundle.json", first), *objects.items(), ("checksums.json", last))


def made(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def at(path: Path) -> Path:
        make(path)
        return path

    return at


NO_BUNDLES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "text": (
        made(lambda path: path.write_text("no tar\n" * 200)),
        "is no bundle of recua: it is no tar file; `recua exp",
    ),
    "empty": (made(lambda path: path.touch()), "it is no tar file"),
    "zeros": (made(lambda path: path.write_bytes(bytes(10240))), "is no whole bundle of recua"),
    "zip": (made(lambda path: zipfile.ZipFile(path, "w").writestr("a", "b")), "it is no tar file"),
    "gzip of text": (made(lambda path: path.write_bytes(gzip.compress(b"text" * 999))), "it is no tar file"),
    "folder": (made(lambda path: path.mkdir()), "is a folder: give the file that `recua export` wrote"),
    "nothing": (lambda path: path, "no such file"),
    "fifo": (made(os.mkfifo), "is no regular file"),
    "another tar": (lambda path: tar_of(path, ("a.txt", b"a")), r"a tar of something else, 'a\.txt' is in it"),
    "a packed tar": (lambda path: tar_of(path, ("a", b""), mode="w:xz"), "a tar of something else, 'a' is in it"),
    "a tar that leads out": (lambda path: tar_of(path, ("../../a", b"a")), r"something else, '\.\./\.\./a' is in it"),
    "an absolute tar": (lambda path: tar_of(path, ("/etc/passwd", b"a")), "something else, '/etc/passwd' is in it"),
    "a header alone": (lambda path: tar_of(path, ("recua-bundle.json", b"{}")), "is no whole bundle of recua"),
    "no table": (lambda path: bundle_of(path, {}, checksums=[]), "is no whole bundle of recua"),
    "no header": (lambda path: bundle_of(path, {}, header=[1]), "is no whole bundle of recua"),
    "a run that leads out": (
        lambda path: bundle_of(path, {}, header={"format": 1, "run": "../x"}),
        "is no whole bundle",
    ),
    "no run": (lambda path: bundle_of(path, {"runs/r/a": b""}), "is damaged: it lacks the run's metadata"),
    "twice": (
        lambda path: tar_of(path, *[("recua-bundle.json", b"{}")] * 2),
        r"is damaged: unexpected entry 'recua-bundle\.json'",
    ),
    "a file in a file": (
        lambda path: bundle_of(path, {"runs/r/run.json": b"{}", "runs/r/run.json/a": b""}),
        r"'runs/r/run\.json/a' has no place in a store",
    ),
    "a long name": (
        lambda path: bundle_of(path, {"runs/r/run.json": b"{}", "runs/r/" + "x" * 256: b""}),
        "has 256 bytes, a file name at most 255",
    ),
}


@pytest.mark.parametrize("kind", NO_BUNDLES)
def test_what_is_no_bundle_is_named_in_one_line_and_nothing_is_written(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = NO_BUNDLES[kind]
    bundle = make(tmp_path / "b.tar")
    with pytest.raises(SystemExit) as ended:
        main.main(["import", str(bundle), "--store", str(tmp_path / "other")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, said) and len(said.strip().splitlines()) == 1
    assert not list(FolderStore(tmp_path / "other").list(""))


@pytest.mark.parametrize("name", ["b.tar", "b.tar.gz"])
def test_a_bundle_that_is_cut_off_anywhere_leaves_nothing_behind(store: FolderStore, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / name
    export_run(store, "r", bundle)
    whole, other = bundle.read_bytes().rstrip(b"\0"), FolderStore(tmp_path / "other")
    for part in range(24):
        bundle.write_bytes(whole[: len(whole) * part // 24])
        with pytest.raises(UserError, match=r"no whole bundle|is no bundle|is damaged") as refused:
            import_run(other, bundle)
        assert "\n" not in str(refused.value)
    assert not list(other.list(""))


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_odd_names_bits_and_empty_folders_survive_a_bundle(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    first = open_store(request.getfixturevalue("s3_url") if kind == "folder" else tmp_path / "store")
    other = open_store(tmp_path / "other" if kind == "folder" else request.getfixturevalue("s3_url"))
    writer = ArtifactWriter(
        first, ArtifactSource(first.url, str(tmp_path / "c1")), "runs/r/attempts/a/m", tmp_path / "w", lambda: None
    )
    names = {"a\nb", "caf\udce9", "é", "e\u0301", "x" * 255}
    for name in names:
        (writer.path / name).write_text("text")
        (writer.path / name).chmod(0o755)
    (writer.path / "empty").mkdir()
    sealed = writer.seal()
    first.put("runs/r/run.json", json.dumps({"workflow": "m:w", "recipe": {}, "created": 5.0}).encode())
    journal = Journal.acquire(first, "r")
    append(journal, [commit("train[0]", sealed, "k")])
    append(journal, [{"type": "end", "status": "finished", "time": 9.0, "result": None}])
    export_run(first, "r", tmp_path / "r.tar")
    import_run(other, tmp_path / "r.tar")
    source = ArtifactSource(other.url, str(tmp_path / "c2"))
    folder = Artifact.from_record(sealed.record(), source).path()
    assert set(os.listdir(folder)) == {*names, "empty"} and all(os.access(folder / name, os.X_OK) for name in names)


@pytest.mark.parametrize("evil", ["runs/../../evil", "runs/other/journal/000000000001.json", "gc/lock.json"])
def test_a_name_that_leaves_the_run_is_refused(tmp_path: Path, evil: str) -> None:
    bundle_of(tmp_path / "evil.tar", {evil: b"x"})
    with pytest.raises(UserError, match="has no place in a store"):
        verify(tmp_path / "evil.tar")


def test_what_cannot_be_exported(store: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run 'nobody'"):
        export_run(store, "nobody", tmp_path / "x.tar")
    store.put("runs/live/run.json", b'{"workflow": "m:w", "recipe": null, "created": 1.0}')
    beat = Heartbeat(Journal.acquire(store, "live"), lambda: None, lambda error: None)
    with pytest.raises(UserError, match="run live is running"):
        export_run(store, "live", tmp_path / "x.tar")
    beat.close()
    store.delete("runs/old/attempts/b1/corpus/data/a.txt")
    with pytest.raises(StoreError, match=r"corpus/data/a\.txt"):
        export_run(store, "r", tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists() and read_journal(store, "r").end is not None


def test_the_commands(store: FolderStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main.main(list(arguments))
        assert ended.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    bundle, other = str(tmp_path / "b.tar"), str(tmp_path / "there")
    assert "wrote" in call("export", "r", "--store", store.url, "--out", bundle)
    assert call("import", bundle, "--store", other).startswith("run r is in")
    assert "train[0]" in call("show", "r", "--store", other)
    out = call("gc", "--store", store.url)
    assert "attempts that lost" in out and "nothing was changed" in out
    assert "removed" in call("gc", "--store", store.url, "--run", "r", "--yes", "--grace", "0")
    assert "no runs yet" in call("runs", "--store", store.url)
