"""Every recipe that ships is valid, and mistakes in one are refused by name."""

import json
from pathlib import Path

import pytest

from data.formats import Summary
from infra.config import load
from infra.errors import ConfigError, DataError, UserError
from workflows.recipes.amounts import check_amounts, require_held_out_problems
from workflows.recipes.checks import check_pretraining, check_recipe
from workflows.recipes.settings import PretrainRecipe, Recipe

RECIPES = Path(__file__).parents[3] / "recipes"
TINY = RECIPES / "tiny.toml"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    recipe = load(file, Recipe)
    assert recipe.rounds >= 1
    check_amounts(recipe, Summary(0), Summary(0))
    require_held_out_problems(recipe)


@pytest.mark.parametrize("file", sorted((RECIPES / "pretrain").glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_pretraining_recipes_are_valid_and_fit_their_network(file: Path) -> None:
    recipe = load(file, PretrainRecipe)
    assert recipe.in_order()[0] == "main"
    if file.stem == "tiny":
        check_pretraining(recipe)
        return
    for stage in recipe.stages.values():  # their text and tokenizer are the user's
        sizes = recipe.model.to_llama(128_256)
        assert not sizes.kv_heads % stage.tensor_parallel and stage.pipeline_parallel <= sizes.layers
        assert stage.sequence_length <= sizes.context


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stages.long.after=nowhere", "stages.long.after names 'nowhere'"),
        ("stages.main.after=anneal", "circle"),
        ("stages={'a/b'={steps=99}}", r"stages: 'a/b' must be named without / \[ \]"),
        ("stages={'.a'={steps=99}}", r"stages: '\.a' must be named without"),
        (f"stages={{'{'é' * 101}'={{steps=99}}}}", "in at most 200 bytes: files are named after it"),
        ("stages.main.sequence_length=256", "stages.main.sequence_length = 256 is above model.context = 128"),
        ("stages.anneal.sequence_length=512", "above stages.long.context = 256"),
        ("stages.main.tensor_parallel=4", "workers 2 must divide"),
        ("stages.main={steps=9, warmup=1}", "stages.main.warmup"),
        ("stages.main={steps=20, workers=4, tensor_parallel=4}", "tensor_parallel = 4 does not divide .* kv_heads = 2"),
        ("stages.main={steps=20, workers=5, pipeline_parallel=5}", "pipeline_parallel = 5 is above .* layers = 4"),
        ("stages.anneal.corpus.files=['/nowhere/a.jsonl']", "stages.anneal.corpus.files"),
        ("stages.main.batch_sise=4", r"stages.main.batch_sise; did you mean stages.main.batch_size\?"),
        ("stages.main.elastic.zzz=1", r"unknown setting stages.main.elastic.zzz; known: .*, min_workers, .*, spares,"),
    ],
)
def test_a_mistake_in_a_pretraining_recipe_is_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_pretraining(load(RECIPES / "pretrain" / "tiny.toml", PretrainRecipe, [override]))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sft.bach_size=4", "sft.batch_size"),
        ("sft.batch_size=many", "sft.batch_size"),
        ("dpo.beta=0", "dpo.beta"),
        ("ppo.policy.learning_rte=1e-4", "ppo.policy.learning_rate"),
        ("model.heads=3", "heads"),
    ],
)
def test_a_mistake_is_named_with_the_setting_to_change(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(TINY, Recipe, [override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sft.max_length=4096", "sft.max_length"),
        ("corpus.files=['/nowhere/text.jsonl']", "/nowhere/text.jsonl"),
        ("model.init_from=/nowhere", "/nowhere"),
        ("model.init_from=org/llama", "model.init_from: org/llama: no such folder.* hf download org/llama"),
        ("tokenizer.folder=/nowhere", "tokenizer.folder"),
        ("pools.engine.kv_cache_gib=100000", "pools.engine.kv_cache_gib"),
    ],
)
def test_what_cannot_work_here_is_refused_before_anything_starts(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_recipe(load(TINY, Recipe, [override]))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sft.epochs=0.00001"], r"sft\.epochs = 1e-05 of \d+ examples makes no optimizer step"),
        (["rejection_sft.epochs=0.0001", "rejection.prompts=8"], r"rejection_sft\.epochs = 0\.0001 of 8 answers"),
        (["dpo.epochs=0.05", "rejection.prompts=8"], r"dpo\.epochs = 0\.05 of 8 pairs"),
        (["reward.epochs=0.01", "problems.prompts=8"], r"reward\.epochs = 0\.01 of 7 pairs"),
        (["reward.held_out=0.99", "preferences.safety_prompts=8"], r"reward\.held_out = 0\.99 leaves none of 8 pairs"),
        (["problems.safety_prompts=0"], r"0 preference pairs .* problems\.safety_prompts"),
        (["preferences.prompts=1"], r"1 preference pairs .* raise preferences\.prompts"),
        (["ppo.batch_size=1"], r"ppo\.batch_size = 1 and ppo\.answers = 1 make batches of one answer"),
        (
            ["problems.instructions=0", "problems.safety_instructions=0", "problems.stdlib_instructions=0"],
            r"no example for SFT: problems\.instructions",
        ),
        (
            ["tasks.kinds={'safety/unsafe'=1, 'reasoning/addition'=0, 'reasoning/compare'=0}"],
            r"tasks\.kinds: no kind whose answers can be checked",
        ),
        (["tasks.kinds={'reasoning/addition'=inf}"], r"tasks\.kinds\.reasoning/addition: .* finite number"),
        (["problems.safety_held_out=512"], r"problems\.safety_held_out: .* only 324 different held_out problems"),
        (
            ["tasks.kinds={'reasoning/compare'=1}", "tasks.compare_digits=1"],
            r"problems\.held_out: tasks\.kinds: only \d+ ",
        ),
        (["ppo.max_tokens=256"], r"pools\.engine\.max_model_len = 256 leaves no token for a prompt: ppo\.max_tokens"),
        (
            ["rejection_sft.max_length=16"],
            r"rejection_sft\.max_length = 16 leaves no token .* rejection\.max_tokens = 16",
        ),
        (["corpus.stdlib_parts=[]"], r"pretrain\.sequence_length = 256: corpus\.files .* 0 tokens at most"),
        (["sft.epochs=1e6"], r"sft\.epochs = 1e\+06 of \d+ examples are .* more than the limit of 1e\+08: lower it"),
        (["corpus.stdlib_bytes=100"], r"pretrain\.sequence_length = 256: corpus\.files .* 125 tokens at most"),
    ],
)
def test_a_stage_that_would_learn_nothing_is_refused_before_anything_starts(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_recipe(load(TINY, Recipe, overrides))


def test_text_that_fills_no_row_is_refused_before_pretraining_starts(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{json.dumps({'text': 'é' * 100})}\n" * 2)

    def check(*overrides: str) -> None:
        mine = [f"corpus.files=['{file}']", "corpus.stdlib_bytes=0", *overrides]
        check_pretraining(load(RECIPES / "pretrain" / "tiny.toml", PretrainRecipe, mine))

    check()
    with pytest.raises(DataError, match=r"stages\.long\.sequence_length = 256: corpus\.files .* 206 tokens at most"):
        file.write_text(f"{json.dumps({'text': 'a' * 100})}\n" * 2)
        check()
    with pytest.raises(DataError, match=r"stages\.anneal\.sequence_length = 256: stages\.anneal\.corpus\.files"):
        file.write_text(f"{json.dumps({'text': 'a' * 1000})}\n" * 2)
        check("stages.anneal.corpus={stdlib_bytes=100}")
    file.write_text(f"{json.dumps({'text': 'a' * 1000})}\n")
    with pytest.raises(ConfigError, match=r"corpus\.held_out_share = 0\.02 of one document"):
        check()
    check("corpus.held_out_share=0")


def test_a_malformed_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"mess\n')
    with pytest.raises(UserError, match=r"mine\.jsonl:2"):
        check_recipe(load(TINY, Recipe, [f"problems.instruction_files=['{file}']"]))


def test_a_last_turn_that_is_not_learnt_is_named_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    file.write_text(f"{json.dumps({'messages': [*turns[:3], {**turns[3], 'weight': 0}]})}\n")
    named = [f"problems.instruction_files=['{file}']"]
    check_recipe(load(TINY, Recipe, named))
    with pytest.raises(UserError, match=r"mine\.jsonl:1: the last assistant turn has weight 0 and sft\.train_on"):
        check_recipe(load(TINY, Recipe, [*named, "sft.train_on=last"]))


def test_pools_are_part_of_no_key() -> None:
    from workflows.graph.values import digest, encode

    recipe = load(TINY, Recipe)
    other = load(TINY, Recipe, ["pools.learners.workers=7"])
    assert digest(encode(recipe.pools)) == digest(encode(other.pools))
    assert digest(encode(recipe.sft)) != digest(encode(load(TINY, Recipe, ["sft.batch_size=7"]).sft))
