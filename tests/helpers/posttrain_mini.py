"""The whole post-training recipe in miniature: every stage runs for real, on a model that learns nothing.

Starts of processes (Ray, DeepSpeed, two vLLM engines) are nearly all of its time; everything else is as small as the
recipe's own checks allow.
"""

MINIATURE = (
    "corpus.stdlib_bytes=120000",
    "problems.instructions=512",
    "problems.safety_instructions=64",
    "problems.stdlib_instructions=16",
    "problems.prompts=256",
    "problems.safety_prompts=48",
    "problems.held_out=32",
    "problems.safety_held_out=8",
    "tokenizer.vocab_size=512",
    "model.dim=64",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=2",
    "model.ffn_dim=128",
    "pretrain.steps=5",
    "pretrain.batch_size=8",
    "pretrain.sequence_length=64",
    "pretrain.optimizer.warmup_steps=1",
    "sft.epochs=1",
    "preferences.prompts=64",
    "preferences.safety_prompts=32",
    "preferences.answers=4",
    "reward.epochs=1",
    "reward.batch_size=16",
    "rejection.prompts=64",
    "rejection.answers=4",
    "rejection.threshold=-100.0",
    "rejection.minimum_gap=0.0",
    "rejection_sft.epochs=1",
    "dpo.epochs=1",
    "ppo.steps=6",
    "ppo.batch_size=32",
    "ppo.mini_batch_size=16",
    "eval.problems=32",
    "eval.safety_prompts=8",
    "eval.pass_at_problems=8",
    "eval.pass_at=2",
    "pools.engine.kv_cache_gib=0.1",
    "serving.engine.kv_cache_gib=0.1",
)
"""Values for `--set`, on top of recipes/tiny.toml."""


def miniature(*more: str) -> list[str]:
    """Arguments of `recua run` or of a workflow file: the tiny recipe with the settings above, and with `more`."""
    settings = [argument for setting in (*MINIATURE, *more) for argument in ("--set", setting)]
    return ["--recipe", "recipes/tiny.toml", *settings]
