"""Runs a program to its end in virtual time, on asyncio or trio, with the books kept beside it.

Tasks that are not done after a while are cancelled, so every program ends. Each outcome of a
step is a success, what the documentation says that the call may raise, or a cancellation;
anything else is wrong.
"""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import anyio
import trio
import trio.testing

from membound_async import (
    BoundsError,
    GrantDeadlock,
    GrantReleased,
    GrantTimeout,
    GrantTooLarge,
    Inbox,
    LimiterSettings,
    MemoryGrant,
    MemoryLimiter,
    PressurePolicy,
    QuotaExceeded,
    ReclaimReentry,
    ResourceLimits,
    bounded,
    create_memory_stream,
    grant,
)
from membound_async.fastpath import RELEASED
from membound_async.hooks import Event, Hooks
from membound_async.live import LiveBytes
from membound_async.rules import Polynomial
from membound_async.testing import ScriptedProbe, VirtualTimeLoop

from .invariants import Books, Broken, FollowedLedger, books_for, follow
from .programs import (
    Cancel,
    Catch,
    Change,
    Channel,
    Close,
    Drain,
    Enter,
    Grant,
    Look,
    Program,
    Put,
    Raise,
    Read,
    Receive,
    Reclaim,
    Resize,
    Sleep,
    Step,
    Take,
    Task,
    Within,
)

__all__ = ["Machine", "machine", "run"]

PATIENCE_SECONDS = 8.0
DEADLOCK_SECONDS = 1.0
"""How long two looks for deadlocks take at the most."""
MOST_TURNS = 20_000
COLLECT_AFTER = 50
"""How many programs are run until garbage is collected."""
NO_DELAY = PressurePolicy(
    min_delay_seconds=0,
    max_delay_seconds=0,
    min_interval_seconds=0.1,
    max_interval_seconds=0.5,
)
DELAY = PressurePolicy(min_interval_seconds=0.1, max_interval_seconds=0.5)


def must(condition: object, *otherwise: object) -> None:
    """Check one thing; what to say otherwise is put together only then.

    Raises:
        Broken: it is not so.
    """
    if not condition:
        raise Broken(" ".join(map(str, otherwise)))


class Planned(Exception):
    """What a step raises because the program says so."""


class Message(int):
    """So many bytes, from whom, and which of his."""

    line: tuple[int, str | None]
    number: int


class Messages:
    """What went through a channel."""

    def __init__(self) -> None:
        self.sent = self.got = 0
        self.lost = False
        """Whether some may have been, as the channel was closed or an iterator dropped."""
        self.receivers = 0
        self.in_order = True
        """Whether there was never more than one who received."""
        self.last: dict[tuple[int, str | None], int] = {}

    def take(self, message: Message) -> None:
        """Note that a message has come."""
        self.got += 1
        last = self.last.get(message.line, 0)
        must(message.number != last, "a message has come twice")
        must(not self.in_order or self.lost or message.number > last, "messages came out of order")
        self.last[message.line] = message.number


class Actor:
    """A task while it runs."""

    def __init__(self, number: int, plan: Task) -> None:
        self.number = number
        self.plan = plan
        self.scope = anyio.CancelScope()
        self.task: Any = None
        self.blocks: list[MemoryGrant] = []
        """The grants whose blocks it is in."""
        self.loose: dict[int, MemoryGrant] = {}
        """Grants that it gives back by hand."""
        self.judged: BaseException | None = None
        self.cancel_when_woken: Cancel | None = None
        self.done = False

    def grants(self) -> list[MemoryGrant]:
        """All that it holds, or has held."""
        return [*self.blocks, *self.loose.values()]


class Live(LiveBytes):
    """What the code of components has allocated, as the program says."""

    def __init__(self, performance: Performance) -> None:
        super().__init__()
        self._performance = performance

    def read(self, components: Any, now: float, limit_bytes: int) -> Any:
        performance = self._performance
        found = []
        for plan in performance.program.components:
            if plan.live:
                nbytes = 0 if performance.is_over else latest(plan.live, performance.elapsed())
                found.append((components[plan.path]._account, nbytes))
        return found


def latest(script: tuple[tuple[float, int], ...], now: float) -> int:
    """Give what a script says for a moment."""
    found = 0
    for moment, nbytes in script:
        if moment <= now:
            found = nbytes
    return found


