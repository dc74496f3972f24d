"""Random programs on virtual time: nothing is wrong with them, and what is wrong would be found.

`python -m tests.simulation --seeds 100000` runs many more.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from membound_async.grant import MemoryGrant
from membound_async.ledger import Ledger
from membound_async.limiter import MemoryLimiter
from membound_async.waiters import Kind, Request, State, Waiters
from tests.simulation.campaign import Failure, run_seeds
from tests.simulation.coverage import EXPECTED, missing, report
from tests.simulation.invariants import Broken
from tests.simulation.programs import (
    Cancel,
    Catch,
    Change,
    Channel,
    Component,
    Enter,
    Grant,
    Probe,
    Program,
    Put,
    Read,
    Receive,
    Resize,
    Settings,
    Sleep,
    Task,
    code,
    program,
)
from tests.simulation.runner import run
from tests.simulation.shrink import shrink

ON_ASYNCIO = 300
ON_TRIO = 80


@pytest.mark.parametrize(("backend", "count"), [("asyncio", ON_ASYNCIO), ("trio", ON_TRIO)])
def test_nothing_is_wrong_with_these_programs(backend: str, count: int) -> None:
    seen: Counter[str] = Counter()
    failures = run_seeds(range(count), backend, seen)
    assert failures == [], failures[0]
    assert seen["programs"] == count
    assert seen["admissions"] > 3 * count
    assert seen["waits"] > count // 2
    assert seen["tasks cancelled"] > count // 10


def test_the_same_seed_is_the_same_program_and_does_the_same() -> None:
    assert program(17) == program(17) != program(18)
    for seed in (3, 4, 5):
        assert run(program(seed)) == run(program(seed))
        assert run(program(seed), backend="trio") == run(program(seed), backend="trio")


FOUND = {
    "a transfer out of order left those waiting in its source who fitted then": Program(
        seed=102070,
        components=(Component("a"), Component("b", live=((0.1, 56),))),
        tasks=(
            Task((Grant(248, 1),), start=0.01),
            Task((Sleep(0.25), Grant(235))),
            Task(
                (
                    Grant(
                        39,
                        how="current",
                        steps=(
                            Change("grow", nbytes=354),
                            Grant(138, steps=(Sleep(), Change("transfer", component=1))),
                        ),
                    ),
                ),
                start=0.01,
            ),
        ),
    ),
    "who could use a minimum beyond the limit was not woken": Program(
        seed=209119,
        settings=Settings(share="3/4", mode="permissive"),
        components=(Component("b"), Component("a.b", minimum=155)),
        channels=(Channel(),),
        tasks=(
            Task((Grant(1, steps=(Resize(154), Receive(steps=(Enter(1),)))),)),
            Task((Put(1), Grant(115, 1))),
        ),
    ),
    "a minimum reserved out of order left senders waiting for what could never be": Program(
        seed=30087468,
        settings=Settings(share="3/4"),
        components=(Component("a", 2, 330),),
        channels=(Channel(),),
        tasks=(
            Task((Grant(2, steps=(Enter(0),)),)),
            Task((Grant(329, steps=(Sleep(0.1),)),)),
            Task((Read((23,), ahead=329),), start=0.1),
            Task((Put(247),)),
        ),
    ),
    "who was let in by a higher limit was taken for one who has its memory": Program(
        seed=30067524,
        settings=Settings(limit=1001, share="1"),
        components=(Component("a.b"),),
        probe=Probe(follows=1.5),
        tasks=(
            Task((Grant(458),)),
            Task((Grant(58, steps=(Grant(914, steps=(Sleep(),)), Resize(1535))),)),
        ),
    ),
    "a transfer that was called off was said to be under way": Program(
        seed=30046075,
        settings=Settings(limit=262, delays=True),
        components=(Component("b"), Component("a.b")),
        probe=Probe(follows=1.5, script=((1.5, 301),)),
        tasks=(
            Task((Grant(39, steps=(Sleep(), Change("transfer", of=1))),)),
            Task(
                (
                    Grant(25, how="current", steps=(Read((99, 83), component=1, pause=1.0),)),
                    Grant(1),
                )
            ),
        ),
    ),
}
"""What programs have shown that was wrong, as small as they could be made."""


@pytest.mark.parametrize("what", FOUND)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_what_was_found_is_wrong_no_more(what: str, backend: str) -> None:
    run(FOUND[what], backend=backend)


# --- what is wrong is found

Defect = Callable[[pytest.MonkeyPatch], None]


def lost_on_cancel(patch: pytest.MonkeyPatch) -> None:
    def cancel(ledger: Ledger, request: Request) -> list[Request]:
        ledger._remove(request, State.CANCELLED)
        return []

    patch.setattr(Ledger, "cancel", cancel)


def never_woken(patch: pytest.MonkeyPatch) -> None:
    wake = MemoryLimiter._wake

    def forgetful(limiter: MemoryLimiter, settled: Any) -> None:
        wake(limiter, [*settled][1:])

    patch.setattr(MemoryLimiter, "_wake", forgetful)


def one_more_than_the_rule(patch: pytest.MonkeyPatch) -> None:
    threshold = Ledger._threshold
    patch.setattr(Ledger, "_threshold", lambda *arguments: threshold(*arguments) - 1)


def withdrawn_in_vain(patch: pytest.MonkeyPatch) -> None:
    withdraw = MemoryLimiter._withdraw

    def careless(limiter: MemoryLimiter, request: Request, since: float) -> None:
        if request.state is not State.ADMITTED or request.kind is not Kind.GRANT:
            withdraw(limiter, request, since)

    patch.setattr(MemoryLimiter, "_withdraw", careless)


def barriers_are_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Waiters, "bar", lambda waiters, front, place=None: waiters.lift(front))


def shrunken_in_vain(patch: pytest.MonkeyPatch) -> None:
    def shrink(grant: MemoryGrant, nbytes: int) -> tuple[()]:
        grant._size -= nbytes
        return ()

    patch.setattr(MemoryGrant, "_shrink", shrink)


def last_in_first_out(patch: pytest.MonkeyPatch) -> None:
    add = Waiters.add

    def pushy(waiters: Waiters, request: Request, *arguments: Any) -> bool:
        found = add(waiters, request, *arguments)
        if request.sender is None and not request.exclusive:
            queue = request.account.queue
            assert queue is not None
            queue.line(request).move_to_end(request, last=False)
            return True
        return found

    patch.setattr(Waiters, "add", pushy)


def drift_is_not_subtracted(patch: pytest.MonkeyPatch) -> None:
    set_capacity = Ledger._set_capacity

    def blind(ledger: Ledger, limit: int, drift: int, committed: int, highest: int) -> None:
        set_capacity(ledger, limit, 0, committed, highest)

    patch.setattr(Ledger, "_set_capacity", blind)


@pytest.mark.parametrize(
    ("defect", "reason"),
    [
        (lost_on_cancel, "could go on, but waits"),
        (never_woken, "was admitted and not woken"),
        (one_more_than_the_rule, "too little"),
        (withdrawn_in_vain, "grants of .*: .* not|were admitted, and never ended"),
        (barriers_are_ignored, "were drawn past|it does not come to an end|is a barrier"),
        (shrunken_in_vain, "grants of .*: .* not"),
        (last_in_first_out, "not the first of its line|could go on, but waits"),
        (drift_is_not_subtracted, "drift is 0"),
    ],
)
def test_a_defect_is_found(defect: Defect, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defect(monkeypatch)
    seen: Counter[str] = Counter()
    failures = run_seeds(range(1000, 1600), "asyncio", seen, most_runs=0)
    assert failures, f"not found in {seen['programs']} programs"
    with pytest.raises(Broken, match=reason):
        run(failures[0].program)


# --- a failure is made smaller


def test_a_failure_is_printed_as_a_small_program_that_fails_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost_on_cancel(monkeypatch)
    failures = run_seeds(range(1000, 1600), "asyncio", Counter(), most_runs=250)
    assert len(failures) == 1
    failure = failures[0]
    assert isinstance(failure, Failure)
    assert len(repr(failure.program)) < len(repr(program(failure.seed))) / 1.5
    text = str(failure)
    assert text.startswith(f"seed {failure.seed} on asyncio: ")
    source = text[text.index("from tests.") :]
    with pytest.raises(Broken, match="could go on, but waits"):
        exec(source, {})
    monkeypatch.undo()
    exec(source, {})


def test_shrinking_takes_out_all_that_is_not_needed() -> None:
    grant = Grant(70, 1, steps=(Sleep(1.0), Catch((Grant(8, 1, timeout=0.2),))), sender="x")
    whole = Program(
        1,
        settings=Settings(limit=500, share="1/3", fds=4),
        components=(Component("a", 10), Component("b", firm_limit=200)),
        tasks=(Task((Sleep(), Cancel(1))), Task((grant, Sleep(0.1)), start=0.5)),
    )

    def fails(tried: Program) -> bool:
        return "nbytes=8" in repr(tried)

    smaller = shrink(whole, fails)
    assert smaller.tasks == (Task((Grant(8),)),)
    assert smaller.settings == Settings()
    assert smaller.components == (Component("b"),)


def test_shrinking_stops_after_so_many_runs() -> None:
    tried: list[Program] = []

    def fails(one: Program) -> bool:
        tried.append(one)
        return False

    assert shrink(program(1), fails, most_runs=5) == program(1)
    assert len(tried) == 5


def test_code_of_a_program_runs_by_itself() -> None:
    for seed in range(60):
        source = code(program(seed))
        assert all(len(line) <= 110 for line in source.splitlines())
        made: list[Program] = []
        namespace: dict[str, Any] = {}
        lines = source.replace("from tests.simulation.runner import run", "")
        exec(lines.split("run(")[0], namespace)
        namespace["run"] = lambda one, *, backend, made=made: made.append(one)
        exec("run(" + lines.split("run(", 1)[1], namespace)
        assert made == [program(seed)]


# --- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=Path(__file__).parents[1],
    )


def test_the_command_says_what_programs_got_to() -> None:
    done = command("--seeds", "20", "--first", "7")
    assert done.returncode == 0, done.stderr
    assert "20 programs with" in done.stdout
    assert "Grant with " in done.stdout
    assert "no program got to: " in done.stdout
    assert done.stdout.endswith("0 failures in 20 programs\n")


@pytest.mark.slow
def test_ctrl_c_ends_a_campaign_with_its_summary() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.simulation", "--seeds", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as campaign:
        assert campaign.stderr is not None
        campaign.stderr.readline()  # how far it is
        campaign.send_signal(signal.SIGINT)
        said, _ = campaign.communicate(timeout=100)
    assert campaign.returncode == 0
    assert said.splitlines()[-1].startswith("0 failures in ")


def test_the_command_shows_a_program() -> None:
    done = command("--show", "--first", "7", "--backend", "trio")
    assert done.stdout == code(program(7), "trio") + "\n"


def test_what_is_missing_is_said() -> None:
    assert missing(Counter(EXPECTED)) == []
    assert missing(Counter(EXPECTED[1:])) == [EXPECTED[0]]
    assert report(Counter({"programs": 2000, "steps": 9000, "seconds": 4, "waits": 3})) == (
        f"2,000 programs with 9,000 steps in 4 s: 500 programs/s\n  {'waits':<42}{3:>12}"
    )
