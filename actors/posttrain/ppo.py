"""PPO with a critic: sample, judge, estimate advantages, update, then send the new weights to the generators.

Who waits for whom: all is synchronous. Generators sample with version v while the learners wait; the learners train
while the generators wait; version v + 1 is on every generator before the next prompt is sent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.pools.generators import Generators
from actors.pools.learners import Learners
from actors.pools.micro_batches import Row, epoch_batches, pad
from actors.pools.weight_sync import WeightSync
from actors.posttrain.amounts import require_learnt, require_rollouts
from actors.posttrain.config import PpoSettings
from actors.posttrain.conversation import Answer, answer_row, sample
from actors.posttrain.sft import OnMetrics
from algorithms import ppo
from data.tasks import Problem
from engines.base import Sampling
from engines.chat import ChatTokenizer
from infra.errors import DataError

POLICY, CRITIC, REFERENCE = "policy", "critic", "reference"


@dataclass(frozen=True)
class PpoModels:
    """The folders that PPO starts from. The reference is the policy before its first step."""

    policy: Path
    critic: Path


Judge = Callable[[Sequence[Answer]], np.ndarray]
"""Answers [N] -> scores [N]; the reward models that it uses are open in the learners."""


def optimise_policy(
    learners: Learners, generators: Generators, sync: WeightSync, models: PpoModels, problems: Sequence[Problem],
    judge: Judge, tokenizer: ChatTokenizer, settings: PpoSettings, out: Path, seed: int, version: str,
    on_metrics: OnMetrics,
) -> dict[str, float]:  # fmt: skip
    """Run `settings.steps` rollout batches over `problems` and save the policy in `out`.

    `version` prefixes the weight versions ("<version>-<step>"); the generators already carry the policy, and `sync` is
    connected.
    Metrics per step: reward (mean score), accuracy (share of checkable answers that are right), kl (mean k1 per token
    against the reference), length, policy_loss, value_loss, clipped, grad_norm.
    """
    require_rollouts(settings)
    if not problems:
        raise DataError("no prompt for PPO: raise problems.prompts")
    whole = {"total_steps": settings.updates}
    learners.open(POLICY, models.policy, settings.policy.model_copy(update=whole))
    learners.open(CRITIC, models.critic, settings.critic.model_copy(update=whole), head="scalar")
    learners.open(REFERENCE, models.policy)
    prompts = epoch_batches(
        len(problems), settings.batch_size, settings.steps * settings.batch_size / len(problems), seed
    )
    metrics: dict[str, float] = {}
    committed = 0.0
    for step, indices in enumerate(prompts[: settings.steps]):
        sampling = Sampling(
            temperature=settings.temperature, max_tokens=settings.max_tokens, n=settings.answers,
            seed=seed * 1_000_003 + step * 10_007, stop_token_ids=tokenizer.stop_ids,
        )  # fmt: skip
        groups = sample(generators, [problems[index] for index in indices], tokenizer, sampling)
        answers = [answer for group in groups for answer in group]
        rows, seen = prepare(learners, answers, judge(answers), settings)
        metrics = {**seen, **_update(learners, rows, settings, seed + step, step < settings.critic_warmup_steps)}
        committed += metrics.get("committed", 1.0)
        sync.push(f"{version}-{step + 1}")
        on_metrics({"step": step + 1, "steps": settings.steps, **metrics})
    require_learnt("ppo", committed, settings.steps)
    learners.save(POLICY, out)
    learners.close([POLICY, CRITIC, REFERENCE])
    return {"steps": float(settings.steps), "reward": metrics["reward"], "kl": metrics["kl"]}


def prepare(
    learners: Learners, answers: Sequence[Answer], scores: np.ndarray, settings: PpoSettings
) -> tuple[list[Row], dict[str, float]]:
    """Rollouts as rows for both losses, aligned with tokens, and the batch's metrics."""
    rows = [answer_row(answer) for answer in answers]
    width = max(row["length"] for row in rows)
    mask = pad([row["mask"] for row in rows], 0, torch.long, width)
    # The learner recomputes the sampling policy's log-probs: the sampler's own differ in the last digits.
    logp_old = pad(learners.score(POLICY, "logprobs", rows), 0.0, torch.float32, width)
    logp_ref = pad(learners.score(REFERENCE, "logprobs", rows), 0.0, torch.float32, width)
    values = pad(learners.score(CRITIC, "values", rows), 0.0, torch.float32, width)
    rewards = ppo.token_rewards(torch.tensor(scores), logp_old, logp_ref, mask, settings.kl_beta)
    truncated = torch.tensor([not answer.finished for answer in answers])
    advantages, returns = ppo.gae(rewards, values, mask, settings.gamma, settings.gae_lambda, truncated)
    white = ppo.whiten(advantages, mask)
    for index, row in enumerate(rows):
        length = row["length"]
        row |= {
            "logp_old": logp_old[index, :length].numpy(), "advantages": white[index, :length].numpy(),
            "values_old": values[index, :length].numpy(), "returns": returns[index, :length].numpy(),
        }  # fmt: skip
    checked = [answer.verdict for answer in answers if answer.verdict is not None]
    seen = {
        "reward": float(np.mean(scores)),
        "accuracy": float(np.mean(checked)) if checked else float("nan"),
        "kl": float(((logp_old - logp_ref) * mask).sum() / mask.sum()),
        "length": float(mask.sum(dim=1).float().mean()),
    }
    return rows, seen


def _update(
    learners: Learners, rows: Sequence[Row], settings: PpoSettings, seed: int, critic_only: bool
) -> dict[str, float]:
    """The optimizer steps of one rollout batch; the mean of their metrics."""
    seen: list[dict[str, Any]] = []
    for indices in epoch_batches(len(rows), settings.mini_batch_size, settings.epochs, seed):
        batch = [rows[index] for index in indices]
        params = {
            "denominator": float(sum(sum(row["mask"]) for row in batch)), "clip": settings.clip,
            "dual_clip": settings.dual_clip, "value_clip": settings.value_clip,
        }  # fmt: skip
        value = learners.train_step(CRITIC, "ppo_value", batch, params)
        policy = {} if critic_only else learners.train_step(POLICY, "ppo_policy", batch, params)
        seen.append({"value_loss": value["value_loss"], "critic_grad_norm": value["grad_norm"], **policy})
    return {name: float(np.mean([metrics[name] for metrics in seen])) for name in seen[0]}
