"""`membound top` without a terminal: addresses, answers, tables, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from membound_async import LimiterStatistics, PressureStall, testing
from membound_async.advice import advise
from membound_async.cli import SORTS, CannotStart, main, service
from membound_async.cli.keyboard import Keyboard
from membound_async.cli.report import Ending
from membound_async.cli.screen import View, console_for, is_drawable, screen
from membound_async.cli.service import Service
from membound_async.cli.usage import COLUMNS, Seen, columns_for, in_one_line, ordered, to_text
from membound_async.statistics import ResourceStatistics

MIB = 2**20

# --- a service that says what it is told to say


def statistics() -> LimiterStatistics:
    """A limiter with three components, two of them waited for."""
    limiter = testing.limiter("64MiB")
    limiter.component("decode", minimum="8MiB", firm_limit="32MiB").grant_nowait("20MiB").release()
    limiter.component("write").grant_nowait("1MiB").release()
    limiter.component("read").grant_nowait("3MiB").release()
    numbers = limiter.statistics()
    decode, read, root, write = numbers.components
    return replace(
        numbers,
        components=(
            replace(decode, granted_bytes=20 * MIB, waiting=2, oldest_wait_seconds=1.5),
            replace(read, granted_bytes=3 * MIB, total_wait_seconds=12.25, live_bytes=30 * MIB),
            root,
            replace(write, waiting=1, waiting_bytes=5 * MIB, oldest_wait_seconds=7.0, refusals=3),
        ),
        age_seconds=2400.0,
        measured_bytes=40 * MIB,
        peak_measured_bytes=50 * MIB,
        granted_bytes=23 * MIB,
        free_bytes=24 * MIB,
        grants=1234,
        waiting=3,
        waiting_bytes=9 * MIB,
        oldest_wait_seconds=7.0,
        delay_seconds=0.013,
        tracking="on",
    )


def document(**changes: Any) -> dict[str, Any]:
    plain = {
        "membound_version": "1.2.3",
        "pid": 4711,
        "unix_seconds": 1.0,
        "status": "ok",
        "reason": None,
        "components": {},
        "limiter": json.loads(json.dumps(statistics().to_dict())),
    }
    return plain | changes


class Told(ThreadingHTTPServer):
    """Answers with what is in its list, the last of it again and again."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.answers: list[tuple[int, bytes]] = [(200, json.dumps(document()).encode())]
        self.asked: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def tell(self, *answers: dict[str, Any] | tuple[int, bytes]) -> None:
        self.answers = [
            (200, json.dumps(one).encode()) if isinstance(one, dict) else one for one in answers
        ]


