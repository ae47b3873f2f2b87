"""A call's inputs by value: their digest, and their readable form.

Many calls may share a large argument (all calls of a map do), whose identity is computed once.
"""

import hashlib
import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

from workflows.graph.values import brief, earlier_identity, identity
from workflows.identity.keys import canonical

SHOWN_ARGUMENTS = 32 << 10
IDENTITY = 2
"""The rules of a record's digests (its "identity"); a record without one follows those of earlier versions."""
LARGE = 64 << 10
"""Smallest size in bytes of an argument whose identity is cached."""
REMEMBERED = 4


class Identities:
    """The inputs of a run's calls. Any thread may ask."""

    def __init__(self) -> None:
        self._large: OrderedDict[int, _Argument] = OrderedDict()
        self._lock = threading.Lock()

    def digest(self, arguments: Any) -> str:
        """The digest by value of a call's encoded {"args", "kwargs"}."""
        texts = [self._argument(item).text for item in arguments["args"]]
        named = {name: self._argument(item).text for name, item in arguments["kwargs"].items()}
        return _joined_digest(texts, named)

    def earlier_digest(self, arguments: Any) -> str:
        """The digest as earlier versions stored it; usually the same."""
        texts = [self._argument(item).earlier_text for item in arguments["args"]]
        named = {name: self._argument(item).earlier_text for name, item in arguments["kwargs"].items()}
        return _joined_digest(texts, named)

    def shown(self, arguments: Any) -> Any:
        """The inputs in the readable form of the journal; None if they are too large."""
        args = [self._argument(item).shown for item in arguments["args"][:21]]
        if len(arguments["args"]) > 20:
            args = brief(identity(arguments["args"]))
        kwargs = {name: self._argument(item).shown for name, item in arguments["kwargs"].items()}
        tree = {"args": args, "kwargs": kwargs}
        return tree if len(canonical(tree)) <= SHOWN_ARGUMENTS else None

    def _argument(self, tree: Any) -> "_Argument":
        if not isinstance(tree, (list, dict)):
            return _Argument(tree)
        with self._lock:
            known = self._large.get(id(tree))
            if known is not None:
                self._large.move_to_end(id(tree))
                return known
            made = _Argument(tree)
            if len(made.text) >= LARGE:
                self._large[id(tree)] = made  # which keeps the tree, and so its id
                if len(self._large) > REMEMBERED:
                    self._large.popitem(last=False)
            return made


class _Argument:
    """One argument, encoded."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree

    @cached_property
    def text(self) -> bytes:
        return canonical(identity(self._tree))

    @cached_property
    def earlier_text(self) -> bytes:
        earlier = earlier_identity(self._tree)
        return self.text if earlier == identity(self._tree) else canonical(earlier)

    @cached_property
    def shown(self) -> Any:
        return brief(identity(self._tree))


def _joined_digest(args: list[bytes], kwargs: dict[str, bytes]) -> str:
    """sha256 of {"args": [...], "kwargs": {...}}, canonical, from its canonical parts."""
    named = b",".join(canonical(name) + b":" + kwargs[name] for name in sorted(kwargs))
    return hashlib.sha256(b'{"args":[' + b",".join(args) + b'],"kwargs":{' + named + b"}}").hexdigest()
