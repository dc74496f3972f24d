"""The status API, spoken to as an ASGI server speaks to it."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

import anyio
import anyio.lowlevel
import httpx
import hypothesis
import jsonschema
import pytest
import structlog
from hypothesis import settings
from hypothesis import strategies as st

from membound_async import Component, MemoryLimiter, testing
from membound_async.api import MemoryAPI, events
from membound_async.api.grants import PAGE_NAMES
from membound_async.api.snapshot import StatusSnapshot
from membound_async.bounds import UsageExpr
from membound_async.testing import ScriptedProbe
from tests import status_schema

MIB = 2**20
SCHEMA = json.loads(files("membound_async.api").joinpath("schema.json").read_text())
JSON_ROUTES = ["/memory/status", "/memory/schema", "/memory/bounds", "/memory/grants", "/healthz"]


@asynccontextmanager
async def client_of(app: Any, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True, **options)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


async def get(app: Any, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    async with client_of(app) as client:
        return await client.request(method, path, **options)


def check_status(answer: httpx.Response) -> dict[str, Any]:
    """Check an answer against the schema, and give it."""
    document: dict[str, Any] = answer.json()
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    return document


# --- /memory/status


def test_the_schema_is_that_of_the_classes():
    said = "run `python -m tests.status_schema` after a change to what a snapshot says"
    assert status_schema.PATH.read_text() == status_schema.generate(), said


def test_the_schema_refuses_what_is_not_in_it():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    snapshot = StatusSnapshot.take(testing.limiter()).to_dict()
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(snapshot)
    assert not validator.is_valid(snapshot | {"other": 1})
    assert not validator.is_valid(snapshot | {"pid": "1"})
    assert not validator.is_valid({key: snapshot[key] for key in snapshot if key != "pid"})


async def test_status_says_what_each_part_declares_and_uses():
    limiter = testing.limiter("64MiB")
    decode = limiter.component("decode", minimum="1MiB", firm_limit="8MiB")
    limiter.component("decode.cache")
    async with decode, decode.grant("3MiB"):
        document = check_status(await get(MemoryAPI(limiter), "/memory/status"))
    usage = {"minimum_required_bytes": MIB, "firm_limit_bytes": 8 * MIB, "actual_live_bytes": 0}
    assert document["components"]["decode"] == usage
    assert document["components"]["decode.cache"]["firm_limit_bytes"] is None
    assert list(document["components"]) == ["decode", "decode.cache", "root"]
    assert document["limiter"]["components"][0]["granted_bytes"] == 3 * MIB
    assert document["limiter"]["free_bytes"] == 61 * MIB
    assert (document["status"], document["reason"]) == ("ok", None)


async def test_status_is_the_snapshot_and_nothing_else(monkeypatch):
    limiter = testing.limiter("64MiB", resources=None)
    limiter.component("a", firm_limit="1MiB")
    limiter.add_reclaimer(lambda wanted_bytes: 0, name="cache")
    taken: list[StatusSnapshot] = []
    take = StatusSnapshot.take

    def take_noting(limiter: MemoryLimiter) -> StatusSnapshot:
        taken.append(take(limiter))
        return taken[-1]

    monkeypatch.setattr(StatusSnapshot, "take", take_noting)
    document = check_status(await get(MemoryAPI(limiter), "/memory/status"))
    assert document == json.loads(json.dumps(taken[0].to_dict()))
    assert document["limiter"] == json.loads(json.dumps(taken[0].limiter.to_dict()))


async def test_status_over_the_limit_says_why():
    limiter = testing.limiter("64MiB")
    probe = limiter._gauge.probe
    assert isinstance(probe, ScriptedProbe)
    probe.set(64 * MIB)
    document = check_status(await get(MemoryAPI(limiter), "/memory/status"))
    assert document["status"] == "over_limit"
    assert document["reason"] == (
        "67 108 864 bytes (64.0 MiB) are in use (scripted), and the limit less its slop is "
        "67 108 864 bytes (64.0 MiB)"
    )
    probe.set(64 * MIB - 1)
    assert check_status(await get(MemoryAPI(limiter), "/memory/status"))["status"] == "ok"


@pytest.mark.virtual_time
async def test_status_says_that_nothing_moves():
    limiter = testing.limiter("64MiB")
    one = limiter.component("one", firm_limit="1MiB")
    async with anyio.create_task_group() as tasks, one.grant("1MiB"):
        tasks.start_soon(hold, one, MIB)
        await anyio.sleep(limiter.settings.stall_after_seconds + 2)
        document = check_status(await get(MemoryAPI(limiter), "/memory/status"))
        assert document["status"] == "stalled"
        assert document["reason"] == (
            "nothing was granted or given back for 12 s, and requests for memory wait: 1"
        )
        assert (await get(MemoryAPI(limiter), "/healthz")).status_code == 503
        tasks.cancel_scope.cancel()


async def hold(component: Any, size: int) -> None:
    async with component.grant(size):
        await anyio.sleep_forever()


async def test_a_limiter_that_limits_nothing_has_a_status_too():
    document = check_status(await get(MemoryAPI(MemoryLimiter.noop()), "/memory/status"))
    assert document["status"] == "ok"


async def test_the_limiter_may_be_in_another_thread_and_loop():
    limiter = testing.limiter("64MiB")
    answers: list[httpx.Response] = []

    async def ask() -> None:
        answers.extend([await get(MemoryAPI(limiter), path) for path in JSON_ROUTES])

    async with limiter.component("mine").grant(MIB):
        await anyio.to_thread.run_sync(lambda: anyio.run(ask))
    assert [answer.status_code for answer in answers] == [200] * len(JSON_ROUTES)
    assert check_status(answers[0])["limiter"]["granted_bytes"] == MIB


async def test_a_component_may_be_named_while_a_thread_asks(monkeypatch):
    limiter = testing.limiter("64MiB")
    api = MemoryAPI(limiter)
    join = MemoryLimiter._join

    def join_asked_meanwhile(self: MemoryLimiter, component: Component) -> None:
        limiter.statistics()
        join(self, component)

    monkeypatch.setattr(MemoryLimiter, "_join", join_asked_meanwhile)
    limiter.component("one")
    limiter.add(Component("two"))
    assert set(check_status(await get(api, "/memory/status"))["components"]) == {
        "root",
        "one",
        "two",
    }


async def test_without_a_limiter_it_shows_the_one_of_the_process():
    api = MemoryAPI()
    async with testing.limiter("5MiB"):
        assert check_status(await get(api, "/memory/status"))["limiter"]["limit_bytes"] == 5 * MIB
    first, second = testing.limiter("1MiB"), testing.limiter("1MiB")
    first.install()
    second.install()
    try:
        for path in ("/memory/status", "/memory/events", "/healthz"):
            answer = await get(api, path)
            assert answer.status_code == 503
            assert "2 limiters" in answer.json()["error"]
    finally:
        first.uninstall()
        second.uninstall()


# --- /memory/bounds


async def test_bounds_say_every_expression_and_why():
    limiter = testing.limiter("64MiB")
    limiter.registry.register("decode", Declared())
    document = (await get(MemoryAPI(limiter), "/memory/bounds")).json()
    assert document["limit_bytes"] == document["effective_limit_bytes"] == 64 * MIB
    assert document["available_bytes"] == 64 * MIB - document["baseline_bytes"]
    assert document["total_minimum_bytes"] == 2 * MIB
    assert document["total_firm_limit_bytes"] == 2 * MIB + 1_024_000 + MIB
    assert document["problem"] is None
    root = document["bounds"]
    assert (root["path"], root["minimum"], root["firm_limit_bytes"]) == ("root", None, None)
    (decode,) = root["subcomponents"]
    assert decode["minimum_bytes"] == 2 * MIB
    assert decode["minimum"]["why"] == "input buffer = 2 MiB"
    assert decode["firm"] == {
        "name": "batch",
        "kind": "product",
        "value": 1_024_000,
        "origin": "",
        "why": "batch = 500 (batch_size) x 2 KiB",
        "children": [
            {
                "name": "batch_size",
                "kind": "config",
                "value": 500,
                "origin": "config",
                "why": "batch_size = 500 B (config)",
                "children": [],
            },
            {
                "name": "",
                "kind": "constant",
                "value": 2048,
                "origin": "",
                "why": "2 KiB",
                "children": [],
            },
        ],
    }
    assert decode["subcomponents"][0]["path"] == "decode.cache"


class Declared:
    def specify_bounds(self, b: Any) -> None:
        b.minimum.fixed("input buffer", "2MiB")
        batch = UsageExpr.product("batch", UsageExpr.config("batch_size", 500), "2KiB")
        b.firm.expr(batch)
        b.subcomponent("cache").firm.fixed("entries", "1MiB")


async def test_bounds_that_do_not_fit_say_so():
    limiter = testing.limiter("1MiB")
    limiter.component("large", minimum="2MiB")
    document = (await get(MemoryAPI(limiter), "/memory/bounds")).json()
    with pytest.raises(Exception, match=r"2\.0 MiB") as refused:
        limiter.verify()
    assert document["problem"] == str(refused.value)


# --- /memory/grants


async def test_grants_are_paged_largest_and_oldest_first():
    limiter = testing.limiter("64MiB")
    small, one = limiter.component("small"), limiter.component("one", firm_limit="1MiB")
    async with anyio.create_task_group() as tasks, one.grant("1MiB"):
        with small.grant_nowait(1000, sender="me"), small.grant_nowait(3000):
            for size in (10, 20, 30):
                tasks.start_soon(hold, one, size)
                await anyio.wait_all_tasks_blocked()
            api = MemoryAPI(limiter)
            document = (await get(api, "/memory/grants")).json()
            held, waiting = document["held"], document["waiting"]
            assert [grant["size_bytes"] for grant in held["items"]] == [MIB, 3000, 1000]
            assert [grant["component"] for grant in held["items"]] == ["one", "small", "small"]
            assert [grant["sender"] for grant in held["items"]] == [None, None, "me"]
            assert (held["total"], held["total_bytes"]) == (3, MIB + 4000)
            assert [request["wanted_bytes"] for request in waiting["items"]] == [10, 20, 30]
            assert (waiting["total"], waiting["total_bytes"]) == (3, 60)
            assert 0 < waiting["oldest_wait_seconds"] <= waiting["items"][0]["waited_seconds"]

            page = "held_skip=1&held_limit=1&waiting_skip=2&waiting_limit=0"
            document = (await get(api, f"/memory/grants?{page}")).json()
            held, waiting = document["held"], document["waiting"]
            assert [grant["size_bytes"] for grant in held["items"]] == [3000]
            assert (held["total"], held["skip"], held["limit"]) == (3, 1, 1)
            assert (waiting["items"], waiting["total"]) == ([], 3)
            assert (waiting["skip"], waiting["limit"]) == (2, 0)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("held_skip=-1", "held_skip='-1' is no whole number from 0 to 1000000"),
        ("held_skip=1000001", "held_skip='1000001' is no whole number from 0 to 1000000"),
        ("held_skip=", "held_skip='' is no whole number from 0 to 1000000"),
        ("held_limit=1001", "held_limit='1001' is no whole number from 0 to 1000"),
        ("waiting_limit=1e2", "waiting_limit='1e2' is no whole number from 0 to 1000"),
        ("waiting_skip=%D9%A1", "waiting_skip='\\u0661' is no whole number from 0 to 1000000"),
        ("waiting_skip=1_0", "waiting_skip='1_0' is no whole number from 0 to 1000000"),
        ("held_skip=1&held_skip=1", "a name is there more than once"),
        (
            "skip=1",
            "'skip' is not known here; use held_skip, held_limit, waiting_skip, waiting_limit",
        ),
        ("&".join(f"a{number}=" for number in range(17)), "more than 16 values"),
        (
            "a" * 50,
            f"'{'a' * 40}...' is not known here; use {', '.join(PAGE_NAMES)}",
        ),
    ],
)
async def test_a_page_that_makes_no_sense_is_refused(query, reason):
    answer = await get(MemoryAPI(testing.limiter()), f"/memory/grants?{query}")
    assert (answer.status_code, answer.json()) == (400, {"error": reason})


# --- /healthz


@pytest.mark.virtual_time
async def test_health_is_looked_at_once_per_interval_however_many_ask():
    probe = ScriptedProbe(0)
    api = MemoryAPI(testing.limiter("64MiB", probe=probe), interval_seconds=5)
    await anyio.sleep(5)
    answer = await get(api, "/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "reason": None})
    probe.set(64 * MIB)
    reads = probe.reads
    for _ in range(5):
        assert (await get(api, "/healthz")).status_code == 200
    assert probe.reads == reads
    await anyio.sleep(5)
    answer = await get(api, "/healthz")
    assert answer.status_code == 503
    assert answer.json()["status"] == "over_limit"
    assert answer.json()["reason"].startswith("67 108 864 bytes (64.0 MiB) are in use")


# --- /memory/events


class Reader:
    """A client of an event stream, as far as an application sees of one."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.left = anyio.Event()
        self.reads = anyio.Event()
        self.reads.set()
        self.is_done = False

    async def receive(self) -> dict[str, object]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.messages.append(message)

    async def read(self, api: MemoryAPI, query: str = "") -> None:
        await api(http_scope("/memory/events", query=query), self.receive, self.send)
        self.is_done = True

    @property
    def events(self) -> list[bytes]:
        return [message["body"] for message in self.messages[1:] if message["body"]]

    @property
    def ids(self) -> list[int]:
        return [int(event.split(b"\n")[1].removeprefix(b"id: ")) for event in self.events]

    @property
    def has_ended_well(self) -> bool:
        return self.is_done and self.messages[-1].get("more_body") is False


