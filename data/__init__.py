"""Text in, batches out. Read in this order:

    config       every setting (no torch, no ray)
    tasks/       generated problems with checkable answers; unsafe requests and harmless look-alikes
    stdlib_text  documents and instructions from Python's own library; corpus, filters, dedup: the pretraining text
    files        the files of a source; formats: JSONL, parquet and `datasets` sources as rows; shapes: of a row
    tokenized    token shards on disk; packing: sequences into rows
    loader       the samples of each step, for any number of ranks; mixture and permutation below it

Nothing is re-exported here, so that reading settings never imports torch.
"""
