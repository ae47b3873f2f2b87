"""A fixed selection of the chaos campaign: `make graph-chaos` draws further seeds."""

import json
from pathlib import Path

from tests.chaos.campaign import surroundings
from tests.chaos.campaign_results import carry_out

SEEDS = {
    57: "a driver is killed, the store is down, a node is killed, each driver has a bad S3",
}


def test_runs_under_random_faults_end_like_the_fault_free_one(tmp_path: Path) -> None:
    results = tmp_path / "campaign.jsonl"
    lines = {line["seed"]: line for line in carry_out(SEEDS, results, surroundings)}
    for seed, what in SEEDS.items():
        line = lines[seed]
        assert not line["violations"], f"{what}; replay: SEED={seed} make graph-chaos"
        assert sum(number for kind, number in line["faults"].items() if "nobody" not in kind), (
            f"{what}: nothing was hit"
        )
    assert [json.loads(text) for text in results.read_text().splitlines()] == list(lines.values())