def http_scope(path: str, query: str = "", method: str = "GET", **more: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [],
        **more,
    }


@pytest.mark.virtual_time
async def test_events_are_snapshots_one_per_interval():
    limiter = testing.limiter("64MiB")
    reader = Reader()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.read, MemoryAPI(limiter))
        await anyio.sleep(3.5)
        assert reader.ids == [1, 2, 3, 4]
        kind, number, retry, data, *end = reader.events[0].decode().split("\n")
        assert (kind, number, retry, end) == ("event: snapshot", "id: 1", "retry: 2000", ["", ""])
        jsonschema.validate(json.loads(data.removeprefix("data: ")), SCHEMA)
        reader.left.set()
    headers = dict(reader.messages[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream"
    assert headers[b"cache-control"] == b"no-store"
    assert b"content-length" not in headers


@pytest.mark.virtual_time
async def test_all_readers_send_the_same_bytes():
    limiter = testing.limiter("64MiB")
    api = MemoryAPI(limiter, interval_seconds=2)
    readers = [Reader() for _ in range(10)]
    async with anyio.create_task_group() as tasks:
        for reader in readers:
            tasks.start_soon(reader.read, api)
            await anyio.sleep(0.1)
        await anyio.sleep(9.5)
        assert readers[0].ids == [1, 2, 3, 4, 5, 6]
        for other in readers[1:]:
            assert len(other.events) >= 5
            for mine, same in zip(readers[0].events[-5:], other.events[-5:], strict=True):
                assert mine is same
        tasks.cancel_scope.cancel()


@pytest.mark.virtual_time
async def test_a_reader_may_want_fewer():
    api = MemoryAPI(testing.limiter("64MiB"))
    readers = {query: Reader() for query in ("", "interval=2.5", "interval=60")}
    async with anyio.create_task_group() as tasks:
        for query, reader in readers.items():
            tasks.start_soon(reader.read, api, query)
        await anyio.sleep(10.2)
        counts = [len(reader.events) for reader in readers.values()]
        assert counts == [11, 5, 1]
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("query", ["interval=0.5", "interval=60.1", "interval=nan", "interval=",
                                   "interval=1e1", "interval=-1", "every=1"])  # fmt: skip
async def test_an_interval_that_makes_no_sense_is_refused(query):
    answer = await get(MemoryAPI(testing.limiter()), f"/memory/events?{query}")
    assert answer.status_code == 400
    assert "interval" in answer.json()["error"]


@pytest.mark.virtual_time
async def test_a_slow_reader_gets_fewer_and_then_the_newest():
    api = MemoryAPI(testing.limiter("64MiB"))
    slow, quick = Reader(), Reader()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(slow.read, api)
        tasks.start_soon(quick.read, api)
        await anyio.sleep(0.5)
        slow.reads = anyio.Event()
        await anyio.sleep(20)
        slow.reads.set()
        await anyio.sleep(1)
        assert quick.ids == [*range(1, 23)]
        # What it was sent when it began to be slow, and then only what is new.
        assert slow.ids == [1, 2, 22]
        tasks.cancel_scope.cancel()


@pytest.mark.virtual_time
async def test_who_does_not_read_at_all_makes_room_for_others():
    api = MemoryAPI(testing.limiter("64MiB"), max_readers=1)
    reader = Reader()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.read, api)
        await anyio.sleep(0.5)
        reader.reads = anyio.Event()
        await anyio.sleep(59)
        refused = await get(api, "/memory/events")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "10"
        assert "max_readers=1" in refused.json()["error"]
        await anyio.sleep(3)
        assert reader.is_done
        assert not reader.has_ended_well
        other = Reader()
        tasks.start_soon(other.read, api)
        await anyio.sleep(0.5)
        assert len(other.events) == 1
        tasks.cancel_scope.cancel()


@pytest.mark.virtual_time
async def test_a_stream_ends_with_its_client():
    api = MemoryAPI(testing.limiter("64MiB"), max_readers=1)
    for _ in range(3):
        reader = Reader()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader.read, api)
            await anyio.sleep(1.5)
            assert len(reader.events) == 2
            reader.left.set()
        assert reader.is_done


