"""The keys of a call's result, by which this run and other runs find it."""

import hashlib
import json
from typing import Any

from workflows.identity.fingerprint import Fingerprint

FORMAT = 1


def canonical(tree: Any) -> bytes:
    """One byte string per encoded value, independent of the order of its keys."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def content_key(step_name: str, inputs: str, fingerprint: Fingerprint) -> str:
    """The content key, by which calls of different runs are equal."""
    parts = [FORMAT, step_name, inputs, fingerprint.code, sorted(fingerprint.libraries.items())]
    return hashlib.sha256(canonical(parts)).hexdigest()


def code_key(name: str) -> str:
    """The key of a fingerprint's parts, or of its library versions."""
    return f"code/{name}.json"


def parameters_key(code: str, step_name: str) -> str:
    """The key of the names of a step's parameters, for showing its arguments without its code."""
    return code_key(f"{code}.{step_name.rpartition(':')[2]}")


def libraries_id(libraries: dict[str, str]) -> str:
    return f"libraries-{hashlib.sha256(canonical(libraries)).hexdigest()[:16]}"


def index_key(key: str) -> str:
    return f"index/{key[:2]}/{key}.json"
