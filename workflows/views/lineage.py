"""The lineage of an artifact: the call that made it, that call's inputs, code and recipe, and so on up to the data.

If a call was reused, the graph follows the run that executed it. Roots are files that a recipe names, and calls without
inputs.
"""

from collections import deque

from infra.storage import Store
from workflows.graph.values import artifact_records
from workflows.runs.records import Commit, Json
from workflows.views.call_details import call_arguments, code_of, origin_of
from workflows.views.run_replay import Replay, RunCache, artifact_digests, open_run
from workflows.views.shortened import holds_artifact, sources

MOST_CALLS = 400


def lineage(cache: RunCache, store: Store, run_id: str, digest: str) -> Json:
    """The graph behind an artifact of a run: {"digest", "nodes", "edges": [[from, to]], "truncated"}.

    Nodes by `kind`: "artifact" {digest, name}; "call" {run_id, call, step, status, seconds, started, node,
    code: {digest, parts}, recipe: [{name, value}], reused_in}; "data" {name, digest}. Edges point from inputs to
    outputs. `truncated`: there are more ancestors than the answer holds.
    """
    walk = _Walk(cache, store)
    walk.artifact(run_id, digest)
    while walk.todo and len(walk.calls) < MOST_CALLS:
        walk.call(*walk.todo.popleft())
    known = [edge for edge in walk.edges if edge[0] in walk.nodes and edge[1] in walk.nodes]
    nodes = [{"id": name, **node} for name, node in walk.nodes.items()]
    return {"digest": digest, "nodes": nodes, "edges": known, "truncated": bool(walk.todo)}


class _Walk:
    """One traversal, breadth first. `todo`: (run, call, id of the node that needs it)."""

    def __init__(self, cache: RunCache, store: Store) -> None:
        self.cache = cache
        self.store = store
        self.nodes: dict[str, Json] = {}
        self.edges: list[list[str]] = []
        self.calls: dict[tuple[str, str], str] = {}
        self.todo: deque[tuple[str, str, str]] = deque()
        self._replays: dict[str, Replay] = {}

    def artifact(self, run_id: str, digest: str) -> str:
        """The node of an artifact; its producer is visited later."""
        name = f"artifact:{digest}"
        if name not in self.nodes:
            self.nodes[name] = {"kind": "artifact", "digest": digest, "name": ""}
            if (producer := self._replay(run_id).producers.get(digest)) is not None:
                self.todo.append((run_id, producer, name))
        return name

    def call(self, run_id: str, call_id: str, product: str) -> None:
        """The node of a committed call, with its inputs; `product` is the node that needs it."""
        if (run_id, call_id) not in self.calls:
            commit = self._replay(run_id).commit(call_id)
            if commit is None:
                return
            origin = origin_of(self.cache, self.store, run_id, commit)
            where, made = origin or (run_id, commit)
            name = f"call:{where}/{made.call}"
            self.calls[(run_id, call_id)] = name
            if name not in self.nodes:
                self.nodes[name] = self._node(where, made)
                self._inputs(name, where, made)
            if where != run_id:
                self.nodes[name].setdefault("reused_in", []).append(run_id)
        name = self.calls[(run_id, call_id)]
        self._name_products(name, product)

    def _name_products(self, name: str, product: str) -> None:
        if [name, product] not in self.edges:
            self.edges.append([name, product])
        if product.startswith("artifact:"):
            digest = product.partition(":")[2]
            self.nodes[product]["name"] = self.nodes[name]["products"].get(digest, "")

    def _node(self, run_id: str, commit: Commit) -> Json:
        code = code_of(self.cache, self.store, commit.code)
        arguments = call_arguments(self.cache, self.store, commit)
        return {
            "kind": "call",
            "run_id": run_id,
            "call": commit.call,
            "step": commit.step,
            "status": commit.status,
            "seconds": commit.seconds,
            "started": commit.started,
            "node": commit.node,
            "code": code,
            "recipe": [item for item in arguments if not holds_artifact(item["value"]) and not sources(item["value"])],
            "products": {entry["digest"]: entry["name"] for entry in artifact_records(commit.result)},
        }

    def _inputs(self, name: str, run_id: str, commit: Commit) -> None:
        """Artifacts and files among the arguments, and calls whose plain results were passed."""
        replay = self._replay(run_id)
        makers = set()
        for digest in dict.fromkeys(artifact_digests(commit.arguments)):
            self.edges.append([self.artifact(run_id, digest), name])
            makers.add(replay.producers.get(digest))
        for argument in call_arguments(self.cache, self.store, commit):
            for source, digest in sources(argument["value"]).items():
                self.nodes[f"data:{source}"] = {"kind": "data", "name": source, "digest": digest}
                self.edges.append([f"data:{source}", name])
        for need in replay.calls[commit.call].needs:
            if need not in makers:
                self.todo.append((run_id, need, name))

    def _replay(self, run_id: str) -> Replay:
        if run_id not in self._replays:
            self._replays[run_id] = open_run(self.cache, self.store, run_id)[1]
        return self._replays[run_id]
