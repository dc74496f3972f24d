"""Fairness under attack: 99 well-behaved senders and a hostile one, in virtual time.

All send to one receiver, which takes 0.1 ms for each message and 1 us for each of its bytes. The
well-behaved send 1 KiB again and again, each as soon as it can. What they get through is
compared with what they get through without the hostile one: through an `Inbox`, and through a
memory object stream that has as many places as the inbox has for messages of 1 KiB. Nothing
is left to chance: the same figures each time.

    python -m tests.benchmarks.fairness [--seconds 4]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import anyio

from membound_async import Inbox, ResourceLimits, testing

WELL_BEHAVED = 99
MESSAGE_BYTES = 1024
LIMIT_BYTES = 512 * 1024
PLACES = LIMIT_BYTES // 2 // MESSAGE_BYTES
"""The inbox is alone with the limit, so it may have half of it."""
LARGEST_BYTES = LIMIT_BYTES // 4
"""The largest message that one sender can have in flight."""

HOSTILE = "hostile"
WARM_UP_SECONDS = 1.0

Send = Callable[[int, object], Awaitable[None]]


class Attack(NamedTuple):
    """What the hostile sender does in each of its tasks: sends these sizes over and over."""

    name: str
    sizes: tuple[int, ...]
    tasks: int = 1000


ATTACKS = (
    Attack("one task, 1 KiB", (MESSAGE_BYTES,), tasks=1),
    Attack("1000 tasks, 1 KiB", (MESSAGE_BYTES,)),
    Attack("1000 tasks, nothing in it", (0,)),
    Attack("1000 tasks, 16 KiB", (16 * 1024,)),
    Attack("1000 tasks, small and large", (0, MESSAGE_BYTES, 16 * 1024)),
    Attack("1000 tasks, the largest", (LARGEST_BYTES,)),
)


class Outcome(NamedTuple):
    """How many messages the receiver has worked off, and the most bytes that lay before it."""

    well_behaved: list[int]
    hostile: int
    peak_bytes: int

    @property
    def throughput(self) -> int:
        """All messages of the well-behaved."""
        return sum(self.well_behaved)

    @property
    def jain_index(self) -> float:
        """Of the well-behaved: 1 if all get the same, 1/n if one of n gets everything."""
        squares = sum(each * each for each in self.well_behaved)
        return self.throughput**2 / (len(self.well_behaved) * squares) if squares else 0.0


class Scene:
    """The receiver's work, and the senders' tasks, whatever is between them."""

    def __init__(self, attack: Attack | None, *, answered: bool) -> None:
        self.attack = attack
        self.answered = answered
        """Whether the well-behaved wait until a message is worked off before the next."""
        self.done: Counter[object] = Counter()
        self.waiting_bytes = self.peak_bytes = 0
        self.answers = [asyncio.Event() for _ in range(WELL_BEHAVED)]

    def sent(self, nbytes: int) -> None:
        self.waiting_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.waiting_bytes)

    async def work_off(self, nbytes: int, sender: object) -> None:
        await asyncio.sleep(0.0001 + nbytes * 0.000_001)
        self.waiting_bytes -= nbytes
        if isinstance(sender, int):
            self.answers[sender].set()
        if asyncio.get_running_loop().time() > WARM_UP_SECONDS:
            self.done[sender] += 1

    async def behave(self, send: Send, sender: int) -> None:
        while True:
            self.answers[sender].clear()
            await send(MESSAGE_BYTES, sender)
            if self.answered:
                await self.answers[sender].wait()

    async def misbehave(self, send: Send, sizes: tuple[int, ...], start: int) -> None:
        for place in itertools.count(start):
            await send(sizes[place % len(sizes)], HOSTILE)

    async def play(
        self, send: Send, receive: Callable[[], Coroutine[Any, Any, None]], seconds: float
    ) -> Outcome:
        jobs = [receive(), *[self.behave(send, number) for number in range(WELL_BEHAVED)]]
        if self.attack is not None:
            _, sizes, tasks_at_once = self.attack
            jobs += [self.misbehave(send, sizes, place) for place in range(tasks_at_once)]
        tasks = [asyncio.create_task(job) for job in jobs]
        await asyncio.sleep(WARM_UP_SECONDS + seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return Outcome(
            [self.done[number] for number in range(WELL_BEHAVED)],
            self.done[HOSTILE],
            self.peak_bytes,
        )


def through_inbox(
    attack: Attack | None = None, *, answered: bool = False, seconds: float = 4.0
) -> Outcome:
    """Give what gets through an inbox that is bounded in bytes and in messages."""

    async def play() -> Outcome:
        scene = Scene(attack, answered=answered)
        resources = ResourceLimits(slices=LIMIT_BYTES // MESSAGE_BYTES)
        async with testing.limiter(LIMIT_BYTES, resources=resources) as limiter:
            with Inbox[int](limiter.component("receiver"), size=int) as inbox:

                async def send(nbytes: int, sender: object) -> None:
                    await inbox.send(nbytes, sender=sender)
                    scene.sent(nbytes)

                async def receive() -> None:
                    while True:
                        async with await inbox.receive() as received:
                            await scene.work_off(received.message, received.sender)

                return await scene.play(send, receive, seconds)

    with asyncio.Runner(loop_factory=testing.VirtualTimeLoop) as runner:
        return runner.run(play())


def through_stream(
    attack: Attack | None = None, *, answered: bool = False, seconds: float = 4.0
) -> Outcome:
    """Give what gets through a memory object stream with as many places."""

    async def play() -> Outcome:
        scene = Scene(attack, answered=answered)
        sending, receiving = anyio.create_memory_object_stream[tuple[int, object]](PLACES)

        async def send(nbytes: int, sender: object) -> None:
            await sending.send((nbytes, sender))
            scene.sent(nbytes)

        async def receive() -> None:
            async for nbytes, sender in receiving:
                await scene.work_off(nbytes, sender)

        with sending, receiving:
            return await scene.play(send, receive, seconds)

    with asyncio.Runner(loop_factory=testing.VirtualTimeLoop) as runner:
        return runner.run(play())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of virtual time")
    options = parser.parse_args()
    print(f"{WELL_BEHAVED} well-behaved senders and a hostile one, {options.seconds:g} s\n")
    for answered in (False, True):
        for title, through in (("inbox", through_inbox), ("stream", through_stream)):
            alone = through(answered=answered, seconds=options.seconds)
            how = "one at a time, " if answered else ""
            print(
                f"{title}, {how}not attacked: {alone.throughput} messages, "
                f"Jain index {alone.jain_index:.3f}"
            )
            for attack in ATTACKS:
                outcome = through(attack, answered=answered, seconds=options.seconds)
                print(
                    f"  {attack.name:28} {outcome.throughput / alone.throughput:6.1%} of that, "
                    f"Jain index {outcome.jain_index:.3f}, hostile {outcome.hostile}, "
                    f"peak {outcome.peak_bytes / 2**20:.1f} MiB"
                )


if __name__ == "__main__":
    main()