class Performance:
    """One program while it runs."""

    def __init__(
        self, program: Program, seen: Counter[str], now: Callable[[], float], backend: str
    ) -> None:
        self.program = program
        self.seen = seen
        self.now = now
        self.backend = backend
        self.began_at = now()
        self.is_over = False
        self.freed = 0
        self.turns = 0
        self.keys = 0
        self.limiter = self.make_limiter()
        self.components = [self.limiter.component(each.path) for each in program.components]
        self.books: Books = books_for(self.limiter, seen, in_c=program.settings.in_c)
        self.limiter._hooks = Hooks(self.note_event)
        self.limiter._live = Live(self)
        self.limiter._pressure_path = None
        self.actors = [Actor(number, plan) for number, plan in enumerate(program.tasks)]
        self.by_task: dict[Any, Actor] = {}
        self.box: deque[MemoryGrant] = deque()
        self.box_changed = anyio.Event()
        self.channels: list[Any] = []
        self.clones: list[Any] = []
        self.messages = [Messages() for _ in program.channels]
        self.finished: anyio.Event | None = None
        self.watch_wakes()

    # --- what there is

    def make_limiter(self) -> MemoryLimiter:
        settings = self.program.settings
        others = {"fds": settings.fds, "slices": settings.slices}
        limited = {name: amount for name, amount in others.items() if amount is not None}
        share: Any = Polynomial() if settings.share == "polynomial" else Fraction(settings.share)
        limiter = MemoryLimiter(
            settings.limit,
            slop_factor=settings.slop_factor,
            share=share,
            resources=ResourceLimits(**limited) if limited else None,
            baseline=settings.baseline,
            probe=ScriptedProbe(self.measure),
            observe=settings.observe,
            mode=settings.mode,
            processes=1,
            settings=LimiterSettings(
                overcommit=10.0,
                stall_after_seconds=settings.stall_after_seconds,
                bypass_limit_bytes=settings.bypass_limit,
                stale_after_seconds=settings.stale_after_seconds,
                reclaim=False,
                pressure=DELAY if settings.delays else NO_DELAY,
            ),
        )
        for each in self.program.components:
            fds = {} if each.fds is None else {"fds": each.fds}
            limiter.component(
                each.path,
                each.minimum,
                each.firm_limit,
                limits=ResourceLimits(**fds) if fds else None,
            )
        for plan in self.program.reclaim:
            limiter.add_reclaimer(self.reclaimer(plan, limiter))
        return limiter

    def elapsed(self) -> float:
        return self.now() - self.began_at

    def measure(self) -> int:
        probe, elapsed = self.program.probe, self.elapsed()
        baseline = self.program.settings.baseline
        if self.is_over or not hasattr(self, "limiter"):
            return baseline
        for start, end in probe.fails:
            if start <= elapsed < end:
                raise OSError("it cannot be read")
        accounts = self.limiter._ledger.accounts.values()
        held = sum(account.granted + account.in_flight for account in accounts)
        more = max(0, latest(probe.script, elapsed) - self.freed)
        return baseline + int(probe.follows * held) + more

    def reclaimer(self, plan: Reclaim, limiter: MemoryLimiter) -> Any:
        def free(wanted: int) -> int:
            self.seen[f"reclaimer {plan.what}"] += 1
            match plan.what:
                case "helps":
                    self.freed += wanted
                    return wanted
                case "lies":
                    return wanted
                case "raises":
                    raise Planned
                case "releases" if self.box:
                    self.box.popleft().release()
                case "asks":
                    component = self.components[plan.component]
                    try:
                        component.grant_nowait(1).release()
                    except ReclaimReentry:
                        return 0
                    self.books.fail("a reclaimer was given a grant")
            return 0

        async def free_in_task(wanted: int) -> int:
            if plan.what == "hangs":
                self.seen["reclaimer hangs"] += 1
                await anyio.sleep(2.5)
                return 0
            if plan.what == "asks":
                try:
                    async with self.components[plan.component].grant(1):
                        self.books.fail("a reclaimer was given a grant")
                except ReclaimReentry:
                    self.seen["reclaimer asks"] += 1
                return 0
            await anyio.lowlevel.checkpoint()
            return free(wanted)

        return free_in_task if plan.in_task else free

    def inbox_of(self, channel: Any) -> Inbox[Message]:
        inbox: Inbox[Message] = channel if isinstance(channel, Inbox) else channel[0]._inbox
        return inbox

    def make_channel(self, plan: Channel) -> Any:
        component = self.components[plan.component]
        most = float("inf") if plan.most is None else plan.most
        if plan.kind == "stream":
            return create_memory_stream[Message](size=int, component=component, max_items=most)
        return Inbox[Message](
            component,
            size=int,
            overflow=plan.overflow,
            max_messages=most,
            settle=(lambda _: {"fds": 1}) if plan.settle else None,
        )

    def note_event(self, event: Event) -> None:
        self.seen[f"event {type(event).__name__}"] += 1

    def watch_wakes(self) -> None:
        limiter: Any = self.limiter
        wake = limiter._wake

        def watched(settled: Any) -> None:
            settled = [*settled]
            wake(settled)
            for request in settled:
                actor = self.by_task.get(request.task)
                if actor is not None and actor.cancel_when_woken is not None:
                    how, actor.cancel_when_woken = actor.cancel_when_woken, None
                    self.seen["cancelled when it was woken"] += 1
                    self.cancel(actor, how)

        limiter._wake = watched

    def turn(self) -> None:
        """Check what must be so between any two steps of tasks."""
        self.turns += 1
        if self.turns > MOST_TURNS:
            self.books.fail("it does not come to an end")
        self.books.after_turn()

    # --- from the start to the end

    async def main(self) -> None:
        """Run it all, inside the limiter's block; tasks are started by the backend."""
        self.channels = [self.make_channel(plan) for plan in self.program.channels]
        self.books.inboxes = [self.inbox_of(channel) for channel in self.channels]
        try:
            self.limiter.verify()
        except BoundsError as error:
            self.seen[f"verify {type(error).__name__}"] += 1
            if self.program.settings.mode == "strict" and not self.program.settings.observe:
                return  # it cannot even be entered
        async with self.limiter:
            await self.run_tasks()
            while self.box:
                self.box.popleft().release()
            self.check_messages()
            for channel in self.channels:
                if isinstance(channel, Inbox):
                    channel.close()
                else:
                    for end in channel:
                        end.close()
            self.check_closed()
            self.is_over = True
            for _ in range(40):
                await anyio.sleep(1.0)
                if self.limiter._timer is None and self.limiter._reclaim.run is None:
                    break
            if any(each.holders.count for each in self.limiter._ledger.accounts.values()):
                gc.collect()  # a grant may have been dropped in a cycle
                await anyio.sleep(1.0)
            self.limiter.statistics()
            self.books.check_end()

    async def run_tasks(self) -> None:
        self.finished = anyio.Event()
        if self.backend == "asyncio":
            loop = asyncio.get_running_loop()
            for actor in self.actors:
                actor.task = loop.create_task(self.live(actor))
                self.by_task[actor.task] = actor
            await self.wait_for_tasks()
            await asyncio.wait([actor.task for actor in self.actors])
            return
        async with trio.open_nursery() as nursery:
            for actor in self.actors:
                nursery.start_soon(self.live, actor)
            await self.wait_for_tasks()

    async def wait_for_tasks(self) -> None:
        assert self.finished is not None
        with anyio.move_on_after(PATIENCE_SECONDS):
            await self.finished.wait()
            return
        self.seen["programs that were cut short"] += 1
        before = self.seems_deadlocked()
        if before is not None:
            await anyio.sleep(2 * DEADLOCK_SECONDS)
            must(self.seems_deadlocked() != before, "all who are left wait for each other")
        for actor in self.actors:
            actor.scope.cancel()
        with anyio.move_on_after(PATIENCE_SECONDS):
            await self.finished.wait()
            return
        raise Broken("it does not end when it is cancelled")

    def seems_deadlocked(self) -> object:
        """Say when all who are left wait for each other, so that one should soon be refused.

        Who has got a grant that is nobody's to give back, who is in a component, and drift,
        may be waited for.

        Returns:
            What is the same as long as nothing moves; None if they do not.
        """
        left = [actor for actor in self.actors if not actor.done]
        ledger = self.limiter._ledger
        waiting = {request.task: request for request in self.books.waiting}
        accounts = [*ledger.accounts.values()]
        if (
            not left
            or self.box
            or ledger.drift
            or not all(actor.task in waiting for actor in left)
            or any(actor.loose for actor in left)
            or any(each.in_flight or each.live or each.reserved for each in accounts)
            or any(request.also or request.gives_up for request in waiting.values())
            or len(waiting) > len(left)
            or any(each._holder not in waiting for each in self.limiter._held())
        ):
            return None
        return ledger.moved, ledger.waiters.ended, ledger.waiters.count

    async def live(self, actor: Actor) -> None:
        if self.backend == "trio":
            actor.task = trio.lowlevel.current_task()
            self.by_task[actor.task] = actor
        outcome = "tasks done"
        try:
            with actor.scope:
                await anyio.sleep(actor.plan.start)
                await self.perform(actor, actor.plan.steps)
            if actor.scope.cancelled_caught:
                outcome = "tasks cancelled"
        except asyncio.CancelledError:
            outcome = "tasks cancelled"
        except Exception as error:  # noqa: BLE001
            outcome = "tasks failed"
            if error is not actor.judged:
                self.books.fail(f"task {actor.number}: {error!r}", error)
        finally:
            self.seen[outcome] += 1
            actor.judged = None
            for loose in actor.loose.values():
                loose.release()
            actor.loose.clear()
            actor.done = True
            if all(each.done for each in self.actors) and self.finished is not None:
                self.finished.set()

    async def perform(self, actor: Actor, steps: tuple[Step, ...]) -> None:
        """Do steps one after the other."""
        for step in steps:
            name = type(step).__name__
            self.seen["steps"] += 1
            try:
                done = await DOES[type(step)](self, actor, step)
                if isinstance(done, str):
                    self.seen[f"{name} {done}"] += 1
                else:
                    self.seen[f"{name} done"] += 1
            except Exception as error:
                if error is not actor.judged:
                    self.judge(actor, step, error)
                if not actor.plan.goes_on:
                    raise
            except BaseException:
                self.seen[f"{name} cancelled"] += 1
                raise
            if self.books.broken is not None:
                raise self.books.broken

    def judge(self, actor: Actor, step: Step, error: Exception) -> None:
        """Say whether a step may raise that."""
        actor.judged = error
        name = type(step).__name__
        if isinstance(step, Change):
            name += f" {step.what}"
        elif isinstance(step, (Read, Drain, Grant)):
            name += f" {step.how}"
        elif isinstance(step, (Put, Receive)) and step.nowait:
            name += " nowait"
        self.seen[f"{name} {type(error).__name__}"] += 1
        if isinstance(error, Broken):
            self.books.fail(str(error), error)
        elif isinstance(error, GrantDeadlock):
            must_not = not actor.blocks or "nowait" in name
            if must_not:
                self.books.fail(f"{step}: {error!r}, but it holds nothing", error)
        elif not isinstance(error, ALLOWED.get(name, ())):
            self.books.fail(f"{step}: {error!r}", error)

    def cancel(self, actor: Actor, how: Cancel) -> None:
        if actor.done:
            return
        if how.in_scope or self.backend == "trio":
            actor.scope.cancel()
        else:
            actor.task.cancel()

    def give_up(self) -> None:
        """Have nothing checked any more, and nothing be said of grants that are dropped."""
        limiter: Any = self.limiter
        limiter._ledger.books = None
        for account in limiter._ledger.accounts.values():
            for each in account.holders.snapshot():
                each._state = RELEASED
        for end in [
            *self.clones,
            *(end for each in self.channels if not isinstance(each, Inbox) for end in each),
        ]:
            end._closed = True
        limiter._ledger = FollowedLedger(1 << 40)
        limiter._acquire = limiter._withdraw = limiter._give_back = limiter._leave = nothing

    # --- steps

    async def do_sleep(self, actor: Actor, step: Sleep) -> None:
        await anyio.sleep(step.seconds)

    async def do_grant(self, actor: Actor, step: Grant) -> str:
        component = self.components[step.component]
        options: dict[str, Any] = {}
        if step.up_to is not None:
            options["up_to"] = step.up_to
        if step.timeout is not None and step.how != "nowait":
            options["timeout"] = step.timeout
        if step.alone and step.how != "nowait":
            options["oversize"] = "alone"
        if step.sender is not None:
            options["sender"] = step.sender
        if step.fds:
            options["also"] = {"fds": step.fds}
        asked_at = self.now()
        try:
            if step.how == "nowait":
                got = component.grant_nowait(step.nbytes, **options)
            elif step.how == "current":
                got = grant(step.nbytes, **options)
            else:
                got = component.grant(step.nbytes, **options)
            if step.how == "await":
                await got
                self.keys += 1
                key = self.keys
                actor.loose[key] = got
                self.check_got(step, got, asked_at)
                del got
                try:
                    await self.perform(actor, step.steps)
                finally:
                    loose = actor.loose.pop(key, None)
                    if loose is not None:
                        loose.release()
            else:
                async with got:
                    self.check_got(step, got, asked_at)
                    actor.blocks.append(got)
                    try:
                        await self.perform(actor, step.steps)
                    finally:
                        remove(actor.blocks, got)
        except GrantTimeout as error:
            if error is not actor.judged:
                must(step.timeout is not None, step, "it has no timeout")
                waited = self.now() - asked_at
                must(waited >= (step.timeout or 0.0) - 1e-9, step, "timed out after", waited)
            raise
        return step.how

    def check_got(self, step: Grant, got: MemoryGrant, asked_at: float) -> None:
        most = step.nbytes if step.up_to is None else step.up_to
        must(step.nbytes <= got.size <= most, step, got.size)
        must(dict(got.also) == ({"fds": step.fds} if step.fds else {}), step, got.also)
        must(got.sender == step.sender, step, "of", got.sender)
        if step.timeout is not None and step.how != "nowait":
            waited = self.now() - asked_at
            must(waited <= step.timeout + 0.026, step, "it got it after", waited)

    async def do_change(self, actor: Actor, step: Change) -> str | None:
        whose = actor if step.of is None else self.actors[step.of % len(self.actors)]
        if step.what in ("hand_on", "drop"):
            loose = [*whose.loose]
            if not loose:
                return "nothing"
            key = loose[step.which % len(loose)]
            if step.what == "hand_on":
                self.box.append(whose.loose.pop(key))
                self.box_changed.set()
                self.box_changed = anyio.Event()
            else:
                del whose.loose[key]
            return step.what
        held = whose.grants()
        if not held:
            return "nothing"
        one = held[step.which % len(held)]
        del held
        before = one.size, one.released
        options = one._options
        is_shared = options is not None and options.shares is not None
        is_changing = getattr(one, "_changing", None) is not None
        target = self.components[step.component]
        try:
            match step.what:
                case "grow":
                    await one.grow(step.nbytes)
                case "grow_nowait":
                    one.grow_nowait(step.nbytes)
                case "shrink":
                    one.shrink(step.nbytes)
                case "resize":
                    one.resize(step.nbytes)
                    must(one.size == step.nbytes, step, one.size)
                case "split":
                    self.keep(actor, one.split(step.nbytes))
                case "transfer":
                    await one.transfer(target)
                    must(one.component is target, step, "of", one.component)
                case "transfer_nowait":
                    one.transfer_nowait(target)
                case "share":
                    self.keep(actor, one.share())
                case "deliver":
                    one.deliver()
                    must(one.sender is None, step, "of", one.sender)
                case "release":
                    one.release()
                    must(one.released and not one.size, step, one)
                case "enter_again":
                    async with one:
                        await anyio.sleep(0.01)
        except GrantReleased:
            must(one.released, step, "it is not released")
            raise
        except ValueError:
            too_much = step.what in ("shrink", "split", "resize") and step.nbytes > before[0]
            in_flight = one.sender is not None
            no_flight = step.what == "deliver" and not in_flight
            no_transfer = "transfer" in step.what and (in_flight or one._state == 3)
            no_share = step.what == "share" and one._state == 3
            must(
                too_much or is_shared or no_flight or no_transfer or no_share,
                step,
                "refused for no reason",
            )
            raise
        except QuotaExceeded:
            must((one.size, one.released) == before, step, "refused, it has changed", one)
            raise
        except RuntimeError:
            must(is_changing, step, "nobody changes it")
            raise
        return step.what

    def keep(self, actor: Actor, loose: MemoryGrant) -> None:
        self.keys += 1
        actor.loose[self.keys] = loose

    async def do_take(self, actor: Actor, step: Take) -> str | None:
        with anyio.move_on_after(step.seconds):
            while not self.box:
                await self.box_changed.wait()
        if not self.box:
            return "nothing"
        taken = self.box.popleft()
        try:
            async with taken:
                actor.blocks.append(taken)
                try:
                    await self.perform(actor, step.steps)
                finally:
                    remove(actor.blocks, taken)
        finally:
            taken.release()
        return None

    async def do_enter(self, actor: Actor, step: Enter) -> None:
        component = self.components[step.component]
        async with component:
            account: Any = component._account
            must(account.entries > 0, step, "it is not entered")
            await self.perform(actor, step.steps)

    async def do_within(self, actor: Actor, step: Within) -> str | None:
        with anyio.move_on_after(step.seconds) as scope:
            await self.perform(actor, step.steps)
        return "over" if scope.cancelled_caught else None

    async def do_catch(self, actor: Actor, step: Catch) -> None:
        try:
            await self.perform(actor, step.steps)
        except Exception as error:
            if error is not actor.judged:
                raise

    async def do_raise(self, actor: Actor, step: Raise) -> None:
        raise Planned

    async def do_cancel(self, actor: Actor, step: Cancel) -> str:
        whose = self.actors[step.task % len(self.actors)]
        if step.when == "woken":
            whose.cancel_when_woken = step
        else:
            self.cancel(whose, step)
        return step.when

    async def do_resize(self, actor: Actor, step: Resize) -> None:
        slop = self.limiter.limit.slop_factor
        if int(step.limit * (1 - slop)) > self.program.settings.baseline:
            self.limiter.resize(step.limit)

    # --- messages

    async def do_put(self, actor: Actor, step: Put) -> str:
        number = step.channel % len(self.channels)
        channel = self.channels[number]
        message = Message(step.nbytes)
        message.line = actor.number, step.sender
        self.keys += 1
        message.number = self.keys
        if not isinstance(channel, Inbox):
            if step.nowait:
                channel[0].send_nowait(message)
            else:
                await channel[0].send(message)
            self.messages[number].sent += 1
            return "stream"
        options: dict[str, Any] = {"sender": step.sender}
        if step.fds:
            options["fds"] = step.fds
        key = next(iter(actor.loose), None) if step.given else None
        if key is not None:
            options = {"grant": actor.loose.pop(key)}
        try:
            if step.nowait:
                channel.send_nowait(message, **options)
            else:
                await channel.send(message, **options)
        except BaseException:
            if key is not None:
                actor.loose[key] = options["grant"]
            raise
        self.messages[number].sent += 1
        return "given" if key is not None else "inbox"

    async def do_receive(self, actor: Actor, step: Receive) -> str:
        number = step.channel % len(self.channels)
        channel, messages = self.channels[number], self.messages[number]
        messages.receivers += 1
        messages.in_order = messages.in_order and messages.receivers == 1
        try:
            if isinstance(channel, Inbox):
                received = channel.receive_nowait() if step.nowait else await channel.receive()
                message = received.message
            else:
                stream = channel[1]
                message = stream.receive_nowait() if step.nowait else await stream.receive()
                received = None
        finally:
            messages.receivers -= 1
        messages.take(message)
        if received is None:
            await self.perform(actor, step.steps)
            return "stream"
        async with received:
            must(received.grant.sender is None or is_shared(received.grant), "not delivered")
            await self.perform(actor, step.steps)
        return "inbox"

    async def do_drain(self, actor: Actor, step: Drain) -> str:
        number = step.channel % len(self.channels)
        channel = self.channels[number]
        if isinstance(channel, Inbox):
            return "nothing"
        source = channel[1].clone()
        self.clones.append(source)
        self.messages[number].lost = True  # what an iterator has read ahead is lost with it
        await self.iterate(actor, step, source, step.items)
        return step.how

    async def do_close(self, actor: Actor, step: Close) -> str:
        number = step.channel % len(self.channels)
        channel = self.channels[number]
        self.messages[number].lost = True
        if isinstance(channel, Inbox):
            channel.close()
            return "inbox"
        channel[step.end == "receive"].close()
        return step.end

    def check_messages(self) -> None:
        """Check that what was sent was received, or dropped, or is there."""
        for channel, messages in zip(self.channels, self.messages, strict=True):
            now = self.inbox_of(channel).statistics()
            known = messages.got + now.dropped + now.current_buffer_used
            must(
                messages.lost or messages.sent == known,
                messages.sent,
                "messages were sent, and received, dropped or left",
                known,
            )

    def check_closed(self) -> None:
        """Check that nothing is left of channels that are closed."""
        for channel in self.channels:
            inbox = self.inbox_of(channel)
            now = inbox.statistics()
            must(now.charged_bytes == 0, "something is charged in the end")
            must(now.tasks_waiting_send == 0, "somebody waits to send in the end")
            must(now.tasks_waiting_receive == 0, "somebody waits to receive in the end")
            must(not inbox._lines and not inbox._handed_over, "lines are left")

    # --- iterators

    async def do_read(self, actor: Actor, step: Read) -> str:
        await self.iterate(actor, step, Source(step.sizes, step.every), len(step.sizes))
        return step.how

    async def iterate(self, actor: Actor, step: Read | Drain, source: Any, items: int) -> None:
        component = self.components[step.component]
        size = None if isinstance(step, Drain) else int
        iterator: Any
        if step.how == "bounded":
            ahead = step.ahead if isinstance(step, Read) else 0
            iterator = bounded(source, size=size, ahead=ahead, component=component)
        else:
            iterator = component.batches(
                source, size=size, max_items=step.max_items, max_seconds=step.max_seconds
            )
        try:
            while items > 0:
                try:
                    got = await anext(iterator)
                except StopAsyncIteration:
                    break
                except GrantTooLarge:
                    self.seen[f"{type(step).__name__} {step.how} GrantTooLarge"] += 1
                    items -= 1  # it is left out
                    continue
                items -= len(got) if isinstance(got, list) else 1
                self.seen[f"{type(step).__name__} {step.how} items"] += 1
                await anyio.sleep(step.pause)
        finally:
            if not getattr(step, "leaves_open", False):
                with anyio.CancelScope(shield=True):
                    await iterator.aclose()
            elif isinstance(step, Drain):
                source.close()

    # --- snapshots

    async def do_look(self, actor: Actor, step: Look) -> str:
        limiter, books = self.limiter, self.books
        books.catch_up()
        match step.what:
            case "statistics":
                now = limiter.statistics()
                world = books.world
                place = (None, "bytes")
                must(now.free_bytes == world.free(place), "free", now.free_bytes)
                must(now.drift_bytes == world.drift, "drift", now.drift_bytes)
                must(now.committed_bytes == world.committed(), "committed", now.committed_bytes)
                must(now.waiting == len(books.waiting), "waiting", now.waiting)
                must(now.waiting == len(limiter.waiting_requests()), "waiting_requests()")
                wanted = sum(each.wanted_bytes for each in limiter.waiting_requests())
                must(now.waiting_bytes == wanted, "waiting_bytes", now.waiting_bytes)
                must(now.grants == len(limiter.held_grants()), "grants", now.grants)
            case "held_grants":
                held = limiter.held_grants()
                mine = [each for other in self.actors for each in other.grants()]
                count = sum(not each.released for each in mine)
                must(len(held) >= count, len(held), "grants are held", count)
                must(held[:2] == limiter.held_grants(2), "held_grants(2)")
            case "waiting_requests":
                waiting = limiter.waiting_requests()
                must(len(waiting) == len(books.waiting), len(waiting), "requests wait")
            case "component":
                for component in self.components:
                    found = component.statistics()
                    known = books.world.components[component.path]
                    must(found.granted_bytes == known.granted.get("bytes", 0), found)
                    must(found.in_flight_bytes == known.sent("bytes"), found)
                    must(found.entered == known.entries, found)
        return step.what


