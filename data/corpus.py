"""The pretraining corpus: standard-library text and the user's files, cleaned, deduplicated, shuffled and split."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from data.config import CleaningSettings, CorpusSettings
from data.dedup import ExactDuplicates, LineDuplicates, NearDuplicates
from data.filters import why_rejected
from data.formats import Row, rows_by_source, validate, write_jsonl
from data.stdlib_text import held_out_rank, is_held_out, stdlib_documents
from infra.errors import ConfigError, DataError

_TOLD_EVERY = 200  # documents

Told = Callable[[float, float | None], None]


def write_corpus(
    settings: CorpusSettings, folder: str | Path, seed: int, on_progress: Told | None = None
) -> dict[str, int]:
    """Write `text.jsonl` (training) and `held_out.jsonl` ({"text", "source"} rows) into `folder`.

    The seed shuffles the training documents; the choice of documents and of held-out ones does not depend on it. If
    there are two documents or more, at least one is held out unless the share is 0.
    `on_progress(done, total)` counts documents. Returns counts: documents, bytes, held_out, and one removed_<reason>
    per reason.

    Raises:
        ConfigError: the settings name no text.
        DataError: a malformed row (all files are checked before anything is written), or cleaning left no document.
    """
    if not settings.stdlib_bytes and not settings.files:
        raise ConfigError("corpus: no text; set corpus.stdlib_bytes or corpus.files")
    total = float(sum(validate(source, "text").rows for source in settings.files))
    removed: Counter[str] = Counter()
    train: list[Row] = []
    held_out: list[Row] = []
    for done, row in enumerate(clean(_documents(settings), settings.cleaning, removed), start=1):
        (held_out if is_held_out(row["text"], settings.held_out_share) else train).append(row)
        if on_progress is not None and done % _TOLD_EVERY == 0:
            on_progress(done, total or None)
    if not train and held_out:
        raise DataError(
            f"corpus.held_out_share = {settings.held_out_share:g} holds out all {len(held_out)} documents: lower it, "
            "or give more text"
        )
    if not train:
        raise DataError(
            f"corpus: cleaning left none of {sum(removed.values())} documents; removed: {dict(removed)}: give more "
            "text (corpus.files, corpus.stdlib_bytes), or remove less (corpus.cleaning)"
        )
    if settings.held_out_share and not held_out:
        train, held_out = _hold_one_out(train)
    Random(f"corpus {seed}").shuffle(train)
    write_jsonl(Path(folder) / "text.jsonl", train)
    write_jsonl(Path(folder) / "held_out.jsonl", held_out)
    counts = {f"removed_{reason}": count for reason, count in sorted(removed.items())}
    size = sum(len(row["text"].encode()) for row in train)
    return {"documents": len(train), "bytes": size, "held_out": len(held_out), **counts}


def clean(rows: Iterator[Row], settings: CleaningSettings, removed: Counter[str]) -> Iterator[Row]:
    """The rows that pass all filters and are not copies, without their shared lines; `removed` counts the others."""
    if not settings.enabled:
        yield from rows
        return
    exact, near = ExactDuplicates(), NearDuplicates(settings.near_duplicate)
    lines = LineDuplicates(settings.line_documents) if settings.line_documents else None
    for row in rows:
        text = lines.without_seen_lines(row["text"]) if lines else row["text"]
        reason = why_rejected(text, settings)
        if reason is None and exact.seen(text):
            reason = "exact_copy"
        if reason is None and settings.near_duplicate < 1 and near.seen(text):
            reason = "near_copy"
        if reason is None:
            yield {**row, "text": text}
        else:
            removed[reason] += 1


def _hold_one_out(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(other rows, the document that a rising share holds out first, with its copies); (rows, []) if all are copies."""
    texts = {row["text"] for row in rows if row["text"].strip()}
    if len(texts) < 2:
        return rows, []
    first = min(texts, key=held_out_rank)
    return [row for row in rows if row["text"] != first], [row for row in rows if row["text"] == first]


def _documents(settings: CorpusSettings) -> Iterator[Row]:
    for document in stdlib_documents(settings):
        yield {"text": document.text, "source": f"stdlib/{document.kind}"}
    for source, row in rows_by_source(settings.files, "text"):
        yield {"text": row["text"], "source": source}