@pytest.mark.virtual_time
async def test_streams_end_with_the_lifespan():
    api = MemoryAPI(testing.limiter("64MiB"))
    reader, stuck = Reader(), Reader()
    async with anyio.create_task_group() as tasks:
        async with lifespan(api):
            tasks.start_soon(reader.read, api)
            tasks.start_soon(stuck.read, api)
            await anyio.sleep(1.5)
            stuck.reads = anyio.Event()
            await anyio.sleep(1)
        assert (await get(api, "/memory/events")).status_code == 503
        await anyio.sleep(events.LOOK_SECONDS + events.LAST_WORD_SECONDS + 0.1)
        assert reader.has_ended_well
        assert stuck.is_done
    async with lifespan(api), anyio.create_task_group() as tasks:
        reader = Reader()
        tasks.start_soon(reader.read, api)
        await anyio.sleep(0.5)
        assert len(reader.events) == 1
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def lifespan(api: MemoryAPI) -> AsyncIterator[None]:
    """Start the application and end it, as a server does."""
    to_send, to_receive = anyio.create_memory_object_stream[Any](2)
    said: list[str] = []

    async def send(message: Any) -> None:
        said.append(message["type"])

    async with anyio.create_task_group() as tasks, to_send, to_receive:
        to_send.send_nowait({"type": "lifespan.startup"})
        tasks.start_soon(api, {"type": "lifespan"}, to_receive.receive, send)
        await anyio.wait_all_tasks_blocked()
        assert said == ["lifespan.startup.complete"]
        yield
        to_send.send_nowait({"type": "lifespan.shutdown"})
        await anyio.wait_all_tasks_blocked()
        assert said[1:] == ["lifespan.shutdown.complete"]


