"""`recua up` and `recua down`: start the service on a cluster or on a Ray head of its own, and stop it."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from infra.errors import ConfigError, RecuaError, SystemFault
from infra.machine import answers, require_port, require_ray
from infra.storage import default_store, open_store
from infra.tokens import digest
from workflows.runs.catalog import ask_to_stop
from workflows.service.client import credentials, ray_head
from workflows.service.client.credentials import Record
from workflows.service.client.http_client import Client
from workflows.service.server import actor

LOOPBACK = ("127.0.0.1", "::1", "localhost")
READY_TIMEOUT_S = 180.0
CANCEL_TIMEOUT_S = 60.0
DRIVERS = "~/.recua/drivers"
"""The folder on the head node where packages are unpacked for drivers."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class UpOptions:
    """Options of `recua up`. `address` None: RAY_ADDRESS, else the head that an earlier `up` started, else a new one.
    `store` None: the store of an earlier `up` without `down`, else ~/.recua/store."""

    address: str | None
    store: str | None
    host: str
    port: int
    auth: bool
    token_file: str | None
    hosts: tuple[str, ...]


def up(options: UpOptions, say: Say) -> None:
    """Start the service, or find it, and show its address.

    Raises:
        ConfigError: no cluster at the address, a port that is taken, or a service that is open to the network.
        StoreError: the store cannot be used.
    """
    if not options.auth and options.host not in LOOPBACK:
        raise ConfigError(f"--no-auth with --host {options.host} would open it to the network: use --host 127.0.0.1")
    store = open_store(credentials.known_store() or default_store() if options.store is None else options.store)
    store.check()
    token = credentials.make_token(options.token_file) if options.auth else None
    before = credentials.read_place()
    address, record, fresh = _cluster(options, before or {}, say)
    if fresh:  # record it at once, so that a head is not lost if this process dies
        url = f"http://{_shown(options.host)}:{options.port}"
        credentials.write_place({"url": url, "store": store.url, "address": address, "head": record})
    try:
        with connected(address, record) as ray:
            described, started = _service(ray, options, store.url, token)
    except BaseException:
        if record is not None and fresh:
            ray_head.stop(record)
            credentials.write_place(before)
        raise
    url = f"http://{_shown(described['host'])}:{described['port']}"
    credentials.write_place({"url": url, "store": described["store"], "address": address, "head": record})
    _show(say, options, url, described, started, record, token)


def down(say: Say, cancel: bool = False) -> None:
    """Stop the service, and the head if `up` started it. `cancel`: cancel the unfinished runs first.

    Raises:
        ConfigError: no service is known.
    """
    place = credentials.read_place()
    address = (place or {}).get("address") or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise ConfigError("no service is up here; set RAY_ADDRESS for a service that another user started")
    own = (place or {}).get("head")
    left: list[str] = []
    if ray_head.is_alive(own) if own is not None else place is None or answers(address):
        with connected(address, own) as ray:
            service = actor.find(ray)
            if service is not None:
                with contextlib.suppress(ray.exceptions.RayError):  # it may be dying
                    if cancel:
                        _cancel_all(ray, service, say)
                    left = ray.get(service.close.remote(), timeout=60)
                ray.kill(service, no_restart=True)
    say("the service is stopped")
    if own is not None:
        ray_head.stop(own)
        say(f"the Ray head at {address}, which `recua up` had started, is stopped")
    credentials.forget_place()
    if left:
        say(f"{len(left)} unfinished runs were interrupted; the next `recua up` resumes them: {', '.join(left)}")


def _cancel_all(ray: Any, service: Any, say: Say) -> None:
    """Cancel the service's runs, and wait until they have ended."""
    described = ray.get(service.describe.remote(), timeout=READY_TIMEOUT_S)
    store, runs = open_store(described["store"]), described["active"]
    for run_id in runs:
        say(f"cancelling {run_id}")
        ask_to_stop(store, run_id)
    deadline = time.monotonic() + CANCEL_TIMEOUT_S
    while runs and time.monotonic() < deadline:
        time.sleep(0.5)
        runs = ray.get(service.describe.remote(), timeout=READY_TIMEOUT_S)["active"]
    if runs:
        say(f"not ended within {CANCEL_TIMEOUT_S:g} s: {', '.join(runs)}")


