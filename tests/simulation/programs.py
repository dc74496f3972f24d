"""Random programs as data: one seed, one program, and the Python code that runs it by itself.

A program is a limiter's settings, components, a script for what memory is measured, and a few
tasks with a list of steps each. Amounts are small numbers, so that everything contends with
everything. Nothing here knows what the limiter will say to it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random
from typing import Literal

__all__ = [
    "Cancel",
    "Catch",
    "Change",
    "Channel",
    "Close",
    "Component",
    "Drain",
    "Enter",
    "Grant",
    "Look",
    "Probe",
    "Program",
    "Put",
    "Raise",
    "Read",
    "Receive",
    "Reclaim",
    "Resize",
    "Settings",
    "Sleep",
    "Step",
    "Take",
    "Task",
    "Within",
    "code",
    "program",
]


class _Shown:
    """Shows itself as the code that makes it, without what is as it would be anyway."""

    __slots__ = ()

    def __repr__(self) -> str:
        given = [
            f"{field.name}={value!r}"
            for field in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


# --- what there is


@dataclass(frozen=True, slots=True, repr=False)
class Settings(_Shown):
    """How the limiter is made. ``share`` is ``"1/2"``, or ``"polynomial"``."""

    limit: int = 1000
    share: str = "1/2"
    slop_factor: float = 0.0
    baseline: int = 0
    bypass_limit: int | None = None
    stall_after_seconds: float = 3.0
    observe: bool = False
    mode: Literal["strict", "permissive"] = "strict"
    fds: int | None = None
    slices: int | None = None
    delays: bool = False
    stale_after_seconds: float = 1.0
    in_c: bool = False
    """Whether the fast path in C is used, where it is built; what it does cannot be watched."""


@dataclass(frozen=True, slots=True, repr=False)
class Component(_Shown):
    """One component and its bounds."""

    path: str
    minimum: int = 0
    firm_limit: int | None = None
    fds: int | None = None
    live: tuple[tuple[float, int], ...] = ()
    """From when on its code really has how many bytes, if that is tracked."""


@dataclass(frozen=True, slots=True, repr=False)
class Probe(_Shown):
    """What memory is measured."""

    follows: float = 0.0
    """How many bytes are really used for each that is granted."""
    script: tuple[tuple[float, int], ...] = ()
    """From when on how many more are."""
    fails: tuple[tuple[float, float], ...] = ()
    """From when until when it cannot be read."""


@dataclass(frozen=True, slots=True, repr=False)
class Reclaim(_Shown):
    """A reclaimer: it frees what it says, nothing, or fails, hangs, or asks for memory itself."""

    what: Literal["helps", "lies", "raises", "hangs", "asks", "releases"]
    component: int = 0
    in_task: bool = True


@dataclass(frozen=True, slots=True, repr=False)
class Channel(_Shown):
    """An inbox or a memory stream."""

    component: int = 0
    kind: Literal["inbox", "stream"] = "inbox"
    overflow: Literal["wait", "raise", "drop_oldest"] = "wait"
    most: int | None = None
    settle: bool = False


# --- what tasks do


@dataclass(frozen=True, slots=True, repr=False)
class Sleep(_Shown):
    """Wait for so long, or let others run."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True, repr=False)
class Grant(_Shown):
    """Hold so many bytes during the steps."""

    nbytes: int
    component: int = 0
    how: Literal["with", "await", "nowait", "current"] = "with"
    steps: tuple[Step, ...] = ()
    up_to: int | None = None
    timeout: float | None = None
    alone: bool = False
    sender: str | None = None
    fds: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Change(_Shown):
    """Do something with a grant that this task holds, or another one."""

    what: Literal[
        "grow",
        "grow_nowait",
        "shrink",
        "resize",
        "split",
        "transfer",
        "transfer_nowait",
        "share",
        "deliver",
        "release",
        "enter_again",
        "drop",
        "hand_on",
    ]
    which: int = -1
    nbytes: int = 0
    component: int = 0
    of: int | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Take(_Shown):
    """Take over a grant that was handed on, and hold it during the steps."""

    seconds: float = 1.0
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Enter(_Shown):
    """Be in a component during the steps."""

    component: int
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Within(_Shown):
    """Do the steps as far as there is time."""

    seconds: float
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Catch(_Shown):
    """Do the steps up to the first error."""

    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Raise(_Shown):
    """Fail, as any code may."""


