"""The actions behind the HTTP service's routes: the supervisor implements them, tests of routes have their own."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from workflows.service.schemas import Submission


class Control(Protocol):
    """Errors are RecuaErrors: a UserError is the client's, a StoreError the store's."""

    def active(self) -> list[str]:
        """Runs that are driven to their ends."""
        ...

    def is_active(self, run_id: str) -> bool: ...

    def has_package(self, sha256: str) -> bool: ...

    async def put_package(self, sha256: str, content: AsyncIterator[bytes]) -> None: ...

    def submit(self, submission: Submission) -> dict[str, Any]:
        """{"run_id", "status"} of the run that the submission starts, resumes, or that has already finished."""
        ...

    def cancel(self, run_id: str) -> str:
        """Ask the run to stop; returns its status."""
        ...

    def resume(self, run_id: str) -> str: ...
