"""The Llama post-training recipe as one durable graph.

    python workflows/llama3_posttrain.py --recipe recipes/tiny.toml
    recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml          # the same
    ray job submit --working-dir . -- python workflows/llama3_posttrain.py --recipe recipes/llama3_8b.toml

text -> tokenizer -> pretrain -> SFT -> per round: (preferences -> two reward models -> rejection sampling -> SFT on the
best -> DPO -> PPO), every stage's model evaluated on the same held-out problems -> endpoint.
"""

from functools import partial
from typing import Any

from actors.posttrain.results import Evaluation
from workflows.graph import Future, on_end, run_id, workflow
from workflows.recipes.checks import check_capacity, check_recipe, close_pools
from workflows.recipes.evaluation import deploy, evaluate
from workflows.recipes.inputs import content
from workflows.recipes.sampling import rejection_sample, sample_preferences
from workflows.recipes.settings import Recipe
from workflows.recipes.text import Limits, Problems, build_corpus, build_problems, fit_texts, tokenize, train_tokenizer
from workflows.recipes.training import (
    fine_tune,
    import_model,
    optimise_policy,
    optimise_preferences,
    pretrain,
    train_reward,
)

RECIPE = Recipe
RECIPE_FILE = "recipes/tiny.toml"
SERVED_PROMPTS = 8
"""The number of held-out prompts that the endpoint must answer as in the evaluation."""


@workflow
def llama3_posttrain(recipe: Recipe) -> dict[str, Any]:
    """Every call is a durable step; a plain loop over rounds builds the graph."""
    seed, pools = recipe.seed, recipe.pools
    on_end(partial(close_pools, run_id()))
    problems = build_problems(recipe.problems, recipe.tasks, seed, content(recipe.problems.instruction_files))
    base = base_model(recipe, problems)
    sft = fine_tune.options(name="sft")(base, problems.instructions, recipe.sft, seed, "sft", pools)
    evaluations = [evaluated(recipe, problems, sft.model, "sft", [], [])]
    policy: Any = sft.model
    harvests: list[Any] = []
    for number in range(1, recipe.rounds + 1):
        tag = "" if recipe.rounds == 1 else f"-{number}"
        draw = seed + 1000 * number  # every round uses other problems

        preferences = sample_preferences(policy, problems.prompts, recipe.preferences, draw, pools)
        judges = [
            reward_model(recipe, policy, preferences.helpfulness, draw, f"reward-helpfulness{tag}"),
            reward_model(recipe, policy, preferences.safety, draw, f"reward-safety{tag}"),
        ]
        harvest = rejection_sample(policy, judges, problems.prompts, harvests, recipe.rejection, draw, pools)
        harvests = [*harvests, harvest.best]

        best = fine_tune.options(name=f"rejection{tag}")(
            policy, harvest.best, recipe.rejection_sft, draw, f"rejection{tag}", pools
        )
        evaluations += [evaluated(recipe, problems, best.model, f"rejection{tag}", evaluations, judges)]

        dpo = optimise_preferences.options(name=f"dpo{tag}")(
            best.model, harvest.pairs, recipe.dpo, draw, f"dpo{tag}", pools
        )
        evaluations += [evaluated(recipe, problems, dpo.model, f"dpo{tag}", evaluations, judges)]

        ppo = optimise_policy.options(name=f"ppo{tag}")(
            dpo.model, judges, problems.prompts, recipe.ppo, draw, f"ppo{tag}", pools
        )
        evaluations += [evaluated(recipe, problems, ppo.model, f"ppo{tag}", evaluations, judges)]
        policy = ppo.model
    served = deploy(policy, evaluations[-1], recipe.serving, recipe.eval.max_tokens, SERVED_PROMPTS)
    return {"model": policy.result(), "served": served.result()}


def base_model(recipe: Recipe, problems: Future[Problems]) -> Any:
    """The model that SFT starts from: pretrained here, or the folder that the recipe names."""
    texts = (problems.instructions, problems.prompts, problems.held_out, limits(recipe))
    if recipe.model.init_from is not None:
        return fit_texts(import_model(recipe.model.init_from, content([recipe.model.init_from])), *texts)
    corpus = build_corpus(recipe.corpus, recipe.seed, content(recipe.corpus.files))
    vocabulary = train_tokenizer(corpus, problems.instructions, recipe.tokenizer, content([recipe.tokenizer.folder]))
    tokenizer = fit_texts(vocabulary, *texts)
    tokens = tokenize(corpus, tokenizer)
    return pretrain(tokens, tokenizer, recipe.model, recipe.pretrain, recipe.seed).model


def limits(recipe: Recipe) -> Limits:
    """The longest texts that all stages can read."""
    stages = (recipe.preferences, recipe.rejection, recipe.ppo, recipe.eval)
    engine = recipe.pools.engine.max_model_len - max(stage.max_tokens for stage in stages)
    return Limits(recipe.sft.max_length, min(engine, recipe.rejection_sft.max_length - recipe.rejection.max_tokens))


def reward_model(recipe: Recipe, policy: Any, pairs: Any, seed: int, stage: str) -> Any:
    """One of the two reward models."""
    return train_reward.options(name=stage)(policy, pairs, recipe.reward, seed, stage, recipe.pools).model


def evaluated(
    recipe: Recipe, problems: Future[Problems], model: Any, stage: str, before: list[Any], judges: list[Any]
) -> Future[Evaluation]:
    """Evaluate one stage's model on the held-out problems, compared with all stages before it."""
    return evaluate.options(name=f"evaluate-{stage}")(
        model, problems.held_out, recipe.eval, stage, recipe.seed, list(before), judges, recipe.pools
    )


def preflight(recipe: Recipe) -> None:
    """What can be refused before anything starts: ports, memory, input files, the shape of the data."""
    check_recipe(recipe)


def check_cluster(recipe: Recipe, nodes: list[dict[str, float]]) -> None:
    """What this cluster can never give, before the first step."""
    check_capacity(recipe, nodes)


if __name__ == "__main__":
    from workflows.cli.main import run_script

    run_script(__file__)
