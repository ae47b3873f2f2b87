"""The DeepSpeed learner of the post-training loops, its state and snapshots."""
