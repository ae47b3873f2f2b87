"""The stages that train. Each result names the model's artifact, whose digest is the weight version."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.posttrain.config import DpoSettings, PpoSettings, RewardSettings, SftSettings
from actors.pretrain.config import PretrainSettings
from infra.errors import DataError
from infra.telemetry import MetricsWriter
from workflows.graph import Artifact, context, step
from workflows.recipes.settings import ModelSettings, PoolSettings
from workflows.recipes.text import read_problems, read_rows
from workflows.runs.status import standing

SHOWN = ("loss", "held_out_loss", "reward", "accuracy", "kl")
"""Metrics that the terminal shows."""


@dataclass(frozen=True)
class Trained:
    """A model folder (HF layout) with its training curve, and the stage's summary."""

    stage: str
    model: Artifact
    metrics: Artifact
    summary: dict[str, Any]


class Curve:
    """Writes a stage's metrics.jsonl and shows the same numbers on the driver's terminal."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._run = context()
        self._out = self._run.artifact(f"{stage}-metrics")
        self._writer = MetricsWriter(self._out.path / "metrics.jsonl")

    def __call__(self, metrics: dict[str, Any]) -> None:
        values = {name: value for name, value in metrics.items() if name not in ("step", "steps", "time")}
        self._writer.write(self._stage, metrics["step"], **values)
        shown = {name: metrics[name] for name in SHOWN if name in metrics}
        self._run.progress(metrics["step"], metrics["steps"], **shown)

    def seal(self) -> Artifact:
        self._writer.close()
        return self._out.seal()


@step(num_cpus=0)
def pretrain(
    tokens: Artifact, tokenizer: Artifact, model: ModelSettings, section: PretrainSettings, seed: int,
    base: Artifact | None = None, held_out: Artifact | None = None, stage: str = "pretrain",
    changes: dict[str, Any] | None = None,
) -> Trained:  # fmt: skip
    """Next-token training on an elastic group of ranks, where a fault costs at most one step. From scratch, or from the
    model folder `base`, with its config except for `changes`."""
    from actors.pretrain.job import PretrainJob
    from actors.pretrain.lead import in_words
    from actors.pretrain.lead import pretrain as run_pretrain
    from data.tokenized import token_count
    from models.hf_format import read_config
    from models.tokenizers import load_tokenizer

    run, curve = context(), Curve(stage)
    out = run.artifact("model")
    config = read_config(base.path()) if base else model.to_llama(load_tokenizer(tokenizer.path()).vocab_size)
    config = replace(config, **(changes or {}))
    unseen = None if held_out is None else token_count(held_out.path())
    require_rows(stage, section.sequence_length, token_count(tokens.path()), unseen)

    def tell(event: dict[str, Any]) -> None:
        if (line := in_words(event)) is not None:
            run.log(f"{stage}: {line}")

    job = PretrainJob(
        seen_by_all(tokens), seen_by_all(tokenizer), config, section, run.state_url(), seed,
        weights=base and seen_by_all(base), held_out=held_out and seen_by_all(held_out),
    )  # fmt: skip
    result = run_pretrain(
        job, out.path, curve, on_event=tell, accounts=(run.store_url, run.run_id, stage), ask_standing=standing,
        nodes_come=run.nodes_come,
    )  # fmt: skip
    summary = {"loss": result.final_loss, "tokens": result.tokens}
    if result.held_out_loss is not None:
        summary |= {"held_out_loss": result.held_out_loss}
    if result.short_steps:
        summary |= {"short_steps": result.short_steps}
    return Trained(stage, out.seal(), curve.seal(), summary)


def require_rows(stage: str, length: int, tokens: int, held_out: int | None) -> None:
    """Check that text and held-out text fill a row of `length` tokens and its next token. Raises DataError."""
    for count, what, remedy in (
        (tokens, "its text", "give more (corpus.files, corpus.stdlib_bytes)"),
        (held_out, "the held-out text", "raise corpus.held_out_share, or set it to 0"),
    ):
        if count is not None and count <= length:
            raise DataError(
                f"{stage}: {what} has {count} tokens, a row needs sequence_length = {length} and one more: lower that, "
                f"or {remedy}"
            )


def seen_by_all(artifact: Artifact) -> Path | Artifact:
    """What processes on other nodes need to read an artifact: its path in a folder store, else the artifact itself."""
    folder = artifact.path()
    return artifact if context().store.local_path(artifact.location) is None else folder


@step(num_cpus=0, timeout=6 * 3600)
def fine_tune(
    base: Artifact, examples: Artifact, section: SftSettings, seed: int, stage: str, pools: PoolSettings
) -> Trained:
    """SFT of `base` on instruction examples or on the answers that rejection sampling kept."""
    from actors.pools.keeper import Pools
    from actors.posttrain.conversation import supervised_row
    from actors.posttrain.sft import fine_tune as run_fine_tune
    from engines.chat import ChatTokenizer

    run, curve = context(), Curve(stage)
    out = run.artifact("model")
    tokenizer = ChatTokenizer.load(base.path())
    rows = [
        supervised_row(row["messages"], row["task_type"], tokenizer, section.train_on)
        for row in read_rows(examples.path() / "messages.jsonl")
    ]
    with Pools(run.run_id).learners(pools.learners) as learners:
        name = "sft" if stage == "sft" else "rejection_sft"
        summary = run_fine_tune(learners, base.path(), rows, section, out.path, seed, curve, name)
    return Trained(stage, out.seal(), curve.seal(), {"examples": len(rows), **summary})


@step(num_cpus=0, timeout=6 * 3600)
def train_reward(
    base: Artifact, pairs: Artifact, section: RewardSettings, seed: int, stage: str, pools: PoolSettings
) -> Trained:
    """One reward model, initialised from the policy with a scalar head."""
    from actors.pools.keeper import Pools
    from actors.posttrain.reward_model import train_reward_model

    run, curve = context(), Curve(stage)
    out = run.artifact("model")
    rows = read_rows(pairs.path() / "pairs.jsonl")
    with Pools(run.run_id).learners(pools.learners) as learners:
        summary = train_reward_model(learners, base.path(), rows, section, out.path, seed, curve)
    return Trained(stage, out.seal(), curve.seal(), summary)


@step(num_cpus=0, timeout=6 * 3600)
def optimise_preferences(
    base: Artifact, pairs: Artifact, section: DpoSettings, seed: int, stage: str, pools: PoolSettings
) -> Trained:
    """DPO of `base` against itself on best-versus-worst pairs."""
    from actors.pools.keeper import Pools
    from actors.posttrain.dpo import optimise_preferences as run_dpo
    from engines.chat import ChatTokenizer

    run, curve = context(), Curve(stage)
    out = run.artifact("model")
    rows = read_rows(pairs.path() / "pairs.jsonl")
    stop_ids = ChatTokenizer.load(base.path()).stop_ids
    with Pools(run.run_id).learners(pools.learners) as learners:
        summary = run_dpo(learners, base.path(), rows, section, stop_ids, out.path, seed, curve)
    return Trained(stage, out.seal(), curve.seal(), {"pairs": len(rows), **summary})


@step(num_cpus=0, timeout=6 * 3600)
def optimise_policy(
    base: Artifact, judges: list[Artifact], prompts: Artifact, section: PpoSettings, seed: int, stage: str,
    pools: PoolSettings,
) -> Trained:  # fmt: skip
    """PPO of `base` judged by `judges` [helpfulness, safety]; the critic starts as the helpfulness model."""
    from actors.pools.keeper import Pools
    from actors.pools.weight_sync import WeightSync
    from actors.posttrain.judging import RewardModels, judge
    from actors.posttrain.ppo import POLICY, PpoModels
    from actors.posttrain.ppo import optimise_policy as run_ppo
    from engines.chat import ChatTokenizer

    run, curve = context(), Curve(stage)
    out = run.artifact("model")
    problems = read_problems(prompts)
    lent = Pools(run.run_id)
    with (
        lent.generators(pools.generators, pools.engine, base.path(), base.digest) as generators,
        lent.learners(pools.learners) as learners,
    ):
        models = RewardModels(judges[0].path(), judges[1].path())
        models.open(learners)
        sync = WeightSync(learners, generators, POLICY, pools.engine)
        sync.connect()
        summary = run_ppo(
            learners, generators, sync, PpoModels(base.path(), models.helpfulness), problems,
            lambda answers: judge(learners, answers, section.verifier_weight, section.reward_weight).total,
            ChatTokenizer.load(base.path()), section, out.path, seed, base.digest[:12], curve,
        )  # fmt: skip
    return Trained(stage, out.seal(), curve.seal(), summary)


@step(num_cpus=0.5, memory="1GiB", timeout=3600)
def import_model(folder: str, files: dict[str, str]) -> Artifact:
    """The HF folder that a recipe starts from instead of pretraining, checked and stored; `files` are its digests."""
    from workflows.recipes.checks import check_start_model

    source = Path(folder).expanduser()
    check_start_model(source)
    out = context().artifact("model")
    hidden = shutil.ignore_patterns(".*")  # as `files` does
    shutil.copytree(source, out.path, dirs_exist_ok=True, ignore=hidden, ignore_dangling_symlinks=True)
    return out.seal()
