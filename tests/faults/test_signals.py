"""Signals in each phase of a program: it ends as it should, says nothing else, and keeps nothing.

A program that leaves signals to Python ends by SIGINT after Ctrl-C, and by SIGTERM at once. One
that receives them cancels what it does, and ends as it likes. Each says that it has come to its
phase before it is sent a signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.uploads import at_rate, document, serving, status

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).parent / "signalled.py")
ALONE = [sys.executable, PROGRAM]
UNDER_RUN = [
    *(sys.executable, "-m", "membound_async.cli", "run"),
    *("--limit=512MiB", "--report=json", PROGRAM),
]
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "always", "PYTHONUNBUFFERED": "1"}
NOISE = ("never retrieved", "never awaited", "Warning", "ignored in", "Unhandled", "destroyed")
NOTHING = {"grants": 0, "waiting": 0, "granted": 0}
ENDED = 3
"""What the program exits with when it comes to its end."""
INTERRUPTED = 130

PHASES = ["entering", "holding", "waiting", "delayed", "reclaiming"]
launched = pytest.mark.parametrize(
    ("command", "backend"),
    [(ALONE, "asyncio+uvloop"), (ALONE, "trio"), (UNDER_RUN, "asyncio")],
    ids=["alone on uvloop", "alone on trio", "under run"],
)


class Program:
    """A program that runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def until(self, *said: str) -> None:
        """Wait until it has said all of that, in whatever order."""
        assert self.process.stdout is not None
        awaited = {*said}
        while awaited:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            awaited.discard(line.strip())

    def end(self, *signals: signal.Signals) -> tuple[int, str, str]:
        """Send signals; give its status, and what it has said since, as text and as errors."""
        for each in signals:
            self.process.send_signal(each)
        said, errors = self.process.communicate(timeout=60)
        return self.process.returncode, said, errors


@contextmanager
def program(command: Sequence[str], *arguments: str) -> Iterator[Program]:
    with subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,  # which ends after the signals
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        try:
            yield Program(process)
        finally:
            process.kill()


def assert_nothing_is_left(command: Sequence[str], said: str, errors: str, code: int) -> None:
    """Nothing was held at the end, and nothing said of it but what is to be."""
    assert json.loads(said.splitlines()[-1]) == NOTHING
    if command is UNDER_RUN:
        (line,) = errors.splitlines()
        report = json.loads(line)
        assert report["exit_code"] == code
        assert (report["limiter"]["grants"], report["limiter"]["waiting"]) == (0, 0)
        assert not any(part["granted_bytes"] for part in report["limiter"]["components"])
    elif code == INTERRUPTED:  # of which Python shows where
        assert "KeyboardInterrupt" in errors
        assert not [noise for noise in NOISE if noise in errors], errors
    else:
        assert errors == ""


@launched
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_ends_a_program_that_leaves_it_to_python(command, backend, phase):
    with program(command, phase, "left", backend) as running:
        running.until(phase)
        status, said, errors = running.end(signal.SIGINT)
    # By themselves, trio's task groups wrap it, so that Python does not know it any more.
    is_wrapped = command is ALONE and backend == "trio"
    assert status == (1 if is_wrapped else -signal.SIGINT)
    assert_nothing_is_left(command, said, errors, INTERRUPTED)


@launched
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_ends_a_program_that_receives_it(command, backend, phase):
    with program(command, phase, "received", backend) as running:
        running.until(phase, "listens")
        status, said, errors = running.end(signal.SIGTERM)
    assert status == ENDED
    assert_nothing_is_left(command, said, errors, ENDED)


@launched
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_the_first_has_begun_to_end(command, backend, first):
    with program(command, "ending", "received", backend) as running:
        running.until("begun", "listens")
        running.process.send_signal(first)
        running.until("ending")
        status, said, errors = running.end(signal.SIGTERM)
    assert status == ENDED
    assert_nothing_is_left(command, said, errors, ENDED)


@launched
def test_ctrl_c_while_bounds_are_verified(command, backend):
    with program(command, "verifying", "left", backend) as running:
        running.until("verifying")
        status, said, errors = running.end(signal.SIGINT)
    # By themselves, trio's task groups wrap it, so that Python does not know it any more.
    is_wrapped = command is ALONE and backend == "trio"
    assert status == (1 if is_wrapped else -signal.SIGINT)
    assert_nothing_is_left(command, said, errors, INTERRUPTED)


@launched
def test_sigterm_that_nobody_receives_ends_a_program_at_once(command, backend):
    with program(command, "waiting", "left", backend) as running:
        running.until("waiting")
        assert running.end(signal.SIGTERM) == (-signal.SIGTERM, "", "")


# --- a service under load


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_ends_the_service_while_uploads_wait(number, ended):
    async def load_and_end() -> str:
        uploads = asyncio.create_task(at_rate(service.port, document(40_000), 100, 0.5))
        while not (await status(service.port))["waiting"]:
            await asyncio.sleep(0.01)
        service.process.send_signal(number)
        _, errors = await asyncio.to_thread(service.process.communicate, timeout=60)
        assert {answer.status for answer in await uploads} <= {0, 200, 503}
        return errors

    with serving("--limit=200MiB", "--wait=1", environment=ENVIRONMENT) as service:
        errors = asyncio.run(load_and_end())
    assert service.process.returncode == ended  # uvicorn's own statuses
    assert "Finished server process" in errors
    lines = [line for line in errors.splitlines() if "request_shed" not in line]
    assert not [line for line in lines if any(noise in line for noise in NOISE)], errors
