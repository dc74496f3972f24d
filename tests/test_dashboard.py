"""The dashboard in a real browser, served by the real API from a real limiter.

The screenshots are in build/dashboard/ afterwards. The one of docs/howto/dashboard.md is
renewed so:

    python -m pytest tests/test_dashboard.py -k screenshots
    cp build/dashboard/light.png docs/howto/dashboard.png
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
import uvicorn
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

from membound_async import Inbox, MemoryGrant, MemoryLimiter
from membound_async.api import MemoryAPI, StatusSnapshot
from membound_async.settings import LimiterSettings
from membound_async.testing import ScriptedProbe

T = TypeVar("T")

MIB = 2**20
ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "build" / "dashboard"
CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_MS = 20_000
NONE = "\N{EN DASH}"

pytestmark = [
    pytest.mark.slow,  # the page is the same for every Python
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="NOT TESTED: there is no `chromium` on the PATH; nobody has seen the dashboard",
    ),
]


class Service:
    """A program with a limiter that serves its dashboard, in a thread of its own."""

    def __init__(self, *, port: int = 0, limit: str = "1000MiB", stalls: bool = False) -> None:
        self.probe = ScriptedProbe(300 * MIB)
        self.limiter = MemoryLimiter(
            limit,
            slop_factor=0.1,
            baseline="100MiB",
            probe=self.probe,
            settings=LimiterSettings(stall_after_seconds=0.5 if stalls else 600),
        )
        self.api = MemoryAPI(self.limiter, interval_seconds=0.1)
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/memory/"
        self._server = uvicorn.Server(
            uvicorn.Config(self.api, log_level="critical", ws="none", timeout_graceful_shutdown=5)
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._tasks: list[asyncio.Task[None]] = []
        self._held: list[MemoryGrant] = []

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._server.serve([self._socket]))
        self._loop.run_until_complete(self._give_everything_back())
        self._loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.do(self._end())
            self._thread.join()

    async def _end(self) -> None:
        self.api.close()
        self._server.should_exit = True

    async def _give_everything_back(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for grant in self._held:
            grant.release()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it in the loop of the service, as its own code does."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def hold(self, path: str, nbytes: int) -> MemoryGrant:
        async def take() -> MemoryGrant:
            grant = self.limiter.component(path).grant_nowait(nbytes)
            self._held.append(grant)  # or it would be given back as lost
            return grant

        return self.do(take())

    def release(self, grant: MemoryGrant) -> None:
        async def give_back() -> None:
            grant.release()

        self.do(give_back())

    def ask(self, path: str, nbytes: int) -> None:
        """Make a request that may have to wait, and go on."""

        async def wait() -> None:
            async with self.limiter.component(path).grant(nbytes):
                await asyncio.Event().wait()

        async def start() -> None:
            self._tasks.append(asyncio.create_task(wait()))
            await asyncio.sleep(0)

        self.do(start())

    def snapshot(self) -> dict[str, Any]:
        async def take() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(StatusSnapshot.take(self.limiter).to_json())
            return found

        return self.do(take())


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        yield browser
        browser.close()


Open = Callable[..., Page]

WATCH_POLICY = """
document.addEventListener("securitypolicyviolation", (event) => {
  console.error(`content security policy: ${event.violatedDirective} ${event.blockedURI}`);
});
"""


class Problems(list[str]):
    """What a browser complains about; a lost connection it logs by itself."""

    def without_lost_connections(self) -> list[str]:
        return [text for text in self if "Failed to load resource: net::ERR_" not in text]


@pytest.fixture
def problems() -> Problems:
    return Problems()


@pytest.fixture
def open_page(browser: Browser, problems: Problems) -> Iterator[Open]:
    """Open the dashboard of a service; anything that the browser complains of fails the test."""
    contexts = []

    def open_page(service: Service, *, goto: bool = True, **options: Any) -> Page:
        options = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.add_init_script(WATCH_POLICY)

        def on_error(error: Error) -> None:
            problems.append(f"not caught: {error}")

        def on_message(message: ConsoleMessage) -> None:
            if message.type in {"error", "warning"}:
                problems.append(message.text)

        def on_request(request: Request) -> None:
            if not request.url.startswith(service.url):
                problems.append(f"asked {request.url}")

        page.on("pageerror", on_error)
        page.on("console", on_message)
        page.on("request", on_request)
        if goto:
            page.goto(service.url)
            expect(page.locator("#connection-word")).to_have_text("live")
        return page

    expect.set_options(timeout=WAIT_MS)
    yield open_page
    for context in contexts:
        context.close()
    assert problems.without_lost_connections() == []


def wait_for(page: Page, condition: str) -> None:
    """Wait until it is true; the policy of the page forbids Playwright's own way, `eval`."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def row(page: Page, path: str) -> Locator:
    return page.locator(f'#rows tr[data-path="{path}"]')


