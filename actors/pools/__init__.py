"""Learners and generators that outlive a step: started once per run and lent from step to step."""

from actors.pools.keeper import NAMESPACE, Pools

__all__ = ["NAMESPACE", "Pools"]
