"""What a program declared, what it used, and what it had better declare. Pure.

The rules, with ``seen`` = the most that was granted or live of a component at one time, and
``roomy`` = 30 % more, rounded up to a handsome size:

- Less than a minute or fewer than 20 requests: too little was seen to say anything.
- Held up (waits of more than 5 % of the time, or more than 1 % refused) at its firm limit: the
  firm limit is what holds it up, half as much again is proposed.
- Held up below its firm limit: the pool is what holds it up. Its minimum is raised to half of
  ``seen``; if it has that already, the limit is too small.
- Not held up, and the firm limit or the minimum is more than half as much again as ``roomy``:
  ``roomy`` is proposed.
- Nothing declared: ``roomy`` as firm limit, and a quarter of ``seen`` as minimum.
- Live memory beyond what was granted by more than a quarter, and by more than 1 MiB: the
  grants are too small, and the factor is named.

No proposed firm limit is below ``seen``, no minimum is lowered below it, and no minimum
is above its firm limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .bounds import ROOT
from .sizes import human_size
from .statistics import ComponentStatistics, LimiterStatistics, plain
from .verifier import smallest_limit_bytes

__all__ = [
    "Advice",
    "ComponentAdvice",
    "Verdict",
    "advise",
    "handsome_size",
    "time_in_words",
]

Verdict = Literal["too little seen", "keep", "change"]

ENOUGH_SECONDS = 60.0
ENOUGH_REQUESTS = 20
HEADROOM = 1.3
MORE = 1.5
"""What is more than this times as large as need be is worth a word, and what is too small is
raised by it."""
WAITED_PART = 0.05
REFUSED_PART = 0.01
OVERDRAFT_PART = 0.25
OVERDRAFT_BYTES = 2**20
DRIFT_PART = 0.1
SMALLEST_BYTES = 64 * 1024
"""Bounds below this are not worth the thought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentAdvice:
    """What one component declared and used, and what it had better declare."""

    path: str
    #: "too little seen", "keep" what is declared, or "change" something
    verdict: Verdict
    #: declared
    minimum_bytes: int
    firm_limit_bytes: int | None
    #: the most that was granted, and live, at one time
    peak_granted_bytes: int
    peak_live_bytes: int
    #: how long its requests waited in all, those that still wait included
    waited_seconds: float
    #: requests, and how many were refused
    requests: int
    refusals: int
    #: what to declare instead; as it is declared where nothing speaks against that
    proposed_minimum_bytes: int
    proposed_firm_limit_bytes: int | None
    #: what the sizes that it asks for should be multiplied by; None if they are right
    grant_factor: float | None
    #: the reasoning, in one sentence
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What a limiter's components had better declare, and what holds for all of them."""

    #: how long the limiter was watched
    seconds: float
    limit_bytes: int
    #: a limit that would do, or that would be needed; None if this one is right
    proposed_limit_bytes: int | None
    #: what is left of the limit for the components, and what is proposed for them together
    available_bytes: int
    proposed_minimums_bytes: int
    proposed_firm_limits_bytes: int
    #: what is to be said of the limiter as a whole, a sentence each
    notes: tuple[str, ...]
    #: every component, those first that would have to change, the largest first
    components: tuple[ComponentAdvice, ...]

    @property
    def changes(self) -> list[ComponentAdvice]:
        """The components that would have to change."""
        return [one for one in self.components if one.verdict == "change"]

    def to_dict(self) -> dict[str, Any]:
        """Give the same as plain dicts and lists, ready for ``json.dumps``."""
        values: dict[str, Any] = plain(self)
        return values


def advise(statistics: LimiterStatistics) -> Advice:
    """Compare what was declared with what was used, and say what had better be declared.

    Args:
        statistics: of a limiter that has run for a while under its usual load.
    """
    components = sorted(
        (_component(one, statistics.age_seconds) for one in statistics.components),
        key=lambda one: (one.verdict != "change", -_seen(one), one.path),
    )
    available = statistics.effective_limit_bytes - statistics.baseline_bytes
    minimums = sum(one.proposed_minimum_bytes for one in components)
    firm_limits = sum(
        one.proposed_firm_limit_bytes or one.proposed_minimum_bytes for one in components
    )
    notes, proposed = _of_the_limit(statistics, components, available, minimums, firm_limits)
    return Advice(
        seconds=statistics.age_seconds,
        limit_bytes=statistics.limit_bytes,
        proposed_limit_bytes=proposed,
        available_bytes=available,
        proposed_minimums_bytes=minimums,
        proposed_firm_limits_bytes=firm_limits,
        notes=tuple(notes),
        components=tuple(components),
    )


