"""Llama pretraining as a durable graph: text -> tokenizer -> tokens -> stage after stage of elastic training.

    python workflows/llama3_pretrain.py --recipe recipes/pretrain/tiny.toml
    recua run workflows/llama3_pretrain.py --recipe recipes/pretrain/tiny.toml          # the same
    ray job submit --working-dir . -- python workflows/llama3_pretrain.py --recipe recipes/pretrain/llama3_8b.toml

Every stage (the main run, a longer context, annealing on better text) is a step whose result is a model folder. Plain
transformers and vLLM load it, and workflows/llama3_posttrain.py can start from it (`model.init_from`). `recua goodput
RUN` shows where the ranks' time went.
"""

from typing import Any

from workflows.graph import Future, workflow
from workflows.recipes.checks import check_pretraining, check_pretraining_capacity
from workflows.recipes.inputs import content
from workflows.recipes.settings import PretrainRecipe
from workflows.recipes.text import build_corpus, tokenize, train_tokenizer
from workflows.recipes.training import Trained, import_model, pretrain, require_rows

RECIPE = PretrainRecipe
RECIPE_FILE = "recipes/pretrain/tiny.toml"


@workflow
def llama3_pretrain(recipe: PretrainRecipe) -> dict[str, Any]:
    """Every call is a durable step; stages without a stage before them run side by side."""
    seed, folder = recipe.seed, recipe.model.init_from
    corpus = build_corpus(recipe.corpus, seed, content(recipe.corpus.files))
    base: Any = None
    if folder is not None:
        base = tokenizer = import_model(folder, content([folder]))
    else:
        tokenizer = train_tokenizer(corpus, None, recipe.tokenizer, content([recipe.tokenizer.folder]))
    tokens = tokenize(corpus, tokenizer)
    held_out: Any = None
    if recipe.corpus.held_out_share:
        held_out = tokenize.options(name="tokens-held-out")(corpus, tokenizer, "held_out.jsonl")
    trained: dict[str, Future[Trained]] = {}
    texts: dict[str, Any] = {}
    for name in recipe.in_order():
        stage = recipe.stages[name]
        text = tokens
        if stage.corpus is not None:
            own = build_corpus.options(name=f"corpus-{name}")(stage.corpus, seed, content(stage.corpus.files))
            text = tokenize.options(name=f"tokens-{name}")(own, tokenizer)
        texts[name] = text
        start = trained[stage.after].model if stage.after is not None else base
        trained[name] = pretrain.options(name=name)(
            text, tokenizer, recipe.model, stage, seed, start, held_out, name, stage.changes
        )
    unseen = None if held_out is None else held_out.result().meta["tokens"]
    for name, text in texts.items():  # check all texts now: the last stage would fail much later
        require_rows(name, recipe.stages[name].sequence_length, text.result().meta["tokens"], unseen)
    return {name: result.result() for name, result in trained.items()}


def preflight(recipe: PretrainRecipe) -> None:
    """What can be refused before anything starts."""
    check_pretraining(recipe)


def check_cluster(recipe: PretrainRecipe, nodes: list[dict[str, float]]) -> None:
    """What this cluster can never give, before the first step."""
    check_pretraining_capacity(recipe, nodes)


if __name__ == "__main__":
    from workflows.cli.main import run_script

    run_script(__file__)
