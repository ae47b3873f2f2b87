"""Processes that start at once: forks of one process that has imported the modules that most of them need.

Never from a test's own process: a fork survives neither the threads that Ray and gRPC leave behind in it nor torch's.
"""

import multiprocessing

METHOD = "forkserver"
FORKS = multiprocessing.get_context(METHOD)
FORKS.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "models.sharding",
        "torch.distributed.checkpoint",
        "tests.helpers.elastic_ranks",
        "engines.elastic.pipeline",
        "engines.snapshots.dcp",
    ]
)