def is_shared(one: MemoryGrant) -> bool:
    """Whether there is another handle of it; such a one is not delivered."""
    return one._options is not None and one._options.shares is not None


def remove(blocks: list[MemoryGrant], one: MemoryGrant) -> None:
    """Take one out, by identity, the last first."""
    for place in range(len(blocks) - 1, -1, -1):
        if blocks[place] is one:
            del blocks[place]
            return


def nothing(*_: object, **__: object) -> None:
    """Stand for what a limiter does that has failed."""


class Source:
    """Something to iterate: numbers, which say how large they are."""

    def __init__(self, sizes: tuple[int, ...], every: float) -> None:
        self._sizes = iter(sizes)
        self._every = every

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> int:
        if self._every:
            await anyio.sleep(self._every)
        for size in self._sizes:
            return size
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()


Does = Callable[[Performance, Actor, Any], Awaitable[str | None]]
DOES: dict[type, Does] = {
    Sleep: Performance.do_sleep,
    Grant: Performance.do_grant,
    Change: Performance.do_change,
    Take: Performance.do_take,
    Enter: Performance.do_enter,
    Within: Performance.do_within,
    Catch: Performance.do_catch,
    Raise: Performance.do_raise,
    Cancel: Performance.do_cancel,
    Put: Performance.do_put,
    Receive: Performance.do_receive,
    Drain: Performance.do_drain,
    Close: Performance.do_close,
    Read: Performance.do_read,
    Resize: Performance.do_resize,
    Look: Performance.do_look,
}

