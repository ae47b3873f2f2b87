"""`step.map`: one call per item of a list, which may still be to come.

Pure: encoded trees in, encoded trees out. The executor and the planner make the calls.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from infra.errors import UserError
from workflows.graph.steps import EACH, Runtime, edges_of
from workflows.graph.values import encode, items_of

ITEM = {"$item": True}


@dataclass(frozen=True)
class Child:
    """One call of a map."""

    call_id: str
    arguments: Any
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Fanout:
    """A map's encoded `items` (a list, or the edge to one) and the arguments of its calls: ITEM is the first, all
    calls share the others without copies.

    `waits_for`: the call that gives the list, if any. `shared`: the calls whose results all calls of the map get.
    """

    items: Any
    template: Any
    waits_for: tuple[str, ...]
    shared: tuple[str, ...]

    def children(self, map_id: str, step_name: str, items: Any) -> list[Child]:
        """One call per item; `items` is the list itself, or the encoded result of `waits_for`.

        Raises:
            UserError: the result is not a list.
        """
        found = items_of(items)
        if found is None:
            kind = "dict" if isinstance(items, dict) else type(items).__name__
            raise UserError(f"{map_id}: the items must be a list, and {self.waits_for[0]} gave a {kind}")
        return [self._child(f"{map_id}/{step_name}[{index}]", item) for index, item in enumerate(found)]

    def _child(self, call_id: str, item: Any) -> Child:
        needs = dict.fromkeys([*self.waits_for, *self.shared, *edges_in(item)])
        arguments = {**self.template, "args": [item, *self.template["args"][1:]]}
        return Child(call_id, arguments, tuple(needs))


def fan_out(runtime: Runtime, map_id: str, items: Any, arguments: Any) -> Fanout:
    """Encode the arguments of `Step.map`.

    Raises:
        UserError: a value cannot be stored; the message has the path to it.
    """
    needs: list[str] = []
    shared: list[str] = []
    tree = encode(items, f"{map_id}: items", edges_of(runtime, needs))
    edges = edges_of(runtime, shared)
    template = encode(arguments, f"{map_id}: argument", lambda value: ITEM if value is EACH else edges(value))
    waits_for = tuple(needs) if isinstance(tree, dict) else ()
    return Fanout(tree, template, waits_for, tuple(dict.fromkeys(shared)))


def edges_in(tree: Any) -> Iterator[str]:
    """The calls whose results an encoded tree refers to."""
    if isinstance(tree, list):
        for item in tree:
            yield from edges_in(item)
    elif isinstance(tree, dict):
        if "$edge" in tree:
            yield tree["$edge"]
        else:
            for item in tree.values():
                yield from edges_in(item)
