"""Metrics: what Prometheus and OpenTelemetry are told is what is; and the alerts know it."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import DropAggregation, View
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from membound_async import (
    GrantTooLarge,
    LimiterSettings,
    MemoryLimiter,
    QuotaExceeded,
    ResourceLimits,
    testing,
)
from membound_async.hooks import GrantWaited
from membound_async.metrics import quantities, snapshots
from membound_async.metrics.opentelemetry import MemoryInstruments
from membound_async.metrics.prometheus import Labels, MemoryCollector, exposition
from membound_async.metrics.quantities import GROUPS
from membound_async.statistics import ComponentStatistics, LimiterStatistics, ReclaimerStatistics
from membound_async.testing import ScriptedProbe

ROOT = Path(__file__).parent.parent
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def series(text: bytes, content_type: str = "text/plain") -> Series:
    """Give what the client's own parser reads, and that each series is there once."""
    parse = parse_openmetrics if content_type.startswith(OPENMETRICS[:27]) else parse_text
    samples = [sample for family in parse(text.decode()) for sample in family.samples]
    found = {(one.name, frozenset(one.labels.items())): one.value for one in samples}
    assert len(found) == len(samples)
    return found


def scrape(collector: Any, accept: str = "") -> Series:
    content_type, text = exposition(collector, accept)
    return series(text, content_type)


def of(found: Series, name: str, **labels: str) -> float:
    return found[f"membound_{name}", frozenset(labels.items())]


def promtool(*arguments: str, text: bytes = b"") -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip(
            "promtool is not there, and NOTHING HAS CHECKED the metrics and alerts with it "
            "(Debian: apt-get install prometheus)"
        )
    ended = subprocess.run(
        [program, *arguments], input=text, capture_output=True, timeout=60, check=False
    )
    said = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 0, said
    return said


@pytest.fixture
def busy() -> Iterator[MemoryLimiter]:
    """A limiter of 1000 bytes of which every kind of number is known and different."""
    probe = ScriptedProbe([100, 700])
    limiter = testing.limiter(1000, baseline=100, probe=probe, resources=ResourceLimits(fds=50))
    reader = limiter.component("reader", minimum=50, firm_limit=400)
    grants = [reader.grant_nowait(120, also={"fds": 7}), reader.grant_nowait(30)]
    grants[1].release()
    with pytest.raises(GrantTooLarge):
        reader.grant_nowait(500)
    limiter.component("parse.json")
    limiter.add_reclaimer(lambda wanted: 0, name="cache")
    limiter.add_reclaimer(lambda wanted: 0, name="cache")
    yield limiter
    grants[0].release()


# --- Prometheus


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_a_scrape_gives_the_numbers_of_the_limiter(busy, accept):
    with MemoryCollector(busy) as collector:
        found = scrape(collector, accept)
    assert of(found, "limit_bytes") == 1000
    assert of(found, "effective_limit_bytes") == 1000
    assert of(found, "threshold_bytes") == 950
    assert of(found, "measured_bytes") == 700
    assert of(found, "peak_measured_bytes") == 700
    assert of(found, "baseline_bytes") == 100
    assert of(found, "drift_bytes") == 700 - 100 - 150  # 150 were granted at the most
    assert of(found, "committed_bytes") == 120
    assert of(found, "free_bytes") == 1000 - 100 - 450 - 120
    assert of(found, "granted_bytes") == 120
    assert of(found, "in_flight_bytes") == 0
    assert of(found, "grants") == 1
    assert of(found, "waiting_requests") == of(found, "waiting_bytes") == 0
    assert of(found, "oldest_wait_seconds") == of(found, "stalled_seconds") == 0
    assert of(found, "pressure_ratio") == of(found, "delay_seconds") == 0
    assert of(found, "observe_only") == 0
    assert of(found, "admissions_total") == 2
    assert of(found, "limiter_info", limit_source="explicit", measured="scripted") == 1
    assert of(found, "tracking", state=busy.statistics().tracking) == 1
    assert sum(of(found, "tracking", state=state) for state in quantities.TRACKING_STATES) == 1
    assert of(found, "resource_limit", resource="fds") == 50
    assert of(found, "resource_free", resource="fds") == 43
    assert of(found, "component_resource", component="reader", resource="fds") == 7
    assert of(found, "component_granted_bytes", component="reader") == 120
    assert of(found, "component_peak_granted_bytes", component="reader") == 150
    assert of(found, "component_minimum_bytes", component="reader") == 50
    assert of(found, "component_firm_limit_bytes", component="reader") == 400
    assert of(found, "component_admissions_total", component="reader") == 2
    assert of(found, "component_refusals_total", component="reader") == 1
    assert of(found, "component_granted_bytes", component="parse.json") == 0
    assert of(found, "reclaimer_runs_total", reclaimer="cache") == 0


