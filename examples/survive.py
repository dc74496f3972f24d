"""Run the same pipeline twice under one real memory limit: bare it dies, bounded it lives.

    python survive.py
    python survive.py --limit 200MiB
    python survive.py -- access.log.gz --rate 4MB

The pipeline is ``log_pipeline.py`` with 200,000 flight records (or with the arguments after
``--``), before a sink that stalls for some seconds and is slow afterwards. The limit is a
memory cgroup, which has the kernel kill what exceeds it, or, where none may be made,
``RLIMIT_DATA``, which has memory run out in the process itself. Linux only.

Exits with 0 if the bare run died of the limit and the bounded one finished with every
record written: as many, and with the same checksum, as the pipeline's steps give when they
are taken one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from membound_async.sizes import human_size, parse_size

HERE = Path(__file__).parent
PIPELINE = HERE / "log_pipeline.py"
FLIGHTS = (
    str(HERE / "data" / "flights.csv.gz"),
    f"--join=carrier={HERE / 'data' / 'airlines.csv'}",
    f"--join=dest={HERE / 'data' / 'airports.csv'}",
    "--stall=10",
    "--rate=16MB",
)
BARE = (sys.executable,)
BOUNDED = (sys.executable, "-m", "membound_async.cli", "run")

SAMPLE_SECONDS = 0.02


# --- the limits


class Limit(Protocol):
    """A limit that the system sets on a child's memory."""

    name: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """Give the command that runs ``argv`` under the limit."""
        ...

    def used_bytes(self, pid: int) -> int:
        """Say how much of what the limit counts is in use."""
        ...

    def has_killed(self, status: int, errors: str) -> bool:
        """Tell whether a child with that exit status died of the limit."""
        ...


class CgroupLimit:
    """A memory cgroup, version 1 or 2, for one child; the kernel kills what exceeds it."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._is_v2 = (directory / "memory.max").exists()
        self.name = f"memory cgroup v{2 if self._is_v2 else 1}"
        limit, swap, most_swap = (
            ("memory.max", "memory.swap.max", 0)
            if self._is_v2
            else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit_bytes)
        )
        (directory / limit).write_text(str(limit_bytes))
        with suppress(OSError):  # there is no such file where swap is not counted
            (directory / swap).write_text(str(most_swap))

    def command(self, argv: Sequence[str]) -> list[str]:
        """Give a command that enters the cgroup and then becomes ``argv``."""
        enter = 'echo 0 > "$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self._directory / "cgroup.procs"), *argv]

    def used_bytes(self, pid: int) -> int:  # noqa: ARG002
        """Say how much is charged, without the page cache, which the kernel can take back."""
        return self._count("memory.stat", "anon" if self._is_v2 else "total_rss")

    def has_killed(self, status: int, errors: str) -> bool:  # noqa: ARG002
        """Tell whether the OOM killer was here."""
        events = "memory.events" if self._is_v2 else "memory.oom_control"
        return status < 0 and self._count(events, "oom_kill") > 0

    def _count(self, file: str, key: str) -> int:
        words = (self._directory / file).read_text().split()
        return int(words[words.index(key) + 1])


class DataLimit:
    """``RLIMIT_DATA`` for one child; beyond it, no memory is given to the process."""

    name = "RLIMIT_DATA"

    def __init__(self, limit_bytes: int) -> None:
        self._limit_kib = limit_bytes // 1024

    def command(self, argv: Sequence[str]) -> list[str]:
        """Give a command that limits itself and then becomes ``argv``."""
        return ["/bin/sh", "-c", f'ulimit -d {self._limit_kib} && exec "$@"', "sh", *argv]

    def used_bytes(self, pid: int) -> int:
        """Say how large the data segment is."""
        with suppress(OSError, ValueError):  # it has just ended
            words = Path(f"/proc/{pid}/status").read_text().split()
            return int(words[words.index("VmData:") + 1]) * 1024
        return 0

    def has_killed(self, status: int, errors: str) -> bool:
        """Tell whether memory ran out."""
        return status != 0 and "MemoryError" in errors


@contextmanager
def memory_limit(kind: str, limit_bytes: int) -> Iterator[Limit]:
    """Make a limit of that kind: ``cgroup``, ``rlimit``, or ``auto`` for what can be had."""
    directory = None if kind == "rlimit" else make_cgroup(f"survive-{os.getpid()}")
    if directory is None:
        if kind == "cgroup":
            raise SystemExit("survive.py: no memory cgroup can be made here; try --kind rlimit")
        yield DataLimit(limit_bytes)
        return
    try:
        yield CgroupLimit(directory, limit_bytes)
    finally:
        while directory.exists():
            with suppress(OSError):  # busy until the kernel has cleared up after the child
                directory.rmdir()
            time.sleep(0.01)


def make_cgroup(name: str) -> Path | None:
    """Make a memory cgroup in this process's own or further up; None if that cannot be."""
    for mount, own in own_cgroups():
        for parent in (own, *own.parents):
            directory = parent / name
            with suppress(OSError):
                directory.mkdir()
                if is_usable(directory):
                    return directory
                directory.rmdir()
            if parent == mount:
                break
    return None


