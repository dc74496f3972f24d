"""Every block of code in README.md and docs/ runs, and prints what the page says it prints.

Blocks of one page run in their order and share their names. What they may be:

- ``python``: executed; with ``await`` at top level on an event loop in virtual time. One
  that begins with a comment ``# name.py`` is written to that file for a later command.
- ``console``: what follows ``$`` is run by a shell in an empty directory, where ``python``
  and ``membound`` are those of the tests. Commands that install something, and those after
  ``<!-- ci:... -->``, which .ci/run follows, are compared with pyproject.toml instead.
- ``text`` right after one of these: its output. A line ``...`` stands for any lines.

What prints must show its output. A comment before a block says what is special about it:
``<!-- fails -->`` for a command that does, ``<!-- numbers vary -->`` where only the words of
the output are the same each time. What needs another machine gets a fake one, below, and
is the same code.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import aiokafka
import anyio.lowlevel
import httpx
import pytest
import structlog

import membound_async
from membound_async.cli import _parser
from membound_async.context import process_limiters
from membound_async.pressure import PressurePolicy
from membound_async.settings import LimiterSettings
from membound_async.testing import VirtualTimeLoop

ROOT = Path(__file__).parent.parent
PACKAGE = Path(membound_async.__file__).parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

LANGUAGES = {"python", "console", "text"}
DIRECTIVES = {"{toctree}", "{eval-rst}", "{note}", "{warning}"}


# --- pages


@dataclass
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    marks: set[str] = field(default_factory=set)
    output: str | None = None
    """What the page says that it prints."""

    @property
    def file_name(self) -> str | None:
        """The file that it is, if it is one."""
        match = re.match(r"# (\w+\.py)\n", self.text)
        return match[1] if match and self.language == "python" else None


FENCE = re.compile(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (.*?) -->")


def blocks_of(path: Path) -> list[Block]:
    """Give the fenced blocks of a page, each with its marks and its output."""
    page = path.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(page):
        between = page[end : fence.start()]
        end = fence.end()
        block = Block(
            fence[2], fence[3], page.count("\n", 0, fence.start()) + 2, marks_before(between)
        )
        previous = found[-1] if found else None
        if (
            block.language == "text"
            and previous is not None
            and previous.language in {"python", "console"}
            and not MARK.sub("", between).strip()
        ):
            previous.output = block.text
            previous.marks |= block.marks
        else:
            found.append(block)
    return found


def marks_before(text: str) -> set[str]:
    """Give the comments that stand right before a block."""
    marks = re.search(rf"(?:{MARK.pattern}\s*)*\Z", text)
    assert marks is not None
    return set(MARK.findall(marks[0]))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_kind_of_block_is_known():
    languages = {(block.language, name_of(path)) for path in PAGES for block in blocks_of(path)}
    assert [place for place in languages if place[0] not in LANGUAGES | DIRECTIVES] == []


def test_every_mark_is_known():
    marks = {mark for path in PAGES for mark in MARK.findall(path.read_text(encoding="utf-8"))}
    assert marks <= {"fails", "numbers vary", "ci:main", "ci:test"}


# --- what they print

NUMBER = re.compile(r"[-+]?\d[\d,.]*(?: \d{3}\b)*(?: ?(?:[KMGT]iB|B|m?s)\b)?")


def like(printed: str, shown: str, *, numbers_vary: bool) -> bool:
    """Tell whether something printed looks like what a page shows."""

    def pattern_of(line: str) -> str:
        return r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n"

    def plain(text: str) -> list[str]:
        lines = [line.rstrip() for line in text.rstrip().split("\n")]
        if numbers_vary:
            lines = [re.sub(r"-{3,}", "---", NUMBER.sub("#", line)) for line in lines]
            lines = [re.sub(r" +", " ", line) for line in lines]
        return lines

    pattern = "".join(map(pattern_of, plain(shown)))
    return re.fullmatch(pattern, "\n".join(plain(printed)) + "\n") is not None


def check_output(place: str, printed: str, shown: str | None, marks: set[str]) -> None:
    if printed.strip() or shown is not None:
        assert shown is not None, f"{place} prints what the page does not show:\n{printed}"
        assert like(printed, shown, numbers_vary="numbers vary" in marks), (
            f"{place} prints\n{printed}\nbut the page shows\n{shown}"
        )


@pytest.mark.parametrize(
    ("printed", "shown", "numbers_vary", "alike"),
    [
        ("a\nb\n", "a\nb\n", False, True),
        ("a\nb\n", "a\nc\n", False, False),
        ("a\nb\nc\n", "a\n...\nc\n", False, True),
        ("a\nc\n", "a\n...\nc\n", False, True),
        ("a\nb\n", "...\n", False, True),
        ("a 12.5 MiB in 3 s\n", "a 7 KiB in 300 ms\n", True, True),
        ("a 12.5 MiB in 3 s\n", "a 7 KiB in 300 ms\n", False, False),
        ("name       1 024\n-----------\n", "name 8\n----\n", True, True),
        ("a 1 b\n", "a 1 c\n", True, False),
    ],
)
def test_compares_output_with_what_is_shown(printed, shown, numbers_vary, alike):
    assert like(printed, shown, numbers_vary=numbers_vary) is alike


# --- running them


class Reader:
    """Does what a page says, block by block, in an empty directory.

    Args:
        page: the page.
        directory: where it is done.
    """

    def __init__(self, page: Path, directory: Path) -> None:
        self.page = page
        self.directory = directory
        self.module = ModuleType("page")
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self.unused_files: set[str] = set()
        self.commands = directory / ".commands"
        self.commands.mkdir()
        for name, module in (("python", ""), ("membound", "-m membound_async.cli")):
            command = self.commands / name
            command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
            command.chmod(0o755)

    def run(self, block: Block) -> None:
        place = f"{name_of(self.page)}:{block.line}"
        if block.file_name is not None:
            assert block.file_name not in self.unused_files, f"{place}: the last one was not run"
            (self.directory / block.file_name).write_text(block.text)
            self.unused_files.add(block.file_name)
        elif block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                self.execute(block)
            check_output(place, printed.getvalue(), block.output, block.marks)
        elif block.language == "console":
            for command, shown in commands_of(block):
                if is_set_up(command, block):
                    check_set_up(command)
                else:
                    printed_text, status = self.shell(command)
                    assert (status != 0) == ("fails" in block.marks), (
                        f"{place}: {command} ended with {status}:\n{printed_text}"
                    )
                    check_output(f"{place}: {command}", printed_text, shown, block.marks)

    def execute(self, block: Block) -> None:
        """Execute a block; lines in its tracebacks are lines of the page."""
        source = "\n" * (block.line - 1) + block.text
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code: CodeType = compile(source, str(self.page), "exec", flags, dont_inherit=True)
        outcome = eval(code, self.module.__dict__)
        if inspect.iscoroutine(outcome):
            self.runner.run(outcome)

    def shell(self, command: str) -> tuple[str, int]:
        """Run a command; give what it prints, and its exit status."""
        self.unused_files -= set(re.findall(r"\w+\.py", command))
        self.unused_files -= {f"{name}.py" for name in re.findall(r"(\w+):\w+", command)}
        environment = {
            **os.environ,
            "PATH": f"{self.commands}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(PACKAGE.parent),
        }
        ended = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return ended.stdout, ended.returncode


def commands_of(block: Block) -> Iterator[tuple[str, str | None]]:
    """Give each command of a console block, and what it is said to print."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.split("\n")
        last = next(place for place, line in enumerate(lines) if not line.endswith("\\"))
        shown = "\n".join(lines[last + 1 :])
        yield "\n".join(lines[: last + 1]), shown if shown.strip() else block.output


