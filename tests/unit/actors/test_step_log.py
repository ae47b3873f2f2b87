"""What a training said of its steps, in a store: after a crash, after a rollback, past one object's size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.pretrain import step_log
from actors.pretrain.step_log import CHUNK, StepLog, read_steps
from infra.errors import StoreError
from infra.storage import FolderStore, Store, open_store

Row = dict[str, Any]


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    yield open_store(tmp_path if request.param == "folder" else request.getfixturevalue("s3_url"))


def rows(count: int, start: int = 0, **more: Any) -> list[Row]:
    return [{"step": step, "loss": step / 7, **more} for step in range(start, start + count)]


def say(log: StepLog, said: list[Row]) -> None:
    for row in said:
        log.write(row)


def test_rows_are_there_again_for_the_next_writer_in_order(store: Store) -> None:
    log = StepLog(store)
    say(log, rows(2 * CHUNK + 3))
    log.close()
    again = StepLog(store)
    assert again.rows == rows(2 * CHUNK + 3)
    say(again, rows(CHUNK, 2 * CHUNK + 3))
    again.close()
    assert read_steps(store) == rows(3 * CHUNK + 3)


@pytest.mark.parametrize("to_step", [0, 5, CHUNK, CHUNK + 9])
def test_a_rollback_takes_back_what_is_stored_beyond_it(store: Store, to_step: int) -> None:
    log = StepLog(store)
    say(log, rows(2 * CHUNK + 3))
    log.close()
    log = StepLog(store)
    say(log, rows(4, to_step, again=True))
    assert log.rows == [*rows(to_step), *rows(4, to_step, again=True)]
    log.close()
    assert read_steps(store) == log.rows
    assert len(list(store.list(step_log.FOLDER))) == (to_step + 4) // CHUNK + 1


def test_rows_come_into_the_store_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "PERIOD_S", 0.01)
    log, store = StepLog(FolderStore(tmp_path)), FolderStore(tmp_path)
    say(log, rows(3))
    while len(read_steps(store)) < 3:
        pass
    log.close()


def test_a_store_that_fails_for_a_while_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path)
    log = StepLog(store)
    log.write(rows(1)[0])
    put = store.put

    def fail(*arguments: Any) -> None:
        raise StoreError("no space")

    monkeypatch.setattr(store, "put", fail)
    with pytest.raises(StoreError):
        log.close()
    monkeypatch.setattr(store, "put", put)
    log.close()
    assert read_steps(store) == rows(1)


def test_a_writer_that_was_taken_over_from_cannot_undo_its_successors_rows(store: Store) -> None:
    first = StepLog(store, 1)
    say(first, rows(CHUNK + 3))
    first.undo(CHUNK + 2)
    second = StepLog(store, 2)
    assert second.rows == rows(CHUNK + 2)
    say(second, rows(7, CHUNK + 2, writer=2))
    second.close()
    say(first, rows(1, CHUNK + 2, writer=1))
    first.close()
    assert read_steps(store) == [*rows(CHUNK + 2), *rows(7, CHUNK + 2, writer=2)]
