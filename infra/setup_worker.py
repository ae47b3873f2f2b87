"""Starts a Ray worker process in its runtime environment, as Ray's own script of this name does (Ray 2.60), but without
importing Ray: that takes 0.4 s of CPU, and the worker imports it again.

Raylets run this file by its path, see `infra.ray_internals.quick_starts`. They leave it out, by this name, if a worker
has no runtime environment. What it does not know is handed to Ray's own script.
"""

import json
import os
import re
import sys

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
WORKER = "default_worker.py"
"""The program of a worker; Ray's own script lies beside it."""


def main(arguments: list[str]) -> None:
    command = [word for word in arguments if not word.startswith((CONTEXT, LANGUAGE))]
    contexts = [json.loads(word.removeprefix(CONTEXT)) for word in arguments if word.startswith(CONTEXT)]
    plain = len(contexts) == 1 and LANGUAGE + "PYTHON" in arguments and is_plain(contexts[0])
    if not plain:
        worker = next(word for word in arguments if os.path.basename(word) == WORKER)
        own = os.path.join(os.path.dirname(worker), os.path.basename(__file__))
        os.execv(sys.executable, [sys.executable, own, *arguments])
    for name, value in contexts[0]["env_vars"].items():  # a variable that is not set counts as empty
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    os.execv(sys.executable, [sys.executable, *command])


def is_plain(context: dict[str, object]) -> bool:
    """Nothing but variables: no other interpreter, no container."""
    asked = {name for name, value in context.items() if value and name != "env_vars"}
    return context.get("py_executable") == sys.executable and asked <= {"py_executable", "java_jars"}


if __name__ == "__main__":
    main(sys.argv[1:])