def cell(page: Page, path: str, label: str) -> Locator:
    return row(page, path).locator(f'td[data-label="{label}"]')


def paths(page: Page) -> list[str]:
    found: list[str] = page.locator("#rows tr:visible .path").all_text_contents()
    return [path for path in found if path != "root"]


# --- what it shows ------------------------------------------------------------------------


def test_shows_what_is_declared_granted_and_measured(service, open_page):
    service.limiter.component("decode", minimum="8MiB", firm_limit="64MiB")
    grant = service.hold("decode", 40 * MIB)
    service.hold("upload", 30 * MIB)
    page = open_page(service)

    expect(page.locator("#status")).to_have_text("OK")
    expect(page.locator("#measured")).to_have_text("300.0 MiB")
    expect(page.locator("#measured-of")).to_have_text(
        "measured (scripted), 33 % of the effective limit of 900.0 MiB"
    )
    expect(page.locator("#threshold")).to_have_text("855.0 MiB")
    expect(page.locator("#baseline")).to_have_text("100.0 MiB")
    expect(page.locator("#committed")).to_have_text("70.0 MiB")
    expect(page.locator("#drift")).to_have_text("130.0 MiB")
    expect(page.locator("#slop")).to_have_text("100.0 MiB")
    expect(page.locator("#free")).to_have_text("600.0 MiB")
    expect(page.locator("#granted")).to_have_text("70.0 MiB")
    expect(page.locator("#granted-note")).to_have_text("2 grants")
    expect(page.locator("#notes")).to_contain_text("Limit 1000.0 MiB (explicit)")
    expect(page.locator("#memory-legend")).to_have_text(
        "Measured300.0 MiBBaseline + committed170.0 MiBThreshold855.0 MiBEffective limit900.0 MiB"
    )

    expect(cell(page, "decode", "Minimum")).to_have_text("8.0 MiB")
    expect(cell(page, "decode", "Granted")).to_have_text("40.0 MiB")
    expect(cell(page, "decode", "Firm limit")).to_have_text("64.0 MiB")
    expect(cell(page, "upload", "Granted")).to_have_text("30.0 MiB")
    expect(cell(page, "upload", "Firm limit")).to_have_text("none")
    expect(row(page, "decode").locator(".share")).to_have_text("63 %")  # 40 of 64
    bar = row(page, "decode").locator(".bar")
    lengths = bar.evaluate(
        "bar => ['--minimum-at', '--granted-to', '--flight-to', '--firm-at']"
        ".map(name => Number(bar.style.getPropertyValue(name)))"
    )
    assert lengths == [0.125, 0.625, 0.625, 1]
    expect(page.locator("#holders li")).to_have_count(2)
    expect(page.locator("#holders li").first).to_contain_text("decode")
    expect(page.locator("#holders li").first).to_contain_text("40.0 MiB")
    expect(page.locator("#waiters")).to_have_text("Nobody waits.")

    service.release(grant)
    service.probe.set(450 * MIB)
    expect(cell(page, "decode", "Granted")).to_have_text("0 B")
    expect(page.locator("#measured")).to_have_text("450.0 MiB")
    expect(page.locator("#holders li")).to_have_count(1)


def test_says_who_waits_for_what_and_since_when(service, open_page):
    service.limiter.component("decode", firm_limit="64MiB")
    service.hold("decode", 40 * MIB)
    service.ask("decode", 32 * MIB)  # 8 MiB over its firm limit
    service.hold("upload", 200 * MIB)
    service.ask("upload", 250 * MIB)  # half of what is free would not do
    page = open_page(service)

    expect(page.locator("#waiting")).to_have_text("2")
    expect(page.locator("#waiting-note")).to_contain_text("for 282.0 MiB, since ")
    expect(cell(page, "decode", "Waiting")).to_have_text("1 · 32.0 MiB")
    expect(cell(page, "decode", "Oldest wait")).to_contain_text("s")
    waiters = page.locator("#waiters li")
    expect(waiters).to_have_count(2)
    expect(waiters.nth(0)).to_contain_text(
        "a grant; 8.0 MiB over the firm limit with it: waits until decode gives something back"
    )
    # 2 * 250 + 200 of 900 - 100 - 240, as nothing is measured that was not granted
    expect(waiters.nth(1)).to_contain_text("needs 700.0 MiB free, 140.0 MiB of it are missing")
    expect(page.locator("#waits-legend")).to_contain_text("Requests waiting2")


