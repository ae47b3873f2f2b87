"""From raw text to training data: corpus, problems, tokenizer, token shards.

`files` arguments are digests of the files that a section names (`inputs.content`): a changed file is a changed input.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.config import CorpusSettings, TaskSettings
from infra.errors import DataError
from workflows.graph import Artifact, context, step
from workflows.recipes.inputs import require_unchanged
from workflows.recipes.settings import ProblemSettings, TokenizerSettings

if TYPE_CHECKING:
    from data.tasks import Problem

SAFETY = {"safety/unsafe": 1.0, "safety/lookalike": 1.0}


@dataclass(frozen=True)
class Problems:
    """SFT's examples (`messages.jsonl`), and the problems of sampling stages and evaluation (`problems.jsonl`)."""

    instructions: Artifact
    prompts: Artifact
    held_out: Artifact


@step(num_cpus=0.5, memory="1GiB", timeout=1800)
def build_corpus(section: CorpusSettings, seed: int, files: dict[str, str]) -> Artifact:
    """The pretraining text, cleaned and deduplicated (`text.jsonl`), and a share held out (`held_out.jsonl`)."""
    from data.corpus import write_corpus

    run = context()
    out = run.artifact("corpus")
    counts = write_corpus(section, out.path, seed, run.progress)
    require_unchanged("corpus.files", section.files, files)
    return out.seal(**counts)


@step(num_cpus=0.5, memory="1GiB", timeout=1800)
def build_problems(section: ProblemSettings, tasks: TaskSettings, seed: int, files: dict[str, str]) -> Problems:
    """Instruction examples, prompts for the sampling stages, and held-out problems: disjoint by construction."""
    from data.formats import read_rows as read_files
    from data.stdlib_text import stdlib_instructions
    from data.tasks import Problem, Split, make_problems, to_instruction_row

    def make(count: int, safety_count: int, split: Split, draw_seed: int) -> list[Problem]:
        problems = make_problems(None, count, draw_seed, split, tasks) if count else []
        return problems + (make_problems(SAFETY, safety_count, draw_seed, split, tasks) if safety_count else [])

    def keep(name: str, problems: list[Problem]) -> Artifact:
        out = context().artifact(name)
        write_rows(out.path / "problems.jsonl", [problem.to_row() for problem in problems])
        return out.seal(problems=len(problems))

    answered = make(section.instructions, section.safety_instructions, "train", seed)
    careless = random.Random(f"careless {seed}")
    rows = [
        to_instruction_row(
            replace(problem, answer=problem.misread)
            if problem.misread is not None and careless.random() < section.careless_share
            else problem
        )
        for problem in answered
    ]
    library = stdlib_instructions("train")
    rows += random.Random(seed).sample(library, min(section.stdlib_instructions, len(library)))
    if section.instruction_files:
        rows += read_files(section.instruction_files, "messages")
        require_unchanged("problems.instruction_files", section.instruction_files, files)
    out = context().artifact("instructions")
    write_rows(out.path / "messages.jsonl", [{"task_type": "user/files", **row} for row in rows])
    return Problems(
        instructions=out.seal(examples=len(rows)),
        prompts=keep("prompts", make(section.prompts, section.safety_prompts, "train", seed + 1)),
        # Independent of the seed, so that runs with other seeds are judged on the same problems.
        held_out=keep("held_out", make(section.held_out, section.safety_held_out, "held_out", 0)),
    )


@step(num_cpus=1, memory="2GiB", timeout=1800)
def train_tokenizer(
    corpus: Artifact, instructions: Artifact | None, section: TokenizerSettings, files: dict[str, str]
) -> Artifact:
    """A byte-level BPE with Llama 3's special tokens, or a copy of the folder that the recipe names."""
    from models.tokenizers import load_tokenizer, train_bpe

    out = context().artifact("tokenizer")
    if section.folder:
        tokenizer = load_tokenizer(Path(section.folder).expanduser())
        require_unchanged("tokenizer.folder", [section.folder], files)
    else:
        texts = [row["text"] for row in read_rows(corpus.path() / "text.jsonl")]
        # Add role names and turns as in chats: trained on code alone, "assistant" would take half a dozen tokens.
        for row in read_rows(instructions.path() / "messages.jsonl") if instructions is not None else ():
            texts += [f"{message['role']}\n\n{message['content']}" for message in row["messages"]]
        tokenizer = train_bpe(texts, section.vocab_size)
    tokenizer.save(out.path)
    return out.seal(vocab_size=tokenizer.vocab_size)


@dataclass(frozen=True)
class Limits:
    """Limits in tokens: `example` of an SFT example; `prompt` of a prompt that leaves room for its answer, in the
    engine and in SFT on the answers."""

    example: int
    prompt: int


@step(num_cpus=0.5, memory="1GiB", timeout=1800)
def fit_texts(
    base: Artifact, instructions: Artifact, prompts: Artifact, held_out: Artifact, limits: Limits
) -> Artifact:
    """`base` (a tokenizer, or the model to start from) after a check that every example and prompt fits. Training
    starts from this result, so that a text that is too long ends the run before it."""
    from data.tasks import prompt_messages
    from engines.chat import ChatTokenizer

    tokenizer = ChatTokenizer.load(base.path())

    def require(messages: list[dict[str, str]], what: str, most: int, settings: str, answered: bool) -> None:
        try:
            length = len(tokenizer.example(messages, "all")[0] if answered else tokenizer.prompt(messages))
        except ValueError as error:
            raise DataError(f"{what} does not fit the chat format: {error}") from None
        if length > most:
            raise DataError(
                f"{what} has {length} tokens, {most} fit: raise {settings}, or shorten it; it starts with "
                f"{messages[0]['content'][:60]!r}"
            )

    for number, row in enumerate(read_rows(instructions.path() / "messages.jsonl"), start=1):
        what = f"instruction example {number} ({row['task_type']})"
        require(row["messages"], what, limits.example, "sft.max_length", True)
    for artifact in (prompts, held_out):
        for problem in read_problems(artifact):
            settings = "pools.engine.max_model_len and rejection_sft.max_length"
            require(prompt_messages(problem), f"a prompt ({problem.task_type})", limits.prompt, settings, False)
    return base


@step(num_cpus=1, memory="2GiB", timeout=3600)
def tokenize(corpus: Artifact, tokenizer: Artifact, file: str = "text.jsonl") -> Artifact:
    """Documents of one of the corpus' files as memory-mapped token shards."""
    from data.tokenized import write_shards
    from models.tokenizers import load_tokenizer

    run = context()
    out = run.artifact("tokens")
    texts = [row["text"] for row in read_rows(corpus.path() / file)]
    if not texts and file == "held_out.jsonl":
        raise DataError("corpus.held_out_share holds out no document of so few: give more text, or set it to 0")
    return out.seal(**write_shards(texts, load_tokenizer(tokenizer.path()), out.path, run.progress))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that one of our steps wrote."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_problems(artifact: Artifact) -> "list[Problem]":
    """The problems of an artifact that `build_problems` made."""
    from data.tasks import Problem

    return [Problem.from_row(row) for row in read_rows(artifact.path() / "problems.jsonl")]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """The inverse of `read_rows`."""
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
