"""What `membound run` does beside a program: serves its memory, shows its progress."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from membound_async import testing
from membound_async.cli import serve
from membound_async.cli.progress import Progress
from membound_async.cli.serve import Server
from membound_async.context import installed_limiters
from tests.test_cli import Ended, in_a_process, membound, project, write

__all__ = ["membound", "project"]  # fixtures

MIB = 2**20

ASKS = """\
import json, re, sys, urllib.request
from membound_async import current_limiter

err = sys.stderr.getvalue()
url = re.search(r"serving (\\S+)", err)[1]
with current_limiter().component("decode").grant_nowait("3MiB"):
    request = urllib.request.Request(url + "status", headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        document = json.load(answer)
print(url, document["limiter"]["granted_bytes"], document["status"])
"""


# --- serve


def test_the_api_is_served_while_the_program_runs(membound: Callable[..., Ended]) -> None:
    write("app.py", ASKS)
    ended = membound("run", "--limit", "1GiB", "--report", "none", "--serve", "0", "app.py")
    assert ended.exit_code == 0, ended.err
    url, granted, status = ended.out.split()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/memory/", url)
    assert (int(granted), status) == (3 * MIB, "ok")
    assert ended.err == f"membound: serving {url}\n"
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


@pytest.mark.parametrize("where", [["--token", "secret"], []])
def test_a_token_is_required_if_there_is_one(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, where: list[str]
) -> None:
    if not where:
        monkeypatch.setenv("MEMBOUND_API_TOKEN", "secret")
    options = ["run", "--limit", "1GiB", "--report", "none", "--serve", ":0", *where]
    write("app.py", ASKS)
    assert membound(*options, "app.py").exit_code == 0
    installed_limiters.clear()
    write("app.py", ASKS.replace("Bearer secret", "Bearer guess"))
    ended = membound(*options, "app.py")
    assert ended.exit_code == 1
    assert "HTTP Error 401" in ended.err


def test_a_port_in_use_is_exit_code_2_before_the_program_starts(
    membound: Callable[..., Ended],
) -> None:
    write("app.py", "print('started')")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = membound("run", "--serve", f"{port}", "app.py")
    assert ended == Ended(2, "", f"membound: --serve {port}: Address already in use\n")


@pytest.mark.parametrize("address", ["", "x", "shop:", "70000", "1:2:3", "http://shop:1"])
def test_what_is_no_address_is_exit_code_2(membound: Callable[..., Ended], address: str) -> None:
    write("app.py", "")
    ended = membound("run", "--serve", address, "app.py")
    message = f"membound: --serve {address}: write HOST:PORT, :PORT or PORT\n"
    assert ended == Ended(2, "", message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token", "se cret"], "--token: token has spaces, which end a bearer token"),
        (["--limit", "12parsecs"], "limit='12parsecs' is no size"),
        (["--limit", "1GiB", "nope:main"], "no module named 'nope'"),
    ],
)
def test_the_port_is_given_back_if_the_program_cannot_start(
    membound: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    made: list[Server] = []
    init = Server.__init__

    def noted(self: Server, *arguments: Any) -> None:
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Server, "__init__", noted)
    write("app.py", "")
    ended = membound("run", "--serve", "0", *options, "app.py")
    assert ended.exit_code == 2
    assert f"membound: {message}" in ended.err
    (server,) = made
    assert server._socket.fileno() == -1


def test_other_hosts_are_served_if_asked_for_and_that_is_said(
    membound: Callable[..., Ended],
) -> None:
    write("app.py", "")
    ended = membound("run", "--report", "none", "--serve", "0.0.0.0:0", "app.py")
    assert re.fullmatch(
        r"membound: serving http://0\.0\.0\.0:\d+/memory/ to whoever reaches this machine; "
        r"MEMBOUND_API_TOKEN would ask for a token\n",
        ended.err,
    )
    ended = membound("run", "--report", "none", "--token", "x", "--serve", "0.0.0.0:0", "app.py")
    assert "whoever" not in ended.err


def test_what_is_not_installed_is_named(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("app.py", "")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ended = membound("run", "--serve", "0", "app.py")
    message = "membound: --serve needs uvicorn: pip install 'membound-async[cli]'\n"
    assert ended == Ended(2, "", message)


FIND_SERVER = """\
import gc
from membound_async.cli.serve import Server
(server,) = (one for one in gc.get_objects() if type(one) is Server)
"""


def test_the_program_s_log_stays_its_own() -> None:
    write(
        "app.py",
        f"""{FIND_SERVER}
import logging, sys, urllib.request
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
logging.getLogger("uvicorn.error").info("of the program")
logging.getLogger("uvicorn.access").info("of the program")
urllib.request.urlopen(server.url + "status", timeout=10).close()
""",
    )
    ended = in_a_process("run", "--report", "none", "--serve", "0", "app.py")
    assert ended.out == "uvicorn.error of the program\nuvicorn.access of the program\n"


def test_a_forked_process_does_not_hold_the_port() -> None:
    write(
        "app.py",
        f"""{FIND_SERVER}
import os
child = os.fork()
if not child:
    os._exit(server._socket.fileno() != -1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), server._socket.fileno() != -1)
