"""Workflows that only wait, for tests without Ray; as a script it drives one of them:
`python waiting_program.py STORE RUN WORKFLOW ARGUMENTS_JSON`."""

import json
import sys
from typing import Any

from infra.errors import Denied, RecuaError, StepTimeout
from workflows.driver import session
from workflows.driver.settings import RunSettings
from workflows.graph import approval, event, workflow


@workflow
def deploying(question: str) -> Any:
    """The approval is asked with what the event brought."""
    score = event("score")
    said = approval("deploy", question, show={"score": score}).result()
    return {"score": score, "who": said.who, "comment": said.comment}


@workflow
def careful(timeout: float) -> str:
    """Handles every way in which an approval can end."""
    try:
        return "yes from " + approval("ask", "May I?", timeout=timeout, may_fail=True).result().who
    except Denied as error:
        return str(error)
    except StepTimeout as error:
        return f"late: {error}"


@workflow
def hasty(timeout: float) -> Any:
    return event("late", timeout=timeout)


@workflow
def many(count: int) -> Any:
    events = [event(f"e{index}") for index in range(count)]
    return [each.result() for each in events]


def main(store: str, run_id: str, name: str, arguments: str) -> None:
    settings = RunSettings(store=store, run_id=run_id, lease_s=2.0)
    try:
        result = session.run(globals()[name], *json.loads(arguments), settings=settings)
    except RecuaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        raise SystemExit(3) from None
    print(json.dumps(result.value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