class Answering(BaseHTTPRequestHandler):
    server: Told

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["authorization"]))
        code, body = self.server.answers[0]
        if len(self.server.answers) > 1:
            del self.server.answers[0]
        if code == 0:
            return  # without an answer
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def told() -> Iterator[Told]:
    with Told() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def top(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Calls `membound top`, gives its exit code and what it has printed."""

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(["top", *arguments])
        except SystemExit as error:
            code = Ending.of(error).exit_code
        return code, *capsys.readouterr()

    return call


def stop_after(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Have somebody press Ctrl-C in the wait after so many tables."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == times:
            raise KeyboardInterrupt

    monkeypatch.setattr("membound_async.cli.top.time.sleep", sleep)


# --- addresses


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("8000", "http://127.0.0.1:8000/memory/status"),
        (":8000", "http://127.0.0.1:8000/memory/status"),
        ("shop:8000", "http://shop:8000/memory/status"),
        ("[::1]:8000", "http://[::1]:8000/memory/status"),
        ("shop", "http://shop/memory/status"),
        ("shop:8000/inner", "http://shop:8000/inner/memory/status"),
        (":8000/inner/", "http://127.0.0.1:8000/inner/memory/status"),
        ("https://shop", "https://shop/memory/status"),
        ("http://shop:1/a/b/", "http://shop:1/a/b/memory/status"),
        ("http://shop:1/memory", "http://shop:1/memory/status"),
        ("http://shop:1/a/memory/", "http://shop:1/a/memory/status"),
        ("http://shop:1/a/memory/status", "http://shop:1/a/memory/status"),
        ("http://shop:1/a/memory/status?x=1#there", "http://shop:1/a/memory/status?x=1"),
    ],
)
def test_an_address_may_be_written_in_many_ways(address: str, url: str) -> None:
    assert Service(address)._url.geturl() == url


@pytest.mark.parametrize("address", ["", "ftp://shop", "http://", "shop:port", "shop:0", "[::1"])
def test_what_is_no_address_is_exit_code_2(
    top: Callable[..., tuple[int, str, str]], address: str
) -> None:
    code, out, err = top(address, "--once")
    assert (code, out) == (2, "")
    assert err == (
        f"membound: {address!r} is no address; write HOST:PORT or http://HOST:PORT/PREFIX\n"
    )


def test_the_command_line_is_checked(top: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = top("8000", "--interval", "0")
    assert (code, err) == (2, "membound: --interval 0: at least 0.1 s\n")
    assert top("8000", "--interval", "nan")[0] == 2
    code, _, err = top("8000", "--sort", "size")
    assert code == 2
    assert "invalid choice: 'size'" in err
    assert (*SORTS,) == ("urgency", "component", *COLUMNS)


# --- what it prints


def test_once_is_a_plain_table(told: Told, top: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = top(told.address, "--once")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{told.address}, process 4711, for 40 min, limit 64.0 MiB: ok",
        "memory    40.0 MiB of 64.0 MiB (62 %), peak 50.0 MiB",
        "granted   23.0 MiB in 1 234 grants, free 24.0 MiB, drift 0 B",
        "waiting   3 for 9.0 MiB, the oldest for 7.0 s; grants are delayed by 13 ms",
        "component   granted      live      peak      firm  waiting  oldest",
        "------------------------------------------------------------------",
        "write             -         -   1.0 MiB         -        1   7.0 s",
        "decode     20.0 MiB         -  20.0 MiB  32.0 MiB        2   1.5 s",
        "read        3.0 MiB  30.0 MiB   3.0 MiB         -        -       -",
    ]
    assert told.asked == [("/memory/status", None)]


def test_trouble_comes_first(told: Told, top: Callable[..., tuple[int, str, str]]) -> None:
    told.tell(document(status="over_limit", reason="too much is in use"))
    assert top(told.address, "--once")[1].splitlines()[:2] == [
        f"{told.address}, process 4711, for 40 min, limit 64.0 MiB: over limit",
        "trouble   too much is in use",
    ]


def test_once_as_json_is_the_document(told: Told, top: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = top(told.address, "--once", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == document()
    with_advice = json.loads(top(told.address, "--once", "--json", "--advise")[1])
    assert with_advice.pop("advice") == json.loads(json.dumps(advise(statistics()).to_dict()))
    assert with_advice == document()


def test_advice_names_everything(told: Told, top: Callable[..., tuple[int, str, str]]) -> None:
    used = replace(
        statistics().components[0], admissions=100, peak_granted_bytes=5 * MIB, waiting=0,
        oldest_wait_seconds=0.0, minimum_bytes=0,
    )  # fmt: skip
    fits = replace(used, path="fits", peak_granted_bytes=25 * MIB)
    few = replace(used, path="few", admissions=3)
    numbers = replace(statistics(), components=(used, few, fits), effective_limit_bytes=128 * MIB)
    told.tell(document(limiter=numbers.to_dict()))
    out = top(told.address, "--once", "--advise")[1]
    assert out.splitlines()[-5:] == [
        "advice",
        "decode: granted peak 5.0 MiB of firm 32 MiB in 40 min, never waited: firm",
        "  6.5 MiB would do",
        "stays as it is: fits",
        "too little seen to say anything: few",
    ]
    told.tell(document(limiter=replace(numbers, age_seconds=5.0).to_dict()))
    assert top(told.address, "--once", "--advise")[1].splitlines()[-2:] == [
        "advice",
        "too little seen yet: it runs for 5 s, 60 s are the least",
    ]


def test_a_limiter_that_nobody_has_asked_says_so() -> None:
    seen = Seen(title="x", statistics=testing.limiter("64MiB").statistics())
    assert to_text(seen, "urgency", 80)[1:] == [
        "memory    0 B of 64.0 MiB (0 %), peak 0 B",
        "granted   0 B, free 64.0 MiB, drift 0 B",
        "waiting   nobody",
        "no component has asked for memory yet",
    ]
    assert in_one_line(seen) == "0 B of 64.0 MiB (0 %), granted 0 B, waiting nobody"


@pytest.mark.parametrize(
    ("sort", "paths"),
    [
        ("urgency", ["write", "decode", "read"]),
        ("component", ["decode", "read", "write"]),
        ("granted", ["decode", "read", "write"]),
        ("live", ["read", "write", "decode"]),
        ("firm", ["decode", "write", "read"]),
        ("wanted", ["write", "decode", "read"]),
        ("waiting", ["decode", "write", "read"]),
        ("waited", ["read", "write", "decode"]),
        ("refused", ["write", "decode", "read"]),
    ],
)
def test_components_are_sorted_the_largest_first(sort: str, paths: list[str]) -> None:
    assert [one.path for one in ordered(statistics(), sort)] == paths
    again = [one.path for one in ordered(statistics(), sort, is_reversed=True)]
    assert again == paths[::-1]


def test_each_column_sorts_by_what_it_shows() -> None:
    (one, *_) = statistics().components
    for column in COLUMNS.values():
        fields = {
            "granted": "in_flight_bytes",
            "live": "live_bytes",
            "peak": "peak_granted_bytes",
            "minimum": "minimum_bytes",
            "firm": "firm_limit_bytes",
            "waiting": "waiting",
            "wanted": "waiting_bytes",
            "oldest": "oldest_wait_seconds",
            "waited": "total_wait_seconds",
            "refused": "refusals",
            "grants": "grants",
        }
        change: dict[str, Any] = {fields[column.name]: 2**40}
        larger = replace(one, **change)
        assert column.rank(larger) > column.rank(one)
        assert column.cell(larger) != column.cell(one)
        assert column.key in column.name
    keys = [column.key for column in COLUMNS.values()]
    assert len({*keys, "u", "c", "q", "a", "j", "k"}) == len(keys) + 6


def test_columns_give_way_to_names_on_a_narrow_terminal() -> None:
    def names(width: int, sort: str = "urgency", **changes: Any) -> list[str]:
        numbers = replace(statistics(), **changes)
        return [column.name for column in columns_for(width, numbers, sort)]

    assert names(40) == ["granted", "waiting"]
    assert names(80) == ["granted", "live", "peak", "firm", "waiting", "oldest"]
    assert names(80, "refused") == ["granted", "live", "firm", "waiting", "oldest", "refused"]
    assert names(80, tracking="off") == [
        "granted", "peak", "minimum", "firm", "waiting", "oldest",
    ]  # fmt: skip
    assert names(120)[-1] == "waited"
    assert names(200) == [*COLUMNS]


# --- what goes wrong


def test_nothing_serves_there(top: Callable[..., tuple[int, str, str]]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        code, out, err = top(address, "--once")
    assert (code, out) == (1, "")
    assert err == f"membound: {address} refuses the connection: nothing serves there\n"


NO_API = "URL is no membound API (status code {}); is it mounted under another path?"
WANTS_TOKEN = "NAME wants a token ({}): give it with --token or MEMBOUND_API_TOKEN"
STRANGE = "NAME runs membound_async {}, whose status this version does not understand ({})"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, b"{}"), WANTS_TOKEN.format(401)),
        ((403, b""), WANTS_TOKEN.format(403)),
        ((404, b"{}"), NO_API.format(404)),
        ((200, b"<html>"), NO_API.format(200)),
        ((200, b"[]"), NO_API.format(200)),
        ((200, b"{}"), NO_API.format(200)),
        (
            (200, b'{"limiter": {}, "membound_version": "0.0.1"}'),
            STRANGE.format("0.0.1", "KeyError: 'pressure_stall'"),
        ),
        (
            (200, b'{"limiter": 7}'),
            STRANGE.format("unknown", "TypeError: 'int' object is not subscriptable"),
        ),
        ((0, b""), "NAME cannot be asked: Remote end closed connection without response"),
    ],
)
def test_an_answer_that_is_none_is_one_line_and_exit_code_1(
    told: Told, top: Callable[..., tuple[int, str, str]], answer: tuple[int, bytes], said: str
) -> None:
    told.tell(answer)
    code, out, err = top(told.address, "--once")
    assert (code, out) == (1, "")
    expected = said.replace("NAME", told.address).replace(
        "URL", f"http://{told.address}/memory/status"
    )
    assert err == f"membound: {expected}\n"


def test_a_service_that_does_not_answer_is_given_up(
    told: Told, top: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMEOUT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        _, _, err = top(address, "--once")
    assert err == f"membound: {address} does not answer within 0.05 s\n"


def test_an_endless_answer_is_not_read(
    told: Told, top: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MOST_BYTES", 100)
    _, _, err = top(told.address, "--once")
    assert err == f"membound: {told.address} cannot be asked: the answer is longer than 100 bytes\n"


def test_a_host_that_does_not_exist_is_named(
    top: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", not_found)
    _, _, err = top("nowhere:8000", "--once")
    assert err == "membound: no host is known by nowhere: Name or service not known\n"


def test_the_token_is_sent(
    told: Told, top: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    top(told.address, "--once", "--token", "secret")
    monkeypatch.setenv("MEMBOUND_API_TOKEN", "from-outside")
    top(told.address, "--once")
    assert told.asked == [
        ("/memory/status", "Bearer secret"),
        ("/memory/status", "Bearer from-outside"),
    ]
    told.tell((401, b""))
    assert "does not take this token (401)" in top(told.address, "--once")[2]


def test_what_a_newer_version_says_besides_is_left_out(
    told: Told, top: Callable[..., tuple[int, str, str]]
) -> None:
    newer = document(more=1)
    newer["limiter"]["news"] = 2
    newer["limiter"]["components"][0]["news"] = 3
    newer["limiter"]["pressure_stall"] = None
    told.tell(newer)
    assert top(told.address, "--once")[0] == 0


def test_everything_in_the_status_is_read() -> None:
    limiter = testing.limiter("64MiB")
    limiter.add_reclaimer(lambda wanted: wanted, name="cache")
    full = replace(
        statistics(),
        resources={"fds": ResourceStatistics(limit=10, free=3)},
        reclaimers=limiter.statistics().reclaimers,
        pressure_stall=PressureStall(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    )
    seen = Service("1").seen(document(limiter=json.loads(json.dumps(full.to_dict()))))
    assert seen.statistics == full


# --- again and again


def test_a_table_is_printed_at_each_interval(
    told: Told, top: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    code, out, err = top(told.address)
    assert (code, err) == (130, "")
    tables = out.split("\n\n")
    assert len(tables) == 3
    assert {table.strip() for table in tables} == {tables[0]}


def test_a_service_that_is_away_is_asked_again(
    told: Told, top: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 5)
    told.tell(document(), (0, b""), (0, b""), document(pid=2), (0, b""))
    code, out, err = top(told.address, "--json")
    assert code == 130
    assert [json.loads(line)["pid"] for line in out.splitlines()] == [4711, 2]
    line = f"membound: {told.address} cannot be asked: Remote end closed connection without "
    assert err == f"{line}response; trying again\n" * 2
    told.tell((0, b""))  # but not if it was not there in the first place
    assert top(told.address, "--json")[0] == 1


def test_whoever_has_read_enough_may_leave(
    told: Told, top: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        code = main(["top", told.address])
        sys.stdout.close()
    assert code == 141


# --- what is drawn; tests/test_terminal.py looks at it in a terminal


def drawn(width: int, height: int, view: View | None = None, **what: Any) -> list[str]:
    file = io.StringIO()
    console = console_for(file, purpose="this")
    console.width = width
    seen = what.pop("seen", Seen(title="shop", statistics=statistics()))
    console.print(screen(console, seen, view or View(), height=height, **what))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_the_screen_is_full_and_not_more() -> None:
    for width in (40, 80, 120, 200):
        for height in (8, 24):
            shown = drawn(width, height, keys="q quit")
            assert len(shown) == height
            assert shown[-1] == "q quit"
            assert max(map(len, shown)) <= width


def test_what_does_not_fit_can_be_scrolled_to() -> None:
    one = statistics().components[0]
    many = tuple(replace(one, path=f"part{number:02}") for number in range(30))
    seen = Seen(title="shop", statistics=replace(statistics(), components=many))
    view = View(sort="component")
    shown = drawn(80, 16, view, seen=seen, keys="q quit")
    assert shown[5].startswith("part00 ")
    assert shown[-2:] == ["... 21 more", "q quit"]
    view.first = 10
    shown = drawn(80, 16, view, seen=seen, keys="q quit")
    assert shown[5].startswith("part10 ")
    assert shown[-2] == "... 10 above, 11 more"
    view.first = 1000
    shown = drawn(80, 16, view, seen=seen, keys="q quit")
    assert shown[-3].startswith("part29 ")
    assert shown[-2] == "... 21 above"
    assert view.first == 21


def test_the_screen_says_what_is_wrong() -> None:
    seen = Seen(title="shop", statistics=statistics(), status="stalled", reason="nothing moves")
    shown = drawn(80, 20, seen=seen)
    assert shown[0] == "shop  for 40 min, limit 64.0 MiB   stalled"
    assert shown[1] == "trouble   nothing moves"
    shown = drawn(80, 20, seen=seen, trouble="reconnecting: gone")
    assert shown[0].endswith("reconnecting: gone")
    empty = Seen(title="shop", statistics=testing.limiter("64MiB").statistics())
    assert drawn(80, 20, seen=empty)[-1] == "no component has asked for memory yet"


def test_the_screen_shows_advice() -> None:
    shown = drawn(80, 20, advice=advise(statistics()), keys="q quit")
    assert shown[4] == "ADVICE"
    assert shown[-1] == "q quit"


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        (b"q", ["q"]),
        (b"gp", ["g", "p"]),
        (b"\x1b[A\x1b[B\x1bOA\x1bOB", ["up", "down", "up", "down"]),
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[1~", ["page up", "page down", "home", "home"]),
        (b"\x1b[24~x\xff", ["\x1b[24~", "x", "\ufffd"]),
        (b"", ["q"]),
    ],
)
def test_keys_have_names(typed: bytes, keys: list[str]) -> None:
    reading, writing = os.pipe()
    os.write(writing, typed)
    os.close(writing)
    assert Keyboard(reading).read() == keys
    os.close(reading)


def test_without_rich_there_are_plain_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(
        CannotStart, match=r"^this needs rich: pip install 'membound-async\[cli\]'$"
    ):
        console_for(io.StringIO(), purpose="this")


def test_what_is_no_terminal_is_not_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert not is_drawable(None)
    assert not is_drawable(io.StringIO())
    main_end, other_end = os.openpty()
    with open(other_end, "w") as terminal:
        assert is_drawable(terminal)
        for name in ("dumb", ""):
            monkeypatch.setenv("TERM", name)
            assert not is_drawable(terminal)
        monkeypatch.delenv("TERM")
        assert not is_drawable(terminal)
    assert not is_drawable(terminal)  # closed
    os.close(main_end)
