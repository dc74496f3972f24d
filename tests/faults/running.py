"""The service of ``service.py`` as a process in a memory cgroup, seen through its samples."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from tests.cgroups import MemoryCgroup
from tests.faults.service import Sample

__all__ = ["RunningService"]

GIVE_UP_SECONDS = 60
PROGRAM = Path(__file__).with_name("service.py")


class RunningService:
    """The service while it runs, from the beginning to the end of a ``with`` block.

    Args:
        cgroup: where it runs.
        options: of its command line.
    """

    def __init__(self, cgroup: MemoryCgroup, *options: str) -> None:
        self.cgroup = cgroup
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            cgroup.command([sys.executable, PROGRAM, *options]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        self._commands = 0

    def start(self, command: str, number: int) -> None:
        """Have something done to it; commands are carried out one after the other."""
        assert self._process.stdin is not None
        print(command, number, file=self._process.stdin)
        self._commands += 1

    def do(self, command: str, number: int) -> Sample:
        """Have something done to it, and give the first sample after that."""
        self.start(command, number)
        return self.until(lambda now: now.commands == self._commands)

    def until(self, condition: Callable[[Sample], object]) -> Sample:
        """Give the first sample from now on of which that is true.

        Raises:
            AssertionError: the service has ended, or it was not true for a minute.
        """
        assert self._process.stdout is not None
        last = ""
        with self._killed_when_late():
            for line in self._process.stdout:
                last = line
                sample = Sample(**json.loads(line))
                if condition(sample):
                    return sample
        raise AssertionError(
            f"ended with {self._process.wait()}, {self.cgroup.oom_kills} OOM kills; last sample: "
            f"{last}\n{self.errors}"
        )

    def works(self, pieces: int = 50) -> Sample:
        """Wait until so many pieces of work more are done; give the sample of then."""
        begun = self.until(lambda _: True).done
        return self.until(lambda now: now.done >= begun + pieces)

    def end(self) -> str:
        """Have it end by itself; give what it has written to standard error.

        Raises:
            AssertionError: it did not end well, or not within a minute.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        with self._killed_when_late():
            self._read_to_the_end()
        assert self._process.wait() == 0, self.errors
        return self.errors

    def dies(self) -> int:
        """Wait until it ends, a minute at the most; give its exit status."""
        with self._killed_when_late():
            self._read_to_the_end()
            return self._process.wait()

    @property
    def errors(self) -> str:
        """What it has written to standard error so far."""
        self._errors.seek(0)
        return self._errors.read()

    def _read_to_the_end(self) -> None:
        assert self._process.stdout is not None
        for _ in self._process.stdout:
            pass

    @contextlib.contextmanager
    def _killed_when_late(self) -> Iterator[None]:
        timer = threading.Timer(GIVE_UP_SECONDS, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
