"""10,000 steps in the browser. Figures are printed, not asserted: the machine may be loaded."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from infra.storage import open_store
from tests.helpers import page_stores as stores
from tests.helpers.page_site import TOKEN, Asked, Site, click_node
from tests.helpers.page_stores import commit
from tests.helpers.stored_records import append
from workflows.runs.journal import Heartbeat, Journal

pytestmark = pytest.mark.page

FRAMES = """async (each) => {
  const { scene } = document.querySelector('.view.graph') ?? {};
  const scroller = document.querySelector('.scroller');
  const taken = [];
  for (let i = 0; i < 60; i++) {
    const before = performance.now();
    if (each === 'zoom') scene.zoom(i % 2 ? 1.2 : 1 / 1.15);
    else scroller.scrollTop += 700;
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    taken.push(performance.now() - before);
  }
  taken.sort((a, b) => a - b);
  return `${Math.round(taken[30])} ms (worst ${Math.round(taken[59])})`;
}"""
ANSWERS = """(pattern) => performance.getEntriesByType('resource').filter(({ name }) => name.match(pattern))
  .map((entry) => ({ sent: entry.transferSize, plain: entry.decodedBodySize, ms: entry.duration }))"""
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    """Of a live run with 100 chains of 100 calls."""
    store = open_store(tmp_path_factory.mktemp("page") / "store")
    journal = stores.chains(store, "chains", finished=False)
    beat = Heartbeat(journal, lambda: None, lambda error: None)
    yield journal
    beat.close()


@pytest.fixture(scope="module")
def site(journal: Journal) -> Iterator[Site]:
    site = Site(journal.store, Asked())
    yield site
    site.down()


def test_page_stays_usable_with_ten_thousand_steps(tab: Any, site: Site, journal: Journal, shoot: Any) -> None:
    clock = time.perf_counter()
    tab.goto(f"{site.url}/#token={TOKEN}&/runs/chains")
    tab.wait_for_selector("text=100 nodes for 10,000 steps")
    loaded = time.perf_counter() - clock
    first = tab.evaluate(ANSWERS, "steps[?]after=0")[0]
    paint = tab.evaluate(PAINT)
    tab.wait_for_timeout(200)
    shoot(tab, "large-grouped")
    click_node(tab, ">chain[7]")
    tab.wait_for_selector("text=199 nodes for 10,000 steps")
    tab.wait_for_timeout(200)
    shoot(tab, "large-opened")
    clock = time.perf_counter()
    tab.click("text=Show every step")
    tab.wait_for_selector("text=10,000 nodes for 10,000 steps")
    everything = time.perf_counter() - clock
    tab.click("text=Fit")
    tab.wait_for_timeout(300)
    shoot(tab, "large-all")
    zoom = tab.evaluate(FRAMES, "zoom")

    clock = time.perf_counter()
    tab.click(".tabs >> text=Steps")
    tab.wait_for_selector(".row >> text=chain[0]/link[0]")
    assert tab.locator(".row").count() < 80, "only the rows in the window are drawn"
    tab.fill(".view.table .search", "chain[42]/link[9")
    tab.wait_for_selector("text=11 of 10,000 steps")
    table = time.perf_counter() - clock
    tab.fill(".view.table .search", "")
    tab.wait_for_selector(".row >> text=chain[0]/link[0]")
    scroll = tab.evaluate(FRAMES, "scroll")
    tab.evaluate("document.querySelector('.scroller').scrollTop = 1e9")
    tab.wait_for_selector(".row >> text=chain[99]/link[99]")
    tab.click(".row >> text=chain[99]/link[99]")
    tab.wait_for_selector(".detail h2 >> text=chain[99]/link[99]")
    shoot(tab, "large-table")

    clock = time.perf_counter()
    now = time.time()
    append(journal, [commit(f"chain[{chain}]/link[100]", "recipes.demo:link", now, 0.5) for chain in range(100)])
    tab.wait_for_selector("text=10,100 steps")
    update = time.perf_counter() - clock
    sizes = sorted(answer["sent"] for answer in tab.evaluate(ANSWERS, "steps[?]after=[1-9]"))
    assert sizes[-1] < 100_000, "only what changed is sent"
    tab.click(".tabs >> text=Timeline")
    tab.wait_for_selector("text=10,100 steps in")
    tab.wait_for_timeout(200)
    timeline = tab.evaluate(FRAMES, "scroll")
    shoot(tab, "large-timeline")
    tab.check("text=lanes per node")
    tab.wait_for_timeout(200)
    shoot(tab, "large-lanes")
    for name, value in {
        "first paint": f"{paint:.0f} ms",
        "graph of groups there after": f"{loaded:.2f} s",
        "first answer": {name: round(value) for name, value in first.items()},
        "every step in the graph": f"{everything:.2f} s",
        "a frame of zooming, of scrolling the table, the timeline": (zoom, scroll, timeline),
        "table and filter": f"{table:.2f} s",
        "100 new steps seen after": f"{update:.2f} s",
        "bytes per poll, median and most": (sizes[len(sizes) // 2], sizes[-1]),
    }.items():
        print(f"\n10,000 steps: {name}: {value}", end="")
