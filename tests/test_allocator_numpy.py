"""NumPy's arrays, which have their data outside CPython's allocators, are charged, too."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
from contextvars import Context, copy_context
from importlib import import_module
from typing import Any

import anyio
import anyio.to_thread
import pytest

from membound_async import allocator
from membound_async.allocator import AllocationGroup
from tests.tracking import need_tracker

np = pytest.importorskip("numpy", reason="NumPy is not installed")
multiarray: Any = import_module(
    "numpy._core.multiarray" if np.__version__[0] > "1" else "numpy.core.multiarray"
)
get_handler_name = multiarray.get_handler_name

OURS = "membound_tracker"


def grown(group: AllocationGroup, before: int, nbytes: int) -> bool:
    """Say whether a group has got as many bytes, and perhaps a few objects."""
    return nbytes <= group.live_bytes - before < nbytes + 5_000


def test_arrays_are_charged(group: AllocationGroup, other: AllocationGroup) -> None:
    with group.enter():
        made = np.ones(100_000)
        zeros = np.zeros(50_000)
        view = made[:10]
    assert get_handler_name(made) == get_handler_name(zeros) == OURS
    assert grown(group, 0, 1_200_000)
    with other.enter():
        derived = made * 2
        del made
    assert grown(other, 0, 800_000)
    assert grown(group, 0, 1_200_000)  # by the view
    del view
    assert grown(group, 0, 400_000)
    threading.Thread(target=zeros.resize, args=(0,), kwargs={"refcheck": False}).start()
    del zeros, derived
    assert grown(group, 0, 0)
    assert grown(other, 0, 0)


def test_data_is_counted_once(group: AllocationGroup) -> None:
    """NumPy 2.5 takes it from CPython's raw domain, earlier ones from the C library."""
    with group.enter():
        array = np.empty(1_000_000, dtype=np.uint8)
    counted = group.statistics()
    assert 1_000_000 <= counted.allocated_bytes < 1_005_000
    del array
    assert group.live_bytes < 5_000
    assert group.statistics().deallocated_bytes < 1_005_000


def test_the_peak_has_what_was_freed_soon(group: AllocationGroup) -> None:
    with group.enter():
        array = np.empty(1_000_000, dtype=np.uint8)
        del array
    assert group.statistics().peak_live_bytes >= 1_000_000


def test_an_array_is_resized_in_place(group: AllocationGroup, other: AllocationGroup) -> None:
    with group.enter():
        array = np.ones(1_000)
    with other.enter():
        array.resize(200_000, refcheck=False)
    assert array[:1_000].all()
    assert not array[1_000:].any()
    assert group.live_bytes < 2_000  # the array; its data is another's now
    assert grown(other, 0, 1_600_000)
    array.resize(10, refcheck=False)
    assert grown(other, 0, 0)
    del array


def test_small_and_empty_arrays(group: AllocationGroup) -> None:
    kept: list[Any] = [None] * 6_000
    with group.enter():
        for i in range(0, 6_000, 6):
            kept[i : i + 6] = (
                np.empty(0),
                np.empty((3, 0)),
                np.zeros(0),
                np.empty(1, dtype=np.uint8),
                np.zeros(3, dtype=np.uint8),
                np.empty(2),
            )
    assert {get_handler_name(array) for array in kept} == {OURS}
    assert group.statistics().live_objects >= 12_000  # each, and its data
    for array in kept:
        array.resize(5, refcheck=False)
        array.resize(0, refcheck=False)
    kept.clear()
    del array
    assert grown(group, 0, 0)


def test_an_array_from_before(group: AllocationGroup) -> None:
    made: list[Any] = []
    Context().run(lambda: made.append(np.ones(100_000)))  # no scope was entered in there
    assert get_handler_name(made[0]) == "default_allocator"
    with group.enter():
        made[0].resize(200_000, refcheck=False)
        assert made[0][:100_000].all()
        made.clear()
    assert grown(group, 0, 0)


