"""The example of many tenants: what it measures, and how it is shown."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "tenants.py"
MIB = 2**20


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_tenants", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tenants = example()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sizes of socket buffers")
def test_the_others_keep_their_throughput_with_quotas_alone():
    alone, bare, bounded = (
        asyncio.run(tenants.run(how, 4, 2.0, hostile=hostile))
        for how, hostile in (("bare", False), ("bare", True), ("quotas", True))
    )
    assert min(alone.answers_per_second) > 5  # of 62
    assert bare.throughput < 0.3 * alone.throughput
    assert bounded.throughput > 0.5 * alone.throughput  # it is four of five senders
    assert bounded.jain_index > 0.8
    assert bounded.hostile_disconnected > 0
    assert bare.hostile_disconnected == 0
    # A MiB of documents, and of answers half of 256 KiB for each of five tenants.
    assert bounded.usage.peak_in_flight_bytes < 2 * MIB


def a_run(*answers_per_second: float, disconnected: int = 0) -> object:
    return tenants.Run(list(answers_per_second), tenants.Usage(40 * MIB, MIB, 7), disconnected)


def test_runs_are_shown_side_by_side():
    runs = {"bare": a_run(10, 0), "with quotas": a_run(5, 5, disconnected=3)}
    assert tenants.compare(runs) == [
        "                        bare                with quotas",
        "answers to the others   10/s                10/s",
        "the worst off of them   0/s                 5/s",
        "Jain index              0.500               1.000",
        "peak in flight          1.0 MiB             1.0 MiB",
        "peak memory             40.0 MiB            40.0 MiB",
        "hostile, worked off     7                   7",
        "hostile, thrown out     0 times             3 times",
    ]


@pytest.mark.parametrize(
    ("bare", "bounded", "said"),
    [
        (a_run(1, 1), a_run(45, 45), "The others keep their throughput with quotas"),
        (a_run(50, 50), a_run(45, 45), "it was not lost without quotas, and kept with them"),
        (a_run(1, 1), a_run(10, 10), "it was lost without quotas, and not kept with them"),
        (a_run(1, 1), a_run(90, 0), "it was lost without quotas, and not kept with them"),
    ],
)
def test_only_the_whole_story_is_a_success(capsys, bare, bounded, said):
    status = tenants.verdict(a_run(50, 50), bare, bounded)
    output = capsys.readouterr().out
    assert said in output
    assert (status == 0) == ("The others keep" in output)


def test_an_endpoint_ends_with_its_standard_input():
    endpoint = subprocess.run(
        [sys.executable, EXAMPLE, "--serve=quotas"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    port, usage = endpoint.stdout.splitlines()
    assert int(port) > 0
    assert json.loads(usage)[1:] == [0, 0]
    assert endpoint.stderr == ""
