"""PyArrow's memory is charged to a group, as of the last refresh."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from membound_async import TrackingError
from membound_async.allocator import AllocationGroup, registry
from membound_async.allocator.arrow import ArrowPool
from tests.tracking import in_new_process, new_group


@pytest.fixture
def arrow() -> Any:
    return pytest.importorskip("pyarrow", reason="PyArrow is not installed")


@pytest.fixture
def group() -> Iterator[AllocationGroup]:
    with new_group("tests.mine") as made:
        yield made


def test_the_group_follows_at_each_refresh(arrow: Any, group: AllocationGroup) -> None:
    mine = ArrowPool(group)
    assert mine.group is group
    assert isinstance(mine.pool, arrow.MemoryPool)
    numbers = arrow.array(range(10_000), memory_pool=mine.pool)
    assert group.live_bytes == 0
    mine.refresh()
    mine.refresh()
    assert (group.live_bytes, group.live_objects) == (80_000, 0)
    more = arrow.allocate_buffer(1_000, memory_pool=mine.pool)
    del numbers
    mine.refresh()
    assert group.live_bytes == 1_024
    del more
    mine.refresh()
    counted = group.statistics()
    assert (counted.live_bytes, counted.allocated_bytes) == (0, 80_000)
    assert counted.peak_live_bytes == 80_000


def test_a_file_is_read_into_it(arrow: Any, group: AllocationGroup) -> None:
    csv = import_module("pyarrow.csv")
    mine = ArrowPool(group)
    text = b"number,name\n" + b"".join(b"%d,row %d\n" % (i, i) for i in range(10_000))
    table = csv.read_csv(io.BytesIO(text), memory_pool=mine.pool)
    mine.refresh()
    assert group.live_bytes >= table.nbytes
    del table
    deadline = time.monotonic() + 30
    while mine.pool.bytes_allocated() and time.monotonic() < deadline:
        time.sleep(0.01)  # Arrow's own threads may have some of it still
    mine.refresh()
    assert group.live_bytes == 0


def test_pools_are_separate(arrow: Any, group: AllocationGroup) -> None:
    with new_group("tests.other") as other:
        pools = [ArrowPool(group), ArrowPool(group), ArrowPool(other)]
        buffers = [arrow.allocate_buffer(6_400, memory_pool=each.pool) for each in pools]
        for each in pools:
            each.refresh()
        assert group.live_bytes == 12_800
        assert other.live_bytes == 6_400
        buffers.clear()
        for each in pools:
            each.refresh()
        assert group.live_bytes == other.live_bytes == 0


def test_refreshing_from_threads(arrow: Any, group: AllocationGroup) -> None:
    mine = ArrowPool(group)

    def work() -> None:
        for i in range(300):
            buffer = arrow.allocate_buffer(64 * (i + 1), memory_pool=mine.pool)
            mine.refresh()
            del buffer
            mine.refresh()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mine.refresh()
    assert group.live_bytes == 0
    assert group.statistics().allocated_bytes > 0


@pytest.mark.usefixtures("arrow")
@in_new_process()
def test_what_was_made_outlives_the_pool() -> None:
    arrow: Any = import_module("pyarrow")
    mine = ArrowPool(registry.register("group"))
    numbers = arrow.array(range(10_000), memory_pool=mine.pool)
    sys.modules["kept"] = arrow.array(range(10_000), memory_pool=mine.pool)  # until the end
    del mine
    made_since = [bytes(64) for _ in range(1_000)]
    del numbers, made_since


@pytest.mark.usefixtures("arrow")
@in_new_process()
def test_a_group_that_is_gone() -> None:
    arrow: Any = import_module("pyarrow")
    groups = [registry.register(f"g{i}") for i in range(126)]
    mine = ArrowPool(groups[0])
    registry.unregister("g0")
    registry.register("new")
    buffer = arrow.allocate_buffer(64, memory_pool=mine.pool)
    for _ in range(2):
        with pytest.raises(TrackingError, match="another group now"):
            mine.refresh()
    del buffer
    mine.refresh()


def test_without_pyarrow(group: AllocationGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pyarrow"):
        ArrowPool(group)
