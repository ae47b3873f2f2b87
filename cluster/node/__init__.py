"""The parts beside the ranks of one node: the agent that notices dead ranks, health, memory, metrics."""
