"""Commands on models: serve, chat."""

from pathlib import Path

import click

from workflows.cli.options import FiniteRange, restarts_option, settings_of, store_option


@click.command()
@click.argument("artifact")
@store_option
@click.option("--grpc-port", type=int, help="Port of the gRPC gateway; 0: any free one.")
@click.option("--http-port", type=int, help="Port of the OpenAI-compatible server; 0: any free one.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any setting of the serving section.")
@click.option("--address", default="local", metavar="local|auto|ray://...", help="Ray to use  [default: local].")
@restarts_option
def serve(
    artifact: str,
    store: str | None,
    grpc_port: int | None,
    http_port: int | None,
    overrides: tuple[str, ...],
    address: str,
    local_ray_restarts: int | None,
) -> None:
    """Serve ARTIFACT until Ctrl-C: a model folder, a RUN, RUN:STEP, or the first digits of an artifact's digest."""
    from infra.config import load
    from serving.config import ServingSettings
    from serving.console import serve_forever
    from workflows.cli.find_model import find_model

    ports = {"grpc_port": grpc_port, "http_port": http_port}
    given = [f"{name}={port}" for name, port in ports.items() if port is not None]
    settings = load(None, ServingSettings, [*overrides, *given])
    run = settings_of(store=store, local_ray_restarts=local_ray_restarts)
    folder, version = find_model(artifact, run)
    serve_forever(folder, settings, version, address, run.local_ray_restarts, run.retry_window_s, say=click.echo)


@click.command()
@click.argument("address", default="127.0.0.1:50051")
@click.option("--token-file", type=click.Path(path_type=Path), help="File whose first line is the bearer token.")
@click.option("--tls-ca", type=click.Path(path_type=Path), help="PEM file of the authority that signed the endpoint.")
@click.option("--system", default="", help="System instruction.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
@click.option("--temperature", type=FiniteRange(min=0), help="0 is greedy.")
def chat(
    address: str,
    token_file: Path | None,
    tls_ca: Path | None,
    system: str,
    max_tokens: int | None,
    temperature: float | None,
) -> None:
    """Chat with a served model over gRPC at ADDRESS [default: 127.0.0.1:50051]. /new starts afresh, /exit ends."""
    from infra.tokens import read_tokens
    from serving.console import chat_loop

    token = None if token_file is None else read_tokens(token_file, "--token-file")[0]
    authority = None if tls_ca is None else _read(tls_ca, "--tls-ca")
    chat_loop(address, token, authority, system, max_tokens, temperature, say=_say)


def _read(path: Path, option: str) -> bytes:
    from infra.errors import ConfigError

    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}") from None


def _say(text: str, end: str = "\n", flush: bool = False) -> None:
    click.echo(text + end, nl=False)