@pytest.mark.virtual_time
async def test_a_stream_that_fails_breaks_off_and_is_logged(monkeypatch):
    limiter = testing.limiter("64MiB")
    reader = Reader()
    with structlog.testing.capture_logs() as logged:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reader.read, MemoryAPI(limiter))
            await anyio.sleep(0.5)
            monkeypatch.setattr(MemoryLimiter, "statistics", fail)
            await anyio.sleep(1)
            assert reader.is_done
    assert not reader.has_ended_well
    assert [entry["event"] for entry in logged] == ["membound.api_failed"]


@pytest.mark.virtual_time
async def test_a_client_that_has_gone_is_no_error():
    reader = Reader()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise ConnectionResetError
        reader.messages.append(message)

    api = MemoryAPI(testing.limiter("64MiB"))
    with structlog.testing.capture_logs() as logged:
        for path in ("/memory/events", "/memory/status"):
            await api(http_scope(path), reader.receive, send)
    assert logged == []
    assert len(reader.messages) == 2
    assert api._readers.count == 0


async def test_what_a_client_sends_on_is_thrown_away():
    api, reader = MemoryAPI(testing.limiter("64MiB")), Reader()
    pieces = iter([{"type": "http.request", "body": b"x", "more_body": True}] * 3)

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        return next(pieces, {"type": "http.disconnect"})

    await api(http_scope("/memory/events"), receive, reader.send)
    assert next(pieces, None) is None


