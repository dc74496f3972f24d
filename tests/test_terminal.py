"""The command line in a real terminal: what a person sees in tmux, and what is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import membound_async

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("tmux") is None,
        reason="tmux IS NOT INSTALLED: nothing was looked at in a terminal (apt-get install tmux)",
    ),
]

PATIENCE_SECONDS = 30.0


class Terminal:
    """A shell in a terminal of its own.

    Args:
        directory: where the shell is.
        columns: of the terminal.
        lines: of the terminal.
    """

    def __init__(self, directory: Path, columns: int = 80, lines: int = 24) -> None:
        home = str(Path(membound_async.__file__).parents[1])
        self._tmux = ["tmux", "-f", "/dev/null", "-S", str(directory / "tmux.socket")]
        settings = {
            "PYTHONPATH": home,
            "LC_ALL": "C.UTF-8",
            "MEMBOUND_TRACK": "0",
        }
        told = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]
        size = ["-x", str(columns), "-y", str(lines)]
        command = "exec bash --norc --noprofile"
        self._do("new-session", "-d", *size, *told, "-c", str(directory), command)
        self.type(f"PS1='$ '; membound() {{ {sys.executable} -m membound_async.cli \"$@\"; }}\n")
        self.clear()

    def clear(self) -> None:
        """Have an empty terminal with a prompt."""
        self.wait_for(lambda now: now[-1].endswith("$"))
        self.type("clear\n")
        self.wait_for(lambda now: now == ["$"])

    def close(self) -> None:
        self._do("kill-server")

    def type(self, text: str) -> None:
        """Type text; a newline is Enter."""
        for part in re.findall(r"[^\n]+|\n", text):
            self._do("send-keys", *(["Enter"] if part == "\n" else ["-l", part]))

    def press(self, key: str) -> None:
        """Press a key by tmux's name for it."""
        self._do("send-keys", key)

    def resize(self, columns: int, lines: int) -> None:
        """Have it another size; the programs in it are told."""
        self._do("resize-window", "-x", str(columns), "-y", str(lines))
        device = self._do("display-message", "-p", "#{pane_tty}").strip()
        until = time.monotonic() + PATIENCE_SECONDS
        with Path(device).open("rb", buffering=0) as terminal:
            while os.get_terminal_size(terminal.fileno()) != (columns, lines):
                assert time.monotonic() < until, "tmux has not resized it"
                time.sleep(0.01)

    def screen(self, *, escapes: bool = False) -> list[str]:
        """Give the lines that are shown, those that are empty at the end left out."""
        shown = self._do("capture-pane", "-p", *(["-e"] if escapes else []))
        return shown.rstrip("\n").split("\n")

    def wait_for(
        self, what: str | Callable[[list[str]], object], *, escapes: bool = False
    ) -> list[str]:
        """Give the screen as soon as it shows something: a pattern, or what a function finds."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            shown = self.screen(escapes=escapes)
            if isinstance(what, str):
                found: object = any(re.search(what, line) for line in shown)
            else:
                found = what(shown)
            if found:
                return shown
            assert time.monotonic() < until, "\n".join([f"waited for {what}, but see", *shown])
            time.sleep(0.05)

    def _do(self, *command: str) -> str:
        done = subprocess.run(
            [*self._tmux, *command],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_SECONDS,
            env={name: value for name, value in os.environ.items() if name != "TMUX"},
        )
        return done.stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    yield made
    made.close()


SERVICE = """\
import sys, time
from membound_async import current_limiter

MIB = 2**20
limiter = current_limiter()
held = [
    limiter.component("decode", minimum="8MiB", firm_limit="64MiB").grant_nowait(60 * MIB),
    limiter.component("write", firm_limit="512MiB").grant_nowait(100 * MIB),
    limiter.component("ingest.of.orders.of.other.departments").grant_nowait(5 * MIB),
]
limiter.component("peaked").grant_nowait(150 * MIB).release()
for number in range(40):
    held.append(limiter.component(f"small.{number:02}").grant_nowait(1000 * (number + 1)))
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts a real service, whose numbers are known, and gives its address."""
    (tmp_path / "service.py").write_text(SERVICE)
    running: list[subprocess.Popen[str]] = []

    def start(port: str = "0") -> str:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "membound_async.cli", "run", "--report", "none"),
                *("--limit", "1GiB", "--serve", port, "service.py"),
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(membound_async.__file__).parents[1]),
                "MEMBOUND_TRACK": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        url = process.stderr.readline()
        assert process.stdout.readline() == "ready\n", url + process.stderr.read()
        match = re.search(r"http://([\d.:]+)/", url)
        assert match is not None
        return match[1]

    start.stop = lambda: end(running.pop())  # type: ignore[attr-defined]
    yield start
    for process in running:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=PATIENCE_SECONDS)


def processes(*arguments: str) -> list[int]:
    """Give the processes of the command line that have these as last arguments."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().rstrip("\0").split("\0")
        except OSError:
            continue
        if "membound_async.cli" in words and words[-len(arguments) :] == [*arguments]:
            found.append(int(path.parent.name))
    return found


