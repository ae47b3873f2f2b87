"""The steps that evaluate a stage's model and deploy the last one."""

from dataclasses import dataclass, replace
from typing import Any

from actors.posttrain.config import EvalSettings
from actors.posttrain.results import Evaluation
from serving.config import ServingSettings
from workflows.graph import Artifact, context, step
from workflows.recipes.settings import PoolSettings
from workflows.recipes.text import read_problems


@dataclass(frozen=True)
class Served:
    """The model's endpoint, and whether its answers are those of the evaluation.

    `grpc` and `openai` are True only if the greedy answers to all prompts, and the weight version, match.
    """

    grpc: bool
    openai: bool
    grpc_address: str
    http_url: str
    weight_version: str
    answers: tuple[dict[str, Any], ...]


@step(num_cpus=0, timeout=3600)
def evaluate(
    model: Artifact, held_out: Artifact, section: EvalSettings, stage: str, seed: int, before: list[Evaluation],
    judges: list[Artifact], pools: PoolSettings,
) -> Evaluation:  # fmt: skip
    """Held-out accuracy, pass@N and safety rates; with `judges` [helpfulness, safety] also reward-model scores."""
    from actors.pools.keeper import Pools
    from actors.posttrain.evaluation import evaluate as run_evaluation
    from actors.posttrain.evaluation import reward_scores
    from actors.posttrain.judging import RewardModels
    from engines.chat import ChatTokenizer

    everything = read_problems(held_out)
    problems = [problem for problem in everything if problem.checkable][: section.problems]
    safety = [problem for problem in everything if problem.unsafe is not None][: section.safety_prompts]
    lent = Pools(context().run_id)
    with lent.generators(pools.generators, pools.engine, model.path(), model.digest) as generators:
        evaluation, answers = run_evaluation(
            generators, problems, safety, ChatTokenizer.load(model.path()), section, stage, seed, before
        )
    if not judges:
        return evaluation
    with lent.learners(pools.learners) as learners:
        RewardModels(judges[0].path(), judges[1].path()).open(learners)
        return replace(evaluation, reward=reward_scores(learners, answers))


@step(num_cpus=0, timeout=3600)
def deploy(model: Artifact, evaluation: Evaluation, section: ServingSettings, max_tokens: int, prompts: int) -> Served:
    """Serve `model` over gRPC and OpenAI-compatible HTTP, then compare its answers with those of its evaluation."""
    from serving.app import deploy as start
    from serving.app import on_head
    from serving.check import compare

    context().progress(0, 2)
    endpoint = start(model.path(), model.digest, section)
    context().progress(1, 2)
    asked = [sample for sample in evaluation.samples if sample["correct"] is not None][:prompts]
    compared = on_head(compare, endpoint, section, asked, max_tokens)
    return Served(
        grpc=compared.grpc and evaluation.weight_version == model.digest,
        openai=compared.openai and evaluation.weight_version == model.digest,
        grpc_address=endpoint.grpc_address,
        http_url=endpoint.http_url,
        weight_version=model.digest,
        answers=compared.answers,
    )
