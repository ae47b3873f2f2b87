"""Waits of the compute stream, which block no thread."""

import torch

from engines.collectives.wait_times import Waits

CYCLES = 400_000_000
"""About 0.2 s at 2 GHz."""


def test_gpu_waits_for_another_stream_are_timed_on_the_compute_stream() -> None:
    waits, other = Waits(torch.device("cuda", 0)), torch.cuda.Stream()
    original = torch.cuda.Stream.wait_event
    with waits.watching():
        with torch.cuda.stream(other):
            torch.cuda._sleep(CYCLES)
            done = other.record_event()
            other.wait_event(done)  # not the stream that computes
        with waits.counted_as("pipeline_bubble"):
            torch.cuda.current_stream().wait_event(done)
        assert sum(waits.take().values()) == 0, "it is not over"
        torch.cuda.synchronize()
        found = waits.take()
    assert found["pipeline_bubble"] > 0.02 and found["exposed_communication"] == 0
    assert torch.cuda.Stream.wait_event is original and sum(waits.take().values()) == 0
