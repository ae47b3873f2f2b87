"""The job that recua and its peers train: the same model, data, batch and threads. Imports nothing heavy."""

import json
import random
from pathlib import Path
from typing import Any

RANKS = 4
MODEL: dict[str, Any] = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_dim": 352, "context": 128}
BATCH, TOKENS, VOCAB = 32, 128, 300
"""Rows of all ranks together, target tokens in each, size of the tokenizer."""
LEARNING_RATE = 1e-3
CLIP = 1.0
THREADS = 1
"""OpenMP threads of one rank."""
STEPS = "steps.jsonl"
"""The log of the peers' ranks, one line per rank and step."""


def prepare(folder: Path) -> None:
    """Write token shards, a tokenizer and the model's configuration, the same every time."""
    from data.tokenized import write_shards
    from models.tokenizers import load_tokenizer, train_bpe

    draw = random.Random(0)
    texts = [" ".join(f"{draw.randrange(100)} plus" for _ in range(100)) for _ in range(300)]
    train_bpe(texts, VOCAB).save(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    write_shards(texts, tokenizer, folder / "tokens")
    (folder / "model.json").write_text(json.dumps({**MODEL, "vocab_size": tokenizer.vocab_size}))
