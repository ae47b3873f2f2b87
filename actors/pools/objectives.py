"""Objectives and scores of learners, by name: rows -> tensors (`collate`) -> loss or result.

The formulas are in `algorithms/`; here they are applied to a model's outputs. `params` holds what is global to the
optimizer step, above all the denominators, which the caller counts over all ranks and micro-batches. Values are aligned
with tokens: a value at position t belongs to token t (see `algorithms.logprobs`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actors.pools.micro_batches import Row, pad, tokens_batch
from algorithms import dpo, ppo, reward, sft
from algorithms.logprobs import align_values, token_logprobs
from engines.base import Batch, LossFn
from engines.forward import logits, values

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """`collate` turns rows into a micro-batch (no rows: a dummy with zero masks); `loss` binds the step's params."""

    collate: Callable[[Sequence[Row]], Batch]
    loss: Callable[[Params], LossFn]


@dataclass(frozen=True)
class Score:
    """`compute(module, batch)` gives one array per row."""

    collate: Callable[[Sequence[Row]], Batch]
    compute: Callable[[torch.nn.Module, Batch], list[np.ndarray]]


# ---- supervised ----------------------------------------------------------------------------------------------------


def _collate_supervised(rows: Sequence[Row]) -> Batch:
    rows = rows or [{"ids": [0, 0], "mask": [0, 0], "channel": [0, 0]}]
    batch = tokens_batch([row["ids"] for row in rows])
    width = batch["input_ids"].shape[1]
    batch["mask"] = pad([row["mask"] for row in rows], 0, torch.long, width)
    batch["channels"] = pad([row["channel"] for row in rows], 0, torch.long, width)
    if "segments" in rows[0]:
        batch["segment_ids"] = pad([row["segments"] for row in rows], 0, torch.long, width)
        batch["position_ids"] = pad([row["positions"] for row in rows], 0, torch.long, width)
    return batch


def _supervised(params: Params) -> LossFn:
    names: Sequence[str] = params["channels"]

    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logp = token_logprobs(logits(module, batch), batch["input_ids"])
        segments = batch.get("segment_ids")
        loss = sft.sft_loss(logp, batch["mask"], params["denominator"], params["aggregation"], segments)
        sums, tokens = sft.channel_losses(logp, batch["mask"], batch["channels"], len(names))
        metrics = {"loss": float(loss.detach())}
        for name, total, number in zip(names, sums.tolist(), tokens.tolist(), strict=True):
            if number:
                metrics |= {f"nll/{name}": total, f"tokens/{name}": number}
        return loss, metrics

    return loss_fn


# ---- preferences: reward models and DPO ------------------------------------------------------------------------------

_DUMMY_ANSWER = {"ids": [0, 0], "mask": [0, 0]}