def own_cgroups() -> Iterator[tuple[Path, Path]]:
    """Give where cgroups that can limit memory are mounted, and which of them is ours."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        memberships = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # this is not Linux
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        for _, _, _, root, mount, *_, kind, _, options in mounts:
            is_v1 = kind == "cgroup" and "memory" in controllers and "memory" in options
            is_v2 = kind == "cgroup2" and controllers == ""
            if is_v1 or is_v2:
                yield Path(mount), Path(mount, path.removeprefix(root).lstrip("/"))


def is_usable(directory: Path) -> bool:
    """Tell whether a cgroup can limit memory, and takes our children in."""
    limits = [directory / "memory.max", directory / "memory.limit_in_bytes"]
    enter = ["/bin/sh", "-c", 'echo 0 > "$0"', str(directory / "cgroup.procs")]
    return (
        any(os.access(limit, os.W_OK) for limit in limits)
        and subprocess.run(enter, stderr=subprocess.DEVNULL, check=False).returncode == 0  # noqa: S603
    )


# --- one run


@dataclass
class Run:
    """What became of a child."""

    status: int = 0
    seconds: float = 0.0
    died_of_the_limit: bool = False
    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and bytes in use."""
    progress: dict[str, Any] = field(default_factory=dict)
    """The last line of the pipeline's own report."""
    errors: str = ""

    @property
    def finished(self) -> bool:
        """Whether the pipeline came to its end."""
        return self.status == 0 and self.progress.get("done") is True

    @property
    def peak_bytes(self) -> int:
        """The most memory in use at any sample."""
        return max((used for _, used in self.samples), default=0)

    @property
    def records(self) -> int:
        """How many records the sink has taken."""
        return int(self.progress.get("records", 0))


def watch(argv: Sequence[str], limit: Limit, title: str, timeout_seconds: float) -> Run:
    """Run a child under a limit, and look at its memory until it ends."""
    run = Run()
    begun = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(limit.command(argv), stdout=output, stderr=errors)  # noqa: S603
        while child.poll() is None:
            run.seconds = time.monotonic() - begun
            if run.seconds > timeout_seconds:
                child.kill()
            elif b"MemoryError" in os.pread(errors.fileno(), 100_000, 0):
                # It is over, but Python may wait for ever for a thread that nobody could end.
                timeout_seconds = min(timeout_seconds, run.seconds + 5)
            used = limit.used_bytes(child.pid)
            run.samples.append((run.seconds, used))
            if len(run.samples) % 5 == 0:
                show_live(f"{title:10}{run.seconds:6.1f} s{human_size(used):>12}")
            time.sleep(SAMPLE_SECONDS)
        show_live("")
        run.seconds = time.monotonic() - begun
        run.status = child.returncode
        output.seek(0)
        for line in output.read().splitlines():
            with suppress(ValueError):  # cut off in the middle
                run.progress = json.loads(line)
        errors.seek(0)
        run.errors = errors.read().decode(errors="replace")
    run.died_of_the_limit = limit.has_killed(run.status, run.errors)
    return run


# --- the outcome


