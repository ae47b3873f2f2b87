"""Code packages: what goes in, what never does, and what the service accepts."""

import asyncio
import errno
import hashlib
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ConfigError, UserError
from infra.storage import open_store
from workflows.service.client.submit import submit
from workflows.service.drivers import packages


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(f"content of {name}"))


def names(package: packages.Package) -> set[str]:
    with zipfile.ZipFile(package.file) as archive:
        return set(archive.namelist())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def test_service_package_leaves_out_what_git_ignores_and_what_is_secret(root: Path, tmp_path: Path) -> None:
    make(root, "flow.py", "lib/__init__.py", "lib/words.txt", "lib/big/data.bin", "lib/big/keep.txt", "notes.log")
    make(root, "lib/deep/notes.log", ".env", ".env.local", "lib/prod.env", "lib/tls.key", "id_rsa", ".aws/credentials")
    make(root, ".git/config", ".venv/lib/x.py", "mine/pyvenv.cfg", "mine/y.py", "runs/r/report.html", "lib/runs/a.py")
    make(root, "lib/__pycache__/a.pyc", "secrets/db.txt", "lib/secrets/__init__.py", "lib/secrets/code.py")
    make(root, ".ray/auth_token", "kept/runs/r/run.json", "lib/.cache/x")
    (root / ".gitignore").write_text("*.log\n!lib/deep/notes.log\n/lib/big/*\n")
    (root / "lib" / "big" / ".gitignore").write_text("!keep.txt\n")
    (root / "lib" / "run.sh").write_text("#!/bin/sh")
    (root / "lib" / "run.sh").chmod(0o755)
    os.symlink("flow.py", root / "alias.py")
    os.symlink("/usr", root / "usr")
    package = packages.build(root, tmp_path / "p.zip", without=[root / "kept"])
    kept = {".gitignore", "flow.py", "lib/__init__.py", "lib/words.txt", "lib/deep/notes.log", "lib/big/keep.txt"}
    kept |= {"lib/runs/a.py", "lib/secrets/__init__.py", "lib/secrets/code.py", "lib/run.sh"}
    assert names(package) == kept | {"alias.py"}
    assert package.left_out == ("usr",) and package.files == 11
    packages.unpack(package.file, tmp_path / "out")
    assert (tmp_path / "out/alias.py").read_text() == "content of flow.py"
    assert os.access(tmp_path / "out/lib/run.sh", os.X_OK) and not os.access(tmp_path / "out/flow.py", os.X_OK)


def test_service_package_leaves_out_and_names_what_it_cannot_hold(root: Path, tmp_path: Path) -> None:
    bad = os.fsdecode(b"caf\xe9")
    make(root, "flow.py", f"{bad}.txt", f"{bad}/in.txt", "a\\b.txt", "a\nb.txt", "\u00e9.txt", "e\u0301.txt")
    os.symlink("loop", root / "loop")
    os.symlink("nothing", root / "nowhere")
    os.mkfifo(root / "fifo")
    package = packages.build(root, tmp_path / "p.zip")
    assert set(package.left_out) == {f"{bad}.txt", f"{bad}/in.txt", "a\\b.txt", "loop", "nowhere"}
    packages.unpack(package.file, tmp_path / "out")
    assert set(os.listdir(tmp_path / "out")) == {"flow.py", "a\nb.txt", "\u00e9.txt", "e\u0301.txt"}


def test_service_package_heeds_ignores_of_any_encoding(root: Path, tmp_path: Path) -> None:
    make(root, "flow.py", "private.txt", os.fsdecode(b"caf\xe9.txt"))
    (root / ".gitignore").write_bytes(b"\xef\xbb\xbfprivate.txt\ncaf\xe9.txt\n")
    package = packages.build(root, tmp_path / "p.zip")
    assert names(package) == {".gitignore", "flow.py"} and package.left_out == ()


def test_service_package_names_what_cannot_be_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(root, "flow.py", "secret.txt")
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "secret.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"cannot package .*secret\.txt: Permission denied; fix that, or exclude it"):
        packages.build(root, tmp_path / "p.zip")
    assert not (tmp_path / "p.zip").exists()


