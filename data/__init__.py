"""Text in, batches out. Read in this order:

    config       every setting (no torch, no ray)
    tasks/       made problems with checkable answers, and the safety requests beside their look-alikes
    stdlib_text  documents and instructions from Python's own library; corpus, filters, dedup: the pretraining text
    files        which files a source means; formats: JSONL, parquet and `datasets` sources as rows; shapes: of a row
    tokenized    token shards on disk; packing: sequences into rows
    loader       which samples a step trains on, for any number of ranks; mixture and permutation below it

Nothing is re-exported here, so that reading settings never imports torch.
"""
