"""A stage that would learn nothing is refused: from the recipe before a run starts, and by the loop itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.pools.micro_batches import epoch_batches
from actors.posttrain.amounts import held_out_pairs, require_rollouts, require_steps, sample_count, tell_long_warmup
from actors.posttrain.config import DpoSettings, PpoSettings, RewardSettings, SftSettings
from actors.posttrain.conversation import Answer
from actors.posttrain.dpo import optimise_preferences
from actors.posttrain.judging import judge
from actors.posttrain.ppo import PpoModels, optimise_policy
from actors.posttrain.reward_model import train_reward_model
from actors.posttrain.sft import fine_tune
from data.tasks import Problem
from engines.config import LearnerSettings
from infra.errors import ConfigError, DataError, UserError

SIDE = {"ids": [1, 2, 3], "mask": [0, 1, 1], "length": 3}
ROW = {**SIDE, "task": "t"}
PAIR = {"chosen": SIDE, "rejected": {**SIDE, "ids": [1, 2, 4]}, "length": 6, "task": "t", "rating": 0}


class Recorded:
    """Stands where the learner pool would; `did` says what it was asked. `committed`: whether its steps are applied."""

    def __init__(self, committed: float = 1.0) -> None:
        self.did: list[str] = []
        self.committed = committed

    def open(self, role: str, *rest: Any, **more: Any) -> None:
        self.did.append("open")

    def score(self, role: str, kind: str, rows: Any) -> list[np.ndarray]:
        return [np.zeros(1 if kind == "reward" else len(row["ids"])) for row in rows]

    def train_step(self, *arguments: Any) -> dict[str, float]:
        self.did.append("step")
        return {"loss": 1.0, "margin": 0.0, "committed": self.committed}

    def save(self, *arguments: Any) -> None:
        self.did.append("save")

    def close(self, *arguments: Any) -> None:
        self.did.append("close")


def sft(learners: Any, count: int, section: str = "sft", **settings: Any) -> Any:
    rows = [ROW] * count
    return fine_tune(learners, Path("m"), rows, SftSettings(**settings), Path("o"), 0, lambda metrics: None, section)


def dpo(learners: Any, count: int, **settings: Any) -> Any:
    pairs = [PAIR] * count
    return optimise_preferences(
        learners, Path("m"), pairs, DpoSettings(**settings), (), Path("o"), 0, lambda metrics: None
    )


def reward(learners: Any, count: int, **settings: Any) -> Any:
    pairs = [PAIR] * count
    return train_reward_model(
        learners, Path("m"), pairs, RewardSettings(**settings), Path("o"), 0, lambda metrics: None
    )


@pytest.mark.parametrize(
    ("loop", "count", "settings", "named"),
    [
        (sft, 1, {"epochs": 0.5}, "sft.epochs = 0.5 of 1 examples makes no optimizer step: raise it above 0.5"),
        (sft, 4, {"epochs": 0.1, "section": "rejection_sft"}, "rejection_sft.epochs = 0.1 of 4 examples"),
        (dpo, 1, {"epochs": 0.5}, "dpo.epochs = 0.5 of 1 pairs"),
        (reward, 0, {}, "0 preference pairs cannot train a reward model"),
        (reward, 1, {}, "1 preference pairs cannot train a reward model"),
        (reward, 2, {"epochs": 0.4}, "reward.epochs = 0.4 of 1 pairs"),
        (reward, 2, {"held_out": 0.9}, "reward.held_out = 0.9 leaves none of 2 pairs to train on"),
    ],
)
def test_a_stage_without_a_step_is_refused_and_saves_nothing(
    loop: Any, count: int, settings: dict[str, Any], named: str
) -> None:
    learners = Recorded()
    with pytest.raises(UserError) as refused:
        loop(learners, count, **settings)
    assert named in str(refused.value) and learners.did == []


@pytest.mark.parametrize(("loop", "count"), [(sft, 1), (dpo, 1), (reward, 2), (reward, 3)])
def test_the_fewest_samples_make_a_step(loop: Any, count: int) -> None:
    learners = Recorded()
    assert loop(learners, count, epochs=1)["steps"] == 1
    assert learners.did == ["open", "step", "save", "close"]


@pytest.mark.parametrize("loop", [sft, dpo, reward])
def test_a_model_of_which_no_step_was_applied_is_not_saved(loop: Any) -> None:
    learners = Recorded(committed=0.0)
    with pytest.raises(UserError, match=r"none of 1 optimizer steps could be applied.*learning rate"):
        loop(learners, 2, epochs=1)
    assert "save" not in learners.did


@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 0]])
def test_an_example_without_anything_to_learn_is_named(mask: list[int]) -> None:
    learners = Recorded()
    rows = [ROW, {**ROW, "mask": mask}]
    with pytest.raises(DataError, match=r"example 1 \(t\) has no token to learn from"):
        fine_tune(learners, Path("m"), rows, SftSettings(), Path("o"), 0, lambda metrics: None)  # type: ignore[arg-type]
    assert learners.did == []


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("epochs", [0.1, 0.25, 0.5, 0.51, 1.0, 1.5])
def test_what_is_refused_is_what_would_draw_no_sample(count: int, epochs: float) -> None:
    plan = epoch_batches(count, 4, epochs, 0)
    assert sum(map(len, plan)) == sample_count(count, epochs)
    if plan:
        require_steps("sft", epochs, count, "examples")
    else:
        with pytest.raises(ConfigError, match=r"sft\.epochs"):
            require_steps("sft", epochs, count, "examples")


def test_a_reward_model_always_learns_from_some_pairs_and_is_measured_on_some() -> None:
    assert [held_out_pairs(RewardSettings(), count) for count in (2, 3, 10, 100)] == [1, 1, 1, 10]
    assert held_out_pairs(RewardSettings(held_out=0.5), 3) == 2


def test_one_answer_is_no_rollout_batch() -> None:
    problem = Problem("What is 2+3?", "5", "reasoning/addition")
    answer = Answer(problem, "5", (1, 2), (3,), (0.0,), True, 1.0, "v")
    with pytest.raises(DataError, match=r"1 answers cannot be judged.*ppo\.batch_size"):
        judge(Recorded(), [answer], 1.0)  # type: ignore[arg-type]
    learners: Any = Recorded()
    nothing: Any = None

    def run(problems: list[Problem], settings: PpoSettings) -> None:
        optimise_policy(
            learners, nothing, nothing, PpoModels(Path("m"), Path("c")), problems, nothing, nothing, settings,
            Path("o"), 0, "v", nothing,
        )  # fmt: skip

    with pytest.raises(ConfigError, match=r"ppo\.batch_size = 1 and ppo\.answers = 1 make batches of one answer"):
        run([problem], PpoSettings(batch_size=1))
    with pytest.raises(DataError, match=r"no prompt for PPO: raise problems\.prompts"):
        run([], PpoSettings())
    assert learners.did == []


def test_a_policy_that_only_waits_for_its_critic_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    require_rollouts(PpoSettings(steps=3, critic_warmup_steps=2))
    assert not caplog.messages
    require_rollouts(PpoSettings(steps=2, critic_warmup_steps=2))
    assert "ppo.critic_warmup_steps = 2 leaves none of ppo.steps = 2 to the policy" in caplog.text


def test_scores_of_a_reward_model_that_diverged_train_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("What is 2+3?", "5", "reasoning/addition")
    answers = [Answer(problem, "5", (1, 2), (token,), (0.0,), True, 1.0, "v") for token in (3, 4)]
    learners: Any = Recorded()
    monkeypatch.setattr(learners, "score", lambda role, kind, rows: [np.full(1, np.nan) for _ in rows])
    with pytest.raises(DataError, match=r"2 of 2 scores are not finite.* lower reward\.optimizer\.learning_rate"):
        judge(learners, answers, 1.0)


def test_a_warmup_longer_than_its_stage_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    tell_long_warmup("sft.optimizer", LearnerSettings(warmup_steps=10), 10)
    assert not caplog.messages
    tell_long_warmup("sft.optimizer", LearnerSettings(warmup_steps=11), 10)
    assert "sft.optimizer.warmup_steps = 11 exceeds the at most 10 optimizer steps" in caplog.text
    assert PpoSettings(batch_size=5, answers=2, mini_batch_size=4, epochs=2, steps=3).updates == 3 * 2 * 3


def test_more_samples_than_can_be_planned_are_refused() -> None:
    require_steps("sft", 1e6, 100, "examples")
    with pytest.raises(
        ConfigError, match=r"sft\.epochs = 1e\+06 of 101 examples are 1\.01e\+08 samples, more than the limit of 1e\+08"
    ):
        require_steps("sft", 1e6, 101, "examples")