def test_what_there_is_not_of_a_component_has_no_series(busy):
    with MemoryCollector(busy) as collector:
        names = {
            name for name, labels in scrape(collector) if ("component", "parse.json") in labels
        }
    assert "membound_component_granted_bytes" in names
    absent = {"minimum_bytes", "firm_limit_bytes", "resource"}
    absent |= set() if busy.statistics().tracking == "on" else {"live_bytes"}
    assert names & {f"membound_component_{name}" for name in absent} == set()


def test_every_statistic_is_exported_or_left_out_for_a_reason(busy):
    """Each group is read through a spy that notes which fields are asked for."""

    class Spy:
        def __init__(self, real: Any) -> None:
            self._real = real

        def __getattr__(self, name: str) -> Any:
            asked.setdefault(type(self._real), set()).add(name)
            return getattr(self._real, name)

    asked: dict[type, set[str]] = {}
    metered = snapshots.MeteredLimiter(busy, "", 10)
    real = metered.snapshot()
    statistics = Spy(real.statistics)
    components = [Spy(one) for one in real.components]
    reclaimers = {name: Spy(one) for name, one in real.reclaimers.items()}
    spied: Any = snapshots.Snapshot(statistics, components, reclaimers, real.events)  # type: ignore[arg-type]
    for group in GROUPS:
        for quantity in group.quantities:
            for _, item in group.items(spied):
                quantity.value(item)
    if real.statistics.tracking != "on":
        asked[ComponentStatistics].add("live_bytes")
    asked[LimiterStatistics] |= {"components", "reclaimers"}  # the snapshot has them
    left_out = {
        LimiterStatistics: {"slop_factor", "age_seconds"},  # limits say it; when it was started
        ComponentStatistics: {
            *("entered", "senders", "grants", "waiting_bytes"),  # for a look, not over time
            *("peak_live_bytes", "overdraft_bytes", "peak_overdraft_bytes"),  # of live and granted
            *("would_wait", "would_wait_seconds", "would_refuse"),  # the limiter has them
        },
        ReclaimerStatistics: {"name", "reported_bytes", "last_seconds"},
    }
    for kind, names in left_out.items():
        assert asked[kind] | names == {one.name for one in fields(kind)}
        assert asked[kind] & names == set()


@pytest.mark.parametrize("accept", ["", OPENMETRICS, "text/plain; version=1.0.0", "text/html"])
def test_a_registry_is_exposed_as_its_client_does(busy, accept):
    registry = CollectorRegistry(target_info={"service": "a"})
    Counter("requests", "Of others.", registry=registry).inc(3, exemplar={"trace": "b"})
    Histogram("seconds", "Of others.", registry=registry).observe(2)
    limiter = {'quoted "name"\\': busy, "näme\n": testing.limiter("1GiB")}
    with MemoryCollector(limiter).register(registry):
        content_type, text = exposition(registry, accept)
        encode, their_content_type = choose_encoder(accept)
        theirs = encode(registry)
    assert content_type == their_content_type
    ours, expected = series(text, content_type), series(theirs, content_type)
    varying = {
        "membound_samples_total",
        "membound_pressure_stall_some_seconds_total",
        "membound_pressure_stall_full_seconds_total",
    }
    assert {key: number for key, number in ours.items() if key[0] not in varying} == {
        key: number for key, number in expected.items() if key[0] not in varying
    }
    # And word for word, but for how numbers are written and the order of the families.
    lines = [one.splitlines() for one in (text, theirs)]
    assert sorted(line.rpartition(b" ")[0] for line in lines[0]) == sorted(
        line.rpartition(b" ")[0] for line in lines[1]
    )
    assert text.count(b"# EOF") == (1 if "openmetrics" in content_type else 0)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