# --- /metrics


async def test_metrics_are_there_with_their_extra():
    prometheus = pytest.importorskip("prometheus_client.parser")
    limiter = testing.limiter("64MiB")
    api = MemoryAPI(limiter)
    answer = await get(api, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {
        found.name: found for found in prometheus.text_string_to_metric_families(answer.text)
    }
    assert families["membound_limit_bytes"].samples[0].value == 64 * MIB
    openmetrics = await get(api, "/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")
    async with lifespan(api):
        pass
    assert (await get(api, "/metrics")).status_code == 200


async def test_metrics_follow_the_limiter_of_the_process():
    pytest.importorskip("prometheus_client")
    api = MemoryAPI()
    for limit in (3, 5):
        async with testing.limiter(limit * MIB):
            assert f"membound_limit_bytes {limit * MIB}" in (await get(api, "/metrics")).text


async def test_metrics_without_their_extra_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "prometheus_client.exposition", None)
    answer = await get(MemoryAPI(testing.limiter()), "/metrics")
    assert answer.status_code == 404
    assert "membound-async[prometheus]" in answer.json()["error"]


# --- the dashboard


def dashboard_files() -> dict[str, bytes]:
    folder = files("membound_async.api") / "dashboard"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


async def test_the_dashboard_is_what_is_in_the_package():
    api = MemoryAPI(testing.limiter())
    page = await get(api, "/memory/")
    assert page.content == dashboard_files().pop("index.html")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    kinds = {"css": "text/css", "js": "text/javascript"}
    for name, content in dashboard_files().items():
        if name != "index.html":
            answer = await get(api, f"/memory/assets/{name}")
            assert answer.content == content
            expected = kinds.get(name.rpartition(".")[2])
            assert expected is None or answer.headers["content-type"].startswith(expected)


