"""The command line. `run_script` is what a workflow file calls that is run as a script."""

from workflows.cli.main import run_script

__all__ = ["run_script"]
