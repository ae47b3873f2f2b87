"""The page in headless Chromium, clicked through as a user would, over stores written by the real Journal."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infra.storage import Store, open_store
from tests.helpers import page_stores as stores
from tests.helpers.page_site import TOKEN, Asked, Site, click_node, enter, until
from tests.helpers.page_stores import artifact, commit, end, failure, full, start
from tests.helpers.stored_records import append
from workflows.runs.journal import Heartbeat, Journal

pytestmark = pytest.mark.page
TRACE = 'Traceback (most recent call last):\n  File "recipe.py", line 42, in train\n    raise ValueError("no")\n'
EVIL = "<img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, asked: Asked) -> Iterator[Site]:
    """Runs of every kind: a finished one, a live one that somebody must approve, one that has not begun, a failed one
    with lineage, and one whose every name is an attack."""
    store = open_store(tmp_path_factory.mktemp("page") / "store")
    stores.chains(store, "chains", chains=4, length=3)
    failed_run(store)
    evil_run(store)
    live = [live_run(store), stores.open_run(store, "heartbeat", created=time.time() - 200_000)]
    beats = [Heartbeat(journal, lambda: None, lambda error: None) for journal in live]
    site = Site(store, asked)
    yield site
    site.down()
    for beat in beats:
        beat.close()


def live_run(store: Store) -> Journal:
    now = time.time()
    journal = stores.open_run(store, "live", {"seed": 1, "lr": 0.001}, created=now - 100)
    ask = {"type": "wait", "call": "approval[ship]", "step": "workflows.waits:approval", "message": "Ship it?"}
    append(
        journal,
        [
            start("corpus[0]", "demo:corpus", at=now - 90),
            commit("corpus[0]", "demo:corpus", now - 90, 20.0, artifact("c0", "corpus")),
            *(start(f"train[{number}]", at=now - 60, needs=["corpus[0]"]) for number in range(3)),
            failure("train[1]", f"no {EVIL}", final=False, at=now - 50, trace=TRACE),
            start("train[1]", attempt=2, at=now - 45, needs=["corpus[0]"]),
            {**ask, "time": now - 30, "needs": ["corpus[0]"], "deadline": None, "inputs": "", "show": {"score": 0.93}},
        ],
    )
    lines = "".join(f"step {number} loss {3 / (number + 1):.3f}\n" for number in range(50))
    store.put("runs/live/attempts/train[1]-2/log.txt", f"{EVIL}\n{lines}".encode())
    rows = [[number + 1, now - 60 + number, number, 100, {"loss": 3 / (number + 1)}] for number in range(40)]
    history = {"format": 1, "curves": [{"call": "train[0]", "rows": rows}], "texts": []}
    more = [[100 + number, when, done, total, {"loss": 5 / (done + 1)}] for number, when, done, total, _ in rows]
    history["curves"].append({"call": "train[1]", "rows": more})  # type: ignore[attr-defined]
    store.put("runs/live/history/00000001-0000000200.json", json.dumps(history).encode())
    return journal


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
    append(journal, [corpus, model, start("check[0]", "demo:check", needs=["train[0]"])])
    append(journal, [failure("check[0]", "no", final=True, trace=TRACE), end("failed", error=error)])


def evil_run(store: Store) -> None:
    """Whatever a run may name itself is HTML that would run if it were read as such."""
    now = time.time()
    journal = stores.open_run(store, EVIL, {EVIL: EVIL}, created=now - 4000)
    made = commit(f"{EVIL}[0]", f"demo:{EVIL}", now - 90, result=artifact("e0", EVIL), node=EVIL)
    ask = {"type": "wait", "call": f"approval[{EVIL}]", "step": "workflows.waits:approval", "message": EVIL}
    asked = {**ask, "time": now, "needs": [f"{EVIL}[0]"], "deadline": None, "inputs": "", "show": {EVIL: EVIL}}
    broken = [start("bad[0]", f"demo:{EVIL}", at=now - 50), failure("bad[0]", EVIL, final=True, at=now, trace=EVIL)]
    append(journal, [made, *broken, asked])
    curve = {"call": f"{EVIL}[0]", "rows": [[1, now, 1, 2, {EVIL: 1.0}], [2, now, 2, 2, {EVIL: 2.0}]]}
    history = {"format": 1, "curves": [curve], "texts": []}
    store.put(f"runs/{EVIL}/history/00000001-0000000200.json", json.dumps(history).encode())


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
    assert tab.locator(".run-row").count() == 5
    assert tab.inner_text("[data-run=chains] .progress") == "12 of 12 steps"
    assert "1 waiting" in tab.inner_text("[data-run=live] .progress")
    assert "failed" in tab.inner_text("[data-run=failed] .chip")
    tab.fill(".search", "fail")
    tab.wait_for_selector("text=1 of 5 runs")
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


def test_page_reads_nothing_of_a_run_as_html(tab: Any, site: Site, shoot: Any) -> None:
    enter(tab, site)
    tab.click(".run-row:has-text('onerror')")
    tab.wait_for_selector(".view.graph canvas")
    until(tab, "document.querySelector('.view.graph').scene.nodes.length === 3")
    for view in ("Steps", "Timeline", "Metrics", "Recipe and result"):
        tab.click(f".page > .tabs >> text={view}")
        tab.wait_for_selector(".viewport >> text=<img" if view in ("Steps", "Metrics") else ".viewport")
        shoot(tab, f"evil-{view[:4].lower()}")
    tab.click(".tabs >> text=Steps")
    for call in (f"{EVIL}[0]", "bad[0]", f"approval[{EVIL}]"):
        tab.locator(".row", has_text=call).first.click()
        for name in ("Log", "Inputs and result", "Code", "Overview"):
            tab.click(f".detail .tabs >> text={name}")
        tab.wait_for_timeout(100)
    tab.click(".detail >> text=Approve…")
    tab.click("dialog >> text=Back")
    tab.locator(".row", has_text=f"{EVIL}[0]").first.click()
    tab.click(".detail .artifact")
    tab.wait_for_selector("h1 >> text=Where <img")
    shoot(tab, "evil-lineage")
    assert "hacked" not in tab.title().replace(EVIL, "")
    assert tab.evaluate("document.querySelectorAll('main img, main script').length") == 0


@pytest.mark.parametrize(("width", "scheme"), [(420, "light"), (1280, "dark"), (1920, "light")])
def test_page_fits_every_window(window: Callable[..., Any], site: Site, shoot: Any, width: int, scheme: str) -> None:
    tab = window(width, 1000 if width > 1900 else 800, scheme)
    for address, wanted in {
        "runs": ".run-row",
        "runs/live": ".banner >> text=Ship it?",
        "runs/live/steps/approval%5Bship%5D?view=graph": ".detail >> text=Waits for your approval",
        "runs/live?view=steps": ".row >> text=corpus[0]",
        "runs/live?view=timeline": ".timeline canvas",
        "runs/live?view=metrics": "path.curve",
        "runs/live?view=about": ".about dd >> text=0.001",
        "runs/failed/steps/check%5B0%5D?view=graph": ".detail .problem >> text=ValueError",
        f"runs/failed/artifacts/{full('a0')}": "text=2 steps behind it",
    }.items():
        enter(tab, site, f"#/{address}")
        tab.wait_for_selector(wanted, state="attached")
        tab.wait_for_timeout(150)
        shoot(tab, f"{address.replace('/', '-').replace('?view=', '-')[:40]}-{width}-{scheme}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, address
