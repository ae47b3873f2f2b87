"""Artifacts: damage of every kind is found, and half an upload is nothing. On a folder and on an S3 server."""

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import StoreError, UserError
from infra.storage import Store, open_store
from workflows.graph import ArtifactWriter, StepContext
from workflows.graph.artifacts import Artifact, ArtifactSource


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "store" if request.param == "folder" else request.getfixturevalue("s3_url"))


@pytest.fixture
def write(store: Store, tmp_path: Path) -> Callable[..., Artifact]:
    source = ArtifactSource(store.url, str(tmp_path / "cache"))

    def make(attempt: str = "1", on_file: Callable[[], None] = lambda: None) -> Artifact:
        out = ArtifactWriter(store, source, f"runs/r/attempts/{attempt}/model", tmp_path / attempt, on_file)
        (out.path / "a.bin").write_bytes(b"a" * 1000)
        (out.path / "deep").mkdir()
        (out.path / "deep" / "b.bin").write_bytes(b"b")
        return out.seal(kind="toy")

    return make


def test_content_comes_back(write: Callable[..., Artifact]) -> None:
    artifact = write()
    assert (artifact.path() / "deep" / "b.bin").read_bytes() == b"b"
    assert artifact == write("2"), "equal content, equal digest"


DAMAGES: dict[str, Callable[[Store, str], None]] = {
    "flipped": lambda store, at: store.put(f"{at}/data/a.bin", b"a" * 999 + b"b"),
    "short": lambda store, at: store.put(f"{at}/data/a.bin", b"a" * 10),
    "missing": lambda store, at: store.delete(f"{at}/data/deep/b.bin"),
    "no manifest": lambda store, at: store.delete(f"{at}/manifest.json"),
    "half a manifest": lambda store, at: store.put(f"{at}/manifest.json", b'{"files": ['),
    "another manifest": lambda store, at: store.put(f"{at}/manifest.json", b'{"files": []}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_that_names_the_artifact(
    write: Callable[..., Artifact],
    store: Store,
    damage: str,
    tmp_path: Path,
) -> None:
    artifact = write()
    DAMAGES[damage](store, artifact.location)
    with pytest.raises(StoreError, match=r"model|a\.bin|b\.bin"):
        artifact.path()
    assert not (tmp_path / "cache" / artifact.digest).exists(), "nothing damaged stays in the cache"


def test_an_upload_that_breaks_off_leaves_no_artifact(write: Callable[..., Artifact], store: Store) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write("broken", die)
    assert not store.exists("runs/r/attempts/broken/model/manifest.json")
    assert write("next").path().is_dir()


def test_a_damaged_cache_is_fetched_again(write: Callable[..., Artifact], store: Store) -> None:
    artifact = write()
    if store.local_path("x") is not None:
        pytest.skip("a folder store is read in place")
    file = artifact.path() / "a.bin"
    file.write_bytes(b"x" * 1000)
    assert (artifact.path() / "a.bin").read_bytes() == b"a" * 1000


def test_sealing_twice_is_refused(store: Store, tmp_path: Path) -> None:
    source = ArtifactSource(store.url, str(tmp_path / "cache"))
    out = ArtifactWriter(store, source, "runs/r/attempts/1/model", tmp_path / "scratch", lambda: None)
    out.seal()
    with pytest.raises(UserError, match="already sealed"):
        out.seal()


@pytest.fixture
def writer(store: Store, tmp_path: Path) -> Callable[..., ArtifactWriter]:
    source = ArtifactSource(store.url, str(tmp_path / "cache"))
    counter = itertools.count()

    def make() -> ArtifactWriter:
        number = next(counter)
        location = f"runs/r/attempts/w{number}/model"
        return ArtifactWriter(store, source, location, tmp_path / f"scratch{number}", lambda: None)

    return make


def tree(folder: Path) -> dict[str, object]:
    """Relative path -> content and execute bit of a file, None of a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else (path.read_bytes(), os.access(path, os.X_OK))
        for path in folder.rglob("*")
    }


ODD_NAMES = [
    "a\nb", "a\tb", "a\rb", " lead", "trail ", "dot.", "...", ".hidden", ".tmp-mine", "%0A", "%%0A", "%%25", "a%20b",
    "#", "?x", "a+b", "\\", "'\"", "&<>", "~", "*", "a;b=c", "😀", "é", "e\u0301", "MODEL", "model", "x" * 255,
    "caf\udce9", "\u2028",
]  # fmt: skip


def test_names_bits_and_empty_folders_come_back(writer: Callable[..., ArtifactWriter], store: Store) -> None:
    out = writer()
    for name in ODD_NAMES:
        (out.path / "odd" / name).mkdir(parents=True)
        (out.path / "odd" / name / name).write_bytes(name.encode(errors="surrogateescape"))
    (out.path / "run.sh").write_text("#!/bin/sh")
    (out.path / "run.sh").chmod(0o755)
    (out.path / "empty" / "deep").mkdir(parents=True)
    (out.path / "empty" / "a\nb").mkdir()
    before = tree(out.path)
    artifact = out.seal()
    assert tree(artifact.path()) == before
    (artifact.path() / "empty" / "deep").rmdir()
    (artifact.path() / "run.sh").chmod(0o644)
    assert tree(artifact.path()) == before, "what an import or a cleaner takes from a folder is put back"
    keys = {f"{artifact.location}/data/odd/{name}/{name}" for name in ODD_NAMES if not name.startswith(".tmp-")}
    assert keys <= set(store.list(artifact.location))


def test_execute_bits_and_empty_folders_are_content_and_plain_digests_stay(
    writer: Callable[..., ArtifactWriter],
) -> None:
    def digest(bit: int = 0o644, empty: bool = False) -> str:
        out = writer()
        (out.path / "a.txt").write_text("a")
        (out.path / "a.txt").chmod(bit)
        if empty:
            (out.path / "b").mkdir()
        return out.seal().digest

    plain = [["a.txt", 1, hashlib.sha256(b"a").hexdigest()]]
    assert digest() == hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()
    assert len({digest(), digest(0o755), digest(empty=True), digest(0o755, empty=True)}) == 4


def test_links_come_back_as_what_they_led_to(writer: Callable[..., ArtifactWriter], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "bare").mkdir()
    (outside / "deep" / "tool").write_text("tool")
    (outside / "deep" / "tool").chmod(0o755)
    (outside / "again").symlink_to("deep")
    out = writer()
    (out.path / "own").mkdir()
    (out.path / "own" / "a").write_text("a")
    (out.path / "inside").symlink_to("own")
    (out.path / "file").symlink_to("own/a")
    (out.path / "chain").symlink_to("file")
    (out.path / "all").symlink_to(outside)
    found = tree(out.seal().path())
    a, tool = (b"a", False), (b"tool", True)
    assert {name: what for name, what in found.items() if what} == {
        "own/a": a, "inside/a": a, "file": a, "chain": a, "all/deep/tool": tool, "all/again/tool": tool
    }  # fmt: skip
    assert "all/bare" in found and tree(outside)["deep/tool"] == tool, "what they led to stays as it was"


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "dangling": (lambda path: path.symlink_to("nothing"), "is a link to nothing"),
    "loop": (lambda path: path.symlink_to(path.name), "is a link to nothing"),
    "round": (lambda path: path.symlink_to(".."), "is a link to a folder around it"),
    "fifo": (os.mkfifo, "is neither a file nor a folder"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "is neither a file nor a folder"),
    "socket": (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "is neither a file nor a folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_is_named_before_anything_is_uploaded(
    writer: Callable[..., ArtifactWriter], store: Store, kind: str
) -> None:
    make, message = REFUSED[kind]
    out = writer()
    (out.path / "a.txt").write_text("a")
    (out.path / "deep").mkdir()
    make(out.path / "deep" / "odd one")
    with pytest.raises(UserError, match=rf"artifact model: 'deep/odd one' {message}"):
        out.seal()
    assert store.local_path("x") is not None or not list(store.list("runs"))
    (out.path / "deep" / "odd one").unlink()
    assert tree(out.seal().path()) == {"a.txt": (b"a", False), "deep": None}, "and it can be sealed then"


def test_names_that_are_too_long_for_s3_are_named_before_anything_is_uploaded(s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    source = ArtifactSource(store.url, str(tmp_path / "cache"))
    out = ArtifactWriter(store, source, "runs/r/attempts/1/model", tmp_path / "scratch", lambda: None)
    (out.path / "a.txt").write_text("a")
    deep = out.path.joinpath(*["é" * 100] * 5)
    deep.mkdir(parents=True)
    (deep / "b").write_text("b")
    with pytest.raises(UserError, match=r"would be a key of 10\d\d bytes, S3 allows 1024: use shorter"):
        out.seal()
    assert not list(store.list("runs"))


def test_metadata_that_cannot_be_kept_is_named_before_the_upload(writer: Callable[..., ArtifactWriter]) -> None:
    out = writer()
    with pytest.raises(UserError, match="artifact model: seal"):
        out.seal(score=object())
    assert out.seal(score=1).meta == {"score": 1}


def test_a_manifest_that_names_files_outside_is_refused(write: Callable[..., Artifact], store: Store) -> None:
    artifact = write()
    for files, empty in (([{"path": "../a", "size": 1, "sha256": ""}], []), ([], ["/tmp/x"])):
        store.put(f"{artifact.location}/manifest.json", json.dumps({"files": files, "empty_folders": empty}).encode())
        with pytest.raises(StoreError, match="names files outside of it"):
            artifact.path()


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a\0b", "log.txt", "x" * 256, "é" * 128, "a\ud800"])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    source = ArtifactSource(store.url, str(tmp_path / "cache"))
    step = StepContext(
        run_id="r",
        call_id="f[0]",
        attempt=1,
        attempt_id="1",
        scratch_path=tmp_path,
        store=store,
        source=source,
        send=lambda event: None,
        on_file=lambda: None,
    )
    with pytest.raises(UserError, match=r"artifact name|a file name at most 255"):
        step.artifact(name)
    assert step.artifact("é" * 127).path.is_dir()
