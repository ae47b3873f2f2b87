"""The processes that drive submitted runs, and what the store keeps of them."""
