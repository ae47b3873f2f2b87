"""What a store keeps of runs: journals and what is folded from them, answers of people, garbage collection, bundles."""
