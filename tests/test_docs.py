"""Every block of code in README.md and docs/ runs, and prints what the page says it prints.

Blocks of one page run in their order and share their names. What they may be:

- ``python``: executed; with ``await`` at top level on an event loop in virtual time. One
  that begins with a comment ``# name.py`` is written to that file for a later command;
  after ``# name.py, changed`` it takes the place of what it defines anew there.
- ``console``: what follows ``$`` is run by a shell in an empty directory, where ``python``
  and ``membound`` are those of the tests. Commands that install something, and those after
  ``<!-- ci:... -->``, which .ci/run follows, are compared with pyproject.toml instead.
- ``text`` right after one of these: its output. A line ``...`` stands for any lines.
- ``yaml``: for another program, which the tests of what the page is about have read it.

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
import importlib
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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Self, get_args

import aiokafka  # type: ignore[import-untyped]
import anyio.lowlevel
import httpx
import pytest
import structlog

import membound_async
from membound_async import GrantReleased, allocator
from membound_async.cli import _parser
from membound_async.eventlog import EventLog
from membound_async.hooks import Event
from membound_async.pressure import PressurePolicy
from membound_async.settings import LimiterSettings
from membound_async.testing import ScriptedProbe, VirtualTimeLoop

ROOT = Path(__file__).parent.parent
PACKAGE = Path(membound_async.__file__).parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

LANGUAGES = {"python", "console", "text", "yaml"}
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
        match = re.match(r"# (\w+\.py)(, changed)?\n", self.text)
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
    assert marks <= {"fails", "numbers vary", "ci:main", "ci:test", "figures"}


# --- what they print

NUMBER = re.compile(r"[-+]?\d[\d,.]*(?: \d{3}\b)*(?: ?(?:[KMGT]iB|B|m?s)\b)?")


def like(printed: str, shown: str, *, numbers_vary: bool) -> bool:
    """Tell whether something printed looks like what a page shows."""

    def pattern_of(line: str) -> str:
        return r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n"

    def plain(text: str) -> list[str]:
        lines = [line.rstrip() for line in text.rstrip().split("\n")]
        return without_numbers(lines) if numbers_vary else lines

    pattern = "".join(map(pattern_of, plain(shown)))
    return re.fullmatch(pattern, "\n".join(plain(printed)) + "\n") is not None


def without_numbers(lines: list[str]) -> list[str]:
    """Leave of a text what is the same each time.

    Of the report of ``membound run``: its words, however they are broken in lines, but not
    which columns its table has, and not whether the machine was short of memory.
    """
    plain: list[str] = []
    in_table = False
    for line in lines:
        in_table |= line.startswith("component ")
        text = " ".join(NUMBER.sub("#", line).split())
        if line.startswith("stalled ") or set(line) == {"-"}:
            continue
        if in_table:
            plain.append(text.partition(" ")[0])
        elif line.startswith("  ") and plain:
            plain[-1] += f" {text}"
        else:
            plain.append(text)
    return plain


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
        ("a 1 b\n", "a 2 c\n", True, False),
        ("limit 1 KiB of\n  them\nstalled 3 s\n", "limit 20 MiB\n  of them\n", True, True),
        ("component  a\n-----\nb  3\n", "component  a  c\n--------\nb  1  2\n", True, True),
        ("component  a\n-----\nb  3\n", "component  a\n-----\nc  3\n", True, False),
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
            self.write(self.directory / block.file_name, block.text)
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

    def write(self, path: Path, text: str) -> None:
        """Write a file, or what has changed in it."""
        if text.startswith(f"# {path.name}, changed"):
            text = changed(path.read_text(), text)
        path.write_text(text)
        self.unused_files.add(path.name)

    def note_use(self, modules: list[str]) -> None:
        """Note that these modules were run or imported, and so what they import."""
        for name in modules:
            if f"{name}.py" in self.unused_files:
                self.unused_files.remove(f"{name}.py")
                self.note_use(imports_of((self.directory / f"{name}.py").read_text()))

    def execute(self, block: Block) -> None:
        """Execute a block; lines in its tracebacks are lines of the page."""
        self.note_use(imports_of(block.text))
        source = "\n" * (block.line - 1) + block.text
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code: CodeType = compile(source, str(self.page), "exec", flags, dont_inherit=True)
        outcome = eval(code, self.module.__dict__)
        if inspect.iscoroutine(outcome):
            self.runner.run(outcome)

    def shell(self, command: str) -> tuple[str, int]:
        """Run a command; give what it prints, and its exit status."""
        self.note_use(re.findall(r"(\w+)(?:\.py|:\w+)", command))
        if "pytest" in command:
            self.note_use(["conftest"])
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


def imports_of(program: str) -> list[str]:
    return re.findall(r"^(?:from|import) (\w+)", program, re.MULTILINE)


def changed(before: str, change: str) -> str:
    """Give a program in which everything that ``change`` defines has been replaced."""
    statements = {names_in(statement): statement for statement in ast.parse(before).body}
    first = next(name for name in statements if not name.startswith("import"))
    for statement in ast.parse(change).body:
        name = names_in(statement)
        if name not in statements:  # before what there is, which may need it
            places = [*statements.items()]
            place = next(at for at, (known, _) in enumerate(places) if known == first)
            statements = dict([*places[:place], (name, statement), *places[place:]])
        statements[name] = statement
    return ast.unparse(ast.Module([*statements.values()], []))


def names_in(statement: ast.stmt) -> str:
    """Give what a statement defines; all that only run are one, the program's start."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Import(names=names):
            return "import " + ", ".join(alias.name for alias in names)
        case ast.ImportFrom(module=module):
            return f"import from {module}"
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case _:
            return "start"