def test_service_package_of_equal_folders_has_one_name(root: Path, tmp_path: Path) -> None:
    make(root, "a.py", "b/c.py")
    first = packages.build(root, tmp_path / "1.zip").sha256
    os.utime(root / "a.py", (1, 1))
    assert packages.build(root, tmp_path / "2.zip").sha256 == first
    make(root, "b/d.py")
    assert packages.build(root, tmp_path / "3.zip").sha256 != first


def test_service_package_too_large_names_the_largest_folders(root: Path, tmp_path: Path) -> None:
    make(root, "flow.py", "lib/a.py")
    (root / "data" / "raw").mkdir(parents=True)
    (root / "data" / "raw" / "x.bin").write_bytes(b"x" * 30_000)
    (root / "data" / "y.bin").write_bytes(b"x" * 10_000)
    with pytest.raises(ConfigError, match=r"39\.1 KiB of code, at most 9\.8 KiB.*data 39\.1 KiB, data/raw 29\.3 KiB"):
        packages.build(root, tmp_path / "p.zip", limit=10_000)
    assert not (tmp_path / "p.zip").exists()


def test_service_package_folder_is_the_current_one_where_the_file_is_in_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(root, "pkg/__init__.py", "pkg/flow.py")
    monkeypatch.chdir(root / "pkg")
    assert packages.working_folder(Path("flow.py")) == root / "pkg"
    monkeypatch.chdir(tmp_path)
    assert packages.working_folder(Path("project/pkg/flow.py")) == tmp_path
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert packages.working_folder(root / "pkg/flow.py") == root, "else the root of its packages"


def test_service_package_is_checked_when_it_arrives(root: Path, tmp_path: Path) -> None:
    make(root, "flow.py")
    store = open_store(tmp_path / "store")
    package = packages.build(root, tmp_path / "p.zip")
    raw = package.file.read_bytes()

    def receive(content: bytes, sha256: str, limit: int = packages.LIMIT) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield content[:10]
            yield content[10:]

        asyncio.run(packages.receive(store, sha256, chunks(), limit))

    receive(raw, package.sha256)
    assert store.get(packages.package_key(package.sha256)) == raw
    with pytest.raises(UserError, match="arrived damaged"):
        receive(raw[:-1], package.sha256)
    with pytest.raises(UserError, match="has more than 20 B"):
        receive(raw, package.sha256, limit=20)
    with pytest.raises(UserError, match="no zip file"):
        receive(b"no zip at all", hashlib.sha256(b"no zip at all").hexdigest())
    bad = tmp_path / "bad.zip"
    for name, limit, message in (
        ("../x.py", 1 << 20, "leads out"),
        ("/x.py", 1 << 20, "leads out"),
        ("x", 4, "unpacked"),
    ):
        with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, "12345")
        with pytest.raises(UserError, match=message):
            packages.unpack(bad, tmp_path / "unpacked", limit)
    assert not (tmp_path / "unpacked").exists() and not (tmp_path / "x.py").exists()


def test_a_workflow_of_several_is_submitted_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        """The service, as far as a submission goes."""

        def get(self, path: str) -> dict[str, str]:
            return {"store": str(tmp_path / "store")}

        def send_package(self, file: Path, sha256: str) -> None: ...

        def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            return body

    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "a.b.py").write_text("")
    (tmp_path / "r.toml").write_bytes("\ufeffx = 1".encode())
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"store": None, "run_id": None}
    for target in ("flows/a.b.py", "flows/a.b.py:outer"):
        body = submit(Client(), Path(target), "r.toml", (), **given)  # type: ignore[arg-type]
        assert body["workflow_file"] == target and body["recipe"] == "x = 1"
    with pytest.raises(UserError, match=r"workflow flows/c\.py: no such Python file"):
        submit(Client(), Path("flows/c.py:outer"), None, (), **given)  # type: ignore[arg-type]
