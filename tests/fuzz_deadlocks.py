"""Runs random programs that hold memory and wait for more, and judges every `GrantDeadlock`.

    python -m tests.fuzz_deadlocks --programs 100000 --seed 1

stops at the first program in which one was raised although somebody could still have given
something back, or which did not come to its end although nothing was handed on, and prints its
number: `--seed 1 --first 4711 --programs 1` runs that one again. A program is a few tasks on
virtual time with one small limiter, so that everything contends with everything. They nest
grants, grow and shrink them, pass them to coroutines, children, timers, queues and async
generators, and have time limits of each kind.

The judge knows nothing of the package's own bookkeeping. Each task says what it waits for, and
who might give back each grant; what would fit is computed from that alone, with fractions.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random
from typing import Any
from weakref import WeakKeyDictionary

import anyio

from membound_async import (
    Component,
    GrantError,
    MemoryGrant,
    QuotaExceeded,
    testing,
)

__all__ = ["Wrong", "main", "run_program"]

LIMIT = 1000
HANDS_ON = 0.5  # of the programs
EXPECTED = (GrantError, TimeoutError)
END_SECONDS = 400


class Wrong(AssertionError):
    """A false alarm, or a program that hangs."""


@dataclass(eq=False)
class Actor:
    """A task, as the judge sees it."""

    wants: tuple[str, Component, int] | None = None
    """The kind, the component and the bytes of what it waits for."""
    time_limits: int = 0
    inside: list[Component] = field(default_factory=list)


class World:
    """One program, while it runs."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.hands_on = random.random() < HANDS_ON
        self.share = random.choice([Fraction(1), Fraction(1), Fraction(1, 2), Fraction(3, 4)])
        self.limiter = testing.limiter(LIMIT, share=self.share)
        self.components = [self.limiter.component(name) for name in "ab"]
        if random.random() < 0.5:
            self.components.append(self.limiter.component("firm", firm_limit=250))
        if random.random() < 0.3:
            self.components.append(self.limiter.component("kept", minimum=100))
        self.actors: list[Actor] = []
        self.ended: set[Actor] = set()
        self.releasers: WeakKeyDictionary[MemoryGrant, set[Actor]] = WeakKeyDictionary()
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.counts: Counter[str] = Counter()
        self.children: set[asyncio.Task[None]] = set()
        self.wrong: str | None = None
        ledger = self.limiter._ledger
        for name, note in (("break_deadlock", self.judge), ("suspend_order", None)):
            self._watch(ledger, name, note)

    def _watch(self, ledger: Any, name: str, judge: Any) -> None:
        act = getattr(ledger, name)

        def watched(argument: Any) -> Any:
            if judge is not None:
                judge()
            settled = act(argument)
            self.counts[name] += bool(settled)
            return settled

        setattr(ledger, name, watched)

    # --- the judge

    def judge(self) -> None:
        """Object if somebody could still give something back, or come in."""
        known: Counter[str] = Counter()
        used = Counter({c.path: c._account.granted for c in self.components})
        wanted_of = {actor.wants[1].path for actor in self.actors if actor.wants}
        for grant, releasers in self.releasers.items():
            path = grant.component.path
            known[path] += grant.size
            in_pool = used[path] > self.entered_minimum(grant.component)
            if grant.size and (in_pool or path in wanted_of):
                for actor in releasers - self.ended:
                    if actor.wants is None or actor.time_limits:
                        self.object(f"{grant} could be given back")
                    elif self.fits(actor.wants, used):
                        self.object(f"{actor} could come in")
        if known != used:
            self.object(f"{used - known} were granted to somebody who has not begun yet")

    def reserved(self, component: Component) -> int:
        """What is reserved for good: by nobody, or by one who waits."""
        inside = [actor for actor in self.actors if component in actor.inside]
        if not self.limiter._stalls.stalled and any(actor.wants is None for actor in inside):
            return 0
        return component._account.minimum if inside else 0

    def entered_minimum(self, component: Component) -> int:
        entered = any(component in actor.inside for actor in self.actors)
        return component._account.minimum if entered else 0

    def held_by(self, component: Component, used: int) -> int:
        """What others have to do without: nothing if it can all be given up with the minimum."""
        reserved = self.reserved(component)
        wanted = any(actor.wants and actor.wants[1] is component for actor in self.actors)
        if not wanted and reserved < self.entered_minimum(component) >= used:
            return 0
        return max(used, reserved)

    def fits(self, wants: tuple[str, Component, int], used: Counter[str]) -> bool:
        kind, component, nbytes = wants
        others = [each for each in self.components if each is not component]
        free = LIMIT - sum(self.held_by(each, used[each.path]) for each in others)
        minimum = component._account.minimum
        if kind == "enter":
            return minimum <= free
        entered = any(component in actor.inside for actor in self.actors)
        over = used[component.path] - (minimum if entered else 0)
        free -= max(used[component.path], used[component.path] - over)
        draw, held = nbytes + min(over, 0), max(over, 0)
        within = used[component.path] + nbytes <= component._account.firm_limit
        return within and (draw <= 0 or held + draw <= self.share * (free + held))

    def object(self, reason: str) -> None:
        self.wrong = self.wrong or reason

    # --- what tasks do

    async def act(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        """Do a few random things inside of a block with that grant."""
        for _ in range(self.random.randint(1, 3)):
            steps = [self.sleep, self.grow, self.shrink]
            if depth < 4:
                steps += [self.block] * 4 + [self.time_limit, self.catch, self.enter]
                if self.hands_on:
                    steps += [
                        self.send, self.receive, self.receive, self.share_it, self.by_timer,
                        self.group, self.generator, self.stack, self.try_at_once,
                    ]  # fmt: skip
            await self.random.choice(steps)(actor, grant, depth)

    def size(self) -> int:
        return self.random.choice([10, 50, 100, 150, 200, 300, 400])

    def seconds(self) -> float:
        return self.random.choice([0, 0, 0.01, 0.25, 0.3, 1, 7])

    def note(self, grant: MemoryGrant, actor: Actor) -> None:
        self.releasers.setdefault(grant, set()).add(actor)

    def hand_on(self, grant: MemoryGrant, how: Any = None) -> None:
        """Note that anybody may give it back; put it, or what will do so, into the queue."""
        anybody = Actor()
        self.note(grant, anybody)
        self.queue.put_nowait((grant if how is None else how, anybody))

    async def sleep(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        await asyncio.sleep(self.seconds())

    async def block(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        component, nbytes = self.random.choice(self.components), self.size()
        timeout = self.random.choice([0.2, 5]) if self.random.random() < 0.1 else None
        alone = self.random.random() < 0.03
        new = component.grant(nbytes, timeout=timeout, oversize="alone" if alone else "raise")
        actor.time_limits += timeout is not None
        actor.wants = ("grant", component, nbytes)
        try:
            async with new:
                actor.wants = None
                actor.time_limits -= timeout is not None
                timeout = None
                self.note(new, actor)
                await self.act(actor, new, depth + 1)
        finally:
            actor.wants = None
            actor.time_limits -= timeout is not None

    async def grow(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        if grant is None:
            return
        if self.random.random() < 0.3:
            await self.helped(self.grow, actor, grant)
            return
        nbytes = self.size()
        actor.wants = ("grow", grant.component, nbytes)
        try:
            await grant.grow(nbytes)
        except RuntimeError:
            pass  # another task is growing it
        finally:
            actor.wants = None

    async def helped(self, step: Any, actor: Actor, grant: MemoryGrant) -> None:
        await step(actor, grant, 9)

    async def shrink(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        if grant is not None:
            with suppress(RuntimeError):
                grant.shrink(grant.size // 2)

    async def time_limit(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        seconds = self.random.choice([0.2, 3, 60])
        actor.time_limits += 1
        try:
            if self.random.random() < 0.5:
                with anyio.move_on_after(seconds):
                    await self.act(actor, grant, depth + 1)
            else:
                async with asyncio.timeout(seconds):
                    await self.act(actor, grant, depth + 1)
        finally:
            actor.time_limits -= 1

    async def catch(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        with suppress(*EXPECTED):
            await self.act(actor, grant, depth + 1)

    async def enter(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        component = self.components[-1]
        actor.wants = ("enter", component, component._account.minimum)
        try:
            async with component:
                actor.wants = None
                actor.inside.append(component)
                try:
                    await self.act(actor, grant, depth + 1)
                finally:
                    actor.inside.remove(component)
        finally:
            actor.wants = None

    # --- handing on

    async def try_at_once(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        with suppress(QuotaExceeded):
            new = self.random.choice(self.components).grant_nowait(self.size())
            self.note(new, actor)
            async with new:
                await self.act(actor, new, depth + 1)

    async def send(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        component, nbytes = self.random.choice(self.components), self.size()
        actor.wants = ("grant", component, nbytes)
        try:
            new = await component.grant(nbytes)
        finally:
            actor.wants = None
        self.hand_on(new)

    async def receive(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        try:
            async with asyncio.timeout(self.random.choice([0.1, 2, 20])):
                got, anybody = await self.queue.get()
        except TimeoutError:
            return
        await self.work_off(got, anybody, actor, depth)

    async def work_off(self, got: Any, anybody: Actor, actor: Actor, depth: int) -> None:
        match got:
            case MemoryGrant() if self.random.random() < 0.5:
                self.releasers[got].remove(anybody)
                self.note(got, actor)
                if not got.released:
                    async with got:
                        await self.act(actor, got, depth + 1)
            case MemoryGrant():
                await asyncio.sleep(self.seconds())
                got.release()
            case _:
                await asyncio.sleep(self.seconds())
                await got.aclose()

    async def share_it(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        if grant is not None:
            self.hand_on(grant)

    async def by_timer(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        if grant is not None:
            self.note(grant, Actor())
            asyncio.get_running_loop().call_later(self.seconds(), grant.release)

    async def group(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        children = [self.start(grant, depth + 1) for _ in range(self.random.randint(1, 3))]
        if self.random.random() < 0.7:
            await asyncio.wait(children)

    async def generator(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        component, nbytes = self.random.choice(self.components), self.size()
        anybody = Actor()

        async def items() -> AsyncIterator[None]:
            new = component.grant(nbytes)
            actor.wants = ("grant", component, nbytes)
            try:
                async with new:
                    actor.wants = None
                    self.note(new, anybody)
                    yield
            except GrantError:
                actor.wants = None
                raise

        made = items()
        await anext(made)
        self.queue.put_nowait((made, anybody))

    async def stack(self, actor: Actor, grant: MemoryGrant | None, depth: int) -> None:
        component, nbytes = self.random.choice(self.components), self.size()
        async with AsyncExitStack() as stack:
            actor.wants = ("grant", component, nbytes)
            try:
                new = await stack.enter_async_context(component.grant(nbytes))
            finally:
                actor.wants = None
            self.hand_on(new, stack.pop_all())

    # --- from the start to the end

    def start(self, grant: MemoryGrant | None, depth: int) -> asyncio.Task[None]:
        actor = Actor()
        self.actors.append(actor)
        if grant is not None:
            self.note(grant, actor)

        async def live() -> None:
            with suppress(*EXPECTED):
                await self.act(actor, grant, depth)
            self.actors.remove(actor)
            self.ended.add(actor)

        task = asyncio.create_task(live())
        self.children.add(task)
        return task

    async def run(self) -> Counter[str]:
        for _ in range(self.random.randint(2, 6)):
            self.start(None, 0)
            if self.random.random() < 0.3:
                await asyncio.sleep(self.seconds())
        patience = END_SECONDS / 5 if self.hands_on else END_SECONDS
        end = asyncio.get_running_loop().time() + patience
        while pending := {task for task in self.children if not task.done()}:
            await asyncio.wait(pending, timeout=patience / 10)
            if asyncio.get_running_loop().time() > end:
                break
        if pending:
            self.counts["hung"] += 1
            if not self.hands_on:
                self.wrong = self.wrong or "hangs although nothing was handed on"
        while pending := {task for task in self.children if not task.done()}:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=1)
        await asyncio.gather(*self.children, return_exceptions=True)
        while not self.queue.empty():
            got, _ = self.queue.get_nowait()
            await (got.aclose() if hasattr(got, "aclose") else asyncio.sleep(0, got.release()))
        await asyncio.sleep(100)
        for task in self.children:
            if not task.cancelled() and task.exception() is not None:
                raise Wrong("a task failed") from task.exception()
        ledger = self.limiter._ledger
        if self.wrong is None and (ledger.free, ledger.waiters.count) != (LIMIT, 0):
            self.wrong = f"{ledger.free} bytes are free and {ledger.waiters.count} wait at the end"
        if self.wrong:
            raise Wrong(self.wrong)
        self.counts["handing on"] += self.hands_on
        return self.counts


def run_program(seed: int, number: int) -> Counter[str]:
    """Run one program.

    Returns:
        How often what has happened in it.

    Raises:
        Wrong: it should have gone otherwise.
    """

    async def run() -> Counter[str]:
        return await World(Random(f"{seed}/{number}")).run()

    with asyncio.Runner(loop_factory=testing.VirtualTimeLoop) as runner:
        try:
            return runner.run(run())
        except Wrong as wrong:
            raise Wrong(f"--seed {seed} --first {number} --programs 1: {wrong}") from wrong


def main(arguments: list[str] | None = None) -> int:
    """Run programs; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("membound_async").setLevel(logging.CRITICAL)
    total: Counter[str] = Counter()
    started = time.perf_counter()
    for number in range(options.first, options.first + options.programs):
        try:
            total += run_program(options.seed, number)
        except Wrong as wrong:
            print(wrong)
            return 1
    seconds = time.perf_counter() - started
    print(f"{options.programs} programs in {seconds:.0f} s:", dict(total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