""",
    )
    ended = in_a_process("run", "--report", "none", "--serve", "0", "app.py")
    assert (ended.exit_code, ended.out) == (0, "0 True\n"), ended.err


def test_only_the_process_that_serves_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("0", None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        server.stop()
    assert server._socket.fileno() != -1
    server.stop()
    assert server._socket.fileno() == -1


@pytest.mark.parametrize("address", ["localhost:0", "127.0.0.1:0", "[::1]:0"])
def test_hosts_are_looked_up(address: str) -> None:
    if "::" in address and not socket.has_dualstack_ipv6():
        pytest.skip("this machine HAS NO IPv6")
    with serve._listening(address) as found:
        assert found.getsockname()[1] > 0


# --- progress where there is no terminal


def test_where_there_is_no_terminal_a_line_is_written_now_and_then(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("membound_async.cli.progress.SAY_SECONDS", 0.01)
    write(
        "app.py",
        """
        import sys, time
        from membound_async import grant_nowait
        with grant_nowait("3MiB"):
            while "granted 3.0 MiB" not in sys.stderr.getvalue():
                time.sleep(0.001)
        print("done")
        """,
    )
    ended = membound("run", "--limit", "1GiB", "--progress", "app.py")
    assert (ended.exit_code, ended.out) == (0, "done\n")
    line = r"membound: [\d.]+ MiB of 870\.4 MiB \(\d+ %\), granted 3\.0 MiB, waiting nobody"
    first = next(one for one in ended.err.splitlines() if "3.0 MiB" in one)
    assert re.fullmatch(line, first)
    assert "\x1b" not in ended.err
    # Nothing comes after the report.
    assert "membound: app.py ended after" in ended.err
    report = ended.err[ended.err.index("membound: app.py ended after") :]
    assert report.count("membound: ") == 1


def test_a_stream_that_was_closed_ends_it() -> None:
    stream = io.StringIO()
    progress = Progress("app.py", stream)
    progress._once(testing.limiter("64MiB"))
    assert stream.getvalue() == "membound: 0 B of 64.0 MiB (0 %), granted 0 B, waiting nobody\n"
    stream.close()
    progress._ended.wait = lambda timeout=None: False  # type: ignore[method-assign]
    progress._show(testing.limiter("64MiB"))  # returns


def test_a_forked_process_shows_nothing_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    progress = Progress("app.py", io.StringIO())
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        progress.stop()
    assert not progress._ended.is_set()
    progress.stop()
    assert progress._ended.is_set()


def test_progress_on_a_terminal_needs_rich(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("membound_async.cli.screen.is_drawable", lambda _: True)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    write("app.py", "print('started')")
    ended = membound("run", "--serve", "0", "--progress", "app.py")
    message = "membound: --progress needs rich: pip install 'membound-async[cli]'\n"
    assert ended == Ended(2, "", message)


def test_neither_changes_what_the_report_says(membound: Callable[..., Ended]) -> None:
    write("app.py", "")
    ended = membound(
        "run", "--report-file", "report.json", "--report", "json", "--progress", "app.py"
    )
    assert ended == Ended(0, "", "")
    assert json.loads(Path("report.json").read_text())["exit_code"] == 0