def test_any_name_is_read_back(name):
    text = f"a{Labels([('name', name)]).text} 1\n"
    ((family),) = parse_text(text)
    assert family.samples[0].labels == {"name": name}


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_several_limiters_are_told_apart_by_a_label(accept):
    registry = CollectorRegistry()
    limiters = {"in": testing.limiter(1000), "out": testing.limiter(2000)}
    with MemoryCollector(limiters).register(registry):
        content_type, text = exposition(registry, accept)
        found = series(text, content_type)
    assert of(found, "limit_bytes", limiter="in") == 1000
    assert of(found, "limit_bytes", limiter="out") == 2000
    assert of(found, "grant_wait_seconds_count", limiter="out") == 0
    assert text.count(b"# TYPE membound_limit_bytes ") == 1


def test_a_second_collector_on_a_registry_is_refused_with_the_remedy():
    registry = CollectorRegistry()
    second = MemoryCollector(testing.limiter(1000))
    with (
        MemoryCollector(testing.limiter(1000)).register(registry),
        pytest.raises(ValueError, match="several limiters go into one collector"),
    ):
        second.register(registry)
    second.close()
    MemoryCollector(testing.limiter(1000)).register(registry).close()
    assert [*registry.collect()] == []


def test_registering_reads_no_memory():
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    before = probe.reads
    collector = MemoryCollector(limiter).register(CollectorRegistry())
    assert probe.reads == before
    collector.close()


def test_one_metric_can_be_asked_for():
    registry = CollectorRegistry()
    with MemoryCollector(testing.limiter(1000)).register(registry):
        asked = registry.restricted_registry(["membound_limit_bytes"])
        assert [*series(exposition(asked)[1]).items()] == [
            (("membound_limit_bytes", frozenset()), 1000)
        ]


@pytest.mark.parametrize("most", [-1, True, 1.5])
def test_a_number_of_components_that_makes_no_sense_is_refused(most):
    with pytest.raises(ValueError, match="max_components"):
        MemoryCollector(testing.limiter(1000), max_components=most)


@pytest.mark.parametrize("ends", [[], [1, 1], [2, 1]])
def test_buckets_that_make_no_sense_are_refused(ends):
    with pytest.raises(ValueError, match="must be numbers that rise"):
        MemoryCollector(testing.limiter(1000), wait_seconds=ends)


# --- which components


def granted(limiter: MemoryLimiter, collector: MemoryCollector) -> dict[str, float]:
    return {
        dict(labels)["component"]: value
        for (name, labels), value in scrape(collector).items()
        if name == "membound_component_granted_bytes"
    }


def test_the_largest_components_have_series_and_keep_them():
    limiter = testing.limiter(100_000)
    collector = MemoryCollector(limiter, max_components=3)
    assert granted(limiter, collector) == {"root": 0}
    held = [limiter.component(name).grant_nowait(size) for name, size in [("a", 1), ("b", 2)]]
    held[0].release()
    assert granted(limiter, collector) == {"a": 0, "b": 2, "root": 0}
    last = MemoryCollector(limiter, max_components=4)
    assert len(granted(limiter, last)) == 3
    held[0] = limiter.component("a").grant_nowait(1)
    held += [limiter.component(name).grant_nowait(size) for name, size in [("0", 50), ("c", 9)]]
    assert granted(limiter, collector) == {"a": 1, "b": 2, "root": 0, "(others)": 59}
    assert granted(limiter, MemoryCollector(limiter, max_components=2)) == {
        "0": 50,
        "c": 9,
        "(others)": 3,
    }
    assert granted(limiter, last) == {"a": 1, "b": 2, "root": 0, "0": 50, "(others)": 9}
    assert granted(limiter, MemoryCollector(limiter, max_components=0)) == {"(others)": 62}
    assert sum(granted(limiter, collector).values()) == limiter.statistics().granted_bytes
    for grant in held:
        grant.release()