def test_shows_what_is_in_flight_and_of_how_many_senders(service, open_page):
    inboxes = []

    async def send() -> None:
        inbox = Inbox[bytes](service.limiter.component("writer"))
        inboxes.append(inbox)
        await inbox.send(bytes(3 * MIB), sender="one")
        await inbox.send(bytes(2 * MIB), sender="other")

    async def end() -> None:
        await inboxes[0].aclose()

    service.do(send())
    page = open_page(service)
    expect(cell(page, "writer", "In flight")).to_have_text("5.0 MiB")
    expect(page.locator("#granted-note")).to_contain_text("5.0 MiB in flight")
    expect(page.locator("#holders li").first).to_contain_text("writer for one")
    row(page, "writer").click()
    expect(page.locator("#details-facts")).to_contain_text("5 242 880 bytes, of 2 senders")
    service.do(end())
    expect(cell(page, "writer", "In flight")).to_have_text(NONE)


def test_details_say_why_bounds_are_what_they_are(service, open_page):
    class Decoder:
        def specify_bounds(self, b: Any) -> None:
            b.minimum.fixed("input buffer", "8MiB")
            b.firm.array("batch", count=500, each="64KiB")
            b.firm.config("cache_bytes", "16MiB")

    service.limiter.registry.register("decode", Decoder())
    service.hold("decode", 12 * MIB)
    page = open_page(service)
    row(page, "decode").click()
    details = page.locator("#details")
    expect(details).to_be_visible()
    expect(page.locator("#details-path")).to_have_text("decode")
    why = page.locator("#details-bounds .why")
    assert why.all_text_contents() == [
        "minimum: 8.0 MiB",
        "    input buffer = 8 MiB",
        "firm limit, on top of the minimum: 47.3 MiB",
        "    batch = 500 x 64 KiB",
        "    cache_bytes = 16 MiB (config)",
    ]
    expect(page.locator("#details-facts")).to_contain_text("Granted12.0 MiB 12 582 912 bytes")
    expect(page.locator("#details-holders li")).to_have_count(1)
    service.hold("decode", 3 * MIB)
    expect(page.locator("#details-facts")).to_contain_text("Granted15.0 MiB 15 728 640 bytes")
    expect(page.locator("#details-holders li")).to_have_count(2)


@pytest.mark.parametrize(
    ("status", "word", "sign"),
    [("over_limit", "Over the limit", "▲"), ("stalled", "Stalled", "■")],
)
def test_says_in_words_and_signs_when_memory_is_short(status, word, sign, open_page):
    with Service(stalls=status == "stalled") as service:
        page = open_page(service)
        expect(page.locator("#status")).to_have_text("OK")
        if status == "over_limit":
            service.probe.set(950 * MIB)
        else:
            service.hold("upload", 300 * MIB)
            service.ask("upload", 300 * MIB)
        expect(page.locator("#status")).to_have_text(word)
        reason = service.snapshot()["reason"].split(" for ")[0]
        expect(page.locator("#reason")).to_contain_text(reason)
        shown = page.locator("#verdict .sign").evaluate(
            "e => getComputedStyle(e, '::before').content"
        )
        assert shown == f'"{sign}"'
        assert page.title().startswith(sign)


def altered(page: Page, alter: Callable[[dict[str, Any]], None], service: Service) -> None:
    """Serve snapshots of the service that were changed: what is rare in a test."""

    def answer(route: Route) -> None:
        snapshot = service.snapshot()
        alter(snapshot)
        route.fulfill(
            content_type="text/event-stream",
            body=f"retry: 200\nevent: snapshot\ndata: {json.dumps(snapshot)}\n\n",
        )

    page.route("**/memory/events", answer)


