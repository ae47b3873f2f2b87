"""From raw text to what training reads: corpus, problems, tokenizer, token shards."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import CorpusSettings, TaskSettings
from workflows.graph import Artifact, context, step
from workflows.recipe import ProblemSettings, TokenizerSettings


@dataclass(frozen=True)
class Problems:
    """Artifacts with one `Problem` a line: what SFT learns, what sampling stages ask, what evaluation holds out."""

    instructions: Artifact
    prompts: Artifact
    held_out: Artifact


@step(num_cpus=0.5, memory="1GiB", timeout=1800)
def build_corpus(section: CorpusSettings, seed: int) -> Artifact:
    """The pretraining text as `text.jsonl`, cleaned and deduplicated."""
    from data.corpus import write_corpus

    run = context()
    out = run.artifact("corpus")
    summary = write_corpus(section, out.path, seed, on_progress=run.progress)
    return out.seal(**summary)


@step(num_cpus=0.5, memory="1GiB", timeout=1800)
def build_problems(section: ProblemSettings, tasks: TaskSettings, seed: int) -> Problems:
    """Instruction examples, prompts for the sampling stages, and held-out problems: disjoint by construction."""
    from data.tasks import make_problems, to_instruction_row

    safety = {"safety/unsafe": 1.0, "safety/lookalike": 1.0}

    def make(name: str, count: int, safety_count: int, split: Any, draw_seed: int) -> Artifact:
        problems = make_problems(None, count, draw_seed, split, tasks)
        problems += make_problems(safety, safety_count, draw_seed, split, tasks) if safety_count else []
        out = context().artifact(name)
        write_rows(out.path / "problems.jsonl", [problem.to_row() for problem in problems])
        write_rows(out.path / "messages.jsonl", [to_instruction_row(problem) for problem in problems])
        return out.seal(problems=len(problems))

    # The held-out set does not depend on the seed: runs with other seeds are judged on the same problems.
    return Problems(
        instructions=make("instructions", section.instructions, section.safety_instructions, "train", seed),
        prompts=make("prompts", section.prompts, section.safety_prompts, "train", seed + 1),
        held_out=make("held_out", section.held_out, section.safety_held_out, "held_out", 0),
    )


@step(num_cpus=1, memory="2GiB", timeout=1800)
def train_tokenizer(corpus: Artifact, problems: Artifact, section: TokenizerSettings) -> Artifact:
    """A byte-level BPE with Llama 3's special tokens, or a copy of the folder that the recipe names."""
    from models.tokenizer import load_tokenizer, train_bpe

    out = context().artifact("tokenizer")
    if section.folder:
        tokenizer = load_tokenizer(Path(section.folder))
    else:
        texts = [row["text"] for row in read_rows(corpus.path() / "text.jsonl")]
        rows = read_rows(problems.path() / "problems.jsonl")
        texts += [f"{row['prompt']}\n{row['answer']}" for row in rows]
        tokenizer = train_bpe(texts, section.vocab_size)
    tokenizer.save(out.path)
    return out.seal(vocab_size=tokenizer.vocab_size)


@step(num_cpus=1, memory="2GiB", timeout=3600)
def tokenize(corpus: Artifact, tokenizer: Artifact) -> Artifact:
    """Documents as memory-mapped token shards."""
    from data.tokenized import write_shards

    from models.tokenizer import load_tokenizer

    run = context()
    out = run.artifact("tokens")
    documents = (row["text"] for row in read_rows(corpus.path() / "text.jsonl"))
    summary = write_shards(documents, load_tokenizer(tokenizer.path()), out.path, on_progress=run.progress)
    return out.seal(**summary)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """A JSONL file that a step of ours wrote."""
    with file.open() as lines:
        return [json.loads(line) for line in lines]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """The inverse of `read_rows`."""
    with file.open("w") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