@contextlib.contextmanager
def connected(address: str, own: Record | None) -> Iterator[Any]:
    """Connect Ray to a cluster; `own`: the head that `up` started, if it is this cluster's.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if own is not None:
        ray_head.use_ray_token()
    require_ray(address, "--address")
    import ray

    try:
        ray.init(address=address, namespace=actor.NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster there: {str(error).splitlines()[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _cluster(options: UpOptions, place: Record, say: Say) -> tuple[str, Record | None, bool]:
    """(address, the record of the head if it is our own, whether it was started now)."""
    given = options.address or os.environ.get("RAY_ADDRESS")
    known, own = place.get("address"), place.get("head")
    if own is not None and ray_head.is_alive(own):
        if given not in (None, known):
            raise ConfigError(f"the Ray head that `recua up` started still runs at {known}; `recua down` first")
        return str(known), own, False
    if own is not None:
        ray_head.stop(own)  # it died: end the rest of it before a new one starts
    elif known is not None and given is None and answers(known):
        return str(known), None, False
    if given:
        return given, None, False
    require_port(options.port, "--port", options.host)
    say("no cluster is named: starting a Ray head on this machine")
    return *ray_head.start(), True


def _service(ray: Any, options: UpOptions, store: str, token: str | None) -> tuple[Record, bool]:
    """(its description, whether it was started now)."""
    service = actor.find(ray)
    started = service is None
    if service is None:
        digests = () if token is None else (digest(token),)
        config = actor.HostConfig(store, options.host, options.port, digests, options.hosts, DRIVERS)
        service = actor.start(ray, config)
    try:
        described = ray.get(service.describe.remote(), timeout=READY_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise SystemFault(f"the service did not answer within {READY_TIMEOUT_S:g} s; `recua down` stops it") from None
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    return described, started


def _cause(error: Any) -> RecuaError:
    """The error of the actor's constructor."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    kind, _, text = last.partition(": ")
    if kind in ("infra.errors.ConfigError", "infra.errors.StoreError"):
        return ConfigError(text)
    return SystemFault(f"the service did not start: {last}")


def _show(
    say: Say, options: UpOptions, url: str, described: Record, started: bool, own: Record | None, token: str | None
) -> None:
    say(f"the service is {'up' if started else 'up already'}: {url}, runs in {described['store']}")
    if started and described["found"]:
        say(f"it resumes {len(described['found'])} unfinished runs: {', '.join(described['found'])}")
    if not started:
        if options.store is not None and described["store"] != open_store(options.store).url:
            say(f"note: it does not use --store {options.store}; `recua down` first to change that")
        _wait_until_ours(url, token if described["token_required"] else None)
    if described["token_required"]:
        kept = options.token_file or ("RECUA_TOKEN" if os.environ.get("RECUA_TOKEN") else credentials.home() / "token")
        say(f"page:    {url}/#token={token}")
        say(f"token:   in {kept}; HTTP clients send it as `Authorization: Bearer`")
    else:
        say(f"page:    {url}/ (no token: every process that reaches the port may use it)")
    say("submit:  recua run WORKFLOW_FILE --recipe FILE --detach")
    say("stop:    recua down" + (" (and the Ray head that was started with it)" if own is not None else ""))


def _wait_until_ours(url: str, token: str | None) -> None:
    """Check the token now, because a service that was already up may have another one."""
    client = Client(url, token)
    deadline = time.monotonic() + 10
    while True:
        try:
            client.get("/service")
            return
        except ConfigError:
            raise
        except RecuaError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _shown(host: str) -> str:
    """An address that a client on this machine can use."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