def test_the_rest_is_summed():
    limiter = testing.limiter(100_000, resources=ResourceLimits(fds=10, slices=10))
    held = [
        limiter.component("a", minimum=10, firm_limit=100).grant_nowait(5, also={"fds": 1}),
        limiter.component("b", minimum=20, firm_limit=300).grant_nowait(
            6, also={"fds": 2, "slices": 3}
        ),
    ]
    metered = snapshots.MeteredLimiter(limiter, "", 0)
    ((rest),) = metered.snapshot().components
    assert (rest.path, rest.minimum_bytes, rest.granted_bytes) == ("(others)", 30, 11)
    assert rest.firm_limit_bytes is None  # root has none
    assert rest.resources == {"fds": 3, "slices": 3}
    a, b, _ = limiter.statistics().components
    assert snapshots._total([a, b]).firm_limit_bytes == 400
    for grant in held:
        grant.release()


def test_reclaimers_of_one_name_are_one():
    one, other = (
        ReclaimerStatistics(
            name="cache",
            runs=runs,
            failures=0,
            freed_bytes=10 * runs,
            reported_bytes=0,
            last_seconds=0.0,
            total_seconds=0.5,
            backed_off_seconds=float(runs),
        )
        for runs in (1, 2)
    )
    merged = snapshots._by_name((one, other))["cache"]
    assert (merged.runs, merged.freed_bytes, merged.total_seconds) == (3, 30, 1.0)
    assert merged.backed_off_seconds == 2.0


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_what_there_is_none_of_has_no_head(accept):
    with MemoryCollector(testing.limiter(1000)) as collector:
        text = exposition(collector, accept)[1]
    assert b"membound_limit_bytes" in text
    assert b"membound_resource" not in text


@pytest.mark.virtual_time
async def test_the_oldest_wait_of_the_rest_is_the_longest():
    limiter = testing.limiter(1000, settings=LimiterSettings(stall_after_seconds=60, reclaim=False))
    collector = MemoryCollector(limiter, max_components=0)
    async with anyio.create_task_group() as tasks, limiter.grant(500):
        tasks.start_soon(wait_for_grant, limiter, "a", 400)
        await anyio.sleep(2)
        tasks.start_soon(wait_for_grant, limiter, "b", 300)
        await anyio.sleep(3)
        found = scrape(collector)
        assert of(found, "oldest_wait_seconds") == pytest.approx(5)
        assert of(found, "component_oldest_wait_seconds", component="(others)") == pytest.approx(5)
        assert of(found, "component_waiting_requests", component="(others)") == 2
        assert of(found, "waiting_bytes") == 700


async def wait_for_grant(limiter: MemoryLimiter, path: str, nbytes: int) -> None:
    async with limiter.component(path).grant(nbytes):
        pass


# --- events


@pytest.mark.virtual_time
async def test_waiting_times_are_in_the_histogram():
    limiter = testing.limiter(1000)
    registry = CollectorRegistry()
    collector = MemoryCollector(limiter, wait_seconds=(1, 2.5, 10)).register(registry)
    for seconds in (0.5, 2, 3, 60):
        async with anyio.create_task_group() as tasks, limiter.grant(500):
            tasks.start_soon(wait_for_grant, limiter, "a", 300)
            await anyio.sleep(seconds)
    async with limiter.grant(10):
        pass  # has not waited
    for accept in ("", OPENMETRICS):
        found = scrape(registry, accept)
        counts = [of(found, "grant_wait_seconds_bucket", le=le) for le in ("1.0", "2.5", "10.0")]
        assert counts == [1, 2, 3]
        assert of(found, "grant_wait_seconds_bucket", le="+Inf") == 4
        assert of(found, "grant_wait_seconds_count") == 4
        assert of(found, "grant_wait_seconds_sum") == pytest.approx(65.5)
        assert of(found, "waited_seconds_total") == pytest.approx(65.5)
    collector.close()
    async with anyio.create_task_group() as tasks, limiter.grant(500):
        tasks.start_soon(wait_for_grant, limiter, "a", 300)
        await anyio.sleep(1)
    assert of(scrape(collector), "grant_wait_seconds_count") == 4  # closed


