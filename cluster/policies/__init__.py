"""Decisions about a group, as pure functions: after losses and hangs, on scaling, nodes, snapshots, rollbacks."""