def names(shown: list[str]) -> list[str]:
    """Give the first words of the table's lines."""
    head = next(place for place, line in enumerate(shown) if line.startswith("COMPONENT"))
    return [line.split()[0] for line in shown[head + 1 :] if line.strip()]


# --- top


def test_top_shows_a_service_and_sorts(terminal: Terminal, service: Callable[..., str]) -> None:
    address = service()
    terminal.type(f"membound top {address}\n")
    shown = terminal.wait_for("^COMPONENT")
    assert len(shown) == 24
    assert max(map(len, shown)) <= 80
    assert re.fullmatch(rf"{address}, process \d+  for \d+ m?s, limit 1\.0 GiB   ok *", shown[0])
    assert re.match(r"memory    [█░]+  \d+\.\d MiB of 870\.4 MiB \(\d+ %\), peak ", shown[1])
    assert re.match(r"granted   165\.8 MiB in 43 grants, free \d+\.\d MiB, drift ", shown[2])
    assert shown[3] == "waiting   nobody"
    assert shown[4].split() == [
        "COMPONENT",
        "GRANTED",
        "PEAK",
        "MINIMUM",
        "FIRM",
        "WAITING",
        "OLDEST",
    ]
    first, second, third, fourth, *_ = names(shown)
    assert (first, second, fourth) == ("write", "decode", "small.39")
    assert re.fullmatch(r"ingest\.of\.orders\..*…", third)
    assert re.fullmatch(r"write +100\.0 MiB +100\.0 MiB +- +512\.0 MiB +- +-", shown[5])
    # Right-aligned, one below the other.
    column = shown[4].index("GRANTED") + len("GRANTED")
    assert all(line[column - 1] in "B-" for line in shown[5:20])
    assert shown[-2] == "... 27 more"
    assert shown[-1].startswith("q quit")

    terminal.type("p")
    assert names(terminal.wait_for("^peaked"))[:3] == ["peaked", "write", "decode"]
    terminal.type("p")  # the other way round
    terminal.wait_for(lambda now: names(now)[0] == "small.00")
    terminal.type("c")
    terminal.wait_for(lambda now: names(now)[0] == "decode" and names(now)[2] == "peaked")
    terminal.press("PageDown")
    terminal.wait_for(r"\.\.\. 10 above, 17 more")
    terminal.press("Up")
    terminal.wait_for(r"\.\.\. 9 above, 18 more")
    terminal.type("a")
    terminal.wait_for("too little seen yet")
    terminal.type("q")
    shown = terminal.wait_for(lambda now: now[-1] == "$")
    assert "COMPONENT" not in "".join(shown)  # the screen is as it was before
    terminal.type("stty -a | grep -c -- ' icanon'; echo ended with $?\n")
    terminal.wait_for("ended with 0")  # Enter is waited for again


def test_top_follows_the_size_of_the_terminal(
    terminal: Terminal, service: Callable[..., str]
) -> None:
    terminal.type(f"membound top {service()} --interval 600\n")
    terminal.wait_for("^COMPONENT")
    terminal.resize(120, 40)
    shown = terminal.wait_for("REFUSED|WAITED")
    assert len(shown) == 40
    assert max(map(len, shown)) <= 120
    assert [line for line in shown if line.startswith("ingest.of.orders.of.")]
    terminal.resize(50, 12)
    titles = ["COMPONENT", "GRANTED", "FIRM", "WAITING"]
    shown = terminal.wait_for(lambda now: len(now) == 12 and now[4].split() == titles)
    assert max(map(len, shown)) <= 50
    assert shown[-1].startswith("q quit")