def test_while_counting_is_off(group: AllocationGroup) -> None:
    with group.enter():
        first = np.ones(100_000)
        allocator.disable()
        second = np.ones(100_000)
        assert grown(group, 0, 800_000)
        del first
        assert grown(group, 0, 0)
        allocator.enable()
        third = np.ones(50_000)
        del second
        assert grown(group, 0, 400_000)
        del third
    assert grown(group, 0, 0)


def test_plain_threads_enter_a_scope_themselves(group: AllocationGroup) -> None:
    def work() -> None:
        seen.append(get_handler_name(np.ones(10)))
        with group.enter():
            kept.append(np.ones(100_000))
        seen.append(get_handler_name(kept[0]))

    kept: list[Any] = []
    seen: list[str] = []
    with group.enter():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == ["default_allocator", OURS]
    assert grown(group, 0, 800_000)
    kept.clear()
    assert grown(group, 0, 0)


async def test_tasks_and_their_threads_inherit(group: AllocationGroup) -> None:
    kept: list[Any] = []

    def make() -> None:
        kept.append(np.ones(1_000_000))

    async def child() -> None:
        make()
        await anyio.to_thread.run_sync(make)

    async with anyio.create_task_group() as tasks:
        with group.enter():
            tasks.start_soon(child)
    assert [get_handler_name(array) for array in kept] == [OURS, OURS]
    assert 16_000_000 <= group.live_bytes < 17_000_000
    kept.clear()
    assert group.live_bytes < 1_000_000


@pytest.mark.parametrize("anyio_backend", ["asyncio", "asyncio+uvloop"], indirect=True)
async def test_an_executors_threads_do_not(group: AllocationGroup) -> None:
    with group.enter():
        loop = asyncio.get_running_loop()
        array = await loop.run_in_executor(None, np.ones, 1_000_000)
    assert get_handler_name(array) == "default_allocator"
    assert group.live_bytes < 1_000_000


class Handler(ctypes.Structure):
    """NumPy's PyDataMem_Handler."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("functions", ctypes.c_void_p * 5),
    )


def set_own_handler(handler: Handler) -> None:
    """Have this context use a handler of the user's own: the default one by another name."""
    capsules = ctypes.pythonapi
    capsules.PyCapsule_GetPointer.restype = ctypes.c_void_p
    capsules.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsules.PyCapsule_New.restype = ctypes.py_object
    capsules.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    module = sys.modules.get("numpy._core._multiarray_umath") or sys.modules.get(
        "numpy.core._multiarray_umath"
    )
    assert module is not None
    table = ctypes.cast(
        capsules.PyCapsule_GetPointer(module._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p)
    )
    default = ctypes.cast(table[306] or 0, ctypes.POINTER(ctypes.py_object))[0]
    pointer = capsules.PyCapsule_GetPointer(default, b"mem_handler")
    ctypes.memmove(ctypes.byref(handler), pointer, ctypes.sizeof(handler))
    handler.name = b"the_users_own"
    capsule = capsules.PyCapsule_New(ctypes.addressof(handler), b"mem_handler", None)
    ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[304] or 0)(capsule)


def test_a_handler_of_the_users_own_stays(group: AllocationGroup) -> None:
    handler = Handler()

    def work() -> None:
        set_own_handler(handler)
        with group.enter():
            array = np.ones(100_000)
            assert get_handler_name(array) == get_handler_name() == "the_users_own"
            with group.enter():
                assert get_handler_name() == "the_users_own"
        assert get_handler_name() == "the_users_own"

    Context().run(work)
    assert copy_context().run(get_handler_name) != "the_users_own"


IMPORTED_LATER = """
import sys
from membound_async import allocator
from membound_async.allocator import registry

allocator.install()
group = registry.register("group")
with group.enter():
    assert "numpy" not in sys.modules
with registry.root.enter():
    import numpy as np
with group.enter():
    array = np.ones(100_000)
assert 800_000 <= group.live_bytes < 805_000, group.live_bytes
del array
assert group.live_bytes < 5_000, group.live_bytes
"""


def test_numpy_imported_after_install() -> None:
    need_tracker()
    ended = subprocess.run(
        [sys.executable, "-P", "-c", IMPORTED_LATER], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
