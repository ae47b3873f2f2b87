"""Node health: readers on this machine and on the kernel's folder layouts, trends, the score on synthetic traces."""

import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.prediction import first_drain, score
from bench.synthetic_health import PERIOD_S, make_fleet, make_trace
from cluster.config import ElasticSettings
from cluster.guard.prediction import NodeTrend, decide_drain_ahead
from cluster.node.health import (
    EdacReader,
    KernelReader,
    NetworkReader,
    NvidiaReader,
    Readers,
    ThermalReader,
    open_nvidia,
)

SETTINGS = ElasticSettings()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_counters_in_the_kernel_s_own_layout_are_summed(tmp_path: Path) -> None:
    edac = write(
        tmp_path / "mc", {"mc0/ce_count": "3\n", "mc1/ce_count": "4\n", "mc0/ue_count": "0\n", "mc1/ue_count": "x"}
    )
    assert EdacReader(edac).read() == {"ecc_corrected": 7, "ecc_uncorrected": 0}
    assert EdacReader(tmp_path / "none").read() == {}
    cpus = write(tmp_path / "cpu", {f"cpu{i}/thermal_throttle/core_throttle_count": f"{i}\n" for i in range(3)})
    zones = write(tmp_path / "thermal", {"thermal_zone0/temp": "41000\n", "thermal_zone1/temp": "67500\n"})
    assert ThermalReader(cpus, zones).read() == {"throttles": 3, "temperature_c": 67.5}
    assert ThermalReader(tmp_path / "none", zones).read() == {"temperature_c": 67.5}


def test_network_and_kernel_counters(tmp_path: Path) -> None:
    device = (
        "face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier\n"
    )
    numbers = " ".join(str(n) for n in range(16))
    proc = {
        "net/snmp": "Ip: Forwarding\nIp: 1\nTcp: RtoMin RetransSegs\nTcp: 200 17\n",
        "net/dev": f"Inter-|\n {device}    lo: {numbers}\n  eth0: {numbers}\n",
        "vmstat": "pgfault 5\noom_kill 2\n",
        "pressure/memory": "some avg10=1.25 avg60=0.00 avg300=0.00 total=9\n",
    }
    root = write(tmp_path / "proc", proc)
    ports = write(
        tmp_path / "ib", {"mlx5_0/ports/1/counters/symbol_error": "5", "mlx5_0/ports/1/counters/link_downed": "1"}
    )
    assert NetworkReader(root, tmp_path / "none").read() == {"retransmits": 17, "link_errors": 2 + 10}
    assert NetworkReader(root, ports).read()["link_errors"] == 2 + 10 + 6
    assert KernelReader(root).read() == {"oom_kills": 2, "memory_pressure": 1.25}


def test_the_real_machine_is_read_and_what_it_lacks_is_named() -> None:
    readers = Readers()
    signals = readers.read()
    assert signals["retransmits"] >= 0 and signals["link_errors"] >= 0 and "network counters" in readers.sources
    assert not set(readers.sources) & set(readers.missing)
    assert (open_nvidia() is None) == ("nvidia-ml" in readers.missing)
    again = readers.read()
    assert again["retransmits"] >= signals["retransmits"]


class Nvml(SimpleNamespace):
    """The part of pynvml that is used, for two GPUs; the second has no ECC."""

    class NVMLError(Exception):
        pass


@pytest.fixture
def nvml() -> Nvml:
    hot = {"now": 0}

    def ecc(gpu: int, kind: int, aggregate: int) -> int:
        if gpu == 1:
            raise Nvml.NVMLError("not supported")
        return 11 if kind == 0 else 2

    return Nvml(
        hot=hot,
        NVML_AGGREGATE_ECC=1,
        NVML_MEMORY_ERROR_TYPE_CORRECTED=0,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksThrottleReasonHwThermalSlowdown=0x40,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetTotalEccErrors=ecc,
        nvmlDeviceGetPcieReplayCounter=lambda gpu: 5,
        nvmlDeviceGetRemappedRows=lambda gpu: (1, 1, 0, 0),
        nvmlDeviceGetTemperature=lambda gpu, sensor: 60 + gpu,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: hot["now"],
    )


def test_all_gpus_are_added_up_and_throttling_counts_when_it_begins(nvml: Nvml) -> None:
    reader = NvidiaReader(nvml)
    first = reader.read()
    assert first["gpu_ecc_corrected"] == 11 and first["gpu_ecc_uncorrected"] == 2 and first["pcie_replays"] == 10
    assert first["gpu_remapped_rows"] == 4 and first["gpu_temperature_c"] == 61 and first["gpu_throttles"] == 0
    nvml.hot["now"] = 0x40
    assert [reader.read()["gpu_throttles"] for _ in range(2)] == [2, 2]


