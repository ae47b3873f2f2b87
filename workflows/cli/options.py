"""Options that several commands share, and what they become: settings, an opened store, a path."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workflows.cli import service as service_commands

if TYPE_CHECKING:
    from infra.storage import Store
    from workflows.driver.settings import RunSettings


class FiniteRange(click.FloatRange):
    """A number in a range that is not NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is not a finite number.", param, ctx)


def store_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--store, the same for every command."""
    return click.option(
        "--store",
        envvar="RECUA_STORE",
        metavar="URL",
        help="Where runs are kept: a folder or s3://bucket/prefix  [default: the service's, else ~/.recua/store].",
    )(command)


def restarts_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--local-ray-restarts, the same for every command that may start a local Ray."""
    return click.option(
        "--local-ray-restarts",
        type=click.IntRange(min=0),
        metavar="N",
        help="How often a local Ray that dies is restarted within ten minutes  [default: 3].",
    )(command)


@dataclass(frozen=True)
class RunOptions:
    """The options of `run_options`, by the names of its parameters."""

    recipe: str | None
    overrides: tuple[str, ...]
    store: str | None
    run_id: str | None
    only_plan: bool
    new: bool
    rerun: tuple[str, ...]
    address: str | None
    local_ray_restarts: int | None
    reports: str
    detach: bool
    service: str | None
    token_file: str | None


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `recua run` and a workflow file run as a script share."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option("--recipe", metavar="FILE", help="TOML file with the settings."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one setting; repeatable."),
        store_option,
        click.option("--run", "run_id", metavar="ID", help="Name of the run  [default: workflow and recipe's hash]."),
        click.option("--plan", "only_plan", is_flag=True, help="Show steps, reuse, resources, disk; run nothing."),
        click.option("--new", is_flag=True, help="A new run of this recipe that reuses nothing."),
        click.option("--rerun", multiple=True, metavar="STEP", help="A new run that reuses all but this; repeatable."),
        click.option(
            "--address",
            metavar="local|auto|ray://...",
            help="Ray to use  [default: RAY_ADDRESS if it is set, as in a Ray job, else a new local one].",
        ),
        restarts_option,
        click.option("--reports", default="runs", metavar="DIR", help="Write DIR/RUN/report.html  [default: runs]."),
        click.option("--detach", is_flag=True, help="Submit it to the service (`recua up`) and return."),
        service_commands.service_options,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def settings_of(**given: Any) -> "RunSettings":
    from infra.config import validate
    from workflows.driver.settings import RunSettings
    from workflows.service.client import credentials

    if given.get("store") is None:
        given["store"] = credentials.known_store()
    return validate({name: value for name, value in given.items() if value is not None}, RunSettings, "options")


def open_store_of(settings: "RunSettings") -> "Store":
    from infra.storage import open_store

    return open_store(settings.store)


def local_folder(path: str | Path, option: str) -> Path:
    """A path on this machine. Raises ConfigError for a store's URL."""
    from infra.errors import ConfigError
    from infra.storage import parse_store

    scheme, local = parse_store(str(path), option)
    if scheme != "file":
        raise ConfigError(f"{option} {path}: name a path on this machine; only --store may be on S3")
    return Path(local).expanduser()
