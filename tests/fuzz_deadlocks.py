"""Runs random programs that hold memory and wait for more, and judges every look for deadlocks.

    python -m tests.fuzz_deadlocks --programs 100000 --seed 1

stops at the first look that did anything else than the judge says, or at a program that hangs
in a deadlock, and prints its number: `--seed 1 --first 4711 --programs 1` runs that one again.
A program is a few tasks on virtual time with one small limiter, so that everything contends
with everything. They nest grants, grow and shrink them, hand them on (in a queue, by a
transfer, shared, in flight), enter components, have time limits and are cancelled.

The judge knows nothing of the package's own bookkeeping. Each task notes what it holds and what
it asks for; what a look must do follows from that alone, with fractions: nothing; or to let in
these, in this order; or to refuse these. Of the limiter it takes the drift, the order in which
requests have arrived, and which of them were settled already.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import count
from random import Random
from typing import Any

import anyio

from membound_async import Component, GrantError, MemoryGrant, testing
from membound_async.testing import ScriptedProbe
from membound_async.waiters import State

__all__ = ["Wrong", "main", "run_programs"]

LIMIT = 1000
PATIENCE_SECONDS = 12
SHARES = (Fraction(1), Fraction(1), Fraction(1, 2), Fraction(3, 4))
BOUNDS = {"a": (0, None), "b": (0, None), "firm": (0, 250), "kept": (100, None), "tight": (80, 200)}


class Wrong(AssertionError):
    """A false alarm, the wrong ones let in or refused, or a deadlock that was not seen."""


@dataclass(eq=False)
class Wish:
    """What a task waits for."""

    kind: str
    component: str
    nbytes: int
    timeout: bool = False
    sender: str | None = None
    source: str | None = None


@dataclass(eq=False)
class Hold:
    """What somebody holds."""

    owner: Actor | None
    """Whose block it is; None if anybody may give it back."""
    component: str
    nbytes: int
    since: float
    sender: str | None = None
    handles: int = 1


@dataclass(eq=False)
class Actor:
    """A task, as the judge sees it."""

    name: int
    wish: Wish | None = None
    arrival: int = 0
    outcome: State | None = None
    task: Any = None
    grants: list[MemoryGrant] = field(default_factory=list)

    def waits(self) -> bool:
        """Whether it really waits: neither settled nor cancelled yet."""
        return self.wish is not None and self.outcome is None and self._is_parked()

    def is_cancelled(self) -> bool:
        """Whether it was cancelled while it waited, and has not gone on yet."""
        return self.wish is not None and self.outcome is None and not self._is_parked()

    def _is_parked(self) -> bool:
        place = self.task._fut_waiter
        return place is not None and not place.done()


class Books:
    """Who has how much, by the judge's own record."""

    def __init__(self, share: Fraction, drift: int) -> None:
        self.share = share
        self.drift = drift
        self.used: Counter[str] = Counter()
        self.flight: Counter[tuple[str, str]] = Counter()
        self.inside: Counter[str] = Counter()

    def reserved(self, name: str) -> int:
        return BOUNDS[name][0] if self.inside[name] else 0

    def in_flight(self, name: str) -> int:
        return sum(nbytes for (path, _), nbytes in self.flight.items() if path == name)

    def free(self) -> int:
        own = sum(max(self.reserved(name), self.used[name]) for name in BOUNDS)
        return LIMIT - self.drift - own - self.flight.total()

    def fits(self, wish: Wish) -> bool:
        """Whether it fits by its own T and F."""
        if wish.source is not None:
            self.used[wish.source] -= wish.nbytes
            try:
                return self._fits(wish)
            finally:
                self.used[wish.source] += wish.nbytes
        return self._fits(wish)

    def _fits(self, wish: Wish) -> bool:
        name, n, free, share = wish.component, wish.nbytes, self.free(), self.share
        minimum, firm = BOUNDS[name]
        used, reserved, flight = self.used[name], self.reserved(name), self.in_flight(name)
        if wish.kind == "enter":
            return bool(self.inside[name]) or used >= minimum or minimum - used <= free
        over = used - reserved
        held = max(over, 0) + flight
        if wish.sender is not None:
            mine = self.flight[name, wish.sender]
            if firm is not None:
                left = firm - flight - max(used, reserved)
                if mine + n > share * (left + mine):
                    return False
            return mine + n <= share * (share * (free + held) - (held - mine))
        if firm is not None and used + n + flight > firm:
            return False
        draw = n + min(over, 0)
        return draw <= 0 or held + draw <= share * (free + held)

    def admit(self, wish: Wish) -> None:
        if wish.source is not None:
            self.used[wish.source] -= wish.nbytes
        if wish.kind == "enter":
            self.inside[wish.component] += 1
        elif wish.sender is not None:
            self.flight[wish.component, wish.sender] += wish.nbytes
        else:
            self.used[wish.component] += wish.nbytes


