"""The stages that sample from the policy: preference pairs, and rejection sampling."""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.posttrain.config import PreferenceSettings, RejectionSettings
from workflows.graph import Artifact, context, step
from workflows.recipes.settings import PoolSettings
from workflows.recipes.text import read_problems, read_rows, write_rows

if TYPE_CHECKING:
    from data.tasks import Problem


@dataclass(frozen=True)
class Preferences:
    """`pairs.jsonl` for the two reward models, and the policy's results on the prompts."""

    helpfulness: Artifact
    safety: Artifact
    summary: dict[str, Any]


@dataclass(frozen=True)
class Rejected:
    """Rejection sampling's harvest: the best answers (`messages.jsonl`), best-versus-worst pairs (`pairs.jsonl`)."""

    best: Artifact
    pairs: Artifact
    summary: dict[str, Any]


@step(num_cpus=0, timeout=6 * 3600)
def sample_preferences(
    policy: Artifact, prompts: Artifact, section: PreferenceSettings, seed: int, pools: PoolSettings
) -> Preferences:
    """Sample the policy; the checkers prefer right to wrong answers, and refusals of unsafe requests to compliance."""
    from actors.pools.keeper import Pools
    from actors.posttrain.conversation import sample
    from actors.posttrain.preferences import build_pairs
    from engines.base import Sampling
    from engines.chat import ChatTokenizer

    run = context()
    pool = read_problems(prompts)
    problems = _take([problem for problem in pool if problem.unsafe is None], section.prompts, seed)
    problems += _take([problem for problem in pool if problem.unsafe is not None], section.safety_prompts, seed)
    tokenizer = ChatTokenizer.load(policy.path())
    sampling = Sampling(
        temperature=section.temperature, max_tokens=section.max_tokens, n=section.answers, seed=seed,
        stop_token_ids=tokenizer.stop_ids,
    )  # fmt: skip
    with Pools(run.run_id).generators(pools.generators, pools.engine, policy.path(), policy.digest) as generators:
        groups = sample(generators, problems, tokenizer, sampling)
    pairs = build_pairs(groups, tokenizer, seed)
    helpfulness, safety = run.artifact("helpfulness"), run.artifact("safety")
    write_rows(helpfulness.path / "pairs.jsonl", pairs.helpfulness)
    write_rows(safety.path / "pairs.jsonl", pairs.safety)
    summary = {"prompts": len(problems), "helpfulness": len(pairs.helpfulness), "safety": len(pairs.safety)}
    return Preferences(helpfulness.seal(), safety.seal(), summary)


@step(num_cpus=0, timeout=6 * 3600)
def rejection_sample(
    policy: Artifact, judges: list[Artifact], prompts: Artifact, earlier: list[Artifact],
    section: RejectionSettings, seed: int, pools: PoolSettings,
) -> Rejected:  # fmt: skip
    """The best of K answers per prompt, by `judges` [helpfulness, safety] and checkers, with those of `earlier`
    rounds."""
    from actors.pools.keeper import Pools
    from actors.posttrain.conversation import sample
    from actors.posttrain.judging import RewardModels
    from actors.posttrain.rejection import harvest
    from engines.base import Sampling
    from engines.chat import ChatTokenizer

    run = context()
    problems = _take(read_problems(prompts), section.prompts, seed)
    tokenizer = ChatTokenizer.load(policy.path())
    sampling = Sampling(
        temperature=section.temperature, max_tokens=section.max_tokens, n=section.answers, seed=seed,
        stop_token_ids=tokenizer.stop_ids,
    )  # fmt: skip
    lent = Pools(run.run_id)
    with lent.generators(pools.generators, pools.engine, policy.path(), policy.digest) as generators:
        groups = sample(generators, problems, tokenizer, sampling)
    with lent.learners(pools.learners) as learners:
        RewardModels(judges[0].path(), judges[1].path()).open(learners)
        found = harvest(learners, groups, section)
    best, pairs = run.artifact("best"), run.artifact("pairs")
    kept = [row for artifact in earlier for row in read_rows(artifact.path() / "messages.jsonl")]
    write_rows(best.path / "messages.jsonl", [*kept, *found.best])
    write_rows(pairs.path / "pairs.jsonl", found.pairs)
    return Rejected(best.seal(), pairs.seal(), {**found.summary, "from_earlier_rounds": len(kept)})


def _take(problems: "list[Problem]", count: int, seed: int) -> "list[Problem]":
    """A seeded sample of the prompt pool, so that stages and rounds use different questions."""
    return random.Random(seed).sample(problems, min(count, len(problems)))
