"""The HTTP interface over a real store: routes, schema, token, foreign hosts and origins, errors."""

import json
import os
import re
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import TypeAdapter

from infra.errors import ConfigError, StoreError, UserError
from infra.storage import Store, open_store
from infra.tokens import digest
from tests.helpers.stored_records import append
from workflows.runs.events import Event
from workflows.runs.history import Recorder
from workflows.runs.journal import Journal
from workflows.service import schemas
from workflows.service.client import credentials
from workflows.service.schemas import Submission
from workflows.service.server.app import PAGE, create_app

TOKEN = "a-token-for-tests"


class Refusing:
    """A Control that keeps what it was asked, and refuses what it does not like."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def active(self) -> list[str]:
        return ["r"]

    def is_active(self, run_id: str) -> bool:
        return run_id == "r"

    def has_package(self, sha256: str) -> bool:
        return sha256 == "a" * 64

    async def put_package(self, sha256: str, content: AsyncIterator[bytes]) -> None:
        self.asked.append(b"".join([chunk async for chunk in content]))

    def submit(self, submission: Submission) -> dict[str, Any]:
        self.asked.append(submission)
        if submission.workflow_file == "bad.py":
            raise ConfigError("recipe: unknown setting y; known: x\nrecipe: x: wrong")
        if submission.workflow_file == "down.py":
            raise StoreError("--store s3://bucket: cannot be reached; token=abcdefgh")
        return {"run_id": "r", "status": "submitted"}

    def cancel(self, run_id: str) -> str:
        if run_id != "r":
            raise UserError(f"no run {run_id!r} in the store")
        return "cancelling"

    def resume(self, run_id: str) -> str:
        raise RuntimeError("a fault\nof ours")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one run: two calls, one committed and one running, with a curve."""
    store = open_store(tmp_path / "store")
    made = {"format": 1, "run_id": "r", "workflow": "flow:toy", "recipe": {"args": [], "kwargs": {"x": 1}}}
    made |= {"recipe_hash": "h", "created": 1.0, "reuse": True, "rerun": []}
    store.put("runs/r/run.json", json.dumps(made).encode())
    journal = Journal.acquire(store, "r")
    start = {"type": "start", "step": "flow:a", "attempt": 1, "time": time.time()}
    commit = {"type": "commit", "call": "a[0]", "step": "flow:a", "key": "k", "code": "c", "inputs": "i"}
    commit |= {"result": [1, 2], "arguments": {"args": [], "kwargs": {}}, "started": 1.0, "ended": 2.0, "seconds": 1.0}
    append(journal, [{**start, "call": "a[0]", "attempt_id": "one"}])
    append(journal, [{**commit, "node": "n", "attempt": 1, "attempt_id": "one"}])
    append(journal, [{**start, "call": "a[1]", "attempt_id": "two", "needs": ["a[0]"]}])
    store.put("runs/r/attempts/one/log.txt", b"line one\nline two\n")
    store.put("runs/r/driver/000001.log", b"the driver says token=abcdefgh\n")
    recorder = Recorder(store, "r", journal.lease_slot, period_s=60)
    recorder(Event("progress", "a[1]", "a", {"done": 1, "total": 2, "metrics": {"loss": 0.5}}))
    recorder.close()
    return store


@pytest.fixture
def client(store: Store) -> TestClient:
    app = create_app(store, Refusing(), [digest(TOKEN)], ["recua.example"])
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(app, base_url="http://127.0.0.1:8266", headers=headers, raise_server_exceptions=False)


def test_service_answers_have_the_shapes_of_the_schema(client: TestClient) -> None:
    head = TypeAdapter(list[schemas.RunHead]).validate_python(client.get("/api/v1/runs").json())
    assert [(run.run_id, run.status, run.active) for run in head] == [("r", "running", True)]
    run = schemas.Run.model_validate(client.get("/api/v1/runs/r").json())
    assert run.workflow == "flow:toy" and run.active and run.counts["committed"] == 1
    steps = schemas.Steps.model_validate(client.get("/api/v1/runs/r/steps").json())
    assert {step.id: step.status for step in steps.steps} == {"a[0]": "committed", "a[1]": "running"}
    assert client.get(f"/api/v1/runs/r/steps?after={steps.version}").json()["steps"] == []
    detail = schemas.StepDetail.model_validate(client.get("/api/v1/runs/r/step", params={"id": "a[1]"}).json())
    assert detail.status == "running" and detail.needs == ["a[0]"]
    log = schemas.Log.model_validate(client.get("/api/v1/runs/r/log", params={"id": "a[0]", "offset": 9}).json())
    assert log.text == "line two\n" and log.offset == 18 and log.attempts == ["one"]
    driver = client.get("/api/v1/runs/r/log").json()["text"]
    assert "the driver says" in driver and "abcdefgh" not in driver
    metrics = schemas.Metrics.model_validate(client.get("/api/v1/runs/r/metrics").json())
    assert [event["metrics"] for event in metrics.events] == [{"loss": 0.5}]
    assert client.get("/api/v1/runs/r/metrics", params={"after": metrics.version}).json()["events"] == []
    results = schemas.Results.model_validate(client.get("/api/v1/runs/r/results").json())
    assert results.endpoints == [] and results.sections == []
    assert schemas.Service.model_validate(client.get("/api/v1/service").json()).active == ["r"]


