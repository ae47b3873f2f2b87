"""Where the time of ranks went: buckets, accounts in the store, the account of a group."""
