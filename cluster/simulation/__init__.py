"""A simulated cluster of thousands of GPUs under the real core and policies."""