def test_shows_what_is_allocated_beyond_grants(service, open_page):
    def alter(snapshot: dict[str, Any]) -> None:
        snapshot["limiter"]["tracking"] = "on"
        for component in snapshot["limiter"]["components"]:
            if component["path"] == "decode":
                component["live_bytes"] = 48 * MIB
                component["overdraft_bytes"] = 8 * MIB

    service.hold("decode", 40 * MIB)
    page = open_page(service, goto=False)
    altered(page, alter, service)
    page.goto(service.url)
    expect(cell(page, "decode", "Live")).to_have_text("▲ 48.0 MiB")
    length = (
        row(page, "decode").locator(".bar").evaluate("b => b.style.getPropertyValue('--live-to')")
    )
    assert float(length) == pytest.approx(48 / 900, abs=1e-4)  # no firm limit: the whole limit


def test_says_that_live_bytes_are_not_known_without_tracking(service, open_page):
    service.hold("decode", MIB)
    page = open_page(service)
    tracking = service.snapshot()["limiter"]["tracking"]
    assert tracking == "off"
    expect(page.locator("#notes")).to_contain_text("Live bytes are not known: tracking is off.")
    expect(cell(page, "decode", "Live")).to_have_text(NONE)


def test_paths_are_text_and_never_markup(service, open_page):
    path = "<img/src=x/onerror=alert(1)>"
    service.hold(path, MIB)
    page = open_page(service)
    expect(page.locator("#rows .path", has_text="onerror")).to_have_text(path)
    expect(page.locator("#holders .who").first).to_have_text(path)
    assert page.locator("main img").count() == 0


# --- the table ----------------------------------------------------------------------------


def a_few(service: Service) -> None:
    service.limiter.component("decode", minimum="2MiB", firm_limit="64MiB")
    for path, size in {"upload": 3, "decode": 12, "index.10": 5, "index.9": 5}.items():
        service.hold(path, size * MIB)


def test_sorts_by_click(service, open_page):
    a_few(service)
    page = open_page(service)
    expect(row(page, "upload")).to_be_visible()
    granted = page.locator('th[data-key="granted"]')
    path = page.locator('th[data-key="path"]')
    assert granted.get_attribute("aria-sort") == "descending"
    assert paths(page) == ["decode", "index.9", "index.10", "upload"]

    granted.locator("button").click()
    assert granted.get_attribute("aria-sort") == "ascending"
    assert paths(page) == ["upload", "index.9", "index.10", "decode"]

    path.locator("button").click()
    assert path.get_attribute("aria-sort") == "ascending"
    assert granted.get_attribute("aria-sort") == "none"
    assert paths(page) == ["decode", "index.9", "index.10", "upload"]
    path.locator("button").click()
    assert paths(page) == ["upload", "index.10", "index.9", "decode"]


def test_rows_keep_their_places_under_the_pointer(service, open_page):
    a_few(service)
    page = open_page(service)
    expect(row(page, "upload")).to_be_visible()
    row(page, "upload").hover()
    service.hold("upload", 50 * MIB)
    expect(cell(page, "upload", "Granted")).to_have_text("53.0 MiB")
    assert paths(page)[-1] == "upload"
    page.mouse.move(1, 1)
    expect(page.locator("#rows tr").first).to_have_attribute("data-path", "upload")


def test_filters(service, open_page):
    a_few(service)
    service.ask("decode", 60 * MIB)
    page = open_page(service)
    expect(page.locator("#components-count")).to_have_text("5")  # root too
    page.locator("#filter").fill("INDEX")
    assert paths(page) == ["index.9", "index.10"]
    expect(page.locator("#components-count")).to_have_text("2 of 5")
    page.locator("#filter").fill("no such")
    assert paths(page) == []
    expect(page.locator("#no-rows")).to_be_visible()
    page.locator("#filter").fill("")
    page.locator("#only-waiting").check()
    assert paths(page) == ["decode"]


