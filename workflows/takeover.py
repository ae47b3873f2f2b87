"""A driver that was stopped (SIGSTOP, a debugger, a frozen container) and replaced still holds what Ray gave it.

Ray lends workers to drivers, and a stopped one gives nothing back: not the workers of its attempts, nor those that its
waiting requests are granted later. Its successor on the same cluster could wait for ever. So a run that is starved
kills the stopped processes of its earlier drivers, which may commit nothing any more; one that only sleeps a little is
left to wake up and find itself fenced.
"""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def kill_stopped(leases: list[Record]) -> list[int]:
    """Kill the drivers of these leases that are stopped processes of this machine; their process ids. Travels to nodes
    by value, and is therefore whole in itself."""
    import os
    import signal
    from pathlib import Path

    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    here = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    killed = []
    for lease in leases:
        if lease["machine"] != here:
            continue
        try:
            state = Path(f"/proc/{lease['pid']}/stat").read_text().rpartition(")")[2].split()
            if state[0] in ("T", "t") and state[19] == lease["process_start"]:
                os.kill(lease["pid"], signal.SIGKILL)
                killed.append(lease["pid"])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return killed


def kill_stopped_everywhere(ray: Any, leases: list[Record], done: Callable[[int], None]) -> None:
    """Ask every node. `done(pid)` is called for each driver that was killed, on one of Ray's threads."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(kill_stopped)

    def ended(future: Any) -> None:
        if future.exception() is None:  # a node that left meanwhile took its drivers along
            for pid in future.result():
                done(pid)

    for node in ray.nodes():
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = task.options(scheduling_strategy=where, name="recua-takeover").remote(leases)
            answer.future().add_done_callback(ended)