CHANGED = (GrantReleased, ValueError, RuntimeError)
ENDED = (anyio.ClosedResourceError, anyio.BrokenResourceError)
ALLOWED: dict[str, tuple[type[Exception], ...]] = {
    "Raise": (Planned,),
    "Grant with": (GrantTooLarge, GrantTimeout),
    "Grant await": (GrantTooLarge, GrantTimeout),
    "Grant current": (GrantTooLarge, GrantTimeout),
    "Grant nowait": (GrantTooLarge, QuotaExceeded),
    "Change grow": (GrantTooLarge, *CHANGED),
    "Change grow_nowait": (GrantTooLarge, QuotaExceeded, *CHANGED),
    "Change resize": (GrantTooLarge, QuotaExceeded, *CHANGED),
    "Change shrink": CHANGED,
    "Change split": CHANGED,
    "Change transfer": (GrantTooLarge, *CHANGED),
    "Change transfer_nowait": (GrantTooLarge, QuotaExceeded, *CHANGED),
    "Change share": CHANGED,
    "Change deliver": CHANGED,
    "Change enter_again": (GrantReleased,),
    "Take": (GrantReleased,),
    "Enter": (GrantTooLarge, BoundsError),
    "Put": (GrantTooLarge, QuotaExceeded, GrantReleased, *ENDED),
    "Put nowait": (GrantTooLarge, QuotaExceeded, GrantReleased, anyio.WouldBlock, *ENDED),
    "Receive": (anyio.EndOfStream, *ENDED),
    "Receive nowait": (anyio.EndOfStream, anyio.WouldBlock, *ENDED),
    "Drain bounded": ENDED,
    "Drain batches": ENDED,
}
"""What the documentation says that a step may raise, besides `GrantDeadlock`."""


