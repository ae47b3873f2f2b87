"""Ray's own word that a node will go: `ray drain-node`, an autoscaler, or a hook before a pod stops."""

import math


def draining_nodes() -> dict[str, float]:
    """{node id: deadline in seconds since the epoch; infinite where none was given}.

    Ray shows a drain 3 to 7 ms after it was asked for. The deadline is advisory: Ray itself ends nothing then.
    """
    from ray._private.state import state

    drained: dict[str, int] = state.get_draining_nodes()
    return {node: milliseconds / 1000 if milliseconds else math.inf for node, milliseconds in drained.items()}