def test_service_openapi_names_every_route_with_its_answer(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    paths = schema["paths"]
    routes = {f"{method.upper()} {path.removeprefix('/api/v1')}" for path in paths for method in paths[path]}
    wanted = {"GET /runs", "POST /runs", "GET /runs/{run}", "GET /runs/{run}/steps", "GET /runs/{run}/step"}
    wanted |= {"GET /runs/{run}/log", "GET /runs/{run}/metrics", "GET /runs/{run}/lineage", "PUT /packages/{sha256}"}
    wanted |= {"GET /packages/{sha256}", "POST /runs/{run}/cancel", "POST /runs/{run}/resume", "GET /healthz"}
    assert wanted <= routes
    for path, each in paths.items():
        for operation in each.values():
            good = [answer for code, answer in operation["responses"].items() if code.startswith("2")]
            assert good and all(answer["content"]["application/json"]["schema"] for answer in good), path
            refused = operation["responses"].get("401", {}).get("content", {}).get("application/json", {})
            assert path == "/healthz" or (operation["security"] and refused["schema"]["$ref"].endswith("/Problem")), (
                path
            )


def test_service_wants_a_token_for_all_but_health_and_page(store: Store) -> None:
    app = create_app(store, Refusing(), [digest("other"), digest(TOKEN)])
    client = TestClient(app, base_url="http://localhost")
    assert client.get("/healthz").json() == {"status": "ok", "token_required": True}
    paths = [path for path in client.get("/openapi.json").json()["paths"] if path.startswith("/api/v1")]
    assert len(paths) > 10
    for path in paths:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for method in ("GET", "POST", "PUT"):
                answer = client.request(method, path.format(run="r", sha256="0" * 64), headers=given)
                assert answer.status_code in (401, 405), (method, path)
                if answer.status_code == 401:
                    assert "~/.recua/token" in answer.json()["error"] and answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/api/v1/runs", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert client.get(f"/api/v1/runs?token={TOKEN}").status_code == 401, "never in a URL"
    open_client = TestClient(create_app(store, Refusing(), []), base_url="http://localhost")
    assert open_client.get("/api/v1/runs").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:8266", ""])
def test_service_refuses_foreign_hosts(client: TestClient, host: str) -> None:
    answer = client.get("/healthz", headers={"Host": host})
    assert answer.status_code == 421 and "--allow-host" in answer.json()["error"]


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "[::1]:8266", "10.1.2.3:80", "recua.example", "RECUA.example:1"]
)
def test_service_knows_its_hosts(client: TestClient, host: str) -> None:
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


