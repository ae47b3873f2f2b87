"""The HTTP service: routes, token, errors. `workflows.views` makes its answers; a Control carries out its requests.

    GET  /healthz                 200 while the service works (no token)
    GET  /, /assets/...           the page (no token; the page asks for it)
    *    /api/v1/...              with `Authorization: Bearer TOKEN`
    GET  /openapi.json            all routes with their models (no token)

Every error is `{"error": "one line"}`. Other origins get no answer: there are no CORS headers, and a foreign `Origin`
is refused, as is a `Host` that is neither an address nor a name of this service (DNS rebinding).
"""

import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from infra.errors import RecuaError, StoreError, UserError
from infra.storage import Store
from infra.telemetry import redact
from serving.auth import TokenAuthority
from workflows.report import record
from workflows.report import results as report_results
from workflows.runs import signals
from workflows.runs.catalog import load_metadata, load_run
from workflows.service import schemas
from workflows.service.server.control import Control
from workflows.views import run_views

PAGE = Path(run_views.__file__).parent / "page"
NO_TOKEN = (
    "a valid bearer token is required; `recua up` made it: ~/.recua/token on the machine where it ran "
    "(give it with --token-file or RECUA_TOKEN)"
)
ASKED_OVER = "the service"
"""The author of answers that come over HTTP: the holder of the token."""
PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": schemas.Problem, "description": "No valid token."},
    404: {"model": schemas.Problem, "description": "No such run, step or artifact."},
    422: {"model": schemas.Problem, "description": "What `recua` on the command line would refuse, in the same words."},
    503: {"model": schemas.Problem, "description": "The store does not answer."},
}
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def create_app(store: Store, control: Control, digests: Collection[str], hosts: Collection[str] = ()) -> FastAPI:
    """The service over `store`. `digests`: sha256 of the accepted tokens; if empty, the service is open. `hosts`: names
    by which clients may call it, besides addresses and localhost."""
    app = FastAPI(title="recua", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=4096, compresslevel=1)  # 10,000 steps: 2.1 MB of JSON, 0.16 packed
    authority = TokenAuthority(digests)

    def authorized(request: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> None:
        if not authority.accepts(request.headers.get("authorization")):
            raise HTTPException(401, NO_TOKEN, {"WWW-Authenticate": "Bearer"})

    _closed(app, {"localhost", *(host.lower() for host in hosts)})
    _errors(app)

    @app.get("/healthz", response_model=schemas.Health)
    def healthz() -> Any:
        return {"status": "ok", "token_required": bool(digests)}

    for router in (_reading(store, control), _acting(store, control)):
        app.include_router(router, prefix="/api/v1", dependencies=[Depends(authorized)], responses=PROBLEMS)
    app.mount("/assets", StaticFiles(directory=PAGE, check_dir=False))

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    return app


def _reading(store: Store, control: Control) -> APIRouter:
    """Routes that only read."""
    router = APIRouter(tags=["runs"])
    cache = run_views.RunCache()

    @router.get("/runs", response_model=list[schemas.RunHead])
    def runs() -> Any:
        """Every run of the store, newest first."""
        return _json([{**each, "active": control.is_active(each["run_id"])} for each in run_views.runs(store)])

    @router.get("/runs/{run}", response_model=schemas.Run)
    def run(run: str) -> Any:
        """One run with its recipe, result and error."""
        return _json({**run_views.run(cache, store, run), "active": control.is_active(run)})

    @router.get("/runs/{run}/steps", response_model=schemas.Steps)
    def steps(run: str, after: int = 0) -> Any:
        """The steps that changed after version `after`."""
        return _json(run_views.steps(cache, store, run, after))

    @router.get("/runs/{run}/step", response_model=schemas.StepDetail)
    def step(run: str, id: str) -> Any:
        """One call with its arguments, result, error, attempts and artifacts."""
        return _json(run_views.step(cache, store, run, id))

    @router.get("/runs/{run}/log", response_model=schemas.Log)
    def log(run: str, id: str = "", attempt: str = "", offset: int = 0) -> Any:
        """The output of an attempt of a call from byte `offset`; without `id`, the output of the run's driver."""
        return _json(run_views.log(cache, store, run, id, attempt, offset))

    @router.get("/runs/{run}/metrics", response_model=schemas.Metrics)
    def metrics(run: str, id: str = "", after: str = "") -> Any:
        """Progress and metrics since the cursor `after`."""
        return _json(run_views.metrics(cache, store, run, id, after))

    @router.get("/runs/{run}/results", response_model=schemas.Results)
    def results(run: str) -> Any:
        """The run's results: evaluations, answers, endpoints, and where the time of elastic groups went."""
        return _json(report_results.results(record.read_run(store, load_run(store, run), with_metrics=False)))

    @router.get("/runs/{run}/lineage", response_model=schemas.Lineage)
    def lineage(run: str, digest: str) -> Any:
        """The origin of an artifact: its call, inputs, code and parents."""
        return _json(run_views.lineage(cache, store, run, digest))

    return router


def _acting(store: Store, control: Control) -> APIRouter:
    """Routes that start, stop and answer."""
    router = APIRouter(tags=["actions"])

    @router.get("/service", response_model=schemas.Service)
    def service() -> Any:
        """The service's store, and the runs that it drives."""
        return {"store": redact(store.url), "active": control.active()}

    @router.get("/packages/{sha256}", response_model=schemas.PackageState)
    def has_package(sha256: str) -> Any:
        """Whether the store has a code package."""
        return {"sha256": sha256, "stored": control.has_package(sha256)}

    @router.put("/packages/{sha256}", response_model=schemas.PackageState, status_code=201)
    async def put_package(sha256: str, request: Request) -> Any:
        """Store a code package: the body is a zip file of the working folder."""
        await control.put_package(sha256, request.stream())
        return {"sha256": sha256, "stored": True}

    @router.post("/runs", response_model=schemas.Submitted, status_code=201)
    def submit(submission: schemas.Submission) -> Any:
        """Start or resume a run. Answers with the run's id, or with the error of `recua run`."""
        return control.submit(submission)

    @router.post("/runs/{run}/cancel", response_model=schemas.RunState, status_code=202)
    def cancel(run: str) -> Any:
        """Ask the run to stop; it can be resumed."""
        return {"run_id": run, "status": control.cancel(run)}

    @router.post("/runs/{run}/approve", response_model=schemas.Said)
    def approve(run: str, answer: schemas.Approval) -> Any:
        """Answer an approval that the run waits for. The first answer counts."""
        load_metadata(store, run)
        value = {"approve": answer.approve, "comment": answer.comment}
        return {"message": signals.reply(store, run, answer.id, "approval", value, ASKED_OVER)}

    @router.post("/runs/{run}/send", response_model=schemas.Said)
    def send(run: str, message: schemas.Message) -> Any:
        """Send the value of an event that the run waits for. The first one counts."""
        load_metadata(store, run)
        return {"message": signals.reply(store, run, message.id, "event", message.value, ASKED_OVER)}

    @router.post("/runs/{run}/resume", response_model=schemas.RunState, status_code=202)
    def resume(run: str) -> Any:
        """Resume a run that failed, was cancelled, or lost its driver."""
        return {"run_id": run, "status": control.resume(run)}

    return router


def _json(tree: Any) -> Response:
    """A response that is not validated against its model, which takes long for ten thousand steps; tests do that."""
    return Response(json.dumps(tree, separators=(",", ":"), allow_nan=False), media_type="application/json")


def _errors(app: FastAPI) -> None:
    """Answer every error with one line of JSON."""

    def answer(status: int, text: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": redact(" ".join(text.split("\n")))}, status, headers)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        return answer(422, f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}")

    @app.exception_handler(RecuaError)
    async def failed(_: Request, error: RecuaError) -> Response:
        return JSONResponse({"error": redact(str(error))}, _status(error))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return answer(500, f"a bug in the service: {type(error).__name__}: {error}")


def _status(error: RecuaError) -> int:
    if isinstance(error, UserError):
        return 404 if str(error).startswith("no run ") or " has no " in str(error) else 422
    return 503 if isinstance(error, StoreError) else 500


def _closed(app: FastAPI, names: Collection[str]) -> None:
    """Refuse foreign hosts and origins; set headers that isolate the page in browsers."""

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        host = request.headers.get("host", "")
        if not _is_ours(host, names):
            return JSONResponse({"error": f"unknown host {host!r}; start the service with --allow-host"}, 421)
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return JSONResponse({"error": "requests from other origins are refused"}, 403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def _is_ours(host: str, names: Collection[str]) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True
