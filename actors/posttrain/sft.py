"""Supervised fine-tuning on instructions, or on the best answers that rejection sampling kept."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.pools.learners import Learners
from actors.pools.micro_batches import Row, epoch_batches
from actors.posttrain.amounts import require_learnt, require_steps
from actors.posttrain.config import SftSettings
from data.config import PackingSettings
from data.packing import pack
from infra.errors import DataError

OnMetrics = Callable[[dict[str, Any]], None]
ROLE = "policy"


def fine_tune(
    learners: Learners, folder: Path, rows: Sequence[Row], settings: SftSettings, out: Path, seed: int,
    on_metrics: OnMetrics, section: str = "sft",
) -> dict[str, float]:  # fmt: skip
    """Train `folder` on `rows` (`conversation.supervised_row`) and save it in `out`; errors name settings of `section`.

    Metrics per step: loss, grad_norm, lr, "loss/<task_type>". Returns {"steps", "loss"}, the loss of the last step.
    """
    if not rows:
        raise DataError(
            "no example to learn from: give more problems (problems.*), or lower rejection.threshold if these are the "
            "answers that rejection sampling kept"
        )
    for number, row in enumerate(rows):
        if row["length"] > settings.max_length:
            raise DataError(
                f"example {number} has {row['length']} tokens, above {section}.max_length = {settings.max_length}: "
                "raise it (and model.context), or shorten the example"
            )
        if not any(row["mask"][1:]):  # no token predicts the first one
            raise DataError(f"example {number} ({row['task']}) has no token to learn from: leave it out")
    require_steps(section, settings.epochs, len(rows), "examples")
    channels = sorted({row["task"] for row in rows})
    examples = with_channels(rows, channels)
    plan = epoch_batches(len(examples), settings.batch_size, settings.epochs, seed)
    optimizer = settings.optimizer.model_copy(update={"total_steps": len(plan)})
    learners.open(ROLE, folder, optimizer)
    metrics: dict[str, Any] = {}
    committed = 0.0
    for step, indices in enumerate(plan):
        batch = [examples[index] for index in indices]
        if settings.packing:
            batch = _packed(batch, settings.max_length)
        params = {
            "channels": channels,
            "aggregation": settings.aggregation,
            "denominator": denominator(batch, settings),
        }
        metrics = per_channel(learners.train_step(ROLE, "supervised", batch, params))
        committed += metrics.get("committed", 1.0)
        on_metrics({"step": step + 1, "steps": len(plan), **metrics})
    require_learnt(section, committed, len(plan))
    learners.save(ROLE, out)
    learners.close([ROLE])
    return {"steps": float(len(plan)), "loss": metrics["loss"]}


def with_channels(rows: Sequence[Row], channels: Sequence[str]) -> list[Row]:
    """`rows` with a channel for each token: its example's task type, as an index into `channels`."""
    number = {name: index for index, name in enumerate(channels)}
    return [{**row, "channel": [number[row["task"]]] * len(row["ids"])} for row in rows]


def denominator(batch: Sequence[Row], settings: SftSettings) -> float:
    """Target tokens, or sequences, of one whole optimizer step."""
    if settings.aggregation == "token-mean":
        return float(sum(sum(row["mask"]) for row in batch))
    return float(sum(row.get("sequences", 1) for row in batch))


def per_channel(metrics: dict[str, float]) -> dict[str, float]:
    """Convert sums over ranks into means: "nll/x" and "tokens/x" -> "loss/x"."""
    means = {
        f"loss/{name.removeprefix('nll/')}": value / metrics[f"tokens/{name.removeprefix('nll/')}"]
        for name, value in metrics.items()
        if name.startswith("nll/")
    }
    rest = {name: value for name, value in metrics.items() if not name.startswith(("nll/", "tokens/"))}
    return {**rest, **means}


def _packed(batch: Sequence[Row], width: int) -> list[Row]:
    """Several examples in each row; positions restart, and attention stays inside each example."""
    packed = pack([(row["ids"], row["mask"]) for row in batch], PackingSettings(length=width), pad_id=0)
    rows = []
    for place, members in enumerate(packed.members):
        used = sum(len(batch[index]["ids"]) for index in members)
        rows.append(
            {
                "ids": packed.input_ids[place, :used].tolist(),
                "mask": packed.loss_mask[place, :used].long().tolist(),
                "positions": packed.position_ids[place, :used].tolist(),
                "segments": packed.segment_ids[place, :used].tolist(),
                "channel": [channel for index in members for channel in batch[index]["channel"]],
                "sequences": len(members),
                "length": used,
            }
        )
    return rows
