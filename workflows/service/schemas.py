"""The models of the HTTP interface; its OpenAPI schema consists of them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Clients must expect more fields."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Problem(BaseModel):
    """The answer of every error."""

    error: str


class Health(Answer):
    status: str
    token_required: bool


class Service(Answer):
    store: str
    active: list[str]
    """Runs that it drives to their ends."""


class RunHead(Answer):
    run_id: str
    workflow: str
    status: str
    """submitted (no driver yet), running, interrupted (its driver is gone), finished, failed, cancelled."""
    created: float
    """Seconds since the epoch, as all times."""
    ended: float | None
    counts: dict[str, int]
    """Calls by status."""
    driver: str
    active: bool
    """The service drives it to its end; if it has no driver now, it will get one soon."""


class Run(RunHead):
    """With recipe, result and error."""


class Step(Answer):
    id: str
    step: str
    status: str
    started: float | None = None
    ended: float | None = None
    seconds: float | None = None
    attempts: int = 0
    node: str = ""
    needs: list[str] = []
    """Ids of the calls whose results it takes."""
    reused_from: str | None = None
    message: str = ""


class Steps(Answer):
    version: int
    """Pass it as `after` to get only later changes."""
    steps: list[Step]


class StepDetail(Step):
    """With arguments, result, error, attempts and artifacts."""


class Log(Answer):
    text: str
    offset: int
    """The offset of the next read."""
    attempts: list[str] = []


class Metrics(Answer):
    version: str
    """Pass it as `after` to get only later data."""
    events: list[dict[str, Any]]


class Results(Answer):
    endpoints: list[str]
    """Those of grpc and openai that answered after the run had deployed them."""
    errors: list[dict[str, str]]
    sections: list[dict[str, Any]]
    """Tables: {title, note, rows}, a header first; an answer that was judged is {text, correct}."""


class Lineage(Answer):
    digest: str


class PackageState(BaseModel):
    sha256: str
    stored: bool


class Submission(BaseModel):
    """A run to start: a code package that is in the store, a workflow file in it, and a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    package: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 of the zip file."""
    workflow_file: str
    """Path inside the package; PATH:NAME if the file has several workflows."""
    recipe: str | dict[str, Any] | None = None
    """TOML text, or its tree; none: the workflow file's own RECIPE_FILE."""
    recipe_name: str = "recipe"
    """The recipe's name in errors, e.g. recipes/tiny.toml."""
    overrides: list[str] = []
    """section.key=value, applied in order."""
    run_id: str | None = None
    """Default: the workflow's name and the recipe's hash."""
    new: bool = False
    """A new run that reuses nothing."""
    rerun: list[str] = []
    """A new run that reuses all but these steps."""


class RunState(BaseModel):
    run_id: str
    status: str


class Submitted(RunState):
    """`status` is finished if the run had finished before: nothing runs again."""


class Approval(BaseModel):
    """The answer to an approval."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The call, or the name that the workflow gave it."""
    approve: bool
    comment: str = ""


class Message(BaseModel):
    """The value of an event."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The call, or the name that the workflow gave it."""
    value: Any


class Said(BaseModel):
    message: str
