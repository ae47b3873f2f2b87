"""Saved states: every call has a place of its own, whatever its name; it goes when the call is committed."""

from pathlib import Path
from urllib.parse import quote

import pytest

from infra.storage import Store, open_store
from workflows.graph.step_state import StepStates, state_url, states_key

NESTED = "/".join(f"experiment_group[{number}]" for number in range(14)) + "/pretrain[{}]"
CALLS = [
    "pretrain[0]",
    "pretrain[" + "学習" * 15 + "]",
    "pretrain[" + "学習" * 15 + "再]",
    "pretrain[" + "x" * 3000 + "]",
    "pretrain[" + "é" * 90 + "]",
    "pretrain[a%0Ab\n\udcff]",
    NESTED.format(0),
    NESTED.format(1),
]


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "store" if request.param == "folder" else request.getfixturevalue("s3_url"))


def test_every_call_has_a_state_of_its_own_until_it_is_committed(store: Store) -> None:
    for call in CALLS:
        open_store(state_url(store, "r", call)).put("deep/state", call.encode(errors="surrogatepass"))
    for call in CALLS:
        kept = open_store(state_url(store, "r", call)).get("deep/state")
        assert kept == call.encode(errors="surrogatepass")
    assert len(list(store.list(states_key("r")))) == len(CALLS)
    states = StepStates(store, "r", {CALLS[1]: {}, CALLS[6]: {}, "another[0]": {}})
    states.committed(CALLS[3])
    states.close()
    left = [call for call in CALLS if open_store(state_url(store, "r", call)).exists("deep/state")]
    assert left == [call for call in CALLS if call not in (CALLS[1], CALLS[3], CALLS[6])]


def test_a_name_that_fits_stays_as_it_is(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for call in ("pretrain[0]", "round[1]/pretrain[a b]", "pretrain[" + "x" * 245 + "]"):
        assert state_url(store, "r", call) == f"{store.url}/runs/r/state/{quote(call, safe='[]')}"