class World:
    """One program, while it runs."""

    def __init__(self, random: Random, clock: Any) -> None:
        self.random = random
        self.clock = clock
        self.share = random.choice(SHARES)
        self.probe = ScriptedProbe(0)
        self.limiter = testing.limiter(LIMIT, share=self.share, probe=self.probe)
        names = ["a", "b", *random.sample(["firm", "kept", "tight"], random.randint(0, 2))]
        self.components = {
            name: self.limiter.component(name, minimum=BOUNDS[name][0], firm_limit=BOUNDS[name][1])
            for name in names
        }
        self.steps = [self.sleep, self.grow, self.shrink, self.limited, self.cancel]
        self.steps += [self.block] * 4 + [self.catch, self.grow]
        if {"kept", "tight"} & {*names}:
            self.steps += [self.enter, self.busy]
        if random.random() < 0.4:
            self.steps += [self.put, self.take, self.take, self.transfer, self.share_it]
            self.steps += [self.send, self.at_once, self.split]
        if random.random() < 0.15:
            self.steps.append(self.drift)
        self.actors: list[Actor] = []
        self.by_task: dict[Any, Actor] = {}
        self.holds: dict[MemoryGrant, Hold] = {}
        self.inside: Counter[str] = Counter()
        self.queue: asyncio.Queue[MemoryGrant] = asyncio.Queue()
        self.counts: Counter[str] = Counter()
        self.arrivals = count(1)
        self.wrong: str | None = None
        self._watch()

    def _watch(self) -> None:
        limiter: Any = self.limiter
        ledger = limiter._ledger
        ask, wake, untangle = ledger.request, limiter._wake, limiter._untangle

        def watched_ask(request: Any) -> Any:
            actor = self.by_task.get(asyncio.current_task())
            if actor is not None:
                actor.arrival = next(self.arrivals)
            return ask(request)

        def watched_wake(settled: Iterable[Any]) -> None:
            settled = [*settled]
            for request in settled:
                if request.task in self.by_task:
                    self.by_task[request.task].outcome = request.state
            wake(settled)

        def watched_untangle() -> Any:
            expected, is_settled = self.judge(), any(actor.is_cancelled() for actor in self.actors)
            settled = untangle()
            done = [(r.state, self.by_task[r.task]) for r in settled if r.task in self.by_task]
            self.compare(expected, done, is_settled)
            return settled

        ledger.request, limiter._wake, limiter._untangle = (
            watched_ask,
            watched_wake,
            watched_untangle,
        )

    # --- the judge

    def compare(
        self,
        expected: tuple[State, list[Actor]] | None,
        done: Sequence[tuple[State, Actor]],
        one_is_cancelled: bool,
    ) -> None:
        """Compare what a look has done with what it should have done."""
        self.counts["looks"] += 1
        if one_is_cancelled and (expected is None) == (not done):
            return  # who is let in meanwhile, and gives it back, may be in the way of others
        if expected is None:
            if done:
                self.object(f"false alarm: {done}")
            return
        state, actors = expected
        if one_is_cancelled and not done:
            return  # the next look will see it
        self.counts[state.value] += 1
        first = [actor for its, actor in done if its is state][: len(actors)]
        refused = [actor for its, actor in done if its is State.DEADLOCKED]
        if first != actors or (refused and refused != actors):
            self.object(f"expected {state} of {actors}, but got {done}")

    def books(self) -> tuple[Books, list[Hold]]:
        """Give who has how much, those included who were let in and have not gone on yet."""
        books = Books(self.share, self.limiter._ledger.drift)
        books.inside += self.inside
        holds = list(dict.fromkeys(self.holds.values()))
        for hold in holds:
            if hold.sender is None:
                books.used[hold.component] += hold.nbytes
            else:
                books.flight[hold.component, hold.sender] += hold.nbytes
        for actor in self.actors:
            if actor.wish is not None and actor.outcome is State.ADMITTED:
                books.admit(actor.wish)
                if actor.wish.kind != "enter":
                    holds.append(Hold(None, actor.wish.component, actor.wish.nbytes, 0.0))
        return books, holds

    def judge(self) -> tuple[State, list[Actor]] | None:
        """Say what a look must do now: let these in, refuse these, or nothing."""
        books, holds = self.books()
        if books.flight.total():
            return None
        waiting = sorted((a for a in self.actors if a.waits()), key=lambda a: a.arrival)
        wanted = {a.wish.component for a in waiting if a.wish and a.wish.sender is None}
        mine: dict[Actor, list[Hold]] = {}
        for hold in holds:
            name = hold.component
            of_pool = books.used[name] > books.reserved(name)
            if hold.nbytes and (of_pool or name in wanted):
                if hold.owner not in waiting:
                    return None
                assert hold.owner is not None
                mine.setdefault(hold.owner, []).append(hold)
        if not mine:
            return None
        holders = sorted(mine, key=lambda a: (min(h.since for h in mine[a]), a.arrival))
        admitted = []
        for actor in holders + [a for a in waiting if a not in mine]:
            assert actor.wish is not None
            if books.fits(actor.wish):
                books.admit(actor.wish)
                admitted.append(actor)
        if admitted:
            return State.ADMITTED, admitted
        wishes = [actor.wish for actor in holders if actor.wish is not None]
        books.drift = 0
        if any(wish.timeout or books.fits(wish) for wish in wishes):
            return None
        refused: list[Actor] = []
        while not refused or len(wishes) > 1:
            refused.append(holders[len(wishes) - 1])
            wishes.pop()
            for hold in mine[refused[-1]]:
                books.used[hold.component] -= hold.nbytes
            if any(map(books.fits, wishes)):
                break
        return State.DEADLOCKED, refused

    def object(self, reason: str) -> None:
        self.wrong = self.wrong or reason

    # --- what tasks do

    async def act(self, actor: Actor, depth: int) -> None:
        """Do a few random things."""
        for _ in range(self.random.randint(1, 3)):
            await self.random.choice(self.steps if depth < 4 else self.steps[:5])(actor, depth)

    def component(self) -> Component:
        return self.components[self.random.choice([*self.components])]

    def size(self) -> int:
        return self.random.choice([10, 50, 90, 100, 150, 200, 300, 400])

    async def asked(self, actor: Actor, wish: Wish, awaitable: Any) -> Any:
        actor.wish, actor.outcome = wish, None
        try:
            return await awaitable
        finally:
            actor.wish = None

    def note(
        self, grant: MemoryGrant, owner: Actor | None, nbytes: int, sender: str | None = None
    ) -> None:
        name = grant.component.path
        self.holds[grant] = Hold(owner, name, nbytes, self.clock(), sender)

    def forget(self, grant: MemoryGrant) -> None:
        hold = self.holds.pop(grant)
        hold.handles -= 1

    async def inside_of(self, grant: MemoryGrant, actor: Actor, depth: int) -> None:
        """Act inside of the grant's block, up to its end."""
        actor.grants.append(grant)
        try:
            await self.act(actor, depth + 1)
        finally:
            actor.grants.pop()
            self.forget(grant)

    async def sleep(self, actor: Actor, depth: int) -> None:
        await asyncio.sleep(self.random.choice([0, 0, 0.01, 0.1, 0.25, 0.3, 1]))

    async def block(self, actor: Actor, depth: int) -> None:
        component, nbytes, random = self.component(), self.size(), self.random
        timeout = random.choice([0.2, 1.3]) if random.random() < 0.08 else None
        oversize: Any = "alone" if random.random() < 0.03 else "raise"
        sender = "x" if oversize == "raise" and random.random() < 0.02 else None
        new = component.grant(nbytes, timeout=timeout, oversize=oversize, sender=sender)
        wish = Wish("grant", component.path, nbytes, timeout is not None, sender)
        actor.wish, actor.outcome = wish, None
        try:
            async with new:
                actor.wish = None
                self.note(new, actor, nbytes, sender)
                await self.inside_of(new, actor, depth)
        finally:
            actor.wish = None

    async def grow(self, actor: Actor, depth: int) -> None:
        if not actor.grants:
            return
        grant, nbytes = self.random.choice(actor.grants), self.size()
        hold = self.holds[grant]
        wish = Wish("grow", hold.component, nbytes, sender=hold.sender)
        with suppress(ValueError):  # shared
            await self.asked(actor, wish, grant.grow(nbytes))
            hold.nbytes += nbytes

    async def shrink(self, actor: Actor, depth: int) -> None:
        if actor.grants:
            grant = self.random.choice(actor.grants)
            nbytes = self.random.choice([grant.size // 2, grant.size])
            with suppress(ValueError):
                grant.shrink(nbytes)
                self.holds[grant].nbytes -= nbytes

    async def limited(self, actor: Actor, depth: int) -> None:
        if depth < 4:
            with anyio.move_on_after(self.random.choice([0.2, 0.6, 3])):
                await self.act(actor, depth + 1)

    async def catch(self, actor: Actor, depth: int) -> None:
        with suppress(GrantError):
            await self.act(actor, depth + 1)

    async def cancel(self, actor: Actor, depth: int) -> None:
        if self.random.random() < 0.3:
            self.random.choice(self.actors).task.cancel()

    async def enter(self, actor: Actor, depth: int) -> None:
        name = self.random.choice(sorted({"kept", "tight"} & {*self.components}))
        actor.wish, actor.outcome = Wish("enter", name, BOUNDS[name][0]), None
        try:
            async with self.components[name]:
                actor.wish = None
                self.inside[name] += 1
                try:
                    await self.act(actor, depth + 1)
                finally:
                    self.inside[name] -= 1
        finally:
            actor.wish = None

    async def busy(self, actor: Actor, depth: int) -> None:
        """Use what is reserved, again and again, while others wait."""
        name = self.random.choice(sorted({"kept", "tight"} & {*self.components}))
        if not self.inside[name]:
            return
        for _ in range(20):
            new = self.components[name].grant(10)
            actor.wish, actor.outcome = Wish("grant", name, 10), None
            try:
                async with new:
                    actor.wish = None
                    self.note(new, actor, 10)
                    try:
                        await asyncio.sleep(0.07)
                    finally:
                        self.forget(new)
            finally:
                actor.wish = None

    async def drift(self, actor: Actor, depth: int) -> None:
        self.probe.set(self.random.choice([0, 300, 900]))

    # --- handing on

    async def put(self, actor: Actor, depth: int) -> None:
        component, nbytes = self.component(), self.size()
        new = component.grant(nbytes)
        await self.asked(actor, Wish("grant", component.path, nbytes), new)
        self.note(new, None, nbytes)
        self.queue.put_nowait(new)

    async def send(self, actor: Actor, depth: int) -> None:
        component, nbytes, sender = self.component(), self.size(), self.random.choice("xy")
        new = component.grant(nbytes, sender=sender)
        await self.asked(actor, Wish("grant", component.path, nbytes, sender=sender), new)
        self.note(new, None, nbytes, sender)
        self.queue.put_nowait(new)

    async def take(self, actor: Actor, depth: int) -> None:
        grant = None
        with anyio.move_on_after(self.random.choice([0.1, 1, 3])):
            grant = await self.queue.get()
        if grant is None:
            return
        hold = self.holds[grant]
        if hold.sender is not None:
            with suppress(ValueError):  # shared
                grant.deliver()
                hold.sender = None
        if self.random.random() < 0.3:
            self.forget(grant)
            grant.release()
            return
        async with grant:
            if hold.handles == 1 and not getattr(hold, "shared", False):
                hold.owner = actor
            await self.inside_of(grant, actor, depth)

    async def transfer(self, actor: Actor, depth: int) -> None:
        if not actor.grants:
            return
        grant = self.random.choice(actor.grants)
        hold, target = self.holds[grant], self.component()
        if target.path == hold.component:
            return
        wish = Wish("transfer", target.path, hold.nbytes, source=hold.component)
        with suppress(ValueError):  # shared, in flight, or alone
            await self.asked(actor, wish, grant.transfer(target))
            hold.component, hold.owner = target.path, None

    async def share_it(self, actor: Actor, depth: int) -> None:
        if actor.grants:
            grant = self.random.choice(actor.grants)
            with suppress(ValueError):  # alone
                handle = grant.share()
                hold = self.holds[handle] = self.holds[grant]
                hold.handles += 1
                hold.owner = None
                hold.shared = True  # type: ignore[attr-defined]
                self.queue.put_nowait(handle)

    async def split(self, actor: Actor, depth: int) -> None:
        if actor.grants:
            grant = self.random.choice(actor.grants)
            hold, nbytes = self.holds[grant], grant.size // 2
            with suppress(ValueError):
                part = grant.split(nbytes)
                hold.nbytes -= nbytes
                self.note(part, None, nbytes, hold.sender)
                self.queue.put_nowait(part)

    async def at_once(self, actor: Actor, depth: int) -> None:
        component, nbytes = self.component(), self.size()
        new = component.grant_nowait(nbytes)
        if self.random.random() < 0.5:
            self.note(new, None, nbytes)
            with new:
                await self.inside_of(new, actor, depth)
        else:
            self.note(new, None, nbytes)
            async with new:
                self.holds[new].owner = actor
                await self.inside_of(new, actor, depth)

    # --- from the start to the end

    def start(self) -> None:
        actor = Actor(len(self.by_task))

        async def live() -> None:
            try:
                with suppress(GrantError):
                    await self.act(actor, 0)
            finally:
                self.actors.remove(actor)

        actor.task = asyncio.create_task(live())
        self.actors.append(actor)
        self.by_task[actor.task] = actor

    async def run(self) -> Counter[str]:
        for _ in range(self.random.randint(2, 5)):
            self.start()
            await asyncio.sleep(self.random.choice([0, 0.02, 0.3]))
        await asyncio.wait(self.by_task, timeout=PATIENCE_SECONDS)
        if self.actors:
            self.counts["hung"] += 1
            before = self.judge()
            if before is not None:
                await asyncio.sleep(3)
                if self.judge() == before:
                    self.object(f"a deadlock was not seen: {before}")
        for task in self.by_task:
            task.cancel()
        await asyncio.wait(self.by_task)
        while not self.queue.empty():
            self.queue.get_nowait().release()
        for task in self.by_task:
            if not task.cancelled() and task.exception() is not None:
                raise Wrong("a task failed") from task.exception()
        if self.limiter._timer is not None:
            self.limiter._timer.cancel()
        self.probe.set(0)
        self.limiter._look()
        ledger = self.limiter._ledger
        if self.wrong is None and (ledger.free, ledger.waiters.count) != (LIMIT, 0):
            self.wrong = f"{ledger.free} bytes are free and {ledger.waiters.count} wait at the end"
        if self.wrong:
            raise Wrong(self.wrong)
        return self.counts


def run_programs(seed: int | str, numbers: Iterable[int]) -> Counter[str]:
    """Run programs, one after the other.

    Returns:
        How often what has happened in them.

    Raises:
        Wrong: one should have gone otherwise.
    """

    async def run() -> Counter[str]:
        total: Counter[str] = Counter()
        clock = asyncio.get_running_loop().time
        for number in numbers:
            try:
                total += await World(Random(f"{seed}/{number}"), clock).run()
            except Wrong as wrong:
                raise Wrong(f"--seed {seed} --first {number} --programs 1: {wrong}") from wrong
        return total

    with asyncio.Runner(loop_factory=testing.VirtualTimeLoop) as runner:
        return runner.run(run())


def main(arguments: list[str] | None = None) -> int:
    """Run programs; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("membound_async").setLevel(logging.CRITICAL)
    started = time.perf_counter()
    try:
        total = run_programs(options.seed, range(options.first, options.first + options.programs))
    except Wrong as wrong:
        print(wrong)
        return 1
    seconds = time.perf_counter() - started
    print(f"{options.programs} programs in {seconds:.0f} s:", dict(total))
    return 0


if __name__ == "__main__":
    sys.exit(main())