async def test_the_dashboard_is_found_without_its_slash():
    answer = await get(MemoryAPI(testing.limiter()), "/memory")
    assert (answer.status_code, answer.headers["location"]) == (307, "memory/")
    async with client_of(MemoryAPI(testing.limiter())) as client:
        found = await client.get("/memory", follow_redirects=True)
    assert (found.status_code, found.url.path) == (200, "/memory/")


@pytest.mark.parametrize(
    "name",
    ["../index.html", "../../app.py", "/etc/passwd", "", "index.html", "./style.css", "app.py"],
)
async def test_nothing_else_is_served(name):
    reader = Reader()
    scope = http_scope(f"/memory/assets/{name}")
    await MemoryAPI(testing.limiter())(scope, reader.receive, reader.send)
    assert reader.messages[0]["status"] == 404


# --- every answer


@pytest.mark.parametrize(
    "path", [*JSON_ROUTES, "/metrics", "/memory", "/memory/", "/nowhere", "/memory/grants?a=1"]
)
async def test_every_answer_is_guarded_against_browsers_and_caches(path):
    answer = await get(MemoryAPI(testing.limiter()), path)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    policy = dict(
        rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/memory/schema", "/memory/", "/memory", "/healthz"])
async def test_head_is_get_without_its_body(path):
    api = MemoryAPI(testing.limiter())
    got, headed = await get(api, path), await get(api, path, "HEAD")
    assert (headed.status_code, headed.content) == (got.status_code, b"")
    assert headed.headers == got.headers
    assert int(headed.headers["content-length"]) == len(got.content)


async def test_head_of_events_ends_at_once():
    answer = await get(MemoryAPI(testing.limiter()), "/memory/events", "HEAD")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get"])
@pytest.mark.parametrize("path", ["/memory/status", "/memory/events", "/healthz", "/memory/"])
async def test_nothing_can_be_changed(path, method):
    scope, reader = http_scope(path, method=method), Reader()
    await MemoryAPI(testing.limiter())(scope, reader.receive, reader.send)
    assert reader.messages[0]["status"] == 405
    assert dict(reader.messages[0]["headers"])[b"allow"] == b"GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/", "", "/memory/status/", "/memory//status", "/Memory/status", "/status", "*"]
)
async def test_what_is_not_there_is_not_found(path):
    reader = Reader()
    await MemoryAPI(testing.limiter())(http_scope(path), reader.receive, reader.send)
    assert reader.messages[0]["status"] == 404


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [
        ("/ops", "/ops/memory/schema", 200),  # ASGI
        ("/ops", "/memory/schema", 200),  # a server that leaves it out
        ("/ops/", "/ops/memory/schema", 200),
        ("/memory", "/memory/schema", 200),
        ("/memory", "/memory/memory/schema", 200),
        ("/ops", "/opsmemory/schema", 404),
        ("/ops", "/other/memory/schema", 404),
        ("", "/memory/schema", 200),
    ],
)
async def test_root_path_may_be_in_the_path_or_not(root_path, path, status):
    reader = Reader()
    scope = http_scope(path, root_path=root_path)
    await MemoryAPI(testing.limiter())(scope, reader.receive, reader.send)
    assert reader.messages[0]["status"] == status


