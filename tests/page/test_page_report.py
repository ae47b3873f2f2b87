"""The page that `recua report` writes, opened from disk: no service, no network, and everything in it can be seen."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store, open_store
from tests.helpers import page_stores as stores
from tests.helpers.page_site import PATIENCE_MS, until
from tests.helpers.page_stores import artifact, commit, end, failure, start
from tests.helpers.stored_records import append
from workflows.report.record import read_run
from workflows.report.write import write
from workflows.runs.catalog import load_run

pytestmark = pytest.mark.page
EVIL = "</script><img src=x onerror=\"document.title='hacked'\">"
SERIES = 14


@pytest.fixture
def view(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Opens a file in a browser without network. What fails the test: an error of the page's code, something that its
    own policy refuses, a request for anything but the file."""
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)

    def open_file(file: Path) -> Any:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: problems.append(request.url) if foreign(request.url, file) else None)
        page.goto(file.as_uri())
        return page

    yield open_file
    context.close()
    assert problems == []


def foreign(url: str, file: Path) -> bool:
    return not url.startswith((file.as_uri(), "data:"))


def evaluation(stage: str, correct: bool) -> dict[str, Any]:
    sample = {"prompt": "12+30=", "answer": f"{EVIL} of {stage}", "expected": "42", "correct": correct}
    return {"stage": stage, "n": 512, "accuracy": 0.5 if correct else 0.25, "samples": [sample]}


def report(store: Store, run_id: str, folder: Path) -> Path:
    return write(read_run(store, load_run(store, run_id)), folder)


def test_report_from_disk_shows_results_curves_steps_and_logs(
    view: Callable[[Path], Any], shoot: Callable[[Any, str], None], tmp_path: Path
) -> None:
    store = open_store(tmp_path / "store")
    journal = stores.open_run(store, "done", {"seed": 3}, created=time.time() - 100)
    records = [start("sft[0]"), commit("sft[0]", result=[artifact("m", "model"), evaluation("sft", False)])]
    records += [start("dpo[0]", needs=["sft[0]"]), commit("dpo[0]", result=evaluation("dpo", True), needs=["sft[0]"])]
    for number in range(SERIES):
        call, where = f"train[{number}]", f"somewhere/{number}"
        rows = [json.dumps({"step": step, "loss": number + 1 / step}) for step in (1, 2, 3)]
        store.put(f"{where}/data/metrics.jsonl", "\n".join([*rows, ""]).encode())
        records += [start(call), commit(call, result=artifact(f"{number:x}", "model", where))]
    append(journal, [*records, end(at=time.time() - 10, result={"score": 0.5})])
    store.put("runs/done/attempts/dpo[0]-1/log.txt", f"{EVIL} token=hunter2222\n".encode())

    tab = view(report(store, "done", tmp_path / "out"))
    tab.wait_for_selector("text=Sample answers")
    assert "50.0%" in tab.inner_text(".results") and f"{EVIL} of dpo" in tab.inner_text(".results")
    shoot(tab, "report-results")
    tab.click("text=Metrics")
    until(tab, f"document.querySelectorAll('.charts .curve').length >= {SERIES - 2}")
    tab.click("button:has-text('All')")
    until(tab, f"document.querySelectorAll('.charts .curve').length === {SERIES}")
    drawn = "[...document.querySelectorAll('.charts .curve')].map((line) => getComputedStyle(line).stroke)"
    assert len(set(tab.evaluate(drawn))) == SERIES, "two curves of one chart have the same colour"
    shoot(tab, "report-metrics")
    tab.click("[data-view=steps]")
    tab.click("text=dpo[0]")
    tab.click("#tab-log")
    tab.wait_for_selector("text=token=[redacted]")
    assert "Report of" in tab.inner_text("#connection") and tab.locator("button:has-text('Resume')").count() == 0
    tab.click("[data-view=about]")
    assert "seed" in tab.inner_text(".about") and "score" in tab.inner_text(".about")
    tab.click("[data-view=graph]")
    until(tab, "document.querySelector('.view.graph')?.scene?.where('dpo[0]')")
    tab.click("text=Runs")
    tab.wait_for_selector(".run-row")
    assert tab.title() == "Runs – recua"


def test_report_of_a_run_under_way_stands_still_and_cannot_answer_for_it(
    view: Callable[[Path], Any], tmp_path: Path
) -> None:
    store = open_store(tmp_path / "store")
    journal = stores.open_run(store, "live", created=time.time() - 100)
    ask = {"type": "wait", "call": "approval[ship]", "step": "workflows.waits:approval", "message": "Ship it?"}
    ask |= {"time": time.time() - 30, "needs": [], "deadline": None, "inputs": "", "show": None}
    failed = [start("check[0]"), failure("check[0]", f"no {EVIL}", final=True)]
    began = time.time() - 60
    append(journal, [*failed, start("train[0]", at=began), ask])
    page = report(store, "live", tmp_path / "out")
    written = re.compile(r'"written":[^,]+')
    page.write_text(written.sub(f'"written":{began + 30}', page.read_text()))
    tab = view(page)
    tab.wait_for_selector(f"text=no {EVIL}")
    tab.click("a:has-text('Review')")
    tab.wait_for_selector("text=recua approve live 'approval[ship]'")
    assert tab.locator("button:has-text('Approve')").count() == 0
    tab.click("[data-view=steps]")
    assert tab.inner_text(".row:has-text('train[0]') .took") == "30.0 s" and tab.title() != "hacked"