def test_a_waiting_time_belongs_to_the_bucket_that_ends_with_it():
    limiter = testing.limiter(1000)
    with MemoryCollector(limiter, wait_seconds=(1, 2)) as collector:
        for seconds in (1.0, 1.1, 2.0):
            collector._sources[0].waits(GrantWaited("a", 1, seconds))
        found = scrape(collector)
    assert of(found, "grant_wait_seconds_bucket", le="1.0") == 1
    assert of(found, "grant_wait_seconds_bucket", le="2.0") == 3


def test_refusals_are_counted_by_their_error():
    limiter = testing.limiter(1000)
    with MemoryCollector(limiter) as collector, limiter.grant_nowait(500):
        assert of(scrape(collector), "refusals_total", error="GrantTimeout") == 0
        with pytest.raises(GrantTooLarge):
            limiter.grant_nowait(2000)
        for _ in range(2):
            with pytest.raises(QuotaExceeded):
                limiter.grant_nowait(400)
        found = scrape(collector)
    refused = {
        dict(labels)["error"]: value
        for (name, labels), value in found.items()
        if name == "membound_refusals_total"
    }
    assert refused == {
        "GrantDeadlock": 0,
        "GrantTimeout": 0,
        "GrantTooLarge": 1,
        "QuotaExceeded": 2,
    }


def test_a_closed_collector_counts_nothing():
    limiter = testing.limiter(1000)
    with MemoryCollector(limiter) as collector:
        pass
    with pytest.raises(GrantTooLarge):
        limiter.grant_nowait(2000)
    assert of(scrape(collector), "refusals_total", error="GrantTooLarge") == 0


def test_leaks_and_changed_limits_are_counted():
    limiter = testing.limiter(1000)
    with MemoryCollector(limiter) as collector:
        with pytest.warns(ResourceWarning, match="never released"):
            limiter.grant_nowait(300)
        with limiter.grant_nowait(1):
            pass
        limiter.resize(2000)
        found = scrape(collector)
    assert of(found, "leaked_grants_total") == 1
    assert of(found, "leaked_bytes_total") == 300
    assert of(found, "limit_changes_total") == 1
    assert of(found, "limit_bytes") == 2000


@pytest.mark.virtual_time
async def test_a_stall_is_counted_once_and_told_while_it_goes_on():
    limiter = testing.limiter(1000)
    collector = MemoryCollector(limiter)
    async with anyio.create_task_group() as tasks:
        async with limiter.grant(500):
            tasks.start_soon(wait_for_grant, limiter, "a", 300)
            await anyio.sleep(25)
            found = scrape(collector)
            assert of(found, "stalls_total") == 1
            assert of(found, "stalled_seconds") == pytest.approx(25, abs=0.5)
        await anyio.sleep(5)
        found = scrape(collector)
        assert (of(found, "stalls_total"), of(found, "stalled_seconds")) == (1, 0)


