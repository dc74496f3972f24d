"""Holds the ledger against bus1's arithmetic, in random sequences without waiting.

    python -m tests.fuzz_bus1 --sequences 10000 --seed 1

Receivers charge themselves, senders send to them, messages are delivered with fewer handles
than were charged and without their fds, and are given back. After each operation everything
that anybody has is compared, by resource and sender; what is refused must change nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from random import Random

from membound_async.exceptions import GrantTooLarge, QuotaExceeded
from membound_async.ledger import NO_LIMIT, Ledger
from membound_async.stocks import Pool
from membound_async.waiters import Kind, Request
from tests.bus1 import DEFAULTS, RESOURCES, Amounts, Kernel, Receiver, Refused

__all__ = ["Unequal", "fuzz", "main", "run"]

SHARES = tuple(map(Fraction, ("1/2", "1/2", "1/2", "1/3", "2/3", "3/7", "1")))
SENDERS = ("x", "y", "z", "w")


class Unequal(AssertionError):
    """The ledger and the kernel disagree."""


@dataclass(slots=True)
class Message:
    """What was charged together."""

    name: str
    amounts: Amounts
    sender: str | None


class Both:
    """A kernel and a ledger with the same receivers."""

    def __init__(self, random: Random) -> None:
        self.random = random
        limits = dict(DEFAULTS)
        if random.random() < 0.7:
            limits = {resource: random.choice((5, 16, 60, 200)) for resource in RESOURCES}
        groups: tuple[Amounts, ...] = ()
        if random.random() < 0.3:
            chosen = random.sample(RESOURCES, random.randint(1, 4))
            groups = ({each: max(2, limits[each] // random.choice((1, 2, 3))) for each in chosen},)
        share = random.choice(SHARES)
        self.kernel = Kernel(limits, groups, share)
        others = {resource: limits[resource] for resource in RESOURCES[1:]}
        self.ledger = Ledger(limits["bytes"], share=share, others=others)
        self.pools: dict[tuple[int | None, str], Pool] = {
            (None, resource): pool for resource, pool in self.ledger.pools.items()
        }
        made = [self.ledger.group(group) for group in groups]
        for number, group in enumerate(made):
            self.pools |= {(number, resource): pool for resource, pool in group.items()}
        for name in "abc"[: random.randint(1, 3)]:
            receiver = self.receiver(limits, groups)
            firm = receiver.firm
            account = self.ledger.account(
                name,
                receiver.minimum,
                firm.get("bytes", NO_LIMIT),
                others={each: amount for each, amount in firm.items() if each != "bytes"},
            )
            if receiver.group is not None:
                self.ledger.join(account, made[receiver.group])
            if not self.ledger.enter_again(account):
                self.ledger.force(Request(account, account.minimum, Kind.ENTER))
            self.kernel.receivers[name] = receiver
        self.messages: list[Message] = []
        self.state: object = None
        self.compare("at first")

    def receiver(self, limits: Amounts, groups: tuple[Amounts, ...]) -> Receiver:
        random = self.random
        there = min([limits["bytes"], *[group.get("bytes", limits["bytes"]) for group in groups]])
        minimum = random.choice((0, 0, random.randint(0, there // 5)))
        firm = {
            resource: random.randint(1, limits[resource]) + (minimum if resource == "bytes" else 0)
            for resource in RESOURCES
            if random.random() < 0.3
        }
        return Receiver(minimum, firm, 0 if groups and random.random() < 0.8 else None)

    def step(self) -> str:
        """Do one thing.

        Raises:
            Unequal: they disagree, or it changed what it must not.
        """
        random = self.random
        if self.messages and random.random() < 0.35:
            message = random.choice(self.messages)
            if message.sender is not None and random.random() < 0.6:
                return self.deliver(message)
            return self.release(message)
        return self.send()

    def send(self) -> str:
        random = self.random
        name = random.choice(list(self.kernel.receivers))
        sender = random.choice((None, *SENDERS, *SENDERS))
        chosen = [each for each in RESOURCES if random.random() < 0.6] or [RESOURCES[0]]
        amounts = {each: self.amount(name, sender, each) for each in chosen}
        account = self.ledger.accounts[name]
        request = Request(
            account,
            amounts.get("bytes", 0),
            also={each: amount for each, amount in amounts.items() if each != "bytes"},
            sender=None if sender is None else self.ledger.sender(account, sender),
        )
        what = f"{name} from {sender}: {amounts}"
        before = self.state
        wanted = True
        try:
            self.kernel.charge(name, amounts, sender)
        except Refused:
            wanted = False
        try:
            settled = self.ledger.request_nowait(request)
        except (QuotaExceeded, GrantTooLarge) as error:
            if wanted:
                raise Unequal(f"{what} is refused: {error}") from error
            self.compare(what)
            if self.state != before:
                raise Unequal(f"{what} is refused, but changes something") from error
            return "refused"
        if not wanted or settled:
            raise Unequal(f"{what} is admitted")
        self.compare(what)
        self.messages.append(Message(name, amounts, sender))
        return "admitted" if sender is None else "sent"

    def amount(self, name: str, sender: str | None, resource: str) -> int:
        """Little, or about as much as there may be had."""
        random = self.random
        receiver = self.kernel.receivers[name]
        limit = min(self.kernel.pools(receiver, resource))
        if random.random() < 0.5:
            return random.randint(0, 1 + max(0, limit // 16))
        low, high = 0, max(1, limit)  # the most that is allowed: half of what is left each time
        while low < high:
            middle = (low + high + 1) // 2
            if self.kernel.allows(receiver, resource, middle, sender):
                low = middle
            else:
                high = middle - 1
        return max(0, low + random.choice((-1, 0, 0, 0, 1)))

    def deliver(self, message: Message) -> str:
        random = self.random
        name, amounts, sender = message.name, message.amounts, message.sender
        assert sender is not None
        real = dict(amounts)
        if "fds" in real:
            real["fds"] = 0
        if "handles" in real:
            real["handles"] = random.randint(0, real["handles"])
        receiver = self.kernel.receivers[name]
        before = {each: self.kernel.pools(receiver, each) for each in RESOURCES}
        self.kernel.deliver(name, amounts, sender, real)
        account = self.ledger.accounts[name]
        self.ledger.deliver(
            account,
            amounts.get("bytes", 0),
            {each: amount for each, amount in amounts.items() if each != "bytes"},
            self.ledger.sender(account, sender),
            {each: amounts[each] - real[each] for each in amounts},
        )
        for resource, free in before.items():
            after = self.kernel.pools(receiver, resource)
            if any(now < then for now, then in zip(after, free, strict=True)):
                raise Unequal(f"delivered to {name}, there is less free of {resource}")
        message.amounts, message.sender = real, None
        self.compare(f"delivered to {name} from {sender}: {amounts}")
        return "delivered"

    def release(self, message: Message) -> str:
        name, amounts, sender = message.name, message.amounts, message.sender
        self.messages.remove(message)
        self.kernel.release(name, amounts, sender)
        account = self.ledger.accounts[name]
        self.ledger.give_back(
            account,
            amounts.get("bytes", 0),
            also={each: amount for each, amount in amounts.items() if each != "bytes"},
            sender=None if sender is None else self.ledger.sender(account, sender),
        )
        self.compare(f"released by {name}: {amounts}")
        return "released"

    def compare(self, after: str) -> None:
        """Compare everything, and keep it.

        Raises:
            Unequal: they disagree.
        """
        wanted: dict[object, object] = {
            **{place: self.kernel.free(place[1], place[0]) for place in self.pools},
            **{
                (name, resource): (receiver.granted[resource], receiver.in_flight[resource])
                for name, receiver in self.kernel.receivers.items()
                for resource in RESOURCES
            },
        }
        found: dict[object, object] = {place: pool.free for place, pool in self.pools.items()}
        for name, account in self.ledger.accounts.items():
            for resource in RESOURCES:
                stock = account if resource == "bytes" else account.others.get(resource)
                senders = {
                    sender.name: sender.held[stock]
                    for sender in account.by_sender.values()
                    if stock in sender.held
                }
                if stock is not None and stock.in_flight != sum(senders.values()):
                    raise Unequal(f"{after}: {stock.in_flight} {resource} in flight, {senders}")
                found[name, resource] = stock.granted if stock is not None else 0, senders
        for key, value in wanted.items():
            if found[key] != value:
                raise Unequal(f"{after}: {key} is {found[key]}, should be {value}")
        self.keep_promises(after)
        self.state = repr(wanted)

    def keep_promises(self, after: str) -> None:
        """Check what is promised whatever came before."""
        for name, receiver in self.kernel.receivers.items():
            for resource in RESOURCES:
                firm = receiver.firm.get(resource, NO_LIMIT)
                if receiver.granted[resource] + receiver.sent(resource) > firm:
                    raise Unequal(f"{after}: {name} has more {resource} than its firm limit")
        for number, resource in self.pools:
            if self.kernel.free(resource, number) < 0:
                raise Unequal(f"{after}: there are less than no {resource} free")


def run(seed: int, steps: int = 40) -> Counter[str]:
    """Run one sequence, and give everything back in the end; say what came of the operations.

    Raises:
        Unequal: the ledger and the kernel disagree.
    """
    both = Both(Random(seed))
    seen: Counter[str] = Counter()
    for _ in range(steps):
        seen[both.step()] += 1
    while both.messages:
        both.release(both.messages[0])
    for (number, resource), pool in both.pools.items():
        reserved = sum(
            each.reserve(resource)
            for each in both.kernel.receivers.values()
            if number in (None, each.group)
        )
        if pool.free != pool.limit - reserved:
            raise Unequal(f"{resource}: {pool.free} of {pool.limit} in the end")
    return seen


def fuzz(sequences: int, seed: int) -> Counter[str]:
    """Run so many sequences.

    Raises:
        Unequal: as ``run``, with the sequence's own seed.
    """
    seen: Counter[str] = Counter()
    for number in range(sequences):
        own_seed = seed * 1_000_003 + number
        try:
            seen += run(own_seed)
        except Unequal as unequal:
            raise Unequal(f"run({own_seed}): {unequal}") from unequal
    return seen


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; give its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_bus1", description=__doc__)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        seen = fuzz(options.sequences, options.seed)
    except Unequal as unequal:
        print(unequal, file=sys.stderr)
        return 1
    print(f"{options.sequences} sequences, seed {options.seed}: no difference; {dict(seen)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