@dataclass(frozen=True, slots=True, repr=False)
class Cancel(_Shown):
    """Cancel a task: now, or when a request of its is settled and it has not run yet."""

    task: int
    when: Literal["now", "woken"] = "now"
    in_scope: bool = True


@dataclass(frozen=True, slots=True, repr=False)
class Put(_Shown):
    """Send a message."""

    nbytes: int
    channel: int = 0
    sender: str | None = None
    nowait: bool = False
    fds: int = 0
    given: bool = False
    """Whether the message travels under a grant that is held already."""


@dataclass(frozen=True, slots=True, repr=False)
class Receive(_Shown):
    """Receive a message and hold what it came with during the steps."""

    channel: int = 0
    nowait: bool = False
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Drain(_Shown):
    """Read a memory stream with an iterator, up to so many items."""

    channel: int = 0
    how: Literal["bounded", "batches"] = "bounded"
    component: int = 0
    items: int = 3
    max_items: int | None = None
    max_seconds: float | None = None
    pause: float = 0.0


@dataclass(frozen=True, slots=True, repr=False)
class Close(_Shown):
    """Close an inbox, or one end of a memory stream."""

    channel: int = 0
    end: Literal["send", "receive"] = "send"


@dataclass(frozen=True, slots=True, repr=False)
class Read(_Shown):
    """Read a source of items of these sizes with an iterator."""

    sizes: tuple[int, ...]
    how: Literal["bounded", "batches"] = "bounded"
    component: int = 0
    ahead: int = 0
    max_items: int | None = None
    max_seconds: float | None = None
    every: float = 0.0
    """How long the source takes for each item."""
    pause: float = 0.0
    leaves_open: bool = False
    """Whether the iterator is dropped instead of closed."""


@dataclass(frozen=True, slots=True, repr=False)
class Resize(_Shown):
    """Change the limit."""

    limit: int


@dataclass(frozen=True, slots=True, repr=False)
class Look(_Shown):
    """Ask for a snapshot."""

    what: Literal["statistics", "held_grants", "waiting_requests", "component"]


Step = (
    Sleep
    | Grant
    | Change
    | Take
    | Enter
    | Within
    | Catch
    | Raise
    | Cancel
    | Put
    | Receive
    | Drain
    | Close
    | Read
    | Resize
    | Look
)


@dataclass(frozen=True, slots=True, repr=False)
class Task(_Shown):
    """What one task does, from when on, and whether it goes on after an error."""

    steps: tuple[Step, ...] = ()
    start: float = 0.0
    goes_on: bool = True


@dataclass(frozen=True, slots=True, repr=False)
class Program(_Shown):
    """All of it."""

    seed: int
    settings: Settings = Settings()
    components: tuple[Component, ...] = (Component("a"),)
    probe: Probe = Probe()
    reclaim: tuple[Reclaim, ...] = ()
    channels: tuple[Channel, ...] = ()
    tasks: tuple[Task, ...] = ()


def code(of: Program, backend: str = "asyncio") -> str:
    """Give the Python code of a test that runs the program."""
    lines = [
        "from tests.simulation.programs import *",
        "from tests.simulation.runner import run",
        "",
        "run(",
        *_lines(of, 1),
        f'    backend="{backend}",',
        ")",
    ]
    return "\n".join(lines)


def _lines(value: object, depth: int, name: str = "") -> list[str]:
    """Show a value in lines that are not too long."""
    indent = "    " * depth
    prefix = f"{name}=" if name else ""
    whole = f"{indent}{prefix}{value!r},"
    if len(whole) <= 96:
        return [whole]
    if isinstance(value, tuple):
        inner = [line for each in value for line in _lines(each, depth + 1)]
        return [f"{indent}{prefix}(", *inner, f"{indent}),"]
    if isinstance(value, _Shown):
        inner = []
        for field in fields(value):  # type: ignore[arg-type]
            if (part := getattr(value, field.name)) != field.default:
                inner += _lines(part, depth + 1, field.name)
        return [f"{indent}{prefix}{type(value).__name__}(", *inner, f"{indent}),"]
    return [whole]


# --- at random


def program(seed: int) -> Program:
    """Give the program of a seed."""
    return _Writer(seed).program()


_TIMES = (0.0, 0.0, 0.0, 0.01, 0.05, 0.1, 0.25, 0.3, 1.0)
_SHARES = ("1/2", "1/2", "1/2", "1/2", "1", "1", "1/3", "3/4", "polynomial")