def is_set_up(command: str, block: Block) -> bool:
    return "pip install" in command or any(mark.startswith("ci:") for mark in block.marks)


def check_set_up(command: str) -> None:
    """Check a command that installs the package, which is .ci/run's to run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = re.findall(r"(membound-async|\.)\[([\w,]+)\]", command)
    for _, extras in wanted:
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for word in shlex.split(command):
        if re.search(r"\.(py|txt)$", word):
            assert (ROOT / word).is_file()


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Iterator[Path]:
    """Give the directory in which a page is done, and undo what that did to the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
    sys.modules.pop("page", None)
    structlog.reset_defaults()
    for limiter in [*process_limiters]:
        limiter.uninstall()
    gc.collect()  # a grant that a page has leaked is an error here, not in another test


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_does_what_it_says(page, directory):
    machine = MACHINES.get(name_of(page), contextlib.nullcontext)
    reader = Reader(page, directory)
    sys.modules["page"] = reader.module
    with machine(), reader.runner:
        for block in blocks_of(page):
            reader.run(block)
    assert reader.unused_files == set()


# --- machines that are not there


@contextmanager
def kafka() -> Iterator[None]:
    """Have a topic of 2000 messages, which each group of consumers reads to its end."""
    committed: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiokafka, "AIOKafkaConsumer", partial(Consumer, committed))
        yield
    assert committed == {"billing": len(MESSAGES), "audit": len(MESSAGES)}