def _collate_pairs(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Chosen answers first, then rejected ones: [2P, T]; "weight" [P] is 0 for the dummy."""
    weight = [float(bool(rows))] * max(len(rows), 1)
    rows = rows or [{"chosen": _DUMMY_ANSWER, "rejected": _DUMMY_ANSWER}]
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    batch = tokens_batch([answer["ids"] for answer in answers])
    batch["mask"] = pad([answer["mask"] for answer in answers], 0, torch.long, batch["input_ids"].shape[1])
    batch["weight"] = torch.tensor(weight)
    return batch


def _collate_reward(rows: Sequence[Row]) -> Batch:
    batch = _collate_pairs(rows)
    batch["rating"] = torch.tensor([float(row.get("rating", 3)) for row in rows] or [3.0])
    return batch


def _reward(params: Params) -> LossFn:
    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        scores = reward.last_token_scores(values(module, batch), batch["attention_mask"])
        chosen, rejected = scores.chunk(2)
        margins = reward.margin_by_rating(batch["rating"].to(scores.device), params["margin"])
        real = batch["weight"] > 0
        if not bool(real.any()):
            return scores.sum() * 0.0, {}
        loss = reward.bradley_terry_loss(chosen, rejected, params["denominator"], margins)
        correct = (chosen > rejected).float().sum() / params["denominator"]
        return loss, {"loss": float(loss.detach()), "accuracy": float(correct)}

    return loss_fn


def _collate_dpo(rows: Sequence[Row]) -> Batch:
    batch = _collate_pairs(rows)
    batch["ref_chosen"] = torch.tensor([row["ref_chosen"] for row in rows] or [0.0])
    batch["ref_rejected"] = torch.tensor([row["ref_rejected"] for row in rows] or [0.0])
    return batch


def _dpo(params: Params) -> LossFn:
    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logp = token_logprobs(logits(module, batch), batch["input_ids"])
        if not bool((batch["weight"] > 0).any()):
            return logp.sum() * 0.0, {}
        mask = batch["mask"] != 0
        content = dpo.content_mask(batch["input_ids"], mask, params["format_ids"]) if params["format_ids"] else mask
        chosen, rejected = dpo.response_logprobs(logp, content).chunk(2)
        pairs = (chosen, rejected, batch["ref_chosen"], batch["ref_rejected"], params["beta"], params["denominator"])
        if params["loss"] == "ipo":
            loss, sums = dpo.ipo_loss(*pairs)
        else:
            loss, sums = dpo.dpo_loss(*pairs, label_smoothing=params["label_smoothing"])
        half = len(chosen)
        nll = dpo.chosen_nll(logp[:half], mask[:half], params["denominator"], "seq-mean")
        total = loss + params["nll_weight"] * nll
        shares = {name: float(value) / params["denominator"] for name, value in sums.items() if name != "pairs"}
        return total, {"loss": float(total.detach()), "nll": float(nll.detach()), **shares}

    return loss_fn


# ---- PPO -------------------------------------------------------------------------------------------------------------


def _collate_floats(rows: Sequence[Row], names: Sequence[str]) -> Batch:
    rows = rows or [{**_DUMMY_ANSWER, **{name: [0.0, 0.0] for name in names}}]
    batch = tokens_batch([row["ids"] for row in rows])
    width = batch["input_ids"].shape[1]
    batch["mask"] = pad([row["mask"] for row in rows], 0, torch.long, width)
    for name in names:
        batch[name] = pad([row[name] for row in rows], 0.0, torch.float32, width)
    return batch


def _ppo_policy(params: Params) -> LossFn:
    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        logp = token_logprobs(logits(module, batch), batch["input_ids"])
        loss, sums = ppo.policy_loss(
            logp, batch["logp_old"], batch["advantages"], batch["mask"], params["denominator"],
            clip_low=params["clip"], clip_high=params["clip"], dual_clip=params["dual_clip"],
        )  # fmt: skip
        shares = {name: float(value) / params["denominator"] for name, value in sums.items() if name != "tokens"}
        return loss, {"policy_loss": float(loss.detach()), **shares}

    return loss_fn


def _ppo_value(params: Params) -> LossFn:
    def loss_fn(module: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        estimates = align_values(values(module, batch))
        loss = ppo.value_loss(
            estimates, batch["values_old"], batch["returns"], batch["mask"], params["denominator"], params["value_clip"]
        )
        return loss, {"value_loss": float(loss.detach())}

    return loss_fn


OBJECTIVES: Mapping[str, Objective] = {
    "supervised": Objective(_collate_supervised, _supervised),
    "reward": Objective(_collate_reward, _reward),
    "dpo": Objective(_collate_dpo, _dpo),
    "ppo_policy": Objective(lambda rows: _collate_floats(rows, ("logp_old", "advantages")), _ppo_policy),
    "ppo_value": Objective(lambda rows: _collate_floats(rows, ("values_old", "returns")), _ppo_value),
}


# ---- scores ----------------------------------------------------------------------------------------------------------


def _collate_answers(rows: Sequence[Row]) -> Batch:
    return tokens_batch([row["ids"] for row in rows] or [[0, 0]])


def _per_row(scores: torch.Tensor, batch: Batch) -> list[np.ndarray]:
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [row[:length].float().cpu().numpy() for row, length in zip(scores, lengths, strict=True)]


def _logprobs(module: torch.nn.Module, batch: Batch) -> list[np.ndarray]:
    return _per_row(token_logprobs(logits(module, batch), batch["input_ids"]), batch)


def _values(module: torch.nn.Module, batch: Batch) -> list[np.ndarray]:
    return _per_row(align_values(values(module, batch)), batch)


def _rewards(module: torch.nn.Module, batch: Batch) -> list[np.ndarray]:
    scores = reward.last_token_scores(values(module, batch), batch["attention_mask"])
    return [row.cpu().numpy() for row in scores[:, None].float()]


SCORES: Mapping[str, Score] = {
    "logprobs": Score(_collate_answers, _logprobs),  # [T] per row
    "values": Score(_collate_answers, _values),  # [T] per row
    "reward": Score(_collate_answers, _rewards),  # [1] per row
}
