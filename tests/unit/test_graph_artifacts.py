"""Artifacts: damage of every kind is found, and half an upload is nothing. On a folder and on an S3 server."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import StoreError, UserError
from infra.storage import Store, open_store
from workflows.artifacts import Artifact, ArtifactSource, ArtifactWriter


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
    with pytest.raises(UserError, match="sealed already"):
        out.seal()