@pytest.mark.parametrize(
    ("path", "raw_path", "status"),
    [
        ("/memory/schema/", b"/ops/memory/schema", 200),  # Litestar
        ("/memory/", b"/ops/memory", 307),
        ("/memory/", b"/ops/memory/", 200),
        ("/memory/schema/", b"/memory/schema/", 404),
        ("/memory/schema/", None, 404),
    ],
)
async def test_a_slash_that_the_client_has_not_sent_is_left_out(path, raw_path, status):
    reader = Reader()
    more = {} if raw_path is None else {"raw_path": raw_path}
    await MemoryAPI(testing.limiter())(http_scope(path, **more), reader.receive, reader.send)
    assert reader.messages[0]["status"] == status


async def test_a_websocket_is_refused():
    said: list[Any] = []

    async def receive() -> Any:
        await anyio.lowlevel.checkpoint()
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "websocket", "path": "/memory/events", "headers": []}
    await MemoryAPI(testing.limiter())(scope, receive, send)
    assert said == [{"type": "websocket.close", "code": 1000}]
    with pytest.raises(NotImplementedError, match="'smtp'"):
        await MemoryAPI(testing.limiter())({"type": "smtp"}, receive, send)


def fail(*_: object) -> Any:
    raise RuntimeError("the password is 1234")


async def test_what_goes_wrong_inside_is_logged_and_not_told(monkeypatch):
    api = MemoryAPI(testing.limiter())
    monkeypatch.setattr(MemoryLimiter, "statistics", fail)
    for path in ("/memory/status", "/memory/bounds", "/memory/grants", "/healthz"):
        with structlog.testing.capture_logs() as logged:
            answer = await get(api, path)
        assert answer.status_code == 500
        assert answer.json() == {"error": "this failed; the log of the program says why"}
        (entry,) = logged
        assert (entry["event"], entry["log_level"]) == ("membound.api_failed", "error")
        assert entry["path"] == path
        assert "the password is 1234" in entry["traceback"]


