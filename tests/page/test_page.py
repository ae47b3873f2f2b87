"""The page in headless Chromium, clicked through as a user would: over stores written by the real Journal, and over a
real run on a real Ray that a real supervisor drives.

Screenshots go to PAGE_SCREENSHOTS, or to the test's temporary folder.
"""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import page_stores as stores
import pytest
import uvicorn
from conftest import BROWSERS
from page_stores import artifact, commit, end, failure, full, start

from infra.errors import UserError
from infra.storage import Store, open_store
from workflows.journal import Heartbeat
from workflows.service import packages
from workflows.service.app import create_app
from workflows.service.client import Client
from workflows.service.control import Control
from workflows.service.models import Submission

pytestmark = pytest.mark.page
TOKEN = "a-token-for-the-page"
PATIENCE_MS = 60_000
TRACE = 'Traceback (most recent call last):\n  File "recipe.py", line 42, in train\n    raise ValueError("no")\n'
EVIL = "<img src=x onerror=\"document.title='hacked'\">"


class Site:
    """A service on a loopback port; `down()` and `up()` as an administrator would."""

    def __init__(self, store: Store, control: Control) -> None:
        self._app = create_app(store, control, {hashlib.sha256(TOKEN.encode()).hexdigest()})
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.up()

    def up(self) -> None:
        self._server = uvicorn.Server(uvicorn.Config(self._app, "127.0.0.1", self.port, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the service did not start"
            time.sleep(0.02)

    def down(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)


@dataclass
class Asked:
    """A Control that writes down what the buttons ask for, and refuses a second resume."""

    said: list[tuple[str, str]] = field(default_factory=list)

    def active(self) -> list[str]:
        return []

    def is_active(self, run_id: str) -> bool:
        return False

    def has_package(self, sha256: str) -> bool:
        return False

    async def put_package(self, sha256: str, content: AsyncIterator[bytes]) -> None:
        raise AssertionError("the page sends no packages")

    def submit(self, submission: Submission) -> dict[str, Any]:
        raise AssertionError("the page submits nothing")

    def cancel(self, run_id: str) -> str:
        self.said.append(("cancel", run_id))
        return "cancelling"

    def resume(self, run_id: str) -> str:
        if ("resume", run_id) in self.said:
            raise UserError(f"run {run_id} is being driven already")
        self.said.append(("resume", run_id))
        return "submitted"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A new private window. Errors of the page's own code fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: _console(message, problems))
    yield page
    context.close()
    assert problems == []


def _console(message: Any, problems: list[str]) -> None:
    expected = re.search(r"401|404|422|ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET", message.text)
    if message.type == "error" and not expected:
        problems.append(message.text)


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[[Any, str], None]:
    folder = Path(os.environ.get("PAGE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, asked: Asked) -> Iterator[Site]:
    """Runs of every kind: 10,000 steps, a live one that somebody must approve, a failed one with lineage."""
    store = open_store(tmp_path_factory.mktemp("page") / "store")
    stores.chains(store, "chains")
    live_run(store)
    failed_run(store)
    live = stores.open_run(store, "heartbeat")
    beats = Heartbeat(live, lambda: None, lambda error: None)
    site = Site(store, asked)
    yield site
    site.down()
    beats.close()


def live_run(store: Store) -> None:
    now = time.time()
    journal = stores.open_run(store, "live", {"seed": 1, "lr": 0.001}, created=now - 100)
    ask = {"type": "wait", "call": "approval[ship]", "step": "workflows.waits:approval", "message": "Ship it?"}
    journal.append(
        [
            start("corpus[0]", "demo:corpus", at=now - 90),
            commit("corpus[0]", "demo:corpus", now - 90, 20.0, artifact("c0", "corpus")),
            *(start(f"train[{number}]", at=now - 60, needs=["corpus[0]"]) for number in range(3)),
            failure("train[1]", f"no {EVIL}", final=False, at=now - 50, trace=TRACE),
            start("train[1]", attempt=2, at=now - 45, needs=["corpus[0]"]),
            {**ask, "time": now - 30, "needs": ["corpus[0]"], "deadline": None, "inputs": "", "show": {"score": 0.93}},
        ]
    )
    lines = "".join(f"step {number} loss {3 / (number + 1):.3f}\n" for number in range(50))
    store.put("runs/live/attempts/train[1]-2/log.txt", f"{EVIL}\n{lines}".encode())
    rows = [[number + 1, now - 60 + number, number, 100, {"loss": 3 / (number + 1)}] for number in range(40)]
    history = {"format": 1, "curves": [{"call": "train[0]", "rows": rows}], "texts": []}
    more = [[100 + number, when, done, total, {"loss": 5 / (done + 1)}] for number, when, done, total, _ in rows]
    history["curves"].append({"call": "train[1]", "rows": more})  # type: ignore[attr-defined]
    store.put("runs/live/history/00000001-0000000200.json", stores.json.dumps(history).encode())


def failed_run(store: Store) -> None:
    journal = stores.open_run(store, "failed", created=time.time() - 3600)
    store.put("runs/failed/submission.json", b"{}")
    model = commit("train[0]", result=artifact("a0", "model"), needs=["corpus[0]"])
    model["arguments"] = {
        "args": [{"$artifact": full("c0")}, {"$settings": "r:S", "fields": {"lr": 0.1}}],
        "kwargs": {},
    }
    corpus = commit("corpus[0]", "demo:corpus", result=artifact("c0", "corpus"))
    corpus["arguments"] = {"args": [{"books.txt": "b" * 64}], "kwargs": {}}
    error = {"kind": "user", "type": "StepError", "message": "check[0]: ValueError: no", "traceback": TRACE}
    journal.append([corpus, model, start("check[0]", "demo:check", needs=["train[0]"])])
    journal.append([failure("check[0]", "no", final=True, trace=TRACE), end("failed", error=error)])


def enter(tab: Any, site: Site, address: str = "#/runs") -> None:
    """Open an address with the token, as `recua up` prints it."""
    tab.goto(f"{site.url}/#token={TOKEN}&{address.removeprefix('#')}")
    tab.wait_for_selector(".page")


def until(tab: Any, expression: str) -> None:
    """Wait for an expression of the page to be true (Playwright's own way needs eval, which the page forbids)."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, expression
        tab.wait_for_timeout(50)


def click_node(tab: Any, name: str) -> None:
    """Click a node of the graph's canvas, with the mouse."""
    until(tab, f"document.querySelector('.view.graph')?.scene?.where({name!r})")
    tab.click("text=Fit")
    tab.wait_for_timeout(100)
    at = tab.evaluate(f"document.querySelector('.view.graph').scene.where({name!r})")
    tab.mouse.click(at["x"], at["y"])


def test_page_asks_for_the_token_and_takes_it_from_the_address(tab: Any, site: Site, shoot: Any) -> None:
    tab.goto(site.url)
    tab.wait_for_selector("dialog >> text=Token")
    tab.fill("dialog input[type=password]", "wrong")
    tab.click("dialog >> text=Go on")
    tab.wait_for_selector("dialog >> text=does not accept this token")
    shoot(tab, "token")
    tab.fill("dialog input[type=password]", TOKEN)
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".run-row >> text=chains")
    assert tab.evaluate("localStorage.getItem('recua-token')") is None

    tab.evaluate("sessionStorage.clear()")
    enter(tab, site, "#/runs/live")
    tab.wait_for_selector("h1 >> text=live")
    assert TOKEN not in tab.url and tab.url.endswith("#/runs/live")


def test_page_lists_runs(tab: Any, site: Site, shoot: Any) -> None:
    enter(tab, site)
    tab.wait_for_selector(".run-row")
    shoot(tab, "runs")
    assert tab.locator(".run-row").count() == 4
    assert tab.inner_text("[data-run=chains] .progress") == "10,000 of 10,000 steps"
    assert "failed" in tab.inner_text("[data-run=failed] .chip")
    tab.fill(".search", "fail")
    tab.wait_for_selector("text=1 of 4 runs")
    assert tab.locator(".run-row").count() == 1
    tab.fill(".search", "nothing like that")
    tab.wait_for_selector("text=No run matches")
    tab.fill(".search", "")
    tab.keyboard.press("Tab")
    tab.click("[data-run=live]")
    tab.wait_for_selector("h1 >> text=live")


def test_page_shows_a_live_run(tab: Any, site: Site, shoot: Any) -> None:
    enter(tab, site, "#/runs/live")
    tab.wait_for_selector(".banner >> text=Ship it?")
    click_node(tab, "train[1]")
    tab.wait_for_selector(".detail h2 >> text=train[1]")
    tab.wait_for_selector(".detail .problem >> text=ValueError")
    assert EVIL in tab.inner_text(".detail .problem") and TRACE.strip() in tab.inner_text(".detail .problem .trace")
    tab.wait_for_selector(".detail >> text=39 of 100")
    assert "2 attempts" in tab.inner_text(".detail .state")
    shoot(tab, "graph")
    tab.click(".detail >> text=Log")
    tab.wait_for_selector(".log >> text=step 49 loss")
    assert tab.inner_text(".log").startswith(EVIL)
    tab.click(".tabs >> text=Timeline")
    tab.wait_for_selector(".timeline canvas")
    tab.wait_for_timeout(200)
    shoot(tab, "timeline")
    at = tab.evaluate("document.querySelector('.timeline').timeline.where('corpus[0]')")
    tab.mouse.click(at["x"], at["y"])
    tab.wait_for_selector(".detail h2 >> text=corpus[0]")
    tab.check("text=lanes per node")
    tab.click(".tabs >> text=Metrics")
    tab.wait_for_selector("path.curve[data-name='train[1]']", state="attached")
    box = tab.locator(".chart .plot").first.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    tab.wait_for_selector(".chart .tip >> text=train[0]")
    shoot(tab, "metrics")
    tab.check("text=log scale")
    tab.uncheck(".steps li:has-text('train[0]') input")
    tab.wait_for_selector("path.curve[data-name='train[0]']", state="detached")
    tab.click(".tabs >> text=Recipe and result")
    tab.wait_for_selector(".about dd >> text=0.001")
    tab.keyboard.press("Escape")
    assert tab.title() != "hacked"


def test_page_is_reachable_by_keyboard(tab: Any, site: Site) -> None:
    enter(tab, site, "#/runs/failed")
    tab.wait_for_selector(".view.graph canvas")
    until(tab, "document.querySelector('.view.graph').scene.nodes.length === 3")
    tab.focus(".view.graph canvas")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "Enter"):
        tab.keyboard.press(key)
    tab.wait_for_selector(".detail h2 >> text=check[0]")
    tab.focus(".detail [data-tab=overview]")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector(".detail [data-tab=log][aria-selected=true]")
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".detail", state="hidden")
    tab.focus(".page > .tabs [aria-selected=true]")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector(".view.table")
    tab.focus(".scroller")
    tab.keyboard.press("ArrowDown")
    tab.wait_for_selector(".detail h2 >> text=corpus[0]")


def test_page_asks_before_it_acts(tab: Any, site: Site, asked: Asked, shoot: Any) -> None:
    enter(tab, site, "#/runs/failed")
    tab.wait_for_selector(".failed >> text=The run failed")
    assert tab.is_disabled("text=Cancel") and tab.is_enabled("text=Resume")
    tab.click(".failed summary")
    assert TRACE.strip() in tab.inner_text(".failed .trace")
    shoot(tab, "failed")
    tab.click("text=Resume")
    tab.click("dialog >> text=Back")
    assert asked.said == []
    tab.click("text=Resume")
    shoot(tab, "confirm")
    tab.click("dialog button.primary")
    tab.wait_for_selector(".notice >> text=is being resumed")
    assert asked.said == [("resume", "failed")]
    tab.reload()
    tab.click("text=Resume")
    tab.click("dialog button.primary")
    tab.wait_for_selector(".notice.error >> text=driven already")
    tab.goto(f"{site.url}/#/runs/heartbeat")
    tab.wait_for_selector("text=No step has started yet")
    assert tab.is_disabled("text=Resume")
    tab.click("text=Cancel")
    tab.click("dialog >> text=Cancel the run")
    tab.wait_for_selector(".notice >> text=is being cancelled")
    assert asked.said[-1] == ("cancel", "heartbeat")


def test_page_follows_an_artifact_to_its_data(tab: Any, site: Site, shoot: Any) -> None:
    enter(tab, site, "#/runs/failed/steps/train%5B0%5D")
    tab.click(".detail .artifact")
    tab.wait_for_selector("h1 >> text=Where model comes from")
    tab.wait_for_selector("text=2 steps behind it")
    panel = tab.inner_text(".detail")
    assert "train[0]" in panel and "books.txt" in panel and "lr" in panel
    shoot(tab, "lineage")
    click_node(tab, "call:failed/corpus[0]")
    tab.wait_for_selector(".detail h2 >> text=corpus[0]")
    click_node(tab, "data:books.txt")
    tab.wait_for_selector(".detail >> text=bbbbbbbb")
    tab.click(".detail >> text=corpus[0]")
    tab.click(".detail dd >> text=corpus[0]")
    tab.wait_for_selector("h1 >> text=failed")
    assert tab.url.endswith("#/runs/failed/steps/corpus%5B0%5D")


def test_page_has_deep_links_and_says_what_is_not_there(tab: Any, site: Site) -> None:
    enter(tab, site, "#/runs/failed/steps/check%5B0%5D?view=timeline")
    tab.wait_for_selector(".timeline")
    tab.wait_for_selector(".detail h2 >> text=check[0]")
    enter(tab, site, "#/runs/failde")
    tab.wait_for_selector("text=did you mean failed?")
    tab.click("text=All runs")
    tab.wait_for_selector(".run-row")
    enter(tab, site, "#/runs/failed/steps/nobody")
    tab.wait_for_selector(".detail >> text=has no step")


def test_page_says_when_the_service_is_gone_and_recovers(tab: Any, site: Site, shoot: Any) -> None:
    enter(tab, site, "#/runs/heartbeat")
    tab.wait_for_selector(".chip >> text=running")
    site.down()
    try:
        tab.wait_for_selector("#connection.gone >> text=The service does not answer")
        shoot(tab, "gone")
        assert tab.locator("h1 >> text=heartbeat").is_visible(), "what was there stays"
    finally:
        site.up()
    tab.wait_for_selector("#connection:not(.gone)", state="attached")


def test_page_stays_usable_with_ten_thousand_steps(tab: Any, site: Site, shoot: Any) -> None:
    """Figures are printed, not asserted: the machine may be loaded."""
    enter(tab, site)
    tab.wait_for_selector("[data-run=chains]")
    clock = time.perf_counter()
    tab.click("[data-run=chains]")
    tab.wait_for_selector("text=100 nodes for 10,000 steps")
    loaded = time.perf_counter() - clock
    shoot(tab, "large-grouped")
    click_node(tab, ">chain[7]")
    tab.wait_for_selector("text=199 nodes for 10,000 steps")
    clock = time.perf_counter()
    tab.click("text=Show every step")
    tab.wait_for_selector("text=10,000 nodes for 10,000 steps")
    everything = time.perf_counter() - clock
    tab.click("text=Fit")
    shoot(tab, "large-all")
    frame = tab.evaluate(ZOOMING)
    clock = time.perf_counter()
    tab.click(".tabs >> text=Steps")
    tab.wait_for_selector(".row >> text=chain[0]/link[0]")
    assert tab.locator(".row").count() < 80, "only the rows in the window are drawn"
    tab.fill(".view.table .search", "chain[42]/link[9")
    tab.wait_for_selector("text=11 of 10,000 steps")
    table = time.perf_counter() - clock
    tab.fill(".view.table .search", "")
    tab.evaluate("document.querySelector('.scroller').scrollTop = 1e9")
    tab.wait_for_selector(".row >> text=chain[99]/link[99]")
    tab.click(".row >> text=chain[99]/link[99]")
    tab.wait_for_selector(".detail h2 >> text=chain[99]/link[99]")
    shoot(tab, "large-table")
    tab.click(".tabs >> text=Timeline")
    tab.wait_for_selector("text=10,000 steps in 1:39")
    tab.wait_for_timeout(200)
    shoot(tab, "large-timeline")
    print(
        f"10,000 steps: page {loaded:.2f} s, every step {everything:.2f} s, frame {frame:.1f} ms, table {table:.2f} s"
    )


ZOOMING = """async () => {
  const { scene } = document.querySelector('.view.graph');
  const before = performance.now();
  for (let i = 0; i < 40; i++) {
    scene.zoom(i % 2 ? 1.2 : 1 / 1.15);
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  }
  return (performance.now() - before) / 80;
}"""


@pytest.mark.parametrize(("width", "scheme"), [(420, "light"), (1280, "dark")])
def test_page_fits_a_narrow_window_and_the_dark(browser: Any, site: Site, shoot: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE_MS)
    enter(tab, site, "#/runs/live")
    tab.wait_for_selector(".banner >> text=Ship it?")
    tab.wait_for_timeout(200)
    shoot(tab, f"graph-{width}-{scheme}")
    tab.click(".banner >> text=Review")
    tab.wait_for_selector(".detail >> text=Waits for your approval")
    shoot(tab, f"approval-{width}-{scheme}")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


FLOW = '''
"""A small recipe for the tests of the page."""
import time
from pathlib import Path
from typing import Any
from workflows.graph import Artifact, context, step, workflow
from workflows.steps.inputs import content
from workflows.waits import approval

@step
def corpus(files: dict[str, str], folder: str) -> Artifact:
    out = context().artifact("corpus")
    (out.path / "text.txt").write_text((Path(folder) / "books.txt").read_text())
    return out.seal(lines=1)

@step
def train(corpus: Artifact, lr: float, folder: str) -> Artifact:
    run = context()
    number = 0
    while not (Path(folder) / "trained").exists():
        number += 1
        print("optimizer step", number, "token=abcdefghijkl", flush=True)
        run.progress(number, 100, loss=3 / number, lr=lr)
        time.sleep(0.25)
    out = run.artifact("model")
    (out.path / "weights").write_text(str(lr))
    return out.seal()

@step
def deploy(model: Artifact, go: Any) -> str:
    return f"deployed, said {go.comment!r}"

@workflow
def demo(folder: str, lr: float = 0.01) -> dict[str, Any]:
    text = corpus(content([folder + "/books.txt"]), folder)
    model = train.options(name="base")(text, lr, folder)
    go = approval("ship", "Ship this model?", show=model)
    return {"model": model.result(), "said": deploy(model, go).result()}
'''


@dataclass
class Real:
    """A service over a real cluster, with the recipe above sent to it."""

    site: Site
    store: Store
    package: str
    folder: Path

    def submit(self, run_id: str) -> None:
        body = {"package": self.package, "workflow_file": "flow.py", "overrides": [f"folder={self.folder}"]}
        Client(self.site.url, TOKEN).post("/runs", {**body, "run_id": run_id})


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Real]:
    import ray

    from workflows.service.actor import nodes
    from workflows.service.supervisor import Supervisor

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    code, data = tmp_path / "code", tmp_path / "data"
    code.mkdir()
    data.mkdir()
    (code / "flow.py").write_text(FLOW)
    (data / "books.txt").write_text("once upon a time\n")
    store = open_store(tmp_path / "store")
    package = packages.build(code, tmp_path / "package.zip")
    store.upload_file(packages.package_key(package.sha256), package.file)
    supervisor = Supervisor(store, ray.get_runtime_context().gcs_address, tmp_path / "drivers", nodes, period_s=0.2)
    supervisor.start()
    site = Site(store, supervisor)
    yield Real(site, store, package.sha256, data)
    site.down()
    supervisor.close()
    with contextlib.suppress(Exception):
        ray.shutdown()