def test_works_by_keyboard_alone(service, open_page):
    a_few(service)
    page = open_page(service)
    expect(row(page, "upload")).to_be_visible()
    focused = "document.activeElement.closest('[data-key], tr')?.dataset"

    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips to the components
    for _ in range(4):  # two boxes, the filter, and the first head
        page.keyboard.press("Tab")
    assert page.evaluate(focused) == {"key": "path"}
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    assert page.locator('th[data-key="path"]').get_attribute("aria-sort") == "ascending"

    for _ in range(9):  # the other heads, and one stop for all rows
        page.keyboard.press("Tab")
    assert page.evaluate(focused) == {"path": "decode"}
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == {"path": "index.9"}
    page.keyboard.press("End")
    assert page.evaluate(focused) == {"path": "upload"}
    page.keyboard.press("Home")
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == {"path": "index.10"}

    page.keyboard.press("Enter")
    expect(page.locator("#details")).to_be_visible()
    expect(page.locator("#details-path")).to_have_text("index.10")
    page.keyboard.press("Escape")
    expect(page.locator("#details")).to_be_hidden()
    assert page.evaluate(focused) == {"path": "index.10"}


def test_500_components_and_only_what_changed_is_written(service, open_page):
    grants = {
        f"tenant-{n:03}.decode": service.hold(f"tenant-{n:03}.decode", MIB) for n in range(500)
    }
    page = open_page(service)
    expect(page.locator("#components-count")).to_have_text("501")  # root too
    page.locator("#components").evaluate("node => node.scrollIntoView()")
    page.locator('th[data-key="path"] button').click()
    page.mouse.move(1, 1)
    page.evaluate(
        """() => {
          window.written = new Set();
          const watch = new MutationObserver((changes) => {
            for (const { target } of changes) {
              const node = target.nodeType === 1 ? target : target.parentElement;
              const row = node.closest("#rows tr");
              if (row) window.written.add(row.dataset.path);
            }
          });
          const all = { subtree: true, childList: true, characterData: true, attributes: true };
          watch.observe(document.getElementById("rows"), all);
        }"""
    )

    async def grow() -> None:
        await grants["tenant-001.decode"].grow(2 * MIB)

    service.do(grow())
    expect(cell(page, "tenant-001.decode", "Granted")).to_have_text("3.0 MiB")
    assert page.evaluate("[...window.written]") == ["tenant-001.decode"]

    # A row out of sight is written to when it comes into sight.
    service.release(grants["tenant-499.decode"])
    row(page, "tenant-499.decode").scroll_into_view_if_needed()
    expect(cell(page, "tenant-499.decode", "Granted")).to_have_text("0 B")


# --- how it looks -------------------------------------------------------------------------

CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (...layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (parts) => {
    const [r, g, b] = parts.map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const hasText = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    if (!hasText || !node.checkVisibility() || node.closest("noscript, .unseen")) continue;
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      layers.unshift(getComputedStyle(at).backgroundColor);
    }
    const back = luminance(rgb(...layers));
    const front = luminance(rgb(...layers, getComputedStyle(node).color));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < 4.5) found[`${node.tagName} ${node.className} ${node.textContent}`] = ratio;
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("status", ["ok", "over_limit", "stalled"])
def test_text_has_contrast(scheme, status, service, open_page):
    service.limiter.component("decode", firm_limit="64MiB")
    service.hold("decode", 40 * MIB)
    service.ask("decode", 32 * MIB)
    page = open_page(service, goto=False, color_scheme=scheme)
    altered(page, lambda snapshot: snapshot.update(status=status, reason="a reason"), service)
    page.goto(service.url)
    expect(page.locator("#waiters li")).to_have_count(1)
    expect(cell(page, "decode", "Waiting")).to_have_text("1 · 32.0 MiB")
    assert page.evaluate(CONTRASTS) == {}
    row(page, "decode").click()
    expect(page.locator("#details-waiters li")).to_have_count(1)
    assert page.evaluate(CONTRASTS) == {}


def background(page: Page) -> str:
    found: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return found


def test_is_light_or_dark_as_the_system_says_or_somebody_chose(service, open_page):
    page = open_page(service, color_scheme="light")
    light = background(page)
    page.emulate_media(color_scheme="dark")
    dark = background(page)
    assert (light, dark) == ("rgb(243, 245, 248)", "rgb(14, 18, 24)")

    page.get_by_label("Light").check()
    assert background(page) == light
    page.reload()
    assert background(page) == light
    expect(page.get_by_label("Light")).to_be_checked()
    page.get_by_label("Dark").check()
    page.emulate_media(color_scheme="light")
    assert background(page) == dark
    page.get_by_label("System").check()
    assert background(page) == light


