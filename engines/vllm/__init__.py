"""vLLM as generator: one engine in a process of its own, weights updated in place."""
