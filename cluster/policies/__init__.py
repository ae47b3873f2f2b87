"""Decisions after a loss, as pure functions: shrink, take a spare, wait, stop."""
