"""A node's health signals: counters and temperatures that Linux and the NVIDIA driver expose.

A reader gives the current {signal: value}. If the platform does not expose something (a virtual machine has no error
counters), its reader is left out and `Readers.missing` lists it; nothing is made up. Signals of the same name mean the
same everywhere; those in `GAUGES` go up and down, all others are counters since boot.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

GAUGES = frozenset({"temperature_c", "gpu_temperature_c", "memory_pressure", "io_pressure"})


class Reader(Protocol):
    """One source of signals."""

    @property
    def source(self) -> str:
        """Name of the source, for people."""
        ...

    def read(self) -> dict[str, float]:
        """The current signals, without those that cannot be read at the moment."""
        ...


@dataclass(frozen=True)
class EdacReader:
    """Memory errors that the memory controllers corrected or could not correct (kernel EDAC)."""

    root: Path = Path("/sys/devices/system/edac/mc")
    source: str = "EDAC memory controllers"

    def read(self) -> dict[str, float]:
        return _sums(
            {"ecc_corrected": self.root.glob("mc*/ce_count"), "ecc_uncorrected": self.root.glob("mc*/ue_count")}
        )


@dataclass(frozen=True)
class ThermalReader:
    """How often cores were throttled for heat, and the hottest thermal zone."""

    cpus: Path = Path("/sys/devices/system/cpu")
    zones: Path = Path("/sys/class/thermal")
    source: str = "thermal throttling and zones"

    def read(self) -> dict[str, float]:
        found = _sums({"throttles": self.cpus.glob("cpu*/thermal_throttle/core_throttle_count")})
        temperatures = [value / 1000 for value in _numbers(self.zones.glob("thermal_zone*/temp"))]
        return found | ({"temperature_c": max(temperatures)} if temperatures else {})


@dataclass(frozen=True)
class NetworkReader:
    """Retransmitted TCP segments, errors of network devices and of InfiniBand ports."""

    proc: Path = Path("/proc")
    infiniband: Path = Path("/sys/class/infiniband")
    source: str = "network counters"

    def read(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError, KeyError):
            tcp = [
                line.split() for line in (self.proc / "net/snmp").read_text().splitlines() if line.startswith("Tcp:")
            ]
            found["retransmits"] = float(dict(zip(tcp[0], tcp[1], strict=True))["RetransSegs"])
        errors = 0.0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (self.proc / "net/dev").read_text().splitlines()[2:]:
                name, _, numbers = line.partition(":")
                if name.strip() != "lo":
                    columns = [float(number) for number in numbers.split()]
                    errors += columns[2] + columns[10]
            found["link_errors"] = errors
        ports = list(_numbers(self.infiniband.glob("*/ports/*/counters/symbol_error")))
        ports += _numbers(self.infiniband.glob("*/ports/*/counters/link_downed"))
        if ports:
            found["link_errors"] = errors + sum(ports)
        return found


@dataclass(frozen=True)
class KernelReader:
    """Processes killed for memory, and how much of the last 10 s was lost waiting for memory and disks (PSI, %)."""

    proc: Path = Path("/proc")
    source: str = "kernel counters"

    def read(self) -> dict[str, float]:
        found = {}
        with contextlib.suppress(OSError, ValueError):
            for line in (self.proc / "vmstat").read_text().splitlines():
                if line.startswith("oom_kill "):
                    found["oom_kills"] = float(line.split()[1])
        for signal, file in (("memory_pressure", "pressure/memory"), ("io_pressure", "pressure/io")):
            with contextlib.suppress(OSError, ValueError, IndexError):
                first = (self.proc / file).read_text().splitlines()[0]
                found[signal] = float(first.split("avg10=")[1].split()[0])
        return found


class NvidiaReader:
    """All GPUs of the node through nvidia-ml: ECC errors, PCIe replays, remapped rows, heat, thermal slow-down.

    Args:
        nvml: the module `pynvml`, initialised.
    """

    source = "nvidia-ml"

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        self._hot = [False] * len(self._gpus)
        self._throttles = 0.0

    def read(self) -> dict[str, float]:
        nvml, found, temperatures = self._nvml, dict[str, float](), []

        def add(signal: str, read: Callable[[], float]) -> None:
            with contextlib.suppress(nvml.NVMLError):  # not every card has every counter
                found[signal] = found.get(signal, 0.0) + float(read())

        aggregate = nvml.NVML_AGGREGATE_ECC
        for index, gpu in enumerate(self._gpus):
            for signal, kind in (
                ("gpu_ecc_corrected", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
                ("gpu_ecc_uncorrected", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            ):
                add(signal, lambda gpu=gpu, kind=kind: nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, aggregate))  # type: ignore[misc]
            add("pcie_replays", lambda gpu=gpu: nvml.nvmlDeviceGetPcieReplayCounter(gpu))  # type: ignore[misc]
            add("gpu_remapped_rows", lambda gpu=gpu: sum(nvml.nvmlDeviceGetRemappedRows(gpu)[:2]))  # type: ignore[misc]
            with contextlib.suppress(nvml.NVMLError):
                temperatures.append(float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)))
            with contextlib.suppress(nvml.NVMLError):
                reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
                hot = bool(reasons & nvml.nvmlClocksThrottleReasonHwThermalSlowdown)
                self._throttles += hot and not self._hot[index]
                self._hot[index] = hot
                found["gpu_throttles"] = self._throttles
        return found | ({"gpu_temperature_c": max(temperatures)} if temperatures else {})


class Readers:
    """All readers that work on this machine.

    Args:
        candidates: readers to try; None: those of this module.
    """

    def __init__(self, candidates: Iterable[Reader] | None = None) -> None:
        tried = list(default_readers() if candidates is None else candidates)
        self._readers = [reader for reader in tried if reader.read()]
        self.sources = tuple(reader.source for reader in self._readers)
        self.missing = tuple(reader.source for reader in tried if reader not in self._readers)
        """Sources that this platform lacks."""
        if candidates is None and NvidiaReader.source not in self.sources:
            self.missing = (*self.missing, NvidiaReader.source)

    def read(self) -> Mapping[str, float]:
        """All current signals."""
        found: dict[str, float] = {}
        for reader in self._readers:
            found |= reader.read()
        return found


def default_readers(root: Path = Path("/")) -> list[Reader]:
    """Readers of Linux, with /sys and /proc below `root`, and of nvidia-ml if pynvml and a driver exist."""
    sys, proc = root / "sys", root / "proc"
    readers: list[Reader] = [
        EdacReader(sys / "devices/system/edac/mc"),
        ThermalReader(sys / "devices/system/cpu", sys / "class/thermal"),
        NetworkReader(proc, sys / "class/infiniband"),
        KernelReader(proc),
    ]
    nvidia = open_nvidia()
    return readers if nvidia is None else [*readers, nvidia]


def open_nvidia() -> NvidiaReader | None:
    """The reader of all GPUs; None without pynvml, a driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return NvidiaReader(pynvml) if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError:
        return None


def _numbers(files: Iterable[Path]) -> Iterable[float]:
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            yield float(file.read_text())


def _sums(files: Mapping[str, Iterable[Path]]) -> dict[str, float]:
    """Sums of the signals that have at least one readable file."""
    found = {signal: list(_numbers(paths)) for signal, paths in files.items()}
    return {signal: sum(values) for signal, values in found.items() if values}
