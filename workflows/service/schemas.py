"""The shapes of the HTTP interface (its OpenAPI schema is made of them)."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Readers must expect further fields."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)


class Problem(BaseModel):
    """What every error answers."""

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
    """The service drives it to its end: without a driver now, it will have one soon."""


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
    """Give it as `after` to get only what changes from now on."""
    steps: list[Step]


class StepDetail(Step):
    """With arguments, result, error, attempts and artifacts."""


class Log(Answer):
    text: str
    offset: int
    """Where to go on reading."""
    attempts: list[str] = []


class Metrics(Answer):
    version: str
    """Give it as `after` to get only what comes from now on."""
    events: list[dict[str, Any]]


class Results(Answer):
    endpoints: list[str]
    """Of grpc and openai those that answered when the run had deployed them."""
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
    """Path inside the package; PATH:NAME where the file has several workflows."""
    recipe: str | dict[str, Any] | None = None
    """TOML text, or the tree that it means; none: the workflow file's own RECIPE_FILE."""
    recipe_name: str = "recipe"
    """What errors call it, e.g. recipes/tiny.toml."""
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
    """`status` is finished where the run had finished before: nothing runs again."""


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
