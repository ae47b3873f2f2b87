"""What runs inside a Ray task: batches of attempts, what a body printed, its messages, its failures."""