def test_moves_nothing_for_those_who_asked_for_that(service, open_page):
    page = open_page(service)
    durations = """[...document.querySelectorAll("*")].flatMap((node) => {
      const style = getComputedStyle(node);
      return [style.transitionDuration, style.animationName];
    }).filter((value) => value !== "0s" && value !== "none")"""
    assert page.evaluate(durations) == []
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(durations) != []


PHONE = {"width": 375, "height": 812}


def test_fits_on_a_phone(service, open_page):
    a_few(service)
    long = "ingest.a_component_with_a_name_that_no_line_of_a_phone_can_hold.and_a_part_of_it"
    service.hold(long, 50 * MIB)
    service.ask("decode", 60 * MIB)
    page = open_page(service, viewport=PHONE, has_touch=True)
    expect(cell(page, "decode", "Waiting")).to_have_text("1 · 60.0 MiB")
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 375
    outside = """[...document.querySelectorAll("body *")].filter((node) => {
      const box = node.getBoundingClientRect();
      return box.width && box.right > 375.5 && !node.closest(".unseen, .skip");
    }).map((node) => node.id || node.className)"""
    assert page.evaluate(outside) == []
    page.locator('th[data-key="path"] button').tap()
    assert paths(page)[0] == "decode"
    row(page, long).tap()
    expect(page.locator("#details-path")).to_have_text(long)
    assert page.evaluate(width) == 375
    assert page.evaluate(outside) == []


# --- the connection -----------------------------------------------------------------------


def test_reconnects_after_the_service_has_restarted(open_page, problems):
    with Service() as before:
        before.hold("decode", 40 * MIB)
        page = open_page(before)
        expect(cell(page, "decode", "Granted")).to_have_text("40.0 MiB")
        before.stop()
        expect(page.locator("#connection-word")).to_have_text("reconnecting")
        expect(page.locator("#connection")).to_have_class("stale")
        expect(page.locator("#age")).to_contain_text("s old")
        expect(cell(page, "decode", "Granted")).to_have_text("40.0 MiB")  # the last that is known
    with Service(port=before.port) as after:
        after.hold("upload", 7 * MIB)
        expect(page.locator("#connection-word")).to_have_text("live")
        expect(cell(page, "upload", "Granted")).to_have_text("7.0 MiB")
        expect(row(page, "decode")).to_have_count(0)
        expect(page.locator("#age")).to_have_text("data is new")
    assert {text.partition("ERR_")[0] for text in problems} <= {"Failed to load resource: net::"}
    problems[:] = problems.without_lost_connections()


def test_connects_again_after_an_answer_for_which_a_browser_gives_up(service, open_page, problems):
    refused = 0

    def refuse(route: Route) -> None:
        nonlocal refused
        refused += 1
        if refused <= 2:
            route.fulfill(status=502, body="a proxy has nobody to ask")
        else:
            route.continue_()

    page = open_page(service, goto=False)
    page.route("**/memory/events", refuse)
    page.goto(service.url)
    expect(page.locator("#connection-word")).to_have_text("reconnecting")
    expect(page.locator("#connection-word")).to_have_text("live")
    assert refused == 3
    assert len(problems) == 2
    assert all("502" in text for text in problems)  # the browser's own
    problems.clear()


