"""The shared-memory sender: complete files, bounded space, nothing left behind by dead processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import weight_transfer
from engines.config import GeneratorSettings, LearnerSettings
from engines.weight_transfer import (
    SharedMemorySender,
    brought_here,
    build_sender,
    check_same_architecture,
    read_weights,
)
from infra.errors import CheckpointError, ConfigError, ResourceError


def test_a_version_is_read_back_exactly(tmp_path: Path) -> None:
    sender = build_sender("shared_memory", tmp_path)
    tied = torch.randn(4, 3)
    tensors = {"a": tied, "b": tied, "c": torch.arange(6).reshape(2, 3).t(), "d": torch.ones(2, dtype=torch.bfloat16)}
    update = sender.publish(tensors.items(), "run/step:7")
    assert (update.version, update.backend) == ("run/step:7", "shared_memory")
    assert update.shapes == ((4, 3), (4, 3), (3, 2), (2,))
    assert update.dtypes == ("float32", "float32", "int64", "bfloat16")
    read = dict(read_weights(Path(update.location["path"])))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    sender.close()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_version_is_read_back_exactly_on_a_machine_that_its_bytes_were_brought_to(tmp_path: Path) -> None:
    sender = SharedMemorySender(tmp_path)
    update = sender.publish([("a", torch.arange(5.0))], "v")
    content = np.fromfile(update.location["path"], dtype=np.uint8)
    sender.close()
    with brought_here(update, content) as here:
        path = here.location["path"]
        program = f"from engines.weight_transfer import *; print(dict(read_weights(Path({path!r})))['a'].tolist())"
        assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[0.0, 1.0, 2.0, 3.0, 4.0]\n"
        assert here.version == "v"
    assert not Path(path).exists(), "it takes memory no longer"


def test_the_two_newest_versions_stay(tmp_path: Path) -> None:
    sender = SharedMemorySender(tmp_path)
    paths = [Path(sender.publish([("a", torch.full((2,), i))], f"v{i}").location["path"]) for i in range(4)]
    assert [path.exists() for path in paths] == [False, False, True, True]
    sender.close()


def test_too_little_room_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = SharedMemorySender(tmp_path)
    usage = weight_transfer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weight_transfer.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(ResourceError, match=r"has 1 MiB left .* takes 4 MiB: enlarge /dev/shm"):
        sender.publish([("a", torch.zeros(2**20))], "v")
    assert not list(sender.folder.glob("*safetensors*"))
    sender.close()


def test_a_killed_senders_files_are_swept_and_a_live_ones_are_not(tmp_path: Path) -> None:
    script = (
        "import os, sys, torch; from pathlib import Path; from engines.weight_transfer import SharedMemorySender\n"
        "sender = SharedMemorySender(Path(sys.argv[1])); sender.publish([('a', torch.ones(2))], 'v')\n"
        "os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False, timeout=120)
    [orphan] = tmp_path.rglob("*.safetensors")
    live = SharedMemorySender(tmp_path)
    kept = Path(live.publish([("a", torch.ones(2))], "v").location["path"])
    assert not orphan.exists()
    SharedMemorySender(tmp_path).close()
    assert kept.exists()
    live.close()


def test_architecture_check_tolerates_only_a_tied_head() -> None:
    model = {"embed.weight": (9, 4), "norm.weight": (4,)}
    check_same_architecture(model, model | {"lm_head.weight": (9, 4)}, "x")
    check_same_architecture(model | {"lm_head.weight": (9, 4)}, model, "x")
    with pytest.raises(CheckpointError, match=r"norm\.weight is \(5,\), not \(4,\)"):
        check_same_architecture(model, model | {"norm.weight": (5,)}, "x")
    with pytest.raises(CheckpointError, match=r"v9: .*missing norm\.weight"):
        check_same_architecture(model, {"embed.weight": (9, 4)}, "v9")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        list(read_weights(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        list(read_weights(tmp_path))


def test_settings_refuse_contradictions() -> None:
    from infra.config import validate

    with pytest.raises(ConfigError, match="warmup_steps 9 exceeds total_steps 3"):
        validate({"warmup_steps": 9, "total_steps": 3}, LearnerSettings)
    with pytest.raises(ConfigError, match="max_num_batched_tokens 8 is below max_model_len 16"):
        validate({"max_num_batched_tokens": 8, "max_model_len": 16}, GeneratorSettings)
    with pytest.raises(ConfigError, match="did you mean zero_stage"):
        validate({"zero_stag": 1}, LearnerSettings)


def test_settings_import_no_heavy_library() -> None:
    script = "import sys, engines.config; sys.exit(bool({'torch', 'ray', 'vllm', 'deepspeed'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False, timeout=60).returncode == 0