class _Writer:
    """Writes one program. Each has some features only, so that these meet each other often."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random = Random(seed)
        likely = lambda part: random.random() < part  # noqa: E731
        self.with_minimums = likely(0.45)
        self.with_firm = likely(0.4)
        self.with_senders = likely(0.35)
        self.with_channels = likely(0.45)
        self.with_fds = likely(0.2)
        self.with_changes = likely(0.65)
        self.with_handing_on = likely(0.3)
        self.with_cancels = likely(0.5)
        self.with_limits = likely(0.35)
        self.with_alone = likely(0.15)
        self.with_reads = likely(0.25)
        self.with_resizes = likely(0.2)
        self.with_pressure = likely(0.35)
        self.with_failures = likely(0.4)
        self.smallness = random.choice((0.1, 0.3, 0.7))
        self.limit = random.choice((100, 300, 1000, 1000, 1000, 4000)) + random.randrange(3)
        self.left = 0
        self.channels: tuple[Channel, ...] = ()
        self.inside = 0
        """How many grants the next step is inside of."""

    def likely(self, part: float) -> bool:
        return self.random.random() < part

    def program(self) -> Program:
        random = self.random
        settings = self.settings()
        components = tuple(
            self.component(path)
            for path in ("a", "b", "a.b", "c")[: random.choice((1, 2, 2, 3, 3, 4))]
        )
        self.components = len(components)
        count = random.choice((1, 1, 2)) if self.with_channels else 0
        self.channels = tuple(self.channel() for _ in range(count))
        count = random.choice((2, 2, 3, 3, 4, 5, 6, 8))
        self.tasks = count
        self.kinds = self.choose_kinds()
        most = max(3, random.choice((8, 15, 20, 30)) // count)
        tasks = tuple(self.task(most) for _ in range(count))
        return Program(
            seed=self.seed,
            settings=settings,
            components=components,
            probe=self.probe() if self.with_pressure else Probe(),
            reclaim=tuple(self.reclaim() for _ in range(random.randrange(3)))
            if self.with_pressure
            else (),
            channels=self.channels,
            tasks=tasks,
        )

    def settings(self) -> Settings:
        random, limit = self.random, self.limit
        return Settings(
            limit=limit,
            share=random.choice(_SHARES),
            slop_factor=random.choice((0.0, 0.0, 0.15)),
            baseline=random.choice((0, 0, limit // 10)),
            bypass_limit=random.choice((None, None, limit // 10, limit // 3)),
            stall_after_seconds=random.choice((0.5, 2.0, 3.0, 10.0)),
            observe=self.likely(0.04),
            mode=random.choice(("strict", "strict", "permissive")),
            fds=random.choice((4, 12)) if self.with_fds else None,
            slices=random.choice((5, 20)) if self.with_fds and self.likely(0.4) else None,
            delays=self.with_pressure and self.likely(0.7),
            stale_after_seconds=random.choice((0.3, 2.0)),
            in_c=self.likely(0.15),
        )

    def component(self, path: str) -> Component:
        random, limit = self.random, self.limit
        minimum, firm = 0, None
        if self.with_minimums and self.likely(0.6):
            minimum = random.randint(1, limit // random.choice((2, 4, 4, 8)))
        if self.with_firm and self.likely(0.6):
            firm = minimum + random.randint(1, limit // 2)
        live: tuple[tuple[float, int], ...] = ()
        if self.with_pressure and self.likely(0.25):
            live = self.script(limit // 2)
        return Component(
            path,
            minimum,
            firm,
            random.choice((None, 2, 5)) if self.with_fds else None,
            live,
        )

    def script(self, most: int) -> tuple[tuple[float, int], ...]:
        random = self.random
        moments = sorted(random.choice((0.0, 0.1, 0.3, 0.7, 1.5, 3.0, 5.0)) for _ in range(3))
        return tuple((moment, random.choice((0, random.randint(0, most)))) for moment in moments)

    def probe(self) -> Probe:
        random = self.random
        fails: tuple[tuple[float, float], ...] = ()
        if self.likely(0.2):
            start = random.choice((0.1, 0.5, 1.0))
            fails = ((start, start + random.choice((0.2, 1.0, 4.0))),)
        return Probe(
            follows=random.choice((0.0, 0.5, 1.0, 1.0, 1.5)),
            script=self.script(int(self.limit * 1.2)),
            fails=fails,
        )

    def reclaim(self) -> Reclaim:
        what: tuple[Literal["helps", "lies", "raises", "hangs", "asks", "releases"], ...] = (
            "helps",
            "helps",
            "lies",
            "raises",
            "hangs",
            "asks",
            "releases",
        )
        return Reclaim(
            self.random.choice(what),
            self.random.randrange(self.components),
            in_task=self.likely(0.7),
        )

    def channel(self) -> Channel:
        random = self.random
        most = random.choice((None, None, 1, 3))
        if self.likely(0.4):
            return Channel(random.randrange(self.components), "stream", most=most)
        return Channel(
            random.randrange(self.components),
            overflow=random.choice(("wait", "wait", "raise", "drop_oldest")),
            most=most,
            settle=self.with_fds and self.likely(0.5),
        )

    def choose_kinds(self) -> list[str]:
        kinds = ["sleep", "sleep", "grant", "grant", "grant", "grant", "look", "catch"]
        kinds += ["enter"] * (3 if self.with_minimums else 1)
        kinds += ["change"] * (4 * self.with_changes)
        kinds += ["hand_on", "take", "take"] * self.with_handing_on
        kinds += ["cancel"] * (2 * self.with_cancels)
        kinds += ["within"] * (2 * self.with_limits)
        kinds += ["put"] * 5 + ["receive"] * 3 if self.with_channels else []
        kinds += ["close"] * (self.with_channels and self.likely(0.3))
        if any(channel.kind == "stream" for channel in self.channels):
            kinds += ["drain", "drain"]
        kinds += ["read"] * (3 * self.with_reads)
        kinds += ["resize"] * self.with_resizes
        kinds += ["raise"] * self.with_failures
        return kinds

    def task(self, most: int) -> Task:
        self.left = self.random.randint(1, 2 * most)
        found: list[Step] = []
        while self.left > 0:
            found.append(self.step(0))
        return Task(
            tuple(found),
            start=self.random.choice((0.0, 0.0, 0.0, 0.01, 0.1, 0.5)),
            goes_on=self.likely(0.7),
        )

    def steps(self, depth: int) -> tuple[Step, ...]:
        found: list[Step] = []
        if self.likely(0.6):  # or hardly anybody would ever be in anybody's way
            found.append(Sleep(self.random.choice((0.0, 0.01, 0.1, 0.3, 1.0))))
        more = self.random.choice((0, 1, 1, 2, 2, 3))
        while more > 0 and self.left > 0:
            more -= 1
            found.append(self.step(depth))
        return tuple(found)

    def step(self, depth: int) -> Step:
        self.left -= 1
        kind = self.random.choice(self.kinds)
        if depth > 3 and kind in ("grant", "enter", "within", "catch", "take", "receive"):
            kind = "sleep"
        if kind in ("change", "hand_on") and not self.inside:
            kind = "grant"  # there would be nothing to change
        step: Step = getattr(self, f"new_{kind}")(depth)
        return step

    def nbytes(self) -> int:
        random, limit = self.random, self.limit
        dice = random.random()
        if dice < 0.03:
            return random.choice((0, limit, 2 * limit))
        if dice < self.smallness:
            return random.randint(1, max(1, limit // 8))
        return random.randint(1, max(1, limit // 2))

    def any_component(self) -> int:
        return self.random.randrange(self.components)

    def new_sleep(self, depth: int) -> Step:
        return Sleep(self.random.choice(_TIMES))

    def new_grant(self, depth: int) -> Step:
        random = self.random
        how: Literal["with", "await", "nowait", "current"] = random.choice(
            ("with", "with", "with", "with", "await", "nowait", "current")
        )
        nbytes = self.nbytes()
        options: dict[str, object] = {}
        if self.with_senders and self.likely(0.5):
            options["sender"] = random.choice("xyz")
        elif self.with_alone and self.likely(0.4) and how != "nowait":
            options["alone"] = True
            nbytes = random.randint(min(nbytes, self.limit), self.limit)
        if self.with_fds and self.likely(0.5) and "alone" not in options:
            options["fds"] = random.randint(1, 4)
        if "sender" not in options and self.likely(0.1):
            options["up_to"] = nbytes + random.randrange(self.limit)
        if how != "nowait" and self.likely(0.12):
            options["timeout"] = random.choice((0.0, 0.01, 0.2, 1.3))
        self.inside += 1
        steps = self.steps(depth + 1)
        self.inside -= 1
        return Grant(nbytes, self.any_component(), how, steps, **options)  # type: ignore[arg-type]

    def new_change(self, depth: int) -> Step:
        random = self.random
        what: Literal[
            "grow",
            "grow_nowait",
            "shrink",
            "resize",
            "split",
            "transfer",
            "transfer_nowait",
            "share",
            "deliver",
            "release",
            "enter_again",
            "drop",
        ] = random.choice(
            (
                "grow",
                "grow",
                "grow",
                "grow_nowait",
                "shrink",
                "resize",
                "split",
                "transfer",
                "transfer",
                "transfer_nowait",
                "share",
                "deliver",
                "release",
                "enter_again",
                "drop",
            )
        )
        return Change(
            what,
            which=random.choice((-1, -1, -2, 0)),
            nbytes=self.nbytes(),
            component=self.any_component(),
            of=random.randrange(self.tasks) if self.likely(0.25) else None,
        )

    def new_hand_on(self, depth: int) -> Step:
        found = Change("hand_on", which=self.random.choice((-1, 0)))
        if self.likely(0.5):
            return found
        nbytes = self.nbytes()
        return Grant(nbytes, self.any_component(), "await", (found, *self.steps(depth + 1)))

    def new_take(self, depth: int) -> Step:
        return Take(self.random.choice((0.1, 1.0, 3.0)), self.steps(depth + 1))

    def new_enter(self, depth: int) -> Step:
        return Enter(self.any_component(), self.steps(depth + 1))

    def new_within(self, depth: int) -> Step:
        return Within(self.random.choice((0.0, 0.05, 0.2, 0.25, 1.0)), self.steps(depth + 1))

    def new_catch(self, depth: int) -> Step:
        return Catch(self.steps(depth + 1))

    def new_raise(self, depth: int) -> Step:
        return Raise()

    def new_cancel(self, depth: int) -> Step:
        return Cancel(
            self.random.randrange(self.tasks),
            self.random.choice(("now", "woken")),
            in_scope=self.likely(0.5),
        )

    def new_put(self, depth: int) -> Step:
        random = self.random
        nbytes = random.randint(1, max(1, self.limit // random.choice((8, 8, 20))))
        return Put(
            nbytes if self.likely(0.95) else self.nbytes(),
            random.randrange(len(self.channels)),
            random.choice((None, "x", "x", "y", "z")),
            nowait=self.likely(0.3),
            fds=random.randint(1, 3) if self.with_fds and self.likely(0.5) else 0,
            given=self.likely(0.1),
        )

    def new_receive(self, depth: int) -> Step:
        return Receive(
            self.random.randrange(len(self.channels)),
            nowait=self.likely(0.3),
            steps=self.steps(depth + 1),
        )

    def new_drain(self, depth: int) -> Step:
        random = self.random
        streams = [n for n, channel in enumerate(self.channels) if channel.kind == "stream"]
        return Drain(
            random.choice(streams),
            random.choice(("bounded", "batches")),
            random.choice((self.any_component(), self.channels[streams[0]].component)),
            items=random.randint(1, 4),
            max_items=random.choice((None, 1, 2)),
            max_seconds=random.choice((None, None, 0.2)),
            pause=random.choice(_TIMES),
        )

    def new_close(self, depth: int) -> Step:
        return Close(
            self.random.randrange(len(self.channels)), self.random.choice(("send", "receive"))
        )

    def new_read(self, depth: int) -> Step:
        random = self.random
        how: Literal["bounded", "batches"] = random.choice(("bounded", "batches"))
        sizes = tuple(
            random.randint(0, max(1, self.limit // random.choice((3, 10))))
            for _ in range(random.randint(1, 4))
        )
        return Read(
            sizes,
            how,
            self.any_component(),
            ahead=random.choice((0, self.limit // 10)) if how == "bounded" else 0,
            max_items=random.choice((None, 1, 2)),
            max_seconds=random.choice((None, 0.2)),
            every=random.choice((0.0, 0.0, 0.1)),
            pause=random.choice(_TIMES),
            leaves_open=self.likely(0.2),
        )

    def new_resize(self, depth: int) -> Step:
        return Resize(max(2, int(self.limit * self.random.choice((0.2, 0.5, 0.9, 1.0, 1.1, 2.0)))))

    def new_look(self, depth: int) -> Step:
        return Look(
            self.random.choice(("statistics", "held_grants", "waiting_requests", "component"))
        )