def test_replaces_what_has_changed_in_a_program():
    before = "import a\nfrom b import c\nx = 1\ndef f():\n    return 1\nf()\n"
    change = "from b import d\ny = 2\ndef f():\n    return y\nif x:\n    f()\n"
    after = "import a\nfrom b import d\ny = 2\nx = 1\n\ndef f():\n    return y\nif x:\n    f()"
    assert changed(before, change) == after


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


LONG = {
    "docs/tutorial.md",
    "docs/howto/bounds.md",
    "docs/howto/inbox.md",
    "docs/howto/production.md",
    "docs/howto/prometheus.md",
    "docs/howto/shrink-a-cache.md",
    "docs/howto/status-api.md",
    "docs/howto/testing.md",
}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) in LONG))
        for page in PAGES
    ],
)
def test_page_does_what_it_says(page, tmp_path):
    """Each page is a process of its own: its limits count what that uses, and only that."""
    tracks = any("allocator" in one.text for one in blocks_of(page) if one.language == "python")
    if tracks and not allocator.available:
        pytest.skip(f"nothing can be tracked: {allocator.unavailable_reason}")
    if any(block.language in {"python", "console"} for block in blocks_of(page)):
        ended = subprocess.run(
            [sys.executable, "-W", "error", __file__, page],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout
        assert ended.stdout == ""


def read(page: Path) -> None:
    """Do what a page says in the current directory."""
    faults: list[object] = []
    sys.unraisablehook = lambda raised: faults.append(raised.exc_value)  # from finalisers
    sys.path[0] = os.getcwd()
    reader = Reader(page, Path.cwd())
    sys.modules["page"] = reader.module
    with MACHINES.get(name_of(page), contextlib.nullcontext)(), reader.runner:
        for block in blocks_of(page):
            reader.run(block)
    assert reader.unused_files == set()
    gc.collect()
    assert faults == []


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

    async def __aenter__(self) -> Self:
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


# --- nothing is left out


def table_rows(page: str) -> list[list[str]]:
    """Give the cells of all tables of a page, without their heads."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (DOCS / page).read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    rules = [place for place, row in enumerate(rows) if set(row[0]) == {"-"}]
    return [row for place, row in enumerate(rows) if not {place, place + 1} & {*rules}]


def quoted(text: str) -> list[str]:
    return re.findall(r"`(.*?)`", text)


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_every_setting_is_in_the_table():
    rows = {quoted(row[0])[0]: row for row in table_rows("reference/settings.md")}
    knobs = [
        (knob.name, getattr(settings, knob.name))
        for settings in (LimiterSettings(), PressurePolicy())
        for knob in fields(settings)
        if knob.name != "pressure"
    ]
    for name, default in knobs:
        row = rows[f"MEMBOUND_{name.upper()}"]
        assert (quoted(row[1]), row[2]) == ([name], str(default))
    assert set(rows) == {f"MEMBOUND_{name.upper()}" for name, _ in knobs} | variables_in_sources()


def variables_in_sources() -> set[str]:
    """Give the variables that the package reads by their names."""
    found: set[str] = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="given"), args=[_, ast.Constant(value=name), _]):
                    found.add(f"MEMBOUND_{name!s}")
                case ast.Constant(value=str(text)):
                    found |= set(re.findall(r"MEMBOUND_[A-Z]+(?:_[A-Z]+)*|WEB_CONCURRENCY", text))
    return found


def test_a_variable_in_the_table_does_what_it_says(monkeypatch):
    for name, value in (("MEMBOUND_SHARE", "3/4"), ("MEMBOUND_SLOP_FACTOR", "0.5")):
        monkeypatch.setenv(name, value)
    limiter = membound_async.MemoryLimiter("1GiB", baseline=0, probe=ScriptedProbe(0))
    most = limiter.limit.effective_bytes * 3 // 4
    assert limiter.limit.effective_bytes == 2**29
    with limiter.grant_nowait(most), pytest.raises(membound_async.GrantTooLarge):
        limiter.grant_nowait(most + 1)


def test_every_event_is_in_the_table():
    rows = table_rows("reference/events.md")
    told = {quoted(row[0])[0]: (row[1], set(quoted(row[2]))) for row in rows}
    assert told == events_in_sources()


def events_in_sources() -> dict[str, tuple[str, set[str]]]:
    """Give the level and the keys of everything that the package logs."""
    found = dict(map(told_by_hook, get_args(Event)))
    names: set[str] = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Call(func=ast.Name(id="log")), attr=level),
                    args=[ast.Constant(value=str(event))],
                    keywords=keywords,
                ):
                    found[event] = (level, {str(keyword.arg) for keyword in keywords})
                case ast.Constant(value=str(text)) if re.fullmatch(r"membound\.[a-z_]+", text):
                    names.add(text)
    assert names == set(found)
    return found


def told_by_hook(event: type[Any]) -> tuple[str, tuple[str, set[str]]]:
    """Have an event written to the log, twice; give what was written."""
    keys = {field.name for field in fields(event)}
    example: Any = {"component": "a", "reclaimer": "a", "error": GrantReleased("a", "grow")}
    made = event(**{key: example.get(key, 1) for key in keys})
    log = EventLog(1.0, iter([0.0, 0.5, 1.5]).__next__)
    with structlog.testing.capture_logs() as written:
        for _ in range(3):
            log(made)
    assert [each.get("suppressed") for each in written] == [None, 1]
    assert written[0]["event"] == event.name
    level = written[0]["log_level"]
    return event.name, (level, written[0].keys() - {"event", "log_level"})


def test_every_option_of_the_command_line_is_described():
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    sections = dict(
        re.findall(r"^## membound (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    )
    commands = next(
        action.choices for action in _parser()._actions if isinstance(action.choices, dict)
    )
    assert set(commands) == {name for name in sections if not name.startswith("-")}
    for command, parser in commands.items():
        described = set(re.findall(r"`(--[a-z-]+)", sections[command]))
        known = {text for action in parser._actions for text in action.option_strings}
        assert described == {text for text in known if text.startswith("--")} - {"--help"}


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    modules = re.findall(r"^\.\. automodule:: (\S+)(\n +:no-members:)?", pages, re.MULTILINE)
    single = set(re.findall(r"^\.\. auto(?:function|class):: (\S+)", pages, re.MULTILINE))
    documented = {name.rpartition(".")[2] for name in single}
    for module, has_no_members in modules:
        names = set(importlib.import_module(module).__all__)
        if has_no_members:
            assert {name for name in names if f"{module}.{name}" not in single} == set()
        documented |= names
    assert set(membound_async.__all__) <= documented


def test_the_delays_in_the_table_are_those_of_the_policy():
    rows = [row for row in table_rows("topics/quota.md") if row[0].endswith("%")]
    policy = PressurePolicy()
    delays = {row[0]: row[1] for row in rows}
    assert delays.pop("up to 95 %") == "none"
    assert policy.delay_seconds(95_000, 100_000) == 0.0
    for measured, delay in delays.items():
        percent = float(measured.split()[0])
        seconds = policy.delay_seconds(int(percent * 1000), 100_000)
        assert f"{seconds * 1000:g} ms" == delay
    assert policy.delay_seconds(100_000, 100_000) == 0.025


def test_the_defaults_of_kafka_are_those_of_the_client():
    parameters = inspect.signature(REAL_CONSUMER).parameters
    rows = {quoted(row[0])[0]: row[1] for row in table_rows("howto/kafka.md")}
    assert {name: parameters[name].default for name in rows} == {
        name: int(default.split()[0]) * 2**20 for name, default in rows.items()
    }


def test_the_set_up_of_a_fresh_machine_is_two_commands():
    marked = {
        mark: block
        for block in blocks_of(ROOT / "README.md")
        for mark in block.marks
        if mark.startswith("ci:")
    }
    assert set(marked) == {"ci:main", "ci:test"}
    for block in marked.values():
        assert block.language == "console"
        assert len([*commands_of(block)]) == 1


if __name__ == "__main__":
    read(Path(sys.argv[1]))