def test_service_refuses_other_origins_and_sends_no_cors_headers(client: TestClient) -> None:
    assert client.post("/api/v1/runs/r/cancel", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.options("/api/v1/runs", headers={"Origin": "null"}).status_code == 403
    own = client.post("/api/v1/runs/r/cancel", headers={"Origin": "http://127.0.0.1:8266"})
    assert own.status_code == 202 and own.json() == {"run_id": "r", "status": "cancelling"}
    assert not [name for name in own.headers if name.startswith("access-control")]
    assert "frame-ancestors 'none'" in own.headers["content-security-policy"]


def test_service_errors_are_one_json_line(client: TestClient) -> None:
    body = {"package": "a" * 64, "workflow_file": "bad.py"}
    refused = client.post("/api/v1/runs", json=body)
    assert refused.status_code == 422
    assert refused.json() == {"error": "recipe: unknown setting y; known: x\nrecipe: x: wrong"}, (
        "as `recua run` says it"
    )
    down = client.post("/api/v1/runs", json={**body, "workflow_file": "down.py"})
    assert down.status_code == 503 and "abcdefgh" not in down.text
    assert client.get("/api/v1/runs/nope").status_code == 404
    assert "no run 'nope'" in client.get("/api/v1/runs/nope/steps").json()["error"]
    assert client.get("/api/v1/runs/r/step", params={"id": "zzz"}).status_code == 404
    assert client.post("/api/v1/runs/nope/cancel").status_code == 404
    malformed = client.post("/api/v1/runs", json={**body, "package": "short", "more": 1})
    assert malformed.status_code == 422 and "package" in malformed.json()["error"]
    fault = client.post("/api/v1/runs/r/resume")
    assert fault.status_code == 500 and fault.json()["error"] == "a bug in the service: RuntimeError: a fault of ours"
    assert client.get("/nothing").json() == {"error": "Not Found"}


def test_service_takes_packages_and_submissions(store: Store) -> None:
    control = Refusing()
    client = TestClient(create_app(store, control, []), base_url="http://localhost")
    assert client.get(f"/api/v1/packages/{'a' * 64}").json()["stored"] is True
    assert client.put(f"/api/v1/packages/{'b' * 64}", content=b"zip").status_code == 201
    answer = client.post("/api/v1/runs", json={"package": "a" * 64, "workflow_file": "flow.py", "recipe": {"x": 1}})
    assert answer.status_code == 201 and answer.json() == {"run_id": "r", "status": "submitted"}
    sent = Submission(package="a" * 64, workflow_file="flow.py", recipe={"x": 1})
    assert control.asked == [b"zip", sent]


def test_service_passes_answers_on_to_waiting_calls(client: TestClient, store: Store) -> None:
    assert store.put_if_absent("runs/asks/run.json", store.get("runs/r/run.json") or b"")
    journal = Journal.acquire(store, "asks")
    wait = {"type": "wait", "message": "Ship it?", "time": 1.0, "deadline": None, "inputs": "i", "show": None}
    append(journal, [{**wait, "call": "approval[ship]", "step": "workflows.waits:approval"}])
    append(journal, [{**wait, "call": "event[labels]", "step": "workflows.waits:event"}])
    yes = {"id": "ship", "approve": True, "comment": "good"}
    answer = client.post("/api/v1/runs/asks/approve", json=yes)
    assert answer.status_code == 200 and "approval[ship] is approved" in answer.json()["message"]
    again = client.post("/api/v1/runs/asks/approve", json={**yes, "approve": False})
    assert again.status_code == 422 and "approved by the service" in again.json()["error"]
    sent = client.post("/api/v1/runs/asks/send", json={"id": "event[labels]", "value": {"rows": [1]}})
    assert sent.status_code == 200
    signals = [json.loads(store.get(key) or b"") for key in store.list("runs/asks/signals")]
    values = [signal["value"] for signal in signals]
    assert {"rows": [1]} in values and {"approve": True, "comment": "good"} in values
    wrong = client.post("/api/v1/runs/asks/approve", json={**yes, "id": "shop"})
    assert wrong.status_code == 422 and "did you mean" in wrong.json()["error"]
    assert client.post("/api/v1/runs/nope/approve", json=yes).status_code == 404


def test_service_page_is_served_without_a_token(store: Store) -> None:
    client = TestClient(create_app(store, Refusing(), [digest(TOKEN)]), base_url="http://localhost")
    assert client.get("/assets/../app.py").status_code == 404
    for file in PAGE.glob("*"):
        assert client.get(f"/assets/{file.name}").content == file.read_bytes()
        outside = re.sub(r"http://www\.w3\.org/[\w/]+", "", file.read_text())
        assert "http://" not in outside and "https://" not in outside, "the page asks nobody else"
    policy = client.get("/").headers["Content-Security-Policy"]
    assert "default-src 'self';" in policy and "unsafe" not in policy


def test_service_token_is_made_once_and_private(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RECUA_TOKEN", raising=False)
    assert credentials.read_token(None) is None
    token = credentials.make_token(None)
    file = home / ".recua" / "token"
    assert len(token) >= 40 and stat.S_IMODE(os.stat(file).st_mode) == 0o600 and file.read_text() == token + "\n"
    assert credentials.make_token(None) == token == credentials.read_token(None)
    assert token not in digest(token) and len(digest(token)) == 64
    monkeypatch.setenv("RECUA_TOKEN", "from the environment")
    assert credentials.make_token(None) == "from the environment"
    (tmp_path / "t").write_text(" in a file \n")
    assert credentials.read_token(str(tmp_path / "t")) == "in a file"
    for name, text in (("none", "No such file"), ("empty", "holds no token")):
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(ConfigError, match=f"--token-file: .*{text}"):
            credentials.read_token(str(tmp_path / name))


def test_service_url_comes_from_what_up_left(home: Path) -> None:
    with pytest.raises(UserError, match="recua up"):
        credentials.service_url(None)
    credentials.write_place({"url": "http://127.0.0.1:1", "store": "s", "address": "a", "head": None})
    assert credentials.service_url(None) == "http://127.0.0.1:1" and credentials.service_url("http://x/") == "http://x"
    credentials.forget_place()
    assert credentials.read_place() is None