def test_page_sees_a_real_run_from_submission_to_its_model(tab: Any, real: Real, shoot: Any) -> None:
    enter(tab, real.site)
    tab.wait_for_selector("text=No runs yet")
    real.submit("demo-1")
    tab.click("[data-run=demo-1]")
    click_node(tab, "train[base]")
    tab.wait_for_selector(".detail .chip >> text=running")
    tab.wait_for_selector(".detail progress")
    tab.wait_for_selector(".detail path.curve[data-name='train[base]']", state="attached")
    tab.click(".detail >> text=Log")
    tab.wait_for_selector(".log >> text=optimizer step 4")
    assert "token=[redacted]" in tab.inner_text(".log") and "abcdefghijkl" not in tab.inner_text(".log")
    shoot(tab, "real-running")

    tab.click("text=Cancel")
    tab.click("dialog >> text=Cancel the run")
    tab.wait_for_selector(".runstate >> text=cancelled")
    tab.wait_for_selector(".detail .chip >> text=interrupted")
    tab.click("text=Resume")
    tab.click("dialog button.primary")
    tab.wait_for_selector(".runstate >> text=running")
    tab.wait_for_selector(".detail .state >> text=2 attempts")

    (real.folder / "trained").touch()
    tab.wait_for_selector(".banner >> text=Ship this model?")
    tab.click(".banner >> text=Review")
    tab.click(".detail >> text=Overview")
    tab.click(".detail >> text=Approve…")
    tab.fill("dialog textarea", "looks good")
    shoot(tab, "real-approve")
    tab.click("dialog button.primary")
    tab.wait_for_selector(".runstate >> text=finished")
    tab.click(".tabs >> text=Recipe and result")
    tab.wait_for_selector(".about >> text=deployed, said 'looks good'")
    tab.click(".about .artifact >> nth=0")
    tab.wait_for_selector("h1 >> text=Where model comes from")
    panel = tab.inner_text(".detail")
    assert "books.txt" in panel and "train[base]" in panel and "0.01" in panel
    shoot(tab, "real-lineage")
