"""Check before a run that every stage has something to learn, from an upper bound of its data."""

import math
from typing import TYPE_CHECKING

from actors.posttrain.amounts import held_out_pairs, require_rollouts, require_steps, sample_count, tell_long_warmup
from data.config import CorpusSettings
from infra.errors import ConfigError, DataError
from workflows.recipes.settings import PretrainRecipe, Recipe

if TYPE_CHECKING:
    from data.formats import Summary

MARKS = 3
"""Most tokens that are added to a document: begin, end, and the blank that some tokenizers put before it."""


def check_amounts(recipe: Recipe, corpus: "Summary", instructions: "Summary") -> None:
    """Refuse a recipe in which a stage has nothing to learn. The summaries are those of its files.

    Raises:
        ConfigError, DataError: the message names the settings to change.
    """
    if recipe.model.init_from is None:
        _require_window("pretrain", recipe.pretrain.sequence_length, "corpus", recipe.corpus, corpus)
    _require_checkable(recipe)
    problems = recipe.problems
    made = problems.instructions + problems.safety_instructions + problems.stdlib_instructions
    examples = made + instructions.rows
    if not examples:
        raise ConfigError(
            "no example for SFT: problems.instructions, problems.safety_instructions and problems.stdlib_instructions "
            "are 0, and problems.instruction_files names none"
        )
    require_steps("sft", recipe.sft.epochs, examples, "examples")
    pairs = min(recipe.preferences.prompts, problems.prompts)
    held_out_pairs(recipe.reward, pairs)
    held_out_pairs(recipe.reward, min(recipe.preferences.safety_prompts, problems.safety_prompts))
    kept = min(recipe.rejection.prompts, problems.prompts + problems.safety_prompts)
    require_steps(
        "rejection_sft", recipe.rejection_sft.epochs, kept, "answers (one for each prompt of rejection.prompts)"
    )
    require_steps("dpo", recipe.dpo.epochs, kept, "pairs (one for each prompt of rejection.prompts)")
    require_rollouts(recipe.ppo)
    for section, stage, samples in (
        ("sft", recipe.sft, examples),
        ("reward", recipe.reward, pairs),
        ("rejection_sft", recipe.rejection_sft, kept),
        ("dpo", recipe.dpo, kept),
    ):
        steps = math.ceil(sample_count(samples, stage.epochs) / stage.batch_size)
        tell_long_warmup(f"{section}.optimizer", stage.optimizer, steps)
    tell_long_warmup("ppo.policy", recipe.ppo.policy, recipe.ppo.updates)
    tell_long_warmup("ppo.critic", recipe.ppo.critic, recipe.ppo.updates)


def require_held_out_problems(recipe: Recipe) -> None:
    """Refuse more held-out problems than the kinds have, because they must differ. (Draws them, in about a second.)

    Raises:
        ConfigError: the message names the setting to lower.
    """
    from data.tasks import make_problems
    from workflows.recipes.text import SAFETY

    problems = recipe.problems
    for setting, kinds, count in (
        ("problems.held_out", None, problems.held_out),
        ("problems.safety_held_out", SAFETY, problems.safety_held_out),
    ):
        try:
            make_problems(kinds, count, 0, "held_out", recipe.tasks)
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error}") from None


def check_pretraining_amounts(recipe: PretrainRecipe, corpora: "dict[str, Summary]") -> None:
    """The same for pretraining alone; `corpora`: summaries of the files of `corpus` and of each
    `stages.NAME.corpus`."""
    settings = recipe.corpus
    if settings.held_out_share and not settings.stdlib_bytes and corpora["corpus"].rows == 1:
        raise ConfigError(
            f"corpus.held_out_share = {settings.held_out_share:g} of one document: give more (corpus.files), or set it "
            "to 0"
        )
    for name, stage in recipe.stages.items():
        section = f"stages.{name}"
        where = "corpus" if stage.corpus is None else f"{section}.corpus"
        _require_window(section, stage.sequence_length, where, stage.corpus or recipe.corpus, corpora[where])


def _require_window(section: str, length: int, where: str, settings: CorpusSettings, files: "Summary") -> None:
    """Whether the text can fill one row: no tokenizer makes more tokens than bytes."""
    library = settings.stdlib_bytes if settings.stdlib_parts else 0
    most = files.text_bytes + MARKS * files.rows + library * 5 // 4  # with the marks
    if most < length + 1:
        raise DataError(
            f"{section}.sequence_length = {length}: {where}.files and {where}.stdlib_bytes give {most} tokens at most, "
            "a row needs one more than its length: lower it, or give more text"
        )


def _require_checkable(recipe: Recipe) -> None:
    from data.tasks.registry import all_kinds

    kinds = all_kinds(recipe.tasks)
    if not any(weight and kinds[name].checkable for name, weight in recipe.tasks.kinds.items()):
        raise ConfigError(
            "tasks.kinds: no kind whose answers can be checked has a positive weight; evaluation needs one"
        )
