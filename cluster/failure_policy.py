"""What to do after a failure, as a pure function: (fault, restarts so far, limit) -> decision. No ray, no torch."""

from dataclasses import dataclass

from infra.errors import SystemFault


@dataclass(frozen=True)
class Decision:
    """`action` is "restart" or "raise"; `governed_by` names the setting that a user would change."""

    action: str
    reason: str
    governed_by: str

    def __str__(self) -> str:
        return f"decision: {self.action} | {self.reason} | governed by {self.governed_by}"


def decide(error: Exception, restarts: int, max_restarts: int, setting: str = "max_restarts") -> Decision:
    """A lost worker, node or process is replaced while restarts are left; anything else is the user's to see."""
    if not isinstance(error, SystemFault):
        return Decision("raise", f"{type(error).__name__} is no fault of the platform", "none")
    if restarts >= max_restarts:
        return Decision("raise", f"{type(error).__name__}, and {restarts} restarts are used up", setting)
    return Decision("restart", f"{type(error).__name__}: {error}; restart {restarts + 1} of {max_restarts}", setting)
