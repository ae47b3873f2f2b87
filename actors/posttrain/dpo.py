"""Direct preference optimisation. The reference's log-probs are computed once, before the first step."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.pools.learners import Learners
from actors.pools.micro_batches import Row, epoch_batches
from actors.posttrain.amounts import require_learnt, require_steps
from actors.posttrain.config import DpoSettings
from actors.posttrain.rejection import NO_PAIR
from actors.posttrain.sft import OnMetrics
from infra.errors import DataError

ROLE = "policy"


def optimise_preferences(
    learners: Learners, folder: Path, pairs: Sequence[Row], settings: DpoSettings, format_ids: Sequence[int], out: Path,
    seed: int, on_metrics: OnMetrics,
) -> dict[str, float]:  # fmt: skip
    """Train `folder` on `pairs` ({"chosen": row, "rejected": row, "length"}) against itself as the reference.

    `format_ids` are the terminator tokens that Llama 3 leaves out of the preference term.
    Metrics per step: loss, nll, accuracy, margin, chosen_reward, rejected_reward, grad_norm, lr.
    """
    if not pairs:
        raise DataError(NO_PAIR)
    require_steps("dpo", settings.epochs, len(pairs), "pairs")
    ignored = tuple(format_ids) if settings.mask_format_tokens else ()
    plan = epoch_batches(len(pairs), settings.batch_size, settings.epochs, seed)
    optimizer = settings.optimizer.model_copy(update={"total_steps": len(plan)})
    learners.open(ROLE, folder, optimizer)
    rows = _with_reference(learners, pairs, ignored)
    metrics: dict[str, float] = {}
    committed = 0.0
    for step, indices in enumerate(plan):
        batch = [rows[index] for index in indices]
        params = {
            "denominator": len(batch), "beta": settings.beta, "loss": settings.loss, "format_ids": ignored,
            "label_smoothing": settings.label_smoothing if settings.loss == "cdpo" else 0.0,
            "nll_weight": settings.nll_weight,
        }  # fmt: skip
        metrics = learners.train_step(ROLE, "dpo", batch, params)
        committed += metrics.get("committed", 1.0)
        on_metrics({"step": step + 1, "steps": len(plan), **metrics})
    require_learnt("dpo", committed, len(plan))
    learners.save(ROLE, out)
    learners.close([ROLE])
    return {"steps": float(len(plan)), "loss": metrics["loss"], "margin": metrics["margin"]}


def _with_reference(learners: Learners, pairs: Sequence[Row], ignored: Sequence[int]) -> list[Row]:
    """`pairs` with the reference's log-probs: before its first step, the policy is its own reference."""
    summed = {}
    for side in ("chosen", "rejected"):
        answers = [pair[side] for pair in pairs]
        logprobs = learners.score(ROLE, "logprobs", answers)
        summed[side] = [_sum(logp, answer, ignored) for logp, answer in zip(logprobs, answers, strict=True)]
    return [
        {**pair, "ref_chosen": chosen, "ref_rejected": rejected}
        for pair, chosen, rejected in zip(pairs, summed["chosen"], summed["rejected"], strict=True)
    ]


def _sum(logprobs: np.ndarray, answer: Row, ignored: Sequence[int]) -> float:
    kept = (np.asarray(answer["mask"]) != 0) & ~np.isin(answer["ids"], list(ignored))
    return float(logprobs[kept].sum())