def handsome_size(nbytes: float) -> int:
    """Round up to a size that a person would write: an eighth, or less, above.

    ``1.125 * 2**n``, ``1.25 * 2**n`` and so on: 61 MiB gives 64 MiB, 79.3 MiB gives 80 MiB.
    """
    whole = max(math.ceil(nbytes), SMALLEST_BYTES)
    step = 1 << (max(whole - 1, 1).bit_length() - 4)
    return -(-whole // step) * step


# --- one component


def _component(one: ComponentStatistics, seconds: float) -> ComponentAdvice:
    waited = one.total_wait_seconds + one.oldest_wait_seconds + one.would_wait_seconds
    refusals = one.refusals + one.would_refuse
    requests = one.admissions + one.refusals
    minimum, firm = one.minimum_bytes, one.firm_limit_bytes
    seen = _seen(one)
    grants_nothing = not requests and _is_overdrawn(one)
    factor: float | None = None
    changes: list[str] = []
    verdict: Verdict = "keep"
    if seconds < ENOUGH_SECONDS or (requests < ENOUGH_REQUESTS and not grants_nothing):
        verdict = "too little seen"
    elif one.path == ROOT:  # what is in no component can declare nothing
        if _is_overdrawn(one):
            changes.append("give what allocates so much a component, or grants")
    else:
        if _is_overdrawn(one):
            factor, saying = _too_small_grants(one)
            changes.append(saying)
        held_up = waited > WAITED_PART * seconds or refusals > REFUSED_PART * requests
        minimum, firm, of_bounds = _bounds(one, seen, held_up=held_up)
        changes += of_bounds
    facts = _facts(one, seconds, requests, waited, refusals)
    if verdict == "too little seen":
        reason = f"{facts}: too little seen"
    elif changes:
        verdict = "change"
        reason = f"{facts}: {'; '.join(changes)}"
    else:
        reason = f"{facts}: stays as it is"
    return ComponentAdvice(
        path=one.path,
        verdict=verdict,
        minimum_bytes=one.minimum_bytes,
        firm_limit_bytes=one.firm_limit_bytes,
        peak_granted_bytes=one.peak_granted_bytes,
        peak_live_bytes=one.peak_live_bytes,
        waited_seconds=waited,
        requests=requests,
        refusals=refusals,
        proposed_minimum_bytes=minimum,
        proposed_firm_limit_bytes=firm,
        grant_factor=factor,
        reason=reason,
    )


def _bounds(
    one: ComponentStatistics, seen: int, *, held_up: bool
) -> tuple[int, int | None, list[str]]:
    """Give the minimum and the firm limit to propose, and what to say of them."""
    minimum, firm = one.minimum_bytes, one.firm_limit_bytes
    roomy = handsome_size(HEADROOM * seen)
    if not minimum and firm is None:
        minimum = handsome_size(seen / 4)
        both = f"minimum {_size(minimum)} and firm {_size(roomy)}"
        return minimum, roomy, [f"declares nothing, {both} would do"]
    changes: list[str] = []
    if minimum > MORE * roomy:
        minimum = roomy
        changes.append(f"minimum {_size(minimum)} would do")
    if firm is not None and seen > firm:
        firm = roomy
        changes.append(f"needs firm {_size(firm)}")
    elif held_up and firm is not None and one.peak_granted_bytes >= 0.9 * firm:
        firm = handsome_size(MORE * firm)
        changes.append(f"its firm limit holds it up, firm {_size(firm)} would let it through")
    elif held_up:
        wanted = handsome_size(seen / 2)
        if firm is not None:
            wanted = min(wanted, firm)
        if wanted > minimum:
            minimum = wanted
            changes.append(f"the pool holds it up, minimum {_size(minimum)} would keep it going")
        else:
            changes.append("the pool holds it up, not its own bounds: the limit is short")
    elif firm is not None and firm > MORE * roomy and firm > minimum:
        firm = max(roomy, minimum)
        changes.append(f"firm {_size(firm)} would do")
    return minimum, firm, changes


def _is_overdrawn(one: ComponentStatistics) -> bool:
    promised = max(one.peak_granted_bytes, one.minimum_bytes)
    return one.peak_overdraft_bytes > max(OVERDRAFT_BYTES, OVERDRAFT_PART * promised)


def _too_small_grants(one: ComponentStatistics) -> tuple[float | None, str]:
    live, granted = one.peak_live_bytes, one.peak_granted_bytes
    if not granted:
        return None, f"{human_size(live)} live without a grant"
    factor = math.ceil(10 * live / granted) / 10
    if factor <= 1:  # not at the same time
        return None, "keeps memory when its grants are released: hold them for longer"
    return factor, f"its grants are too small, ask for {factor:g} times as much"


def _facts(
    one: ComponentStatistics, seconds: float, requests: int, waited: float, refusals: int
) -> str:
    granted = f"granted peak {human_size(one.peak_granted_bytes)}"
    if one.firm_limit_bytes is not None:
        granted += f" of firm {_size(one.firm_limit_bytes)}"
    elif one.minimum_bytes:
        granted += f", minimum {_size(one.minimum_bytes)}"
    facts = [f"{granted} in {time_in_words(seconds)}"]
    if one.peak_live_bytes > one.peak_granted_bytes:
        facts.append(f"live peak {human_size(one.peak_live_bytes)}")
    if not requests:
        facts.append("never asked")
    elif waited:
        verb = "would have waited" if one.would_wait else "waited"
        facts.append(f"{verb} {time_in_words(waited)} in all")
    else:
        facts.append("never waited")
    if refusals:
        facts.append(f"{refusals:,} of {requests:,} refused".replace(",", " "))
    return ", ".join(facts)


def _seen(one: ComponentStatistics | ComponentAdvice) -> int:
    return max(one.peak_granted_bytes, one.peak_live_bytes)


# --- the limiter


def _of_the_limit(
    numbers: LimiterStatistics,
    components: Sequence[ComponentAdvice],
    available: int,
    minimums: int,
    firm_limits: int,
) -> tuple[list[str], int | None]:
    """Give what to say of the limiter, and the limit to propose."""
    if numbers.age_seconds < ENOUGH_SECONDS:
        return [], None
    notes: list[str] = []
    effective, peak = numbers.effective_limit_bytes, numbers.peak_measured_bytes
    measured = f"measured peak {human_size(peak)} of {human_size(effective)} effective"
    floor = numbers.baseline_bytes + max(
        minimums,
        max((one.proposed_firm_limit_bytes or 0 for one in components), default=0),
    )
    proposed: int | None = None
    if peak > effective:
        proposed = _limit_for(max(HEADROOM * peak, floor), numbers)
        notes.append(f"{measured}: a limit of {_size(proposed)} would leave room")
    elif minimums > available:
        proposed = _limit_for(floor, numbers)
        notes.append(
            f"the minimums add up to {human_size(minimums)}, but the limit leaves "
            f"{human_size(available)}: they need a limit of {_size(proposed)}"
        )
    elif numbers.components and not any(
        one.waited_seconds or one.refusals or (one.verdict == "too little seen" and one.requests)
        for one in components
    ):
        enough = _limit_for(max(HEADROOM * peak, numbers.baseline_bytes + firm_limits), numbers)
        if numbers.limit_bytes > MORE * enough:
            proposed = enough
            notes.append(f"{measured}, and nobody waited: a limit of {_size(proposed)} would do")
    if proposed is None and firm_limits > available > 0:
        overcommit = math.ceil(10 * firm_limits / available) / 10
        notes.append(
            f"the firm limits add up to {human_size(firm_limits)}, but the limit leaves "
            f"{human_size(available)}: together they need overcommit {overcommit:g}, or a limit "
            f"of {_size(_limit_for(numbers.baseline_bytes + firm_limits, numbers))}"
        )
    if numbers.drift_bytes > DRIFT_PART * effective:
        notes.append(
            f"drift {human_size(numbers.drift_bytes)}: measured, but granted to nobody; "
            "something large has no grant, or belongs into a minimum"
        )
    return notes, proposed


def _limit_for(effective_bytes: float, numbers: LimiterStatistics) -> int:
    return handsome_size(smallest_limit_bytes(math.ceil(effective_bytes), numbers.slop_factor))


# --- words


def _size(nbytes: int) -> str:
    """Say a size in as few digits as it has: ``"80 MiB"``, ``"1.25 GiB"``."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{round(value, 3):g} {unit}"


def time_in_words(seconds: float) -> str:
    """Say a time roughly: ``"40 min"``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)} ms"
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
