"""Writing a run's report: report.json and one self-contained HTML page."""

import json
from pathlib import Path

from infra.storage.files import write_text
from workflows.report.page import render, saved
from workflows.report.record import RunRecord, plain_json
from workflows.report.summary import summarise


def write(record: RunRecord, folder: Path) -> Path:
    """Write `report.html` and `report.json` into `folder`, each atomically; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(plain_json(summarise(record)), indent=2) + "\n")
    page = folder / "report.html"
    text = render(saved(record))
    write_text(page, text.encode(errors="backslashreplace").decode())  # an error's text may have half a surrogate pair
    return page