# --- who may see it


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "authorization", ["Bearer s3cret:x", "bearer  s3cret:x", basic("", "s3cret:x"),
                      basic("ann", "s3cret:x")],
)  # fmt: skip
async def test_the_token_opens(authorization):
    api = MemoryAPI(testing.limiter(), token="s3cret:x")
    for path in ("/memory/schema", "/memory/", "/memory/bounds"):
        answer = await get(api, path, headers={"authorization": authorization})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret ext", "Bearer S3CRET", "s3cret",
     "Digest s3cret", basic("s3cret", ""), basic("ann", "s3crets"), "Basic s3cret", "Basic !",
     "Basic \u00e9", "Bearer s3cret\u00e9", "Basic " + base64.b64encode(b"s3cret").decode()],
)  # fmt: skip
async def test_without_the_token_everything_but_health_is_closed(authorization):
    api = MemoryAPI(testing.limiter(), token="s3cret")
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    for path in ("/memory/status", "/memory/", "/memory/events", "/metrics", "/nowhere"):
        answer = await get(api, path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers.get_list("www-authenticate") == [
            'Bearer realm="membound"',
            'Basic realm="membound", charset="UTF-8"',
        ]
        assert "s3cret" not in answer.text
    assert (await get(api, "/healthz", headers=headers)).status_code == 200


async def test_two_tokens_are_none():
    api = MemoryAPI(testing.limiter(), token="s3cret")
    headers = [("authorization", "Bearer s3cret"), ("authorization", "Bearer other")]
    assert (await get(api, "/memory/schema", headers=headers)).status_code == 401


async def test_the_token_is_compared_in_constant_time(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return False

    monkeypatch.setattr("membound_async.api.access.hmac.compare_digest", compare)
    api = MemoryAPI(testing.limiter(), token="s3cret")
    for given in ("s3cret", "other"):
        headers = {"authorization": f"Bearer {given}"}
        assert (await get(api, "/memory/schema", headers=headers)).status_code == 401
    assert compared == [(b"s3cret", b"s3cret"), (b"other", b"s3cret")]


@pytest.mark.parametrize("token", ["", "two words", "tab\t", "caf\u00e9", "line\n"])
def test_a_token_that_cannot_be_sent_is_refused(token):
    with pytest.raises(ValueError, match="token"):
        MemoryAPI(testing.limiter(), token=token)


@pytest.mark.parametrize("options", [{"token": 5}, {"guard": 5}, {"limiter": "64MiB"}])
def test_arguments_of_other_types_are_refused(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        MemoryAPI(**{"limiter": testing.limiter()} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"interval_seconds": 0},
        {"interval_seconds": 61},
        {"interval_seconds": float("nan")},
        {"max_readers": -1},
    ],
)
def test_arguments_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MemoryAPI(testing.limiter(), **options)


async def later(allowed: bool) -> bool:
    await anyio.lowlevel.checkpoint()
    return allowed


@pytest.mark.parametrize(
    "guard_of",
    [lambda allowed: lambda scope: allowed, lambda allowed: lambda scope: later(allowed)],
)
async def test_a_guard_decides(guard_of: Callable[[bool], Any]):
    limiter = testing.limiter()
    assert (await get(MemoryAPI(limiter, guard=guard_of(True)), "/memory/")).status_code == 200
    closed = MemoryAPI(limiter, guard=guard_of(False))
    for path in ("/memory/", "/memory/status", "/memory/events", "/nowhere"):
        assert (await get(closed, path)).status_code == 403
    assert (await get(closed, "/healthz")).status_code == 200


async def test_a_guard_sees_the_request_after_the_token():
    seen: list[str] = []

    def guard(scope: Any) -> bool:
        seen.append(scope["path"])
        return True

    api = MemoryAPI(testing.limiter(), token="s3cret", guard=guard)
    assert (await get(api, "/memory/status")).status_code == 401
    assert seen == []
    headers = {"authorization": "Bearer s3cret"}
    assert (await get(api, "/memory/status", headers=headers)).status_code == 200
    assert seen == ["/memory/status"]


async def test_a_guard_that_fails_lets_nobody_in():
    with structlog.testing.capture_logs() as logged:
        answer = await get(MemoryAPI(testing.limiter(), guard=fail), "/memory/status")
    assert answer.status_code == 500
    assert "1234" not in answer.text
    assert [entry["event"] for entry in logged] == ["membound.api_failed"]


# --- anything at all

FUZZED = MemoryAPI(testing.limiter("64MiB"), token=None, max_readers=2)
PATHS = st.sampled_from([*FUZZED._routes, "/memory/assets/", "/nowhere"]) | st.text()
QUERIES = st.binary(max_size=200) | st.lists(
    st.tuples(
        st.sampled_from(["held_skip", "held_limit", "waiting_skip", "waiting_limit", "interval"])
        | st.text(max_size=5),
        st.integers().map(str) | st.floats().map(str) | st.text(max_size=9),
    ),
    max_size=5,
).map(lambda pairs: urlencode(pairs).encode())
HEADERS = st.lists(
    st.tuples(st.sampled_from([b"authorization", b"accept", b"host"]), st.binary(max_size=40)),
    max_size=3,
)


@pytest.mark.slow
@settings(max_examples=500)
@hypothesis.given(
    path=PATHS,
    query=QUERIES,
    method=st.sampled_from(["GET", "HEAD", "POST"]) | st.text(max_size=5),
    headers=HEADERS,
    root_path=st.sampled_from(["", "/", "/ops", "/memory"]) | st.text(max_size=5),
    token=st.sampled_from([None, "s3cret"]),
)
def test_no_request_is_too_strange(path, query, method, headers, root_path, token):
    api = FUZZED if token is None else MemoryAPI(testing.limiter("64MiB"), token=token)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "query_string": query,
        "headers": headers,
    }
    reader = Reader.__new__(Reader)
    reader.messages = []

    async def run() -> None:
        reader.reads, reader.left = anyio.Event(), anyio.Event()
        reader.reads.set()
        reader.left.set()  # so that an event stream has an end
        await api(scope, reader.receive, reader.send)

    with structlog.testing.capture_logs() as logged:
        anyio.run(run)
    assert logged == []
    start, *bodies = reader.messages
    assert start["status"] in {200, 307, 400, 401, 404, 405}
    body = b"".join(message["body"] for message in bodies)
    headers_sent = dict(start["headers"])
    if headers_sent[b"content-type"] == b"application/json" and method != "HEAD":
        json.loads(body)
    if b"content-length" in headers_sent:
        assert len(body) == (0 if method == "HEAD" else int(headers_sent[b"content-length"]))
    assert all(b"\n" not in value and b"\r" not in value for _, value in start["headers"])
    assert bodies[-1].get("more_body", False) is False
    assert api._readers.count == 0
