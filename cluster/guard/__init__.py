"""Protects training from bad hosts and bad steps: admission, proofs, stragglers, loss, corruption."""