def test_the_names_used_are_those_of_the_real_binding(repository: Path, nvml: Nvml) -> None:
    """Ray carries a copy of pynvml; only its text is read."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    names = set(re.findall(r"nvml\.(nvml\w+|NVML\w+)", (repository / "cluster/node/health.py").read_text()))
    known = (Path(spec.origin).parent / "_private/thirdparty/pynvml/pynvml.py").read_text()
    assert names - {"nvmlInit"} <= set(vars(nvml)) | {"NVMLError"}
    missing = {name for name in names if not re.search(rf"^(def |class )?{name}\b", known, re.MULTILINE)}
    assert missing == set()


def feed(trend: NodeTrend, minutes: int, signals: Callable[[int], dict[str, Any]], start: int = 0) -> NodeTrend:
    for minute in range(start, start + minutes):
        trend.observe(60.0 * minute, signals(minute))
    return trend


def test_a_steady_rate_of_corrected_errors_is_no_sign_and_an_accelerating_one_is() -> None:
    steady = feed(NodeTrend(), 600, lambda minute: {"ecc_corrected": float(minute // 2)})
    assert steady.risk().probability < 0.05
    burst = feed(steady, 30, lambda minute: {"ecc_corrected": 300.0 + 10 * (minute - 600)}, 600)
    risk = burst.risk()
    assert risk.probability > 0.5 and "ecc_corrected" in risk.signs and "expected" in risk.signs
    decision = decide_drain_ahead("n3", burst, SETTINGS)
    assert decision.action == "drain" and decision.key == "elastic.predicted_risk" and "n3" in decision.reason


def test_one_uncorrected_error_drains_without_a_past_and_retransmissions_alone_never() -> None:
    trend = feed(NodeTrend(), 5, lambda minute: {"ecc_uncorrected": float(minute >= 4)})
    assert decide_drain_ahead("n", trend, SETTINGS).action == "drain"
    storm = feed(NodeTrend(), 200, lambda minute: {"retransmits": 1e4 * max(0, minute - 150) ** 2})
    assert decide_drain_ahead("n", storm, SETTINGS).action == "watch"


def test_a_temperature_that_leads_to_the_limit_counts_and_a_hot_steady_one_does_not() -> None:
    assert feed(NodeTrend(), 300, lambda minute: {"temperature_c": 78.0}).risk().probability < 0.05
    rising = feed(NodeTrend(), 300, lambda minute: {"temperature_c": 60 + max(0, minute - 270) * 1.0})
    assert rising.risk().probability > 0.5


def test_a_reboot_starts_the_window_anew() -> None:
    trend = feed(NodeTrend(), 100, lambda minute: {"ecc_corrected": 500.0})
    trend.observe(6000.0, {"ecc_corrected": 0.0})
    assert trend.risk().probability == 0


def test_synthetic_traces_say_so_and_end_at_the_failure() -> None:
    fleet = list(make_fleet(40, 0.5, 0.5, seed=3))
    assert all(trace.node.startswith("synthetic-") for trace in fleet)
    assert {trace.fails_at is None for trace in fleet} == {True, False}
    for trace in fleet:
        times, (_, last) = [at for at, _ in trace.samples], trace.samples[-1]
        assert times == sorted(times)
        if trace.fails_at is not None:
            assert trace.fails_at - PERIOD_S <= times[-1] + PERIOD_S <= trace.fails_at + PERIOD_S
        assert all(last[name] >= trace.samples[0][1][name] for name in last if name != "temperature_c")


def test_the_score_by_hand_and_on_a_small_fleet() -> None:
    quiet = make_trace("synthetic-q", "quiet", 6 * 3600, None, random.Random(1))
    dying = make_trace("synthetic-m", "memory", 12 * 3600, 12 * 3600.0, random.Random(2))
    sudden = make_trace("synthetic-s", "sudden", 6 * 3600, 5 * 3600.0, random.Random(3))
    assert first_drain(quiet, SETTINGS) is None and first_drain(sudden, SETTINGS) is None
    assert first_drain(dying, SETTINGS) is not None
    found = score([quiet, dying, sudden], 60, SETTINGS)
    assert (found["precision"], found["recall"], found["recall_with_signs"]) == (1.0, 0.5, 1.0)
    assert "synthetic" in found["traces"]
    late = score([dying], 10 * 24 * 3600, SETTINGS)
    assert late["recall"] == 0 and late["false_or_late"] == {"memory": 1}
    fleet = score(make_fleet(24, 1.5, 0.5, seed=7), 60, SETTINGS)
    assert fleet["precision"] >= 0.7 and fleet["recall_with_signs"] >= 0.7