def test_top_reconnects(terminal: Terminal, service: Callable[..., str]) -> None:
    address = service()
    terminal.type(f"membound top {address} --interval 0.1\n")
    terminal.wait_for("^COMPONENT")
    service.stop()  # type: ignore[attr-defined]
    shown = terminal.wait_for(r"^.* reconnecting: ")
    assert "write" in names(shown)  # what was known last
    service(address)
    terminal.wait_for(lambda now: now[0].endswith(" ok"))


def test_ctrl_c_and_signals_leave_the_terminal_as_it_was(
    terminal: Terminal, service: Callable[..., str]
) -> None:
    address = service()
    terminal.type(f"membound top {address}; echo ended with $?\n")
    terminal.wait_for("^COMPONENT")
    terminal.press("C-c")
    shown = terminal.wait_for("^ended with 130")
    assert not [line for line in shown if "COMPONENT" in line or "Traceback" in line]
    terminal.clear()
    terminal.type(f"membound top {address}; echo ended with $?\n")
    terminal.wait_for("^COMPONENT")
    (process,) = processes("top", address)
    os.kill(process, signal.SIGTERM)
    terminal.wait_for("^ended with 143")
    terminal.type("stty -a | grep -c -- ' echo '; echo echoes $?\n")
    terminal.wait_for("^echoes 0")


def test_no_color_and_dumb_terminals(terminal: Terminal, service: Callable[..., str]) -> None:
    address = service()
    terminal.clear()
    terminal.type(f"membound top {address}\n")
    shown = terminal.wait_for("COMPONENT|\x1b\\[1;4mC", escapes=True)
    coloured = re.compile(r"\x1b\[[0-9;]*3[1-7]")
    assert any(coloured.search(line) for line in shown)
    terminal.type("q")
    terminal.clear()
    terminal.type(f"NO_COLOR=1 membound top {address}\n")
    shown = terminal.wait_for("process", escapes=True)
    assert not any(coloured.search(line) for line in shown)
    terminal.type("q")
    terminal.clear()
    terminal.type(f"TERM=dumb membound top {address} --interval 60\n")
    shown = terminal.wait_for("^peaked ", escapes=True)  # plain, and longer than the terminal
    assert not any("\x1b" in line for line in shown)
    terminal.press("C-c")


# --- progress

PROGRAM = """\
import os, subprocess, sys, time
from membound_async import current_limiter

limiter = current_limiter()
with limiter.component("decode", firm_limit="64MiB").grant_nowait("20MiB"):
    for number in range(int(sys.argv[1])):
        print("printed", number, flush=True)
        os.write(1, b"written %d\\n" % number)
        subprocess.run(["echo", "of a child", str(number)])
        time.sleep(0.2)
print("last", flush=True)
"""


def start_program(terminal: Terminal, tmp_path: Path, numbers: int, options: str = "") -> list[str]:
    (tmp_path / "app.py").write_text(dedent(PROGRAM))
    terminal.type(f"membound run --limit 1GiB {options} --progress app.py {numbers}\n")
    return terminal.wait_for("^COMPONENT")


def is_orderly(shown: list[str]) -> bool:
    """Tell whether what the program prints is all there, in its order, and nothing in between.

    What is printed in the moment after a resize stands beside what is left of the table.
    """
    printed = [line for line in shown if re.match(r"(printed|written|of a child) \d", line)]
    kinds = ("printed", "written", "of a child")
    every = [f"{kind} {number}" for number in range(100) for kind in kinds]
    return any(
        all(map(str.startswith, printed, every[first:]))
        for first in range(len(every) - len(printed))
    )


def test_progress_is_below_what_the_program_prints(terminal: Terminal, tmp_path: Path) -> None:
    shown = start_program(terminal, tmp_path, 20)
    assert len(shown) == 24 or shown[-1].startswith("decode")
    shown = terminal.wait_for("^of a child 8")
    rule = next(place for place, line in enumerate(shown) if line.startswith("───"))
    assert len(shown[rule]) == 80
    assert re.match(r"app\.py  for \d+ m?s, limit 1\.0 GiB   ok", shown[rule + 1])
    assert re.match(r"decode +20\.0 MiB +20\.0 MiB", shown[-1])
    assert is_orderly(shown), shown
    terminal.resize(120, 40)
    shown = terminal.wait_for(lambda now: len(now) == 40 and "WANTED" in now[-2])
    assert is_orderly(shown), shown
    terminal.resize(70, 20)
    shown = terminal.wait_for(lambda now: len(now) == 20 and now[-1].startswith("decode"))
    assert is_orderly(shown), shown
    shown = terminal.wait_for("exit code 0")
    assert "───" not in "".join(shown)  # the table is gone, the report is there
    assert [line for line in shown if line == "last"]
    assert_scrolls_whole(terminal)


