"""Learners and generators that outlive a step: started once per run, lent from step to step."""

from actors.pools.keeper import NAMESPACE, Pools

__all__ = ["NAMESPACE", "Pools"]