MESSAGES = [
    aiokafka.ConsumerRecord(
        topic="orders",
        partition=0,
        offset=offset,
        timestamp=0,
        timestamp_type=0,
        key=None,
        value=json.dumps([{"order": offset, "articles": ["nut", "bolt"] * 20}]).encode(),
        checksum=None,
        serialized_key_size=-1,
        serialized_value_size=0,
        headers=(),
    )
    for offset in range(2000)
]


class Consumer:
    """Does what ``AIOKafkaConsumer`` does, without a broker.

    Args:
        committed: the offsets of the groups.
        topics: as of the real one.
        options: as of the real one.
    """

    def __init__(self, committed: dict[str, int], *topics: str, **options: Any) -> None:
        known = inspect.signature(REAL_CONSUMER).bind(*topics, **options)
        known.apply_defaults()
        assert topics == ("orders",)
        self._committed = committed
        self._group = known.arguments["group_id"]
        self._commits_by_itself = known.arguments["enable_auto_commit"]
        self._position = committed.setdefault(self._group, 0)

    async def __aenter__(self) -> Consumer:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._commits_by_itself:
            self._committed[self._group] = self._position

    def __aiter__(self) -> AsyncIterator[aiokafka.ConsumerRecord]:
        return self

    async def __anext__(self) -> aiokafka.ConsumerRecord:
        await anyio.lowlevel.checkpoint()
        if self._position == len(MESSAGES):
            raise StopAsyncIteration
        self._position += 1
        return MESSAGES[self._position - 1]

    async def commit(self, offsets: dict[aiokafka.TopicPartition, int]) -> None:
        await anyio.lowlevel.checkpoint()
        ((partition, offset),) = offsets.items()
        assert partition == aiokafka.TopicPartition("orders", 0)
        assert not self._commits_by_itself
        assert self._committed[self._group] < offset <= self._position
        self._committed[self._group] = offset


REAL_CONSUMER = aiokafka.AIOKafkaConsumer


@contextmanager
def web_server() -> Iterator[None]:
    """Have example.org answer with 3 MB, of which it says the length, or of a stream not."""

    async def in_pieces() -> AsyncIterator[bytes]:
        for _ in range(300):
            await anyio.lowlevel.checkpoint()
            yield bytes(10_000)

    async def answer(_: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        assert request.url.host == "example.org"
        assert "Accept-Encoding" in request.headers
        content = in_pieces() if request.url.path == "/stream" else bytes(3_000_000)
        return httpx.Response(200, content=content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", answer)
        yield


MACHINES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "docs/howto/kafka.md": kafka,
    "docs/howto/http-download.md": web_server,
}
"""What a page needs besides this machine."""