def assert_scrolls_whole(terminal: Terminal) -> None:
    """Assert that lines may go from the last line of the terminal to the first."""
    terminal.clear()
    terminal.type("seq 100 199\n")
    shown = terminal.wait_for(lambda now: now[-2:] == ["199", "$"])
    assert len(shown) >= 20
    assert shown[0] == str(201 - len(shown))


def test_progress_is_gone_after_ctrl_c(terminal: Terminal, tmp_path: Path) -> None:
    start_program(terminal, tmp_path, 1000)
    terminal.press("C-c")
    shown = terminal.wait_for("was interrupted after")
    assert "───" not in "".join(shown)
    assert "Traceback" not in "".join(shown)
    assert_scrolls_whole(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_progress_is_gone_after_the_program_was_killed(
    terminal: Terminal, tmp_path: Path, number: int
) -> None:
    start_program(terminal, tmp_path, 1000)
    (process,) = processes("--progress", "app.py", "1000")
    os.kill(process, number)
    terminal.wait_for(lambda now: "───" not in "".join(now))
    assert_scrolls_whole(terminal)


def test_a_forked_process_does_not_keep_the_terminal(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import os, time\nos.fork()\ntime.sleep(600)\n")
    terminal.type("membound run --limit 1GiB --progress app.py\n")
    terminal.wait_for("^app.py  for")
    parent, child = sorted(processes("--progress", "app.py"))
    try:
        os.kill(parent, signal.SIGKILL)
        terminal.wait_for(lambda now: "───" not in "".join(now))
        assert_scrolls_whole(terminal)
    finally:
        os.kill(child, signal.SIGKILL)


def test_output_of_the_program_can_be_redirected(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(dedent(PROGRAM))
    terminal.type("membound run --limit 1GiB --progress app.py 5 > out.txt\n")
    terminal.wait_for("^COMPONENT")
    terminal.wait_for("exit code 0")
    assert (tmp_path / "out.txt").read_text().splitlines() == [
        *(
            f"{what} {number}"
            for number in range(5)
            for what in ("printed", "written", "of a child")
        ),
        "last",
    ]


# --- verify


BOUNDS = """\
from membound_async import ComponentRegistry

registry = ComponentRegistry()
registry.declare("ingest.decode", minimum="8MiB", firm_limit="64MiB")
registry.declare("ingest.read", minimum="4MiB")
registry.declare("write", minimum="1MiB", firm_limit="100MiB")
"""


def test_verify_draws_the_tree(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(BOUNDS)
    command = "membound verify shop:registry --limit 256MiB --baseline 40MiB --slop 0\n"
    terminal.type(command)
    shown = terminal.wait_for("^smallest limit")
    first = next(place for place, line in enumerate(shown) if line.startswith("COMPONENT"))
    assert [line.rstrip() for line in shown[first : first + 10]] == [
        "COMPONENT       MINIMUM  FIRM LIMIT",
        "root           13.0 MiB   168.0 MiB",
        "├─ write        1.0 MiB   100.0 MiB",
        "└─ ingest      12.0 MiB    68.0 MiB",
        "   ├─ decode    8.0 MiB    64.0 MiB",
        "   └─ read      4.0 MiB     4.0 MiB  *",
        "",
        "available     216.0 MiB   216.0 MiB",
        "left          203.0 MiB    48.0 MiB",
        "available: effective limit 256.0 MiB, less baseline 40.0 MiB",
    ]
    terminal.clear()
    terminal.type(f"{command.strip()} | cat\n")
    shown = terminal.wait_for("^smallest limit")
    assert [line for line in shown if line.startswith("  ingest ")]
    terminal.clear()
    terminal.type(f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {command}")
    shown = terminal.wait_for("^smallest limit")
    assert [line for line in shown if line.startswith("|- write ")]
