"""The example that sends open files to another process: all arrive, and few are in flight."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from membound_async import MemoryLimiter

EXAMPLE = Path(__file__).parent.parent / "examples" / "send_descriptors.py"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="what is open is counted in /proc"
)


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_send_descriptors", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


descriptors = example()


@pytest.mark.parametrize("most", [8, 32])
def test_no_more_are_open_than_may_be_and_all_arrive(tmp_path, most, monkeypatch):
    # The tests' own process may have more than the example's limit already.
    monkeypatch.setattr(
        descriptors, "MemoryLimiter", lambda _, **options: MemoryLimiter("1TiB", **options)
    )
    gc.collect()  # what other tests have left open is not to be closed meanwhile
    paths = [tmp_path / str(number) for number in range(200)]
    for number, path in enumerate(paths):
        path.write_text("x" * number)
    sent, received = asyncio.run(descriptors.send(paths, most))
    assert received[:2] == sent[:2]
    assert sent.files == 200
    # Four who share 8 or 32 have most of that under way, and never more.
    assert most // 2 <= sent.peak_open <= most
    assert received.peak_open == 1
    assert (sent.left_open, received.left_open) == (0, 0)


def outcome(files: int = 9, checksum: int = 7, peak_open: int = 3, left_open: int = 0) -> object:
    return descriptors.Outcome(files, checksum, peak_open, left_open)


@pytest.mark.parametrize(
    ("sent", "received", "status"),
    [
        (outcome(), outcome(), 0),
        (outcome(), outcome(files=8), 1),
        (outcome(), outcome(checksum=8), 1),
        (outcome(left_open=1), outcome(), 1),
        (outcome(), outcome(left_open=1), 1),
        (outcome(peak_open=4), outcome(), 1),
    ],
)
def test_only_the_whole_story_is_a_success(capsys, sent, received, status):
    assert descriptors.verdict(sent, received, 3) == status
    assert ("All arrived" in capsys.readouterr().out) == (received[:2] == sent[:2])