HIDE = """(hidden) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
POINTS = "uPlot.sync('membound').plots[0].data[0].length"


def test_asks_for_nothing_while_nobody_looks(service, open_page):
    page = open_page(service)
    asked = []
    page.evaluate(HIDE, True)
    expect(page.locator("#connection-word")).to_have_text("paused")
    page.on("request", lambda request: asked.append(request.url))
    service.hold("decode", MIB)
    page.wait_for_timeout(500)  # five intervals
    assert asked == []
    assert row(page, "decode").count() == 0
    page.evaluate(HIDE, False)
    expect(page.locator("#connection-word")).to_have_text("live")
    expect(cell(page, "decode", "Granted")).to_have_text("1.0 MiB")

    page.locator("#pause").click()
    expect(page.locator("#connection-word")).to_have_text("paused")
    assert page.locator("#pause").get_attribute("aria-pressed") == "true"
    page.evaluate(HIDE, True)
    page.evaluate(HIDE, False)
    expect(page.locator("#connection-word")).to_have_text("paused")  # as somebody wanted it
    page.locator("#pause").click()
    expect(page.locator("#connection-word")).to_have_text("live")


def test_history_is_bounded_and_has_gaps_where_nothing_was_seen(service, open_page):
    snapshot = service.snapshot()
    start = snapshot["unix_seconds"]
    seconds = [*range(20), *range(3600, 3600 + 880)]

    def answer(route: Route) -> None:
        lines = []
        for second in seconds:
            snapshot["unix_seconds"] = start + second
            lines.append(f"event: snapshot\ndata: {json.dumps(snapshot)}\n\n")
        route.fulfill(content_type="text/event-stream", body="retry: 100000\n" + "".join(lines))

    page = open_page(service, goto=False)
    page.route("**/memory/events", answer)
    page.goto(service.url)
    wait_for(page, f"{POINTS} === 900")
    data = page.evaluate("uPlot.sync('membound').plots[0].data")
    times = [round(time - start, 2) for time in data[0]]
    assert times[-1] == 3600 + 879
    assert times[0] == 1  # one second and a gap more than there is room for
    measured = data[1]
    assert [index for index, value in enumerate(measured) if value is None] == [19]
    seconds = [*range(10_000, 12_000)]
    page.reload()
    wait_for(page, f"{POINTS} === 900")


# --- what a person sees -------------------------------------------------------------------


@contextmanager
def a_busy_service(count: int) -> Iterator[Service]:
    """A program like those that need the page: parts of all kinds, some of which wait."""
    with Service(limit="1GiB") as service:
        inboxes = []

        async def send() -> None:
            inbox = Inbox[bytes](service.limiter.component("sink.kafka", "4MiB", "96MiB"))
            inboxes.append(inbox)
            for sender, size in {"tenant-7": 14, "tenant-12": 9}.items():
                await inbox.send(bytes(size * MIB), sender=sender)

        bounds = {
            "upload": (8, 256, 152),
            "decode": (8, 128, 121),
            "decode.cache": (0, 64, 58),
            "enrich": (16, 96, 22),
            "index.writer": (24, None, 64),
            "index.merge": (4, None, 11),
            "auth.session": (1, 8, 0.4),
        }
        for path, (minimum, firm, held) in bounds.items():
            service.limiter.component(path, f"{minimum}MiB", None if firm is None else f"{firm}MiB")
            for _ in range(4):
                service.hold(path, int(held * MIB / 4))
        for number in range(count - len(bounds) - 1):
            path = f"tenant-{number:03}.{('decode', 'cache', 'sink')[number % 3]}"
            service.limiter.component(path, 0, "2MiB")
            service.hold(path, 1024 * (20 + 97 * number % 880))
        service.do(send())
        for size in (12, 16, 9):
            service.ask("decode", size * MIB)
        service.probe.set(lambda: int((560 + 90 * math.sin(time.monotonic())) * MIB))
        yield service

        async def end() -> None:
            await inboxes[0].aclose()

        service.do(end())


def png_size(image: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", image[16:24])
    return width, height


def test_screenshots(open_page):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with a_busy_service(8) as service:
        page = open_page(
            service, viewport={"width": 1280, "height": 1280}, device_scale_factor=0.75
        )
        expect(page.locator("#waiters li")).to_have_count(3)
        wait_for(page, f"{POINTS} > 60")  # something to see in the charts
        page.screenshot(path=SCREENSHOTS / "light.png")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=SCREENSHOTS / "dark.png")
        row(page, "decode").click()
        expect(page.locator("#details-waiters li")).to_have_count(3)
        page.screenshot(path=SCREENSHOTS / "details.png")

        phone = open_page(service, viewport=PHONE, has_touch=True, device_scale_factor=2)
        wait_for(phone, f"{POINTS} > 20")
        phone.screenshot(path=SCREENSHOTS / "phone.png")
        phone.locator("#components").evaluate("node => node.scrollIntoView()")
        expect(cell(phone, "decode", "Waiting")).to_have_text("3 · 37.0 MiB")
        phone.screenshot(path=SCREENSHOTS / "phone-components.png")
    with a_busy_service(500) as service:
        page = open_page(service)
        page.locator("#components").evaluate("node => node.scrollIntoView()")
        expect(page.locator("#components-count")).to_have_text("501")
        page.screenshot(path=SCREENSHOTS / "500.png")

    shipped = (ROOT / "docs" / "howto" / "dashboard.png").read_bytes()
    assert len(shipped) < 150 * 1024
    assert png_size(shipped) == png_size((SCREENSHOTS / "light.png").read_bytes())
