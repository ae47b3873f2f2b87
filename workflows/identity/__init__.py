"""The identity of calls: canonical names, the fingerprint of a step's code, the keys of results."""
