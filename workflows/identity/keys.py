"""The keys under which what a call's code and inputs made is found again, in this run and by any other."""

import hashlib
import json
from typing import Any

from workflows.identity.fingerprint import Fingerprint

FORMAT = 1


def canonical(tree: Any) -> bytes:
    """One byte string per encoded value, whatever the order of its keys."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def content_key(step_name: str, inputs: str, fingerprint: Fingerprint) -> str:
    """What makes two calls equal across runs."""
    parts = [FORMAT, step_name, inputs, fingerprint.code, sorted(fingerprint.libraries.items())]
    return hashlib.sha256(canonical(parts)).hexdigest()


def code_key(name: str) -> str:
    """Where the parts of a fingerprint, or its library versions, are kept."""
    return f"code/{name}.json"


def parameters_key(code: str, step_name: str) -> str:
    """Where the names of a step's parameters are kept, for those who show its arguments without its code."""
    return code_key(f"{code}.{step_name.rpartition(':')[2]}")


def libraries_id(libraries: dict[str, str]) -> str:
    return f"libraries-{hashlib.sha256(canonical(libraries)).hexdigest()[:16]}"


def index_key(key: str) -> str:
    return f"index/{key[:2]}/{key}.json"
