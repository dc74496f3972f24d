"""The JSON Schema of ``/memory/status``, generated from the classes that say what is in it.

    python -m tests.status_schema

writes it to the file that the package ships; a test holds the file against what is generated.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

import membound_async.api
from membound_async import live, probes, statistics
from membound_async.api import StatusSnapshot, snapshot

PATH = Path(membound_async.api.__file__).parent / "schema.json"

SOURCES = (snapshot, statistics, probes)
"""Where the classes are."""


def generate() -> str:
    """Give the schema as the text of the file."""
    # statistics.py imports these only for type checkers.
    with mock.patch.multiple(
        statistics, create=True, Tracking=live.Tracking, PressureStall=probes.PressureStall
    ):
        (reference,), schemas = msgspec.json.schema_components(
            [StatusSnapshot], ref_template="#/$defs/{name}"
        )
    for name, schema in schemas.items():
        close(schema, comments_of(name))
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "GET /memory/status",
        **reference,
        "$defs": schemas,
    }
    return json.dumps(document, indent=2) + "\n"


def close(schema: dict[str, Any], comments: dict[str, str]) -> None:
    """Say of an object that all of it is there and nothing else, and what it means."""
    assert schema["type"] == "object"
    assert schema["required"] == [*schema["properties"]]
    schema["additionalProperties"] = False
    if "description" in schema:  # a docstring, which Python 3.13 has without its indentation
        schema["description"] = inspect.cleandoc(schema["description"])
    for name, field in schema["properties"].items():
        if name in comments:
            field["description"] = comments[name]


def comments_of(class_name: str) -> dict[str, str]:
    """Give what the comments of a class say of its fields.

    A comment stands before its field, and for those that follow without one of their own; or it
    stands behind the field, on the same line.
    """
    (cls,) = {vars(module)[class_name] for module in SOURCES if class_name in vars(module)}
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    comments: dict[str, str] = {}
    before = ""
    for field in definition.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        above: list[str] = []
        for line in reversed(lines[: field.lineno - 1]):
            if not line.strip().startswith("#:"):
                break
            above.insert(0, line.strip().removeprefix("#:").strip())
        behind = re.search(r"  # (.*)", lines[field.lineno - 1])
        before = behind[1] if behind else " ".join(above) or before
        if before:
            comments[field.target.id] = before
    return comments


if __name__ == "__main__":
    PATH.write_text(generate(), encoding="utf-8")
