"""The process groups of a learner rank, from its seat."""

import torch

from cluster.workers.seat import Seat
from engines.collectives.process_groups import ProcessGroups, Rendezvous, StoreAddress

GENERATION = 0
"""Always the first: a pool that loses a rank is restarted with new groups."""


def process_groups(seat: Seat, device: torch.device, timeout_s: float) -> ProcessGroups:
    """The groups of a seat, not yet formed. Rank 0 hosts their store, so that they end with it."""
    return ProcessGroups(
        GENERATION,
        seat.rank,
        seat.world_size,
        Rendezvous(StoreAddress(seat.master_address, seat.master_port), hosts=seat.rank == 0, timeout_s=timeout_s),
        device=device,
        address=seat.address,
        timeout_s=timeout_s,
        form_timeout_s=timeout_s,
    )
