"""Writes the controller's part of the goodput records at intervals, in a thread of its own."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from cluster.goodput.accounts import PERIOD_S, write_group
from cluster.goodput.group_account import GroupWatch
from infra.errors import StoreError
from infra.storage import open_store

log = logging.getLogger(__name__)


class AccountWriter:
    """Args:
    accounts: (store URL, run id, group); None: nothing is written.
    """

    def __init__(self, accounts: tuple[str, str, str] | None) -> None:
        self._accounts = accounts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="accounts")
        self._writing: Future[None] | None = None
        self._wrote_at = 0.0

    def write(self, watch: GroupWatch) -> None:
        """Write every `PERIOD_S`, unless the store is still busy with the last record."""
        due = time.monotonic() - self._wrote_at > PERIOD_S
        if due and (self._writing is None or self._writing.done()):
            self._write(watch, ended=False)

    def close(self, watch: GroupWatch) -> None:
        """Write the last record, with the group's end, and wait for it."""
        self._write(watch, ended=True)
        if self._writing is not None:
            self._writing.result()
        self._thread.shutdown()

    def leave(self) -> None:
        """Stop writing: another controller continues the account."""
        self._thread.shutdown(wait=False)

    def _write(self, watch: GroupWatch, ended: bool) -> None:
        if self._accounts is None:
            return
        self._wrote_at = time.monotonic()
        url, run, _ = self._accounts
        account = watch.account(time.time())
        if ended:
            account = replace(account, ended=True)

        def write() -> None:
            try:
                write_group(open_store(url), run, account)
            except StoreError as error:  # the next write has everything again
                log.warning("goodput record not written: %s", error)

        self._writing = self._thread.submit(write)
