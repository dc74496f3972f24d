"""Drives the real ledger and the model through the same random operations.

    python -m tests.fuzz_ledger --steps 1000000 --seed 1

stops at the first step at which they differ or a promise of the semantics page is broken, and
prints the seed, what each of them said and the shortest list of operations found that still
shows it, as a program to paste into a test. Limits are small, so that everything contends
with everything; at the end of an episode all is given back, and must be free again.

An operation is a tuple of a method's name and its arguments; its tickets are numbers that
the driver chose, so a list stays meaningful when operations are taken out of it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from tests.model import Component, Core, Grant, Live, Model, Outcome, Waiter

__all__ = [
    "Config",
    "CoreFactory",
    "Difference",
    "Operation",
    "SideBySide",
    "check_promises",
    "fuzz",
    "is_growing",
    "load_factory",
    "main",
    "random_episode",
    "replay",
    "shrink",
]

Operation = tuple[Any, ...]
CoreFactory = Callable[..., Core]

DEFAULT_CORE = "tests.ledger_adapter:LedgerAdapter"
SHARES = tuple(map(Fraction, ("1/2", "1/2", "1/3", "2/3", "3/7", "1")))


class Difference(AssertionError):
    """The two ledgers disagree, or they broke a promise."""


@dataclass(frozen=True, slots=True)
class Config:
    """What an episode starts from, sizes in bytes."""

    limit_bytes: int
    baseline_bytes: int = 0
    share: Fraction = Fraction(1, 2)
    bypass_limit_bytes: int | None = None

    def make(self, factory: CoreFactory) -> Core:
        """Make a ledger."""
        return factory(
            self.limit_bytes,
            baseline_bytes=self.baseline_bytes,
            share=self.share,
            bypass_limit_bytes=self.bypass_limit_bytes,
        )


class SideBySide:
    """A ledger and the model, given the same operations and compared after each."""

    def __init__(self, config: Config, factory: CoreFactory) -> None:
        self.model = Model(
            config.limit_bytes,
            baseline_bytes=config.baseline_bytes,
            share=config.share,
            bypass_limit_bytes=config.bypass_limit_bytes,
        )
        self.core = config.make(factory)
        self._lines: dict[int, tuple[str, bool]] = {}
        self._last_admitted: dict[tuple[str, bool], int] = {}

    def is_meaningful(self, operation: Operation) -> bool:
        """Whether a caller that keeps to the rules of the protocol could do this now."""
        model = self.model
        match operation:
            case ("add", component, *_):
                return component not in model.components
            case ("request" | "request_nowait" | "enter", _, component, *_):
                return component in model.components
            case ("declare", component, *_):
                return component in model.components
            case ("observe", _, live):
                return all(component in model.components for component, _ in live)
            case ("leave", component):
                return component in model.components and model.components[component].entered > 0
            case ("cancel", ticket):
                return any(waiter.ticket == ticket for waiter in model.waiters())
            case ("shrink", ticket, size_bytes):
                held = model.grants.get(ticket)
                return held is not None and size_bytes <= held.size_bytes and not is_growing(held)
            case ("grow" | "grow_nowait", _, ticket, _) | ("release", ticket):
                return ticket in model.grants and not is_growing(model.grants[ticket])
            case _:
                return True

    def apply(self, operation: Operation) -> Outcome:
        """Do one operation on both.

        Raises:
            Difference: they do not agree on what came of it, or a promise is broken.
        """
        name, *arguments = operation
        model = self.model
        barriers = model.barriers()
        committed_bytes = model.total_committed_bytes
        firm_bytes = {node: max(node.granted_bytes, _firm(node)) for node in _nodes(model)}
        expected: Outcome = getattr(model, name)(*arguments)
        try:
            found: Outcome = getattr(self.core, name)(*arguments)
            snapshot = self.core.snapshot()
        except Exception as error:
            raise Difference(f"{operation}: {type(error).__name__}: {error}") from error
        if found != expected:
            raise Difference(f"{operation}: expected {expected}, found {found}")
        wanted = self.model.snapshot()
        if snapshot != wanted:
            for field, ours, theirs in zip(wanted._fields, wanted, snapshot, strict=True):
                if theirs is not None and theirs != ours:
                    raise Difference(f"{operation}: {field} is {theirs}, should be {ours}")
        try:
            check_promises(model)
            if name not in ("add", "declare"):
                assert all(node.granted_bytes <= firm_bytes[node] for node in firm_bytes)
            sets_live = name == "observe" and len(arguments) > 1
            if barriers and not (name == "lift_barrier" or sets_live or model.exclusive):
                # Nobody draws from the pool before it, but for those who came before it.
                first = barriers[0]
                assert (
                    model.barriers()[:1] != [first]
                    or model.total_committed_bytes <= committed_bytes
                    or any(ticket < first.ticket for ticket, _ in expected.admitted)
                ), "the pool was drawn from past a barrier"
            self._check_order(operation, expected)
        except AssertionError as error:
            raise Difference(f"{operation}: {error}") from error
        return expected

    def _check_order(self, operation: Operation, outcome: Outcome) -> None:
        """First come, first served in each line of a component, but for an exclusive grant."""
        match operation:
            case ("request" | "request_nowait", ticket, component, *_):
                self._lines[ticket] = component, False
            case ("enter", ticket, component) if outcome.status == "waiting":
                self._lines[ticket] = component, False
            case ("grow" | "grow_nowait", ticket, grant, _):
                held = self.model.grants[grant]
                if not held.is_exclusive:
                    self._lines[ticket] = held.component.name, True
        for ticket, _ in outcome.admitted:
            if (line := self._lines.get(ticket)) is not None:
                assert ticket > self._last_admitted.get(line, 0), f"{ticket} came in too late"
                self._last_admitted[line] = ticket

    def drain(self) -> None:
        """Give everything back on both.

        Raises:
            Difference: they do not agree, or something is still held.
        """
        model = self.model
        self.apply(
            ("observe", model.measured_bytes, tuple([(name, 0) for name in model.components]))
        )
        while waiters := model.waiters():
            self.apply(("cancel", waiters[0].ticket))
        for grant in list(model.grants):
            self.apply(("release", grant))
        for name, node in model.components.items():
            while node.entered:
                self.apply(("leave", name))
        self.apply(("observe", 0))
        if model.free_bytes != model.limit_bytes - model.baseline_bytes:
            raise Difference(f"in the end {model.free_bytes} are free")


def _nodes(model: Model) -> list[Component]:
    return list(model.components.values())


def _firm(node: Component) -> int:
    return 1 << 64 if node.firm_limit_bytes is None else node.firm_limit_bytes


def rule_allows(model: Model, waiter: Waiter, free_bytes: int) -> bool:
    """The rule as the page has it, once more: s + c <= share * (R + s)."""
    if waiter.kind == "enter":
        return waiter.draw_bytes <= free_bytes
    p, q = model.share.numerator, model.share.denominator
    held_bytes = waiter.component.held_bytes
    return q * (held_bytes + waiter.draw_bytes) <= p * (free_bytes + held_bytes)


def check_promises(model: Model) -> None:
    """What must be so after each operation, whatever came before.

    Raises:
        AssertionError: it is not so.
    """
    nodes = model.components.values()
    free_bytes = model.free_bytes
    sizes = dict.fromkeys(nodes, 0)
    for grant in model.grants.values():
        sizes[grant.component] += grant.size_bytes
    assert [node.granted_bytes for node in nodes] == list(sizes.values())
    heads = [head for node in nodes if (head := node.head()) and not head.is_firm_blocked]
    assert not [head for head in heads if head.draw_bytes <= 0], "a reserve is left unused"
    exclusive = [grant for grant in model.grants.values() if grant.is_exclusive]
    barriers = model.barriers()
    if exclusive:
        assert len(exclusive) == 1
        heads = [head for head in heads if head.is_of_exclusive_grant]
    elif barriers:
        heads = barriers[:1]
    who_fits = [head for head in heads if rule_allows(model, head, free_bytes)]
    assert not who_fits, "who may come in waits"
    for waiter in model.waiters():
        if waiter not in waiter.component.fronts():
            assert not waiter.is_barrier
        elif not waiter.is_barrier and not waiter.is_parked:
            assert waiter.bypassed_bytes is not None
            assert waiter.bypassed_bytes <= model.bypass_limit_bytes, "it has been passed too often"
    if model.pool_is_unused():
        # Somebody could go on, unless nobody in turn fits even without drift.
        for head in heads:
            assert head.draw_bytes > free_bytes + model.drift_bytes, "nothing can go on"


def is_growing(grant: Grant) -> bool:
    """Whether more has been asked for in a grant, and is waited for."""
    return any(waiter.grant is grant for waiter in grant.component.grows)


class _Generator:
    """Chooses the next operation for the state that the model is in."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._tickets = 0
        # Each episode does without some of the features, so that the others get further.
        self._with_nowait = random.random() < 0.7
        self._with_alone = random.random() < 0.4
        self._with_entries = random.random() < 0.7
        self._with_resize = random.random() < 0.4
        self._with_live = random.random() < 0.3
        self._with_declarations = random.random() < 0.3
        self._with_samples = random.random() < 0.5
        self._smallness = random.choice((0.2, 0.5, 0.9))

    def config(self) -> Config:
        random = self._random
        limit_bytes = random.choice((1, 7, 20, 64, 100, 100, 100, 1000)) + random.randrange(5)
        return Config(
            limit_bytes=limit_bytes,
            baseline_bytes=random.choice((0, 0, 0, limit_bytes // 5)),
            share=random.choice(SHARES),
            bypass_limit_bytes=random.choice((None, None, 0, limit_bytes // 4, 3 * limit_bytes)),
        )

    def components(self, config: Config) -> list[Operation]:
        random = self._random
        pool_bytes = config.limit_bytes - config.baseline_bytes
        names = "abcdef"[: random.choice((1, 2, 2, 3, 3, 4, 6))]
        return [("add", name, *self._bounds(pool_bytes)) for name in names]

    def _bounds(self, pool_bytes: int) -> tuple[int, int | None]:
        """A minimum and a firm limit, in bytes."""
        random = self._random
        minimum_bytes = random.choice((0, 0, random.randrange(pool_bytes // 2 + 1)))
        widest_bytes = random.choice((pool_bytes, 1 + pool_bytes // 8))
        return minimum_bytes, random.choice((None, minimum_bytes + random.randint(1, widest_bytes)))

    def operation(self, model: Model) -> Operation:
        random = self._random
        component = random.choice(list(model.components))
        waiting = model.waiters()
        held = random.choice(list(model.grants)) if model.grants else None
        # Those who wait go away in the end, so that queues stay short and much happens.
        if waiting and random.random() * 40 < len(waiting):
            return ("cancel", random.choice(waiting).ticket)
        if model.exclusive is not None and random.random() < 0.3:
            return self._around_exclusive(model, model.exclusive)
        dice = random.random()
        if dice < 0.35 and held is not None and not is_growing(model.grants[held]):
            grant = model.grants[held]
            if dice < 0.22:
                return ("release", held)
            if dice < 0.25:
                return ("shrink", held, random.randint(0, grant.size_bytes))
            size_bytes = self._size(model, grant.component.name)
            if dice < 0.31:
                return ("grow", self._ticket(), held, size_bytes)
            return ("grow_nowait", self._ticket(), held, size_bytes)
        if dice < 0.65:
            return self._request(model, component)
        if dice < 0.73 and self._with_nowait:
            return ("request_nowait", self._ticket(), component, self._size(model, component))
        if dice < 0.82 and self._with_entries:
            inside = [c.name for c in model.components.values() if c.entered]
            if inside and dice > 0.78:
                return ("leave", random.choice(inside))
            return ("enter", self._ticket(), component)
        if dice < 0.86 and self._with_live:
            return ("observe", *self._reading_with_live(model))
        if dice < 0.91 and self._with_samples:
            return ("observe", self._reading(model))
        if dice < 0.93 and self._with_resize:
            least_bytes = model.baseline_bytes + 1
            wanted_bytes = model.limit_bytes + random.randint(-20, 20)
            return ("resize", max(least_bytes, wanted_bytes))
        if dice < 0.94:
            return ("lift_barrier",)
        if dice < 0.945 and self._with_declarations:
            return ("declare", component, *self._bounds(model.limit_bytes - model.baseline_bytes))
        return self._request(model, component)

    def _around_exclusive(self, model: Model, exclusive: Grant) -> Operation:
        """What concerns the grant that holds the pool alone, which is rare otherwise."""
        random = self._random
        component = exclusive.component
        if random.random() < 0.3:
            live = (random.choice(list(model.components)), random.choice((0, 9, 30)))
            return ("observe", model.measured_bytes, (live,))
        if random.random() < 0.05:
            smaller_bytes = max(model.baseline_bytes + 1, model.limit_bytes // 2)
            return ("resize", random.choice((2 * model.limit_bytes, smaller_bytes)))
        mates = [t for t, grant in model.grants.items() if grant.component is component]
        ticket = random.choice(mates)
        grant = model.grants[ticket]
        if not is_growing(grant):
            if random.random() < 0.3:
                return ("shrink", ticket, random.randint(0, grant.size_bytes))
            room_bytes = model.alone_cap_bytes(component) - grant.size_bytes
            return ("grow", self._ticket(), ticket, random.randint(0, max(1, room_bytes)))
        return ("enter", self._ticket(), component.name)

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def _request(self, model: Model, component: str) -> Operation:
        random = self._random
        alone = self._with_alone and random.random() < 0.2
        if alone and random.random() < 0.5:
            # One that has a chance to be alone.
            node = model.components[component]
            low, high = model.normal_cap_bytes(node), model.alone_cap_bytes(node)
            if 0 < low < high:
                return ("request", self._ticket(), component, random.randint(low, high), None, True)
        size_bytes = self._size(model, component)
        up_to = size_bytes + random.randrange(50) if random.random() < 0.15 else None
        return ("request", self._ticket(), component, size_bytes, up_to, alone)

    def _size(self, model: Model, component: str) -> int:
        """Small, or anything, or just about at one of the bounds."""
        random = self._random
        node = model.components[component]
        dice = random.random()
        if dice > 0.99:
            return 0
        if dice < self._smallness:
            size_bytes = random.randint(1, 1 + max(0, model.limit_bytes // 8))
        elif random.random() < 0.5:
            size_bytes = random.randint(1, max(1, model.normal_cap_bytes(node)))
        else:
            bound_bytes = random.choice(
                (
                    model.normal_cap_bytes(node),
                    model.free_bytes // 2,
                    node.unused_minimum_bytes,
                    (node.firm_limit_bytes or 0) - node.granted_bytes,
                )
            )
            size_bytes = bound_bytes + random.randint(-1, 1)
        return max(1, size_bytes)

    def _reading_with_live(self, model: Model) -> tuple[int, Live]:
        """Live bytes of one, some or all, often about as much as was granted or reserved."""
        random = self._random
        live: dict[str, int] = {}
        more_bytes = 0
        names = list(model.components)
        for name in random.sample(names, random.choice((1, random.randint(1, len(names))))):
            node = model.components[name]
            about_bytes = random.choice((node.granted_bytes, node.minimum_bytes, node.live_bytes))
            live_bytes = random.choice(
                (0, about_bytes + random.randint(-5, 5), random.randrange(model.limit_bytes))
            )
            live[name] = max(0, live_bytes)
            more_bytes += max(0, live[name] - node.committed_bytes)
        measured_bytes = random.choice((model.measured_bytes, self._reading(model, more_bytes)))
        return measured_bytes, tuple(live.items())

    def _reading(self, model: Model, more_bytes: int = 0) -> int:
        random = self._random
        explained_bytes = model.baseline_bytes + model.total_committed_bytes + more_bytes
        return max(
            0,
            random.choice(
                (
                    explained_bytes,
                    explained_bytes + random.randint(-10, 10),
                    random.randrange(model.limit_bytes + 20),
                    model.limit_bytes * 95 // 100 + random.randint(0, 1),
                    model.limit_bytes + random.randint(-1, 0),
                    model.baseline_bytes,
                )
            ),
        )


def load_factory(path: str) -> CoreFactory:
    """Find what makes a ledger, given as ``MODULE:NAME``."""
    module, _, name = path.partition(":")
    factory: CoreFactory = getattr(importlib.import_module(module), name)
    return factory


def random_episode(
    seed: int, steps: int, factory: CoreFactory, seen: Counter[str] | None = None
) -> tuple[Config, list[Operation], Difference | None]:
    """Run one episode; give what was done, and the difference that ended it, if any."""
    generator = _Generator(Random(seed))
    config = generator.config()
    pair = SideBySide(config, factory)
    done: list[Operation] = []
    operations = generator.components(config)
    while len(done) < steps:
        operation = operations.pop(0) if operations else generator.operation(pair.model)
        done.append(operation)
        try:
            outcome = pair.apply(operation)
        except Difference as difference:
            return config, done, difference
        if seen is not None:
            seen[f"{operation[0]} {outcome.status}"] += 1
    try:
        pair.drain()
    except Difference as difference:
        return config, done, difference
    return config, done, None


def replay(config: Config, operations: list[Operation], factory: CoreFactory) -> None:
    """Run operations again, leaving out those that have become meaningless.

    Raises:
        Difference: the ledgers do not agree.
    """
    pair = SideBySide(config, factory)
    for operation in operations:
        if pair.is_meaningful(operation):
            pair.apply(operation)
    pair.drain()


def _differs(config: Config, operations: list[Operation], factory: CoreFactory) -> bool:
    try:
        replay(config, operations, factory)
    except Difference:
        return True
    return False


def shrink(config: Config, operations: list[Operation], factory: CoreFactory) -> list[Operation]:
    """Take out what is not needed for a difference, then make the numbers smaller."""
    while True:
        before = operations
        size = max(1, len(operations) // 2)
        while size:
            start = 0
            while start < len(operations):
                fewer = operations[:start] + operations[start + size :]
                if _differs(config, fewer, factory):
                    operations = fewer
                else:
                    start += size
            size //= 2
        operations = _with_small_numbers(config, operations, factory)
        if operations == before:
            return operations


def _with_small_numbers(
    config: Config, operations: list[Operation], factory: CoreFactory
) -> list[Operation]:
    for index, operation in enumerate(operations):
        first_size = 1 if operation[0] in ("observe", "resize") else 2
        for place in range(first_size, len(operation)):
            if operation[0] in ("grow", "grow_nowait") and place == 2:
                continue
            for smaller in _smaller(operation[place]):
                changed = (*operation[:place], smaller, *operation[place + 1 :])
                attempt = [*operations[:index], changed, *operations[index + 1 :]]
                if _differs(config, attempt, factory):
                    operations, operation = attempt, changed
                    break
    return operations


def _smaller(value: Any) -> list[Any]:
    """Numbers below that one, or live bytes with less in them."""
    if isinstance(value, tuple):
        live: Live = value
        parts = [(live[:place], each, live[place + 1 :]) for place, each in enumerate(live)]
        return [before + after for before, _, after in parts] + [
            (*before, (name, smaller), *after)
            for before, (name, live_bytes), after in parts
            for smaller in _smaller(live_bytes)
        ]
    if isinstance(value, bool) or not isinstance(value, int):
        return []
    return sorted({1, value // 2, value - 1} - {0, value, -1})


def fuzz(
    steps: int, seed: int, factory: CoreFactory, *, episode: int = 400, report: bool = False
) -> str | None:
    """Run so many steps; give the report of the first difference, or None."""
    seen: Counter[str] = Counter()
    started = time.perf_counter()
    for number in range(-(-steps // episode)):
        episode_seed = seed * 1_000_003 + number
        config, done, difference = random_episode(episode_seed, episode, factory, seen)
        if difference is not None:
            shortest = shrink(config, done, factory)
            try:
                replay(config, shortest, factory)
            except Difference as last:
                difference = last
            lines = ",\n    ".join(map(repr, shortest))
            return (
                f"seed {seed}, episode {number}, step {len(done)}: {difference}\n"
                f"replay(\n  {config},\n  [\n    {lines},\n  ],\n  factory,\n)"
            )
    if report:
        seconds = time.perf_counter() - started
        total = seen.total()
        print(f"{total} steps, seed {seed}: no difference; {total / seconds:,.0f} steps/s")
        for what, count in sorted(seen.items()):
            print(f"  {what:<26}{count:>10}")
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; give its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_ledger", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episode", type=int, default=400, help="steps before starting afresh")
    parser.add_argument("--core", default=DEFAULT_CORE, help="MODULE:CLASS to try")
    options = parser.parse_args(arguments)
    factory = load_factory(options.core)
    found = fuzz(options.steps, options.seed, factory, episode=options.episode, report=True)
    if found is not None:
        print(found, file=sys.stderr)
    return 0 if found is None else 1


if __name__ == "__main__":
    raise SystemExit(main())
