"""A policy's answer. Policies are pure functions (state, events, resources) -> decision; no ray, torch or clock."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """`action`: one word for the code; `reason`: a sentence for people; `key`: the setting that a user would change.

    Example: Decision("shrink", "1 worker of block 2 lost (n3 died), no spare: 3 of 4 blocks go on", "elastic.spares")
    """

    action: str
    reason: str
    key: str

    def __str__(self) -> str:
        return f"decision: {self.action} | {self.reason} | governed by {self.key}"


def key(name: str) -> str:
    """How decisions name a field of `cluster.config.ElasticSettings`."""
    return f"elastic.{name}"
