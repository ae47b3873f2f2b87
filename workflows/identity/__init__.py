"""What makes two calls equal: canonical names, the fingerprint of a step's code, the keys under which results lie."""
