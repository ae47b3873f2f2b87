"""A fixed selection of the chaos campaign: `make graph-chaos` draws further seeds."""

from collections.abc import Iterator

import pytest

from tests.chaos.campaign import Campaign
from tests.chaos.campaign_place import open_place
from tests.chaos.campaign_run import Schedule

SEEDS = {
    6: "a driver stops itself after a commit and its successor goes on; a worker is killed",
    27: "a driver is killed in the middle of a body, then a worker stops and a node is killed; a folder",
    57: "a driver is killed, the store is down, a node is killed, each driver has a bad S3",
}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with open_place() as place:
        yield Campaign(place, tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed {seed}")
def test_a_run_ends_like_the_fault_free_one(campaign: Campaign, seed: int) -> None:
    schedule = Schedule.of(seed)
    line = campaign.perform(schedule)
    assert not line["violations"], f"{SEEDS[seed]}; replay: SEED={seed} make graph-chaos"
    assert sum(number for kind, number in line["faults"].items() if "nobody" not in kind), "nothing was hit"
