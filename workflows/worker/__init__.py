"""The code inside a Ray task: batches of attempts, captured output, messages to the driver, failures."""