def test_events_of_many_threads_are_all_counted():
    limiter = testing.limiter(1000)

    def be_refused() -> None:
        for _ in range(500):
            with pytest.raises(GrantTooLarge):
                limiter.grant_nowait(2000)

    with MemoryCollector(limiter) as collector:
        threads = [threading.Thread(target=be_refused) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert of(scrape(collector), "refusals_total", error="GrantTooLarge") == 2000


# --- promtool


def test_promtool_accepts_the_metrics(busy):
    with MemoryCollector({"in": busy, "out": testing.limiter("1GiB")}) as collector:
        assert promtool("check", "metrics", text=exposition(collector)[1]) == ""
    assert "SUCCESS: 9 rules" in promtool("check", "rules", str(ALERTS))


def test_promtool_accepts_the_job_of_the_page(tmp_path):
    page = (ROOT / "docs" / "howto" / "prometheus.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    shutil.copy(ALERTS, tmp_path)
    (tmp_path / "prometheus.yml").write_text(config)
    assert "9 rules found" in promtool("check", "config", str(tmp_path / "prometheus.yml"))


def test_alerts_do_what_they_say():
    assert "SUCCESS" in promtool("test", "rules", str(ROOT / "tests" / "alerts_test.yml"))


ALERTS = ROOT / "docs" / "howto" / "alerts.yml"


def test_alerts_use_metrics_that_there_are(busy):
    with MemoryCollector(busy) as collector:
        there = {name for name, _ in scrape(collector)}
    for path in (ALERTS, ROOT / "tests" / "alerts_test.yml"):
        used = set(re.findall(r"\b(membound_(?!async)\w+)", path.read_text(encoding="utf-8")))
        assert len(used) >= 10
        assert used <= there


def test_every_alert_is_tested_and_described():
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text(encoding="utf-8"))
    tested = re.findall(r"alertname: (\w+)", (ROOT / "tests" / "alerts_test.yml").read_text())
    page = (ROOT / "docs" / "howto" / "alerts.md").read_text(encoding="utf-8")
    assert set(tested) == set(alerts)
    assert re.findall(r"^## (Memory\w+)", page, re.MULTILINE) == alerts


# --- OpenTelemetry


def collected(reader: InMemoryMetricReader) -> dict[str, Any]:
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        metric.name: metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def values(metric: Any) -> dict[frozenset[tuple[str, Any]], float]:
    return {frozenset(point.attributes.items()): point.value for point in metric.data.data_points}


def value(found: dict[str, Any], name: str, **attributes: str) -> float:
    labels = {f"membound.{key}": one for key, one in attributes.items()}
    return values(found[f"membound.memory.{name}"])[frozenset(labels.items())]


def test_opentelemetry_collects_the_numbers_of_the_limiter(busy, caplog):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with MemoryInstruments(busy, meter_provider=provider):
        with pytest.raises(GrantTooLarge):
            busy.grant_nowait(5000)
        found = collected(reader)
    assert "hook_failed" not in caplog.text
    assert value(found, "limit") == 1000
    assert value(found, "measured") == 700
    assert value(found, "drift") == 450
    assert value(found, "admissions") == 2
    assert value(found, "component.granted", component="reader") == 120
    assert value(found, "component.resource", component="reader", resource="fds") == 7
    assert (
        values(found["membound.memory.refusals"])[frozenset({("error.type", "GrantTooLarge")})] == 1
    )
    described = {
        f"membound.memory.{one.name}": (one.unit, one.help, one.kind)
        for group in GROUPS
        for one in group.quantities
    }
    for name, metric in found.items():
        unit, text, kind = described[name]
        assert (metric.unit, metric.description) == (unit, text)
        assert (
            getattr(metric.data, "is_monotonic", None)
            == {
                "counter": True,
                "updown": False,
                "gauge": None,
            }[kind]
        )
    absent = {"membound.memory.component.live"} if busy.statistics().tracking != "on" else set()
    if busy.statistics().pressure_stall is None:
        absent |= {name for name in described if "pressure_stall" in name}
    assert set(found) == set(described) - absent


def test_prometheus_and_opentelemetry_are_told_the_same(busy):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with MemoryCollector(busy) as collector, MemoryInstruments(busy, meter_provider=provider):
        scraped, found = scrape(collector), collected(reader)
    varying = {"samples", "pressure_stall.some", "pressure_stall.full"}
    for group in GROUPS:
        for quantity in group.quantities:
            name = f"membound.memory.{quantity.name}"
            if quantity.name in varying or name not in found:
                continue
            suffix = {"By": "_bytes", "s": "_seconds", "1": "_ratio"}.get(quantity.unit, "")
            suffix += "_total" if quantity.kind == "counter" else ""
            metric = f"membound_{quantity.name.replace('.', '_')}{suffix}"
            of_metric = {
                frozenset(one for _, one in labels): number
                for (other, labels), number in scraped.items()
                if other == metric
            }
            assert of_metric == {
                frozenset(one for _, one in labels): number
                for labels, number in values(found[name]).items()
            }


def test_one_snapshot_serves_a_collection():
    probe = ScriptedProbe(0)
    limiter = testing.limiter(1000, probe=probe)
    readers = [InMemoryMetricReader(), InMemoryMetricReader()]
    provider = MeterProvider(
        readers,
        views=[View(instrument_name="membound.memory.limit", aggregation=DropAggregation())],
        shutdown_on_exit=False,
    )
    with MemoryInstruments(limiter, meter_provider=provider):
        for number in range(1, 4):
            for reader in readers:
                before = probe.reads
                probe.set(100 * number)
                assert value(collected(reader), "measured") == 100 * number
                assert probe.reads == before + 1


def test_an_old_snapshot_serves_nobody(monkeypatch):
    limiter = testing.limiter(1000)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    provider = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    with MemoryInstruments(limiter, meter_provider=provider) as instruments:
        ((_, first),) = instruments._shared("a")
        clock[0] += 1.0
        assert instruments._shared("b") == instruments._shared("c")
        assert instruments._shared("d")[0][1] is first
        clock[0] += 0.1
        assert instruments._shared("e")[0][1] is not first


@pytest.mark.virtual_time
async def test_opentelemetry_has_the_waiting_times():
    limiter = testing.limiter(1000)
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with MemoryInstruments({"in": limiter}, meter_provider=provider):
        for seconds in (0.2, 3):
            async with anyio.create_task_group() as tasks, limiter.grant(500):
                tasks.start_soon(wait_for_grant, limiter, "a", 300)
                await anyio.sleep(seconds)
        metric = collected(reader)["membound.memory.grant_wait"]
    async with anyio.create_task_group() as tasks, limiter.grant(500):
        tasks.start_soon(wait_for_grant, limiter, "a", 300)
        await anyio.sleep(1)
    assert collected(reader)["membound.memory.grant_wait"].data.data_points[0].count == 2  # closed
    (point,) = metric.data.data_points
    assert metric.unit == "s"
    assert (point.count, point.sum) == (2, pytest.approx(3.2))
    assert dict(point.attributes) == {"membound.limiter": "in"}
    assert tuple(point.explicit_bounds) == quantities.WAIT_SECONDS
    assert point.bucket_counts[quantities.WAIT_SECONDS.index(0.25)] == 1


def test_closed_instruments_tell_nothing():
    limiter = testing.limiter(1000)
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    instruments = MemoryInstruments({"in": limiter}, meter_provider=provider)
    assert value(collected(reader), "limit", limiter="in") == 1000
    instruments.close()
    instruments.close()
    assert collected(reader) == {}


# --- documents


def table_of_metrics() -> str:
    """Give the table that is in docs/reference/metrics.md."""
    rows = [
        "| metric | type | labels | in OpenTelemetry | what it is |",
        "| --- | --- | --- | --- | --- |",
    ]
    limiter = testing.limiter(1000)
    with MemoryCollector(limiter) as collector:
        families = {family.name: family for family in collector.describe()}
    for group in GROUPS:
        for quantity in group.quantities:
            unit = {"By": "_bytes", "s": "_seconds", "1": "_ratio"}.get(quantity.unit, "")
            name = f"membound_{quantity.name.replace('.', '_')}{unit}"
            family = families.pop(name)
            shown = name + ("_total" if family.type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in group.labels)
            other = (
                f"`{quantity.name}`, `{quantity.unit}`" if quantity.unit else f"`{quantity.name}`"
            )
            rows.append(
                f"| `{shown}` | {family.type} | {labels} | {other} | {family.documentation} |"
            )
    ((family),) = families.values()
    rows.append(
        f"| `{family.name}` | {family.type} | | `grant_wait`, `s` | {family.documentation} |"
    )
    return "\n".join(rows)


def test_every_metric_is_in_the_table():
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    assert table_of_metrics() in page