def show_live(line: str) -> None:
    """Write over the present line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


COLOURS = {"red": 31, "green": 32, "grey": 90, "bold": 1}


def paint(text: str, colour: str) -> str:
    """Colour text for a terminal that wants it."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def chart(run: Run, top_bytes: int, seconds: float, colour: str, width: int = 56) -> Iterator[str]:
    """Draw memory over time: so many columns for so many seconds, the limit at the top."""
    rows, marks = 5, " ▁▂▃▄▅▆▇█"
    end = " finished" if run.finished else " died" if run.died_of_the_limit else " failed"
    levels = [0] * width
    for at, used in run.samples:
        column = min(int(at / seconds * width), width - 1)
        levels[column] = max(levels[column], min(used, top_bytes) * rows * 8 // top_bytes)
    last = min(int(run.seconds / seconds * width), width - 1)
    for column in range(1, last + 1):
        levels[column] = levels[column] or levels[column - 1]
    end_row = min(max(levels[last - 1 : last + 1]) // 8, rows - 1)
    for row in reversed(range(rows)):
        line = "".join(marks[max(0, min(level - row * 8, 8))] for level in levels[: last + 1])
        yield paint(line + end * (row == end_row), colour)


def compare(bare: Run, bounded: Run, expected: dict[str, Any], limit_bytes: int) -> list[str]:
    """Say side by side what became of both, as lines of text."""

    def column(run: Run) -> list[str]:
        if run.finished:
            outcome = "finished"
        elif run.died_of_the_limit:
            outcome = "died (MemoryError)" if "MemoryError" in run.errors else "killed (OOM)"
        else:
            outcome = f"failed, status {run.status}"
        same = run.progress.get("checksum") == expected["checksum"]
        return [
            outcome,
            f"{run.seconds:.1f} s",
            human_size(run.peak_bytes),
            f"{run.records:,} of {expected['records']:,}",
            f"{run.records / run.seconds:,.0f} records/s",
            "-" if not run.finished else "as expected" if same else "WRONG",
        ]

    names = ("outcome", "time", "peak memory", "written", "throughput", "checksum")
    lines = [paint(f"{'':13}{'bare':24}under membound run", "bold")]
    for name, left, right in zip(names, column(bare), column(bounded), strict=True):
        cells = [f"{left:24}", f"{right:24}"]
        if name == "outcome":
            cells = [
                paint(cells[0], "red"),
                paint(cells[1], "green" if bounded.finished else "red"),
            ]
        lines.append(f"{name:13}{cells[0]}{cells[1]}".rstrip())
    seconds = max(bare.seconds, bounded.seconds)
    for name, run, colour in (("bare", bare, "red"), ("bounded", bounded, "green")):
        scale = [f"{human_size(limit_bytes):>10} ┤", *[f"{'':10} │"] * 4]
        scale[-1] = f"{'0':>10} ┤"
        lines.extend(["", f"{name:10} memory over {seconds:.0f} s"])
        lines.extend(
            paint(mark, "grey") + row
            for mark, row in zip(scale, chart(run, limit_bytes, seconds, colour), strict=True)
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="survive.py", description=str(__doc__).partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--limit", type=parse_size, default="256MiB", help="default: 256MiB")
    parser.add_argument(
        "--kind",
        choices=("auto", "cgroup", "rlimit"),
        default="auto",
        help="how memory is limited; default: a cgroup where one may be made, else RLIMIT_DATA",
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="for each run; default: 300"
    )
    parser.add_argument("pipeline", nargs="*", help="after --: arguments of log_pipeline.py")
    arguments = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        parser.error("this needs Linux, where a process can be given a real memory limit")

    pipeline = (str(PIPELINE), *(arguments.pipeline or FLIGHTS), "--report=json")

    def run(title: str, python: Sequence[str]) -> Run:
        with memory_limit(arguments.kind, arguments.limit) as limit:
            return watch([*python, *pipeline], limit, title, arguments.timeout)

    print(f"{PIPELINE.name} with {human_size(arguments.limit)} of memory:\n")
    bare = run("bare", BARE)
    one_by_one = [*BARE, *pipeline, "--one-by-one"]
    with subprocess.Popen(one_by_one, stdout=subprocess.PIPE) as reference:  # noqa: S603
        bounded = run("bounded", BOUNDED)
        output, _ = reference.communicate()
    if reference.returncode != 0:
        return 2
    expected = json.loads(output)
    print("\n".join(compare(bare, bounded, expected, arguments.limit)))
    return verdict(bare, bounded, expected)


def verdict(bare: Run, bounded: Run, expected: dict[str, Any]) -> int:
    """Say what that means; give the exit status."""
    faults = []
    if bare.finished:
        faults.append("bare, it had enough memory; set a lower --limit")
    elif not bare.died_of_the_limit:
        faults.append(f"bare, it failed for another reason:\n{bare.errors}")
    if not bounded.finished:
        faults.append(f"bounded, it did not finish:\n{bounded.errors}")
    elif any(bounded.progress[name] != expected[name] for name in ("records", "checksum")):
        faults.append("bounded, it wrote something else than it should")
    for fault in faults:
        print(paint(f"\nNot shown: {fault}", "red"))
    if not faults:
        print(paint(f"\nWhat `membound run` says of it:\n\n{bounded.errors.strip()}", "grey"))
        print("\nThe same file, the same limit: bare it died, bounded every record arrived.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
