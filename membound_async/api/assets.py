"""The files of the package that are served as they are: the dashboard, the schema."""

from __future__ import annotations

from importlib import resources

from .answers import Answer

__all__ = ["ASSETS"]

CONTENT_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/schema+json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}

PATHS = {"index.html": "/memory/", "schema.json": "/memory/schema"}
"""Where a file is that is not in ``/memory/assets/``."""


def _load() -> dict[str, Answer]:
    package = resources.files("membound_async.api")
    assets: dict[str, Answer] = {}
    for file in (package / "schema.json", *(package / "dashboard").iterdir()):
        if file.is_file():
            path = PATHS.get(file.name, f"/memory/assets/{file.name}")
            suffix = file.name.rpartition(".")[2]
            assets[path] = Answer(200, CONTENT_TYPES[suffix], file.read_bytes())
    return assets


ASSETS = _load()
"""What each path is answered with. No other file is ever looked at, whatever a path says."""
