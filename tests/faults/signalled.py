"""A program that comes to a phase, says so, and stays there until a signal ends it.

It runs by itself or under ``membound run``. Signals are left to Python, which makes Ctrl-C a
``KeyboardInterrupt``, or received, as a service does, so that all tasks are cancelled. The last
line of its output says what is left of its grants then.

    python tests/faults/signalled.py waiting received trio
"""

from __future__ import annotations

import argparse
import json
import signal
import sys

import anyio

from membound_async import (
    Component,
    LimiterSettings,
    MemoryBoundsBuilder,
    MemoryLimiter,
    PressurePolicy,
    current_limiter,
    testing,
)
from membound_async.hooks import Event, GrantDelayed

MIB = 1024 * 1024
LIMIT_BYTES = 512 * MIB
FOR_EVER = 3600.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def say(phase: str) -> None:
    print(phase, flush=True)


def within(nbytes: int) -> MemoryLimiter:
    """Give the limiter of ``membound run``, or one of our own that is used like it."""
    return current_limiter() if "membound_async.cli" in sys.modules else testing.limiter(nbytes)


def pressed() -> MemoryLimiter:
    """Give one that measures its limit, and so delays whoever asks for as long as can be."""
    policy = PressurePolicy(min_delay_seconds=FOR_EVER, max_delay_seconds=FOR_EVER)
    return testing.limiter(
        LIMIT_BYTES,
        baseline=LIMIT_BYTES // 2,
        probe=testing.ScriptedProbe(int(0.96 * LIMIT_BYTES)),
        settings=LimiterSettings(pressure=policy, reclaim=True),
    )


class Slow(Component):
    """Does not say what it needs before its standard input ends."""

    def specify_bounds(self, bounds: MemoryBoundsBuilder) -> None:
        say("verifying")
        sys.stdin.read()


async def until_waiting(limiter: MemoryLimiter, count: int, phase: str) -> None:
    while limiter.statistics().waiting < count:
        await anyio.sleep(0.001)
    say(phase)


async def ask(part: Component, nbytes: int) -> None:
    async with part.grant(nbytes):
        await anyio.sleep_forever()


# --- the phases; each is entered in the limiter given


async def verifying(_: MemoryLimiter) -> None:
    async with Slow("slow"):
        await anyio.sleep_forever()


async def entering(limiter: MemoryLimiter) -> None:
    holds, late = limiter.component("holds"), limiter.component("late", minimum=300 * MIB)
    async with anyio.create_task_group() as tasks, holds.grant(1, up_to=LIMIT_BYTES):
        tasks.start_soon(until_waiting, limiter, 1, "entering")
        async with late:
            raise AssertionError


async def holding(limiter: MemoryLimiter) -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(ask, limiter.component(f"part{number}"), MIB)
        while limiter.statistics().grants < 10:
            await anyio.sleep(0.001)
        say("holding")


async def waiting(limiter: MemoryLimiter) -> None:
    part = limiter.component("part")
    async with anyio.create_task_group() as tasks, part.grant(1, up_to=LIMIT_BYTES):
        for _ in range(100):
            tasks.start_soon(ask, part, MIB)
        await until_waiting(limiter, 100, "waiting")
        await anyio.sleep_forever()


async def delayed(limiter: MemoryLimiter) -> None:
    def tell(event: Event) -> None:
        if isinstance(event, GrantDelayed):
            say("delayed")

    with limiter.add_hook(tell):
        await ask(limiter.component("part"), 1)


async def reclaiming(limiter: MemoryLimiter) -> None:
    async def reclaim(_: int) -> int:
        say("reclaiming")
        await anyio.sleep_forever()
        raise AssertionError

    with limiter.add_reclaimer(reclaim):
        await ask(limiter.component("part"), 1)


async def ending(limiter: MemoryLimiter) -> None:
    """Hold a grant, and take for ever to clean up: a second signal has to end that."""
    async with limiter.component("part").grant(MIB):
        try:
            say("begun")
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True) as scope:
                cleaning.append(scope)
                say("ending")
                await anyio.sleep_forever()


PHASES = {
    each.__name__: each
    for each in (verifying, entering, holding, waiting, delayed, reclaiming, ending)
}
cleaning: list[anyio.CancelScope] = []
"""What only a second signal ends."""


async def receive(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(*SIGNALS) as signals:
        say("listens")
        async for _ in signals:
            for each in cleaning:
                each.cancel()
            scope.cancel()


async def main(phase: str, signals: str) -> None:
    limiter = pressed() if phase in ("delayed", "reclaiming") else within(LIMIT_BYTES)
    try:
        async with limiter, anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                if signals == "received":
                    tasks.start_soon(receive, scope)
                await PHASES[phase](limiter)
            tasks.cancel_scope.cancel()
    finally:
        left = limiter.statistics()
        print(
            json.dumps(
                {
                    "grants": left.grants,
                    "waiting": left.waiting,
                    "granted": sum(part.granted_bytes for part in left.components),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("signals", choices=("left", "received"))
    parser.add_argument("backend")
    options = parser.parse_args()
    name, _, loop = options.backend.partition("+")
    anyio.run(
        main,
        options.phase,
        options.signals,
        backend=name,
        backend_options={"use_uvloop": True} if loop else {},
    )
    sys.exit(3)
