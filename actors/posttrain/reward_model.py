"""Reward models: a scalar head on the policy, trained on preference pairs (Bradley-Terry)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.pools.learners import Learners
from actors.pools.micro_batches import Row, epoch_batches
from actors.posttrain.amounts import held_out_pairs, require_learnt
from actors.posttrain.config import RewardSettings
from actors.posttrain.sft import OnMetrics
from algorithms.reward import accuracy_by_rating, expected_calibration_error

ROLE = "reward"


def train_reward_model(
    learners: Learners, folder: Path, pairs: Sequence[Row], settings: RewardSettings, out: Path, seed: int,
    on_metrics: OnMetrics,
) -> dict[str, Any]:  # fmt: skip
    """Train on `pairs` ({"chosen": row, "rejected": row, "rating", "length"}) and save in `out`.

    The last `settings.held_out` of the pairs is held out. Returns {"steps", "loss", "pairs", "held_out_pairs",
    "accuracy", "calibration_error", "accuracy_by_rating"}; the last three are measured on the held-out pairs.
    """
    held_out = held_out_pairs(settings, len(pairs))
    train, test = list(pairs[:-held_out]), list(pairs[-held_out:])
    plan = epoch_batches(len(train), settings.batch_size, settings.epochs, seed)
    optimizer = settings.optimizer.model_copy(update={"total_steps": len(plan)})
    learners.open(ROLE, folder, optimizer, head="scalar")
    metrics: dict[str, float] = {}
    committed = 0.0
    for step, indices in enumerate(plan):
        batch = [train[index] for index in indices]
        metrics = learners.train_step(ROLE, "reward", batch, {"denominator": len(batch), "margin": settings.margin})
        committed += metrics.get("committed", 1.0)
        on_metrics({"step": step + 1, "steps": len(plan), **metrics})
    require_learnt("reward", committed, len(plan))
    quality = _quality(learners, test)
    learners.save(ROLE, out)
    learners.close([ROLE])
    return {"steps": len(plan), "loss": metrics["loss"], "pairs": len(train), "held_out_pairs": len(test), **quality}


def _quality(learners: Learners, pairs: Sequence[Row]) -> dict[str, Any]:
    chosen = scores(learners, ROLE, [pair["chosen"] for pair in pairs])
    rejected = scores(learners, ROLE, [pair["rejected"] for pair in pairs])
    ratings = torch.tensor([pair.get("rating", 3) for pair in pairs])
    correct, number = accuracy_by_rating(torch.tensor(chosen), torch.tensor(rejected), ratings)
    # Half of the pairs are swapped: otherwise every outcome would be 1 and calibration would mean nothing.
    sign = np.where(np.arange(len(pairs)) % 2 == 0, 1.0, -1.0)
    probability = torch.sigmoid(torch.tensor(sign * (chosen - rejected)))
    error = expected_calibration_error(probability, torch.tensor(sign > 0).double())
    rated = {str(r): float(c / n) for r, (c, n) in enumerate(zip(correct, number, strict=True)) if n > 0}
    return {"accuracy": float(correct.sum() / number.sum()), "calibration_error": error, "accuracy_by_rating": rated}


def scores(learners: Learners, role: str, rows: Sequence[Row]) -> np.ndarray:
    """A reward model's logit for every row [N]."""
    return np.concatenate(learners.score(role, "reward", rows)) if rows else np.zeros(0)
