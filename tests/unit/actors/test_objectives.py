"""A loss does not depend on how its batch is cut: micro-batches, packing, dummies; and rows align with the formulas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from actors.pools.micro_batches import Row
from actors.pools.objectives import OBJECTIVES, SCORES
from actors.posttrain.config import SftSettings
from actors.posttrain.dpo import _sum
from actors.posttrain.ppo import POLICY, prepare
from actors.posttrain.sft import _packed, denominator, with_channels
from engines.forward import ScalarModel


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        attn_implementation="sdpa",
    )


@pytest.fixture(scope="module")
def policy() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(config())


@pytest.fixture(scope="module")
def scalar() -> torch.nn.Module:
    torch.manual_seed(1)
    return ScalarModel(LlamaModel(config()), 32, torch.float32)


def row(rng: np.random.Generator, task: str = "a/b") -> Row:
    length = int(rng.integers(4, 14))
    start = int(rng.integers(1, length - 1))
    ids = rng.integers(3, 61, length).tolist()
    return {"ids": ids, "mask": [0] * start + [1] * (length - start), "task": task, "length": length}


def gradient(module: torch.nn.Module, kind: str, cut: Sequence[Sequence[Row]], params: dict[str, Any]) -> torch.Tensor:
    module.zero_grad()
    total = 0.0
    for rows in cut:
        loss, _ = OBJECTIVES[kind].loss(params)(module, OBJECTIVES[kind].collate(rows))
        loss.backward()
        total += float(loss.detach())
    return torch.cat([torch.tensor([total]), *(p.grad.flatten() for p in module.parameters() if p.grad is not None)])


def rows_of(kind: str) -> list[Row]:
    rng = np.random.default_rng(5)
    if kind == "supervised":
        return with_channels([row(rng, f"t/{i % 3}") for i in range(7)], ["t/0", "t/1", "t/2"])
    if kind in ("reward", "dpo"):
        pairs = [{"chosen": row(rng), "rejected": row(rng), "rating": i % 4} for i in range(7)]
        return [{**pair, "ref_chosen": -3.0 - i, "ref_rejected": -2.5 - i} for i, pair in enumerate(pairs)]
    rows = [row(rng) for _ in range(7)]
    for one in rows:
        for name in ("logp_old", "advantages", "values_old", "returns"):
            one[name] = rng.normal(size=one["length"]).astype(np.float32)
        one["logp_old"] -= 4.0
    return rows


PARAMS: dict[str, dict[str, Any]] = {
    "supervised": {"channels": ["t/0", "t/1", "t/2"], "aggregation": "token-mean", "denominator": 31.0},
    "reward": {"denominator": 7.0, "margin": "small"},
    "dpo": {
        "denominator": 7.0,
        "beta": 0.1,
        "loss": "dpo",
        "label_smoothing": 0.0,
        "format_ids": (5, 6),
        "nll_weight": 0.2,
    },
    "ppo_policy": {"denominator": 31.0, "clip": 0.2, "dual_clip": 3.0},
    "ppo_value": {"denominator": 31.0, "value_clip": 0.2},
}


@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_cutting_a_batch_changes_neither_loss_nor_gradient(
    kind: str, policy: torch.nn.Module, scalar: torch.nn.Module
) -> None:
    module = scalar if kind in ("reward", "ppo_value") else policy
    rows = rows_of(kind)
    whole = gradient(module, kind, [rows], PARAMS[kind])
    cut = gradient(module, kind, [rows[:1], rows[1:5], rows[5:], []], PARAMS[kind])
    assert whole.abs().sum() > 0
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean"])
def test_packing_changes_neither_loss_nor_gradient(aggregation: Any, policy: torch.nn.Module) -> None:
    rows = rows_of("supervised")
    packed = _packed(rows, 32)
    assert len(packed) < len(rows)
    settings = SftSettings(aggregation=aggregation)
    assert denominator(packed, settings) == denominator(rows, settings)
    params = {**PARAMS["supervised"], "aggregation": aggregation, "denominator": denominator(rows, settings)}
    torch.testing.assert_close(
        gradient(policy, "supervised", [packed], params),
        gradient(policy, "supervised", [rows], params),
        rtol=1e-4,
        atol=1e-5,
    )


def scored(module: torch.nn.Module, rows: Sequence[Row]) -> list[np.ndarray]:
    with torch.no_grad():
        return SCORES["logprobs"].compute(module, SCORES["logprobs"].collate(rows))


def test_scores_come_back_per_row_without_padding(policy: torch.nn.Module) -> None:
    rows = rows_of("ppo_policy")
    together = scored(policy, rows)
    for one, found in zip(rows, together, strict=True):
        alone = scored(policy, [one])[0]
        assert found.shape == (one["length"],) and found[0] == 0.0
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_reference_sums_are_those_of_the_loss_at_its_first_step(policy: torch.nn.Module) -> None:
    rows = rows_of("dpo")
    ignored = PARAMS["dpo"]["format_ids"]
    for side in ("chosen", "rejected"):
        for one, logp in zip(rows, scored(policy, [one[side] for one in rows]), strict=True):
            one[f"ref_{side}"] = _sum(logp, one[side], ignored)
    params = {**PARAMS["dpo"], "nll_weight": 0.0}
    loss, metrics = OBJECTIVES["dpo"].loss(params)(policy, OBJECTIVES["dpo"].collate(rows))
    assert float(loss) == pytest.approx(np.log(2), abs=1e-4)
    assert metrics["margin"] == pytest.approx(0.0, abs=1e-4)


class FixedScores:
    """Stands where the learner pool would: the numbers a test chose instead of a network's."""

    def __init__(self, by_role: dict[str, list[np.ndarray]]) -> None:
        self.by_role = by_role

    def score(self, role: str, kind: str, rows: Sequence[Row]) -> list[np.ndarray]:
        return self.by_role[role]


def test_ppo_rows_carry_reward_at_the_last_token_and_whitened_advantages() -> None:
    from actors.posttrain.config import PpoSettings
    from actors.posttrain.conversation import Answer
    from data.tasks import Problem

    problem = Problem("p", "a", "t/x")
    answers = [
        Answer(problem, "a", (1, 2), (3, 4), (-0.1, -0.2), True, 1.0, "v"),
        Answer(problem, "b", (1, 2), (5, 6), (-0.3, -0.4), True, 0.0, "v"),
    ]
    logp = [np.array([0, 0, -0.1, -0.2], np.float32), np.array([0, 0, -0.3, -0.4], np.float32)]
    values = [np.zeros(4, np.float32), np.zeros(4, np.float32)]
    learners = FixedScores({POLICY: logp, "reference": logp, "critic": values})
    settings = PpoSettings(gamma=1.0, gae_lambda=1.0, kl_beta=0.0)
    rows, seen = prepare(learners, answers, np.array([1.0, -1.0]), settings)  # type: ignore[arg-type]
    assert seen == {"reward": 0.0, "accuracy": 0.5, "kl": 0.0, "length": 2.0}
    np.testing.assert_allclose(rows[0]["returns"], [0, 0, 1, 1])
    np.testing.assert_allclose(rows[1]["returns"], [0, 0, -1, -1])
    # mean 0, unbiased variance 4/3 over the four response tokens
    np.testing.assert_allclose(rows[0]["advantages"], [0, 0, 0.8660254, 0.8660254], atol=1e-5)
