"""Elastic pretraining on Ray: the lead that drives a group; its ranks, batches, proofs and logs."""
