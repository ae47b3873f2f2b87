"""The commands of the service: up, down, watch. Only click is imported here, as in workflows.cli."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

CANCEL_WAIT_S = 30.0


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options by which a client finds the service and its token."""
    url = click.option(
        "--service", envvar="RECUA_SERVICE", metavar="URL", help="The service  [default: the one of `recua up`]."
    )
    return url(token_option(command))


def token_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--token-file."""
    text = "File with the token  [default: RECUA_TOKEN, else ~/.recua/token]."
    return click.option("--token-file", type=click.Path(), metavar="FILE", help=text)(command)


@click.command()
@click.option("--address", metavar="HOST:PORT", help="Ray cluster  [default: RAY_ADDRESS, else one is started here].")
@click.option(
    "--store",
    envvar="RECUA_STORE",
    metavar="URL",
    help="Where runs are kept  [default: where a service that was lost kept them, else ~/.recua/store].",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface that the service listens on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8266,
    show_default=True,
    help="Port of the service; 0: any free one.",
)
@click.option("--no-auth", is_flag=True, help="Require no token; only for a service on this machine alone.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name that clients call it by; repeatable.")
@token_option
def up(address: str | None, store: str | None, no_auth: bool, allow_host: tuple[str, ...], **given: Any) -> None:
    """Start the graph service on a Ray cluster, or show its address. It resumes unfinished runs in the store."""
    from workflows.service.client.up import UpOptions
    from workflows.service.client.up import up as bring_up

    bring_up(UpOptions(address=address, store=store, auth=not no_auth, hosts=allow_host, **given), click.echo)


@click.command()
@click.option("--cancel", is_flag=True, help="Cancel unfinished runs first, so that they are not resumed later.")
def down(cancel: bool) -> None:
    """Stop the service, and the Ray head if `recua up` started it. The next `recua up` resumes unfinished runs."""
    from workflows.service.client.up import down as take_down

    take_down(click.echo, cancel)


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option("--store", envvar="RECUA_STORE", metavar="URL", help="Read this store, without a service.")
@service_options
def watch(run_id: str, store: str | None, service: str | None, token_file: str | None) -> None:
    """Follow RUN until it ends, wherever its driver is. Ctrl-C only stops watching. The exit code is the run's."""
    from workflows.launch.display import open_display
    from workflows.service.client import watch as watching

    source = _source(run_id, store, service, token_file)
    try:
        with open_display() as display:
            run = watching.watch(source, display)
    except KeyboardInterrupt:
        click.echo(f"stopped watching; the run continues (`recua watch {run_id}`, `recua cancel {run_id}`)", err=True)
        sys.exit(130)
    if error := run.get("error"):
        _explain(error)
    if run["status"] in ("interrupted", "submitted"):
        click.echo(f"run {run_id} has no driver: `recua resume {run_id}` resumes it here", err=True)
        if run["status"] == "submitted":
            click.echo("`recua up` on its service's machine resumes it too", err=True)
    sys.exit(watching.exit_code(run))


def detach(
    file: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    service: str | None,
    token_file: str | None,
    **given: Any,
) -> None:
    """`recua run --detach`."""
    from workflows.service.client import credentials
    from workflows.service.client.http_client import Client
    from workflows.service.client.submit import submit
    from workflows.service.drivers import packages

    client = Client(credentials.service_url(service), credentials.read_token(token_file))
    answer = submit(client, file, recipe, overrides, **given)
    run_id, package = answer["run_id"], answer["package"]
    for name in package.left_out:
        why = (
            "a link to a folder or to nothing"
            if packages.fits(name)
            else "a name that a package cannot hold: rename it"
        )
        click.echo(f"note: {name!r} was not sent: it is {why}", err=True)
    if answer["status"] == "finished":
        click.echo(f"run {run_id} has already finished; nothing ran (--new starts another)")
    elif answer["status"] == "running":
        click.echo(f"run {run_id} is already running")
    else:
        click.echo(f"run {run_id} is submitted: {package.files} files of code, sha256 {package.sha256[:12]}")
    click.echo(f"follow it with `recua watch {run_id}`")


def resume(run_id: str, store: str | None, service: str | None, token_file: str | None) -> None:
    """`recua resume --detach`."""
    from workflows.service.client import credentials
    from workflows.service.client.http_client import Client, path_of
    from workflows.service.client.submit import check_store

    client = Client(credentials.service_url(service), credentials.read_token(token_file))
    check_store(client, store)
    status = client.post(path_of(run_id, "/resume"))["status"]
    click.echo(f"run {run_id} has already finished" if status == "finished" else f"the service resumes run {run_id}")
    click.echo(f"follow it with `recua watch {run_id}`")


def cancel(store: Any, run_id: str) -> str:
    """`recua cancel`: ask the run's driver, or the service that would start one, to end it; returns the run's status.

    Raises:
        UserError: there is no such run.
    """
    from workflows.runs.catalog import cancel_run, load_metadata
    from workflows.service.client import credentials
    from workflows.service.drivers import records

    load_metadata(store, run_id)
    served = credentials.known_store() == store.url and records.active_after(store, run_id) is not None
    status = cancel_run(store, run_id)
    deadline = time.monotonic() + CANCEL_WAIT_S
    while served and status in ("interrupted", "submitted") and time.monotonic() < deadline:
        time.sleep(0.5)
        status = cancel_run(store, run_id)
    return status


def _source(run_id: str, store: str | None, service: str | None, token_file: str | None) -> Any:
    """The service, if one answers; the store, if no service is known or --store was given."""
    from infra.storage import default_store, open_store
    from workflows.service.client import credentials
    from workflows.service.client.http_client import Client, Unreachable
    from workflows.service.client.watch import ServiceSource, StoreSource

    place = credentials.read_place()
    if service is not None or (place is not None and store in (None, place["store"])):
        client = Client(credentials.service_url(service), credentials.read_token(token_file))
        try:
            client.get("/service")
        except Unreachable:
            if service is not None or place is None:
                raise
            store = store or str(place["store"])
            return StoreSource(open_store(store), run_id, served=True)
        return ServiceSource(client, run_id)
    return StoreSource(open_store(default_store() if store is None else store), run_id)


def _explain(error: dict[str, Any]) -> None:
    """The error that ended a run, as `recua run` prints it."""
    from infra.telemetry import redact

    if error.get("kind") == "user" and error.get("traceback"):
        click.echo(redact(str(error["traceback"]).rstrip()), err=True)
    for line in redact(str(error.get("message", ""))).splitlines():
        click.echo(f"recua: error: {line}", err=True)