# --- where it runs


class _Loop(VirtualTimeLoop):
    """An event loop of virtual time that has a program checked after every turn."""

    performance: Performance | None = None

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        if self.performance is not None:
            self.performance.turn()

    def begin_anew(self) -> None:
        """Forget timers of programs before, and begin at 0: each is alone."""
        self._virtual_seconds = 0.0
        inside: Any = self
        inside._scheduled.clear()
        inside._timer_cancelled_count = 0


class _Instrument(trio.abc.Instrument):
    def __init__(self) -> None:
        self.performance: Performance | None = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.performance is not None:
            with suppress(Broken):  # which is asked for at the end
                self.performance.turn()


class Machine:
    """Runs programs one after the other."""

    def __init__(self, backend: str, seen: Counter[str]) -> None:
        self.backend = backend
        self.seen = seen
        self._loop: _Loop | None = None
        self._since_collection = 0

    def run(self, program: Program) -> None:
        """Run one program.

        Raises:
            Broken: something was wrong.
        """
        self.seen["programs"] += 1
        self._since_collection += 1
        if self._since_collection == COLLECT_AFTER:
            self._since_collection = 0
            gc.collect()
        if self.backend == "trio":
            self._run_on_trio(program)
        else:
            self._run_on_asyncio(program)

    def _run_on_asyncio(self, program: Program) -> None:
        loop = self._loop
        if loop is None:
            loop = self._loop = _Loop()
            loop.set_exception_handler(lambda *_: None)
        loop.begin_anew()

        async def main() -> None:
            performance = Performance(program, self.seen, loop.time, "asyncio")
            loop.performance = performance
            await performance.main()

        try:
            loop.run_until_complete(main())
        except BaseException as error:  # noqa: BLE001
            performance, loop.performance = loop.performance, None
            self.close(performance)
            broken(error, performance)
        finally:
            loop.performance = None

    def _run_on_trio(self, program: Program) -> None:
        instrument = _Instrument()

        async def main() -> None:
            clock = trio.lowlevel.current_clock()
            performance = Performance(program, self.seen, clock.current_time, "trio")
            instrument.performance = performance
            await performance.main()
            performance.turn()

        trio._core._run._r.seed(program.seed)
        try:
            trio.run(
                main,
                clock=trio.testing.MockClock(autojump_threshold=0),
                instruments=[instrument],
            )
        except BaseException as error:  # noqa: BLE001
            if instrument.performance is not None:
                instrument.performance.give_up()
            broken(error, instrument.performance)

    def close(self, performance: Performance | None = None) -> None:
        """End the event loop, and what is left of a program that has failed."""
        loop, self._loop = self._loop, None
        if performance is not None:
            performance.give_up()
        if loop is None:
            return
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            task.cancel()
        with suppress(BaseException):
            loop.run_until_complete(asyncio.wait_for(_end(), 100))
        loop.close()


async def _end() -> None:
    mine = asyncio.current_task()
    for _ in range(20):
        tasks = [task for task in asyncio.all_tasks() if task is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0.1)


def broken(error: BaseException, performance: Performance | None) -> None:
    """Raise what was wrong first.

    Raises:
        Broken: what it was.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    found = None if performance is None else performance.books.broken
    if found is None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, Broken):
            raise error
        raise Broken(f"the program failed: {error!r}") from error
    raise found


@contextmanager
def machine(backend: str = "asyncio", seen: Counter[str] | None = None) -> Iterator[Machine]:
    """Give what runs programs, for as many as you like."""
    made = Machine(backend, Counter() if seen is None else seen)
    collects = gc.isenabled()
    gc.collect()
    gc.freeze()  # a collection then costs what the program made, not what was imported
    gc.disable()  # garbage is collected where that is the same each time
    try:
        with (
            follow(),
            patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", new=True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", ResourceWarning)
            yield made
            made.close()
            gc.collect()
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def run(program: Program, *, backend: str = "asyncio") -> Counter[str]:
    """Run one program; give how often what has happened.

    Raises:
        Broken: something was wrong.
    """
    with machine(backend) as one:
        one.run(program)
    return one.seen
