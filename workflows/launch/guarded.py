"""The end of every command: each expected error as one line per problem on stderr, and the exit code.

Codes: 0 done, 1 a step (or the platform or the store) failed, 2 the user must change something, 130 interrupted.
Only click is imported here, so that `recua --help` is fast.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import click


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; every expected error becomes one line per problem on stderr, and the exit code."""
    from infra.errors import RecuaError
    from infra.telemetry import hide_secrets_in_logs, take_any_text

    hide_secrets_in_logs()
    for stream in (sys.stdout, sys.stderr):
        take_any_text(stream)
    try:
        command()
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("recua: interrupted; run the same command again to resume", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RecuaError as error:
        return _explain(error)
    except Exception:
        import traceback

        from infra.telemetry import redact

        click.echo(redact(traceback.format_exc()), err=True)
        click.echo("recua: error: this is a bug in recua or in the workflow file, not in its settings", err=True)
        return 1


def _explain(error: Exception) -> int:
    from infra.errors import UserError
    from infra.telemetry import redact

    if trace := getattr(error, "user_traceback", ""):
        click.echo(redact(trace.rstrip()), err=True)
    for line in redact(str(error)).splitlines():
        click.echo(f"recua: error: {line}", err=True)
    if type(error).__name__ == "Cancelled":
        return 130
    return 2 if isinstance(error, UserError) else 1
