"""The page over a real run: a real supervisor starts real drivers on a real Ray, and the buttons act on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store, open_store
from tests.helpers.page_site import TOKEN, Site, click_node, enter
from workflows.service.client.http_client import Client
from workflows.service.drivers import packages

pytestmark = pytest.mark.page

FLOW = '''
"""A small recipe for the tests of the page."""
import time
from pathlib import Path
from typing import Any
from workflows.graph import Artifact, context, step, workflow
from workflows.recipes.inputs import content
from workflows.graph import approval

@step
def corpus(files: dict[str, str], folder: str) -> Artifact:
    out = context().artifact("corpus")
    (out.path / "text.txt").write_text((Path(folder) / "books.txt").read_text())
    return out.seal(lines=1)

@step
def train(corpus: Artifact, lr: float, folder: str) -> Artifact:
    run = context()
    if (Path(folder) / "broken").exists():
        raise ValueError("the books are in the wrong order")
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
def score(question: int, model: Artifact) -> int:
    return question * question

@step
def deploy(model: Artifact, go: Any) -> str:
    return f"deployed, said {go.comment!r}"

@workflow
def demo(folder: str, lr: float = 0.01) -> dict[str, Any]:
    text = corpus(content([folder + "/books.txt"]), folder)
    model = train.options(name="base")(text, lr, folder)
    scores = score.map([1, 2, 3], model)
    go = approval("ship", "Ship this model?", show={"model": model, "scores": scores})
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
    from tests.helpers.rays import local_ray
    from workflows.service.drivers.supervisor import Supervisor
    from workflows.service.server.actor import nodes

    code, data = tmp_path / "code", tmp_path / "data"
    code.mkdir()
    data.mkdir()
    (code / "flow.py").write_text(FLOW)
    (data / "books.txt").write_text("once upon a time\n")
    store = open_store(tmp_path / "store")
    package = packages.build(code, tmp_path / "package.zip")
    store.upload_file(packages.package_key(package.sha256), package.file)
    with local_ray(num_cpus=2) as address:
        supervisor = Supervisor(store, address, tmp_path / "drivers", nodes, period_s=0.2)
        supervisor.start()
        site = Site(store, supervisor)
        yield Real(site, store, package.sha256, data)
        site.down()
        supervisor.close()


def test_page_sees_a_real_run_from_submission_to_its_model(tab: Any, real: Real, shoot: Any) -> None:
    enter(tab, real.site)
    tab.wait_for_selector("text=No runs yet")
    (real.folder / "broken").touch()
    real.submit("demo-1")
    tab.click("[data-run=demo-1]")
    tab.wait_for_selector(".failed >> text=the books are in the wrong order")
    tab.click(".failed summary", position={"x": 8, "y": 8})
    assert 'raise ValueError("the books' in tab.inner_text(".failed .trace")
    tab.click(".failed >> text=open the step")
    tab.wait_for_selector(".detail .problem >> text=ValueError")
    shoot(tab, "real-failed")
    (real.folder / "broken").unlink()
    tab.click("text=Resume")
    tab.click("dialog button.primary")
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
    tab.wait_for_selector(".detail .state >> text=3 attempts")

    (real.folder / "trained").touch()
    tab.wait_for_selector(".banner >> text=Ship this model?")
    tab.click(".banner >> text=Review")
    tab.click(".detail >> text=Overview")
    tab.wait_for_selector(".detail >> text=score.map[0] (3 steps)")
    edges = tab.evaluate("document.querySelector('.view.graph').scene.edges.map(({ from, to }) => `${from} > ${to}`)")
    assert "score.map[0]/score[2] > approval[ship]" in edges
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
