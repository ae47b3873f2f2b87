"""A worker's burn-in: measured before standby, and again if the controller asks; the result is in its beacon."""

import threading
import time
from typing import Any

import torch

from cluster.node.beacons import BeaconWriter
from cluster.node.wire_speed import Sink, SinkAddress, measure
from engines.elastic.burn_in import examine
from engines.elastic.replay import processor_kind


class BurningIn:
    """Measures for any thread, one at a time."""

    def __init__(self, beacon: BeaconWriter, device: torch.device) -> None:
        self._beacon, self._device = beacon, device
        self._lock = threading.Lock()
        self._number = self._attempt = 0
        self._machine: dict[str, Any] = {}
        self._bandwidths: dict[str, float] = {}

    def run(self, again: bool, peer: SinkAddress | None) -> None:
        """Measure the machine (if `again`), and the way to another node. A node that cannot be reached has rate 0: the
        controller decides whether that matters."""
        with self._lock:
            started = time.monotonic()
            if again:
                self._examine()
            if peer is not None:
                try:
                    self._bandwidths["peer"] = measure(peer)
                except OSError:
                    self._bandwidths["peer"] = 0.0
            self._number += 1
            rates = {name: round(rate, 3) for name, rate in self._bandwidths.items()}
            seconds = round(time.monotonic() - started, 3)
            note = {**self._machine, "bandwidths": rates, "seconds": seconds}
            self._beacon.note("burn-in", {**note, "number": self._number, "attempt": self._attempt})

    def _examine(self) -> None:
        found = examine(self._device)
        sink = Sink("127.0.0.1")
        self._bandwidths |= {"memory": found.memory_rate, "loopback": measure(sink.address)}
        sink.close()
        self._attempt += 1
        self._machine = {
            "kind": processor_kind(self._device),
            "crowded": round(found.crowded, 3),
            "answer_correct": found.answer_correct,
            "memory_correct": found.memory_correct,
            "compute_rate": round(found.compute_rate, 3),
        }
