"""The limiter: waits, delays and looks at memory, and lets the ledger decide."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from fractions import Fraction
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import anyio
import anyio.lowlevel

from .bounds import ROOT
from .component import Component
from .context import Scope, current_component, current_scope, entered_limiters, installed_limiters
from .deadlocks import waiting_holders
from .drift import DriftWatch
from .eventlog import EventLog
from .eventloop import EventLoop, Handle, ThreadPlace, current_task, running_loop
from .events import log
from .exceptions import (
    BoundsError,
    GrantDeadlock,
    GrantError,
    GrantTimeout,
    GrantTooLarge,
    InvalidComponentBounds,
    InvalidLimit,
    LimitError,
    NoCurrentLimiter,
    UnknownComponent,
)
from .fastpath import ALONE, NEW, LimiterState
from .forks import see_through_forks
from .garbage import is_collecting
from .gauge import Gauge
from .grant import PLAIN, MemoryGrant, Options, make_grant
from .holdings import held_grants, waiting_requests
from .hooks import (
    DriftRose,
    GrantDelayed,
    GrantLeaked,
    GrantRefused,
    GrantWaited,
    Hook,
    Hooked,
    Hooks,
    LimitChanged,
)
from .ledger import Ledger
from .limits import MemoryLimit, resolve
from .live import LiveBytes
from .probes import MemoryProbe, read_pressure
from .reclaim import Reclaim, Reclaimer, ReclaimFunction
from .registry import ComponentRegistry
from .rehearsal import Rehearsal
from .resources import ResourceLimits
from .rules import Polynomial, Rule, Share
from .settings import (
    LimiterSettings,
    Mode,
    given,
    limit_size,
    parse_mode,
    parse_share,
    parse_slop_factor,
    parse_switch,
)
from .sizes import MAX_BYTES, format_size
from .stalls import REPORTED, StallWatch, describe_stall
from .statistics import (
    ComponentStatistics,
    HeldGrant,
    LimiterStatistics,
    ResourceStatistics,
    WaitingRequest,
)
from .stocks import BYTES, NO_LIMIT, Account, Sender
from .verifier import BoundsVerifier, VerifiedBounds
from .waiters import NOTHING, Kind, Request, State

if TYPE_CHECKING:
    from .accounts import Account as ComponentAccount

__all__ = ["MemoryLimiter", "current_limiter"]

LIMIT_LOOK_SECONDS = 1.0
"""How often a limit that may change is read again, at most."""

UNTANGLE_SECONDS = 0.01
"""How soon to look again at who waits for whom, after something was done about it."""

SOME_TASK = object()
"""The task of a request that has not waited, while it is held back; which one, nobody asks."""


class _NoMemory:
    """The probe of a limiter that measures nothing."""

    name = "nothing"

    def read(self) -> int:
        return 0


class MemoryLimiter(LimiterState):
    """Divides memory among components, and makes callers wait or slows them under pressure.

    It has no task and no thread, so nothing must be started: make one, and use it in any
    event loop, one at a time (asyncio, uvloop, trio), and from threads. ``async with
    limiter:`` makes it the current one of the block and of the process, and checks for
    leaks at its end; ``install()`` makes it the process's without a scope.

    Args:
        limit: bytes the process may use, or ``"512MiB"``; None for ``MEMBOUND_LIMIT``, else
            the smallest that the container, the rlimits and the machine set.
        slop_factor: part of the limit held back for what nobody can account; None for
            ``MEMBOUND_SLOP_FACTOR``, else 0.15.
        share: the part of what nobody else holds that one component may have; None for
            ``MEMBOUND_SHARE``, else 1/2 (bus1). 1 is plain first come, first served;
            ``Polynomial()`` is the other rule of bus1.
        resources: how much there is of other resources, such as
            ``ResourceLimits(fds=1000)``; None for bytes only.
        baseline: bytes in use before anything is granted; None to measure it now, and again
            when the limiter is entered before it was used.
        probe: what measures memory; None for what the limit counts.
        observe: grant everything at once, and only report what would have been done; None
            for ``MEMBOUND_OBSERVE``, else False.
        mode: what to do with bounds that do not fit: ``"strict"`` raises, ``"permissive"``
            logs and goes on, ``"disabled"`` does not look; None for ``MEMBOUND_MODE``, else
            strict.
        processes: how many processes share the limit; None for ``WEB_CONCURRENCY``, else 1.
        settings: the other knobs; None for the environment's, else the defaults.

    Raises:
        InvalidLimit: an argument or environment variable makes no sense, the probe cannot be
            read, or the baseline leaves nothing of the limit.
        LimitNotDetected: there is no limit to be found.
    """

    def __init__(
        self,
        limit: int | str | None = None,
        *,
        slop_factor: float | None = None,
        share: Fraction | float | Polynomial | None = None,
        resources: ResourceLimits | None = None,
        baseline: int | str | None = None,
        probe: MemoryProbe | None = None,
        observe: bool | None = None,
        mode: Mode | None = None,
        processes: int | None = None,
        settings: LimiterSettings | None = None,
    ) -> None:
        self.settings = LimiterSettings.from_environment() if settings is None else settings
        self._mode = parse_mode(given(mode, "MODE", "strict"))
        self._observe = parse_switch(given(observe, "OBSERVE", False), "observe")
        self._fixed_baseline = None if baseline is None else limit_size(baseline, "baseline")
        rule = parse_share(given(share, "SHARE", Fraction(1, 2)))
        slop = parse_slop_factor(given(slop_factor, "SLOP_FACTOR", 0.15))
        found = resolve(limit, processes=processes, probe=probe)
        self._limit = MemoryLimit(found.limit_bytes, slop, found.source)
        self._reread_limit = found.reread
        self._limit_exceeds = found.exceeds
        self._pressure_path = found.pressure_path
        if resources is not None and BYTES in resources:
            raise InvalidLimit(
                f"resources={resources!r}: how many bytes there are is what limit= says; leave "
                "them out of resources="
            )
        self._setup(found.probe, rule, resources)
        if found.exceeds is not None:
            log().warning(
                "membound.limit_above_available",
                limit_bytes=found.limit_bytes,
                limit_source=found.source,
                lower_limit=found.exceeds,
                remedy="leave limit= out to have the lower one kept",
            )

    def _setup(
        self, probe: MemoryProbe, rule: Rule, resources: ResourceLimits | None = None
    ) -> None:
        self._gauge = Gauge(
            probe,
            may_be_zero=self._fixed_baseline == 0,
            stale_after_seconds=self.settings.stale_after_seconds,
        )
        self.registry = ComponentRegistry()
        self._lock = threading.Lock()
        self._late: deque[Callable[[], None]] = deque()
        """What could not be done at once, because it may have come in the midst of something."""
        self._impatient: dict[Account, dict[object, Callable[[], None]]] = {}
        """Who holds something of an account, and is to be told if somebody waits for that."""
        self._loop: EventLoop | None = None
        self._loop_token = self
        self._now = time.monotonic
        self._timer: Handle | None = None
        self._entered = 0
        self._used = False
        self._starts_with_first_request = False
        self._verified: tuple[int, int, int | None] | None = None
        self._adopted: list[Component] = []
        self._rehearsal = Rehearsal()
        self._wait_seconds: dict[Account, float] = {}
        self._delay_seconds: dict[Account, float] = {}
        self._first_barrier: Request | None = None
        self._first_barrier_at = 0.0
        self._moved_at_tick: int = -1
        self._ended_at_tick: int = -1
        self._untangled = False
        """Whether something was done about a deadlock, so that the next look is soon."""
        self._stalls = StallWatch(self.settings.stall_after_seconds)
        self._hooks = Hooks(EventLog(self.settings.log_interval_seconds))
        self._made_at = time.monotonic()
        self._drift = DriftWatch()
        self._limit_is_read = True
        self._live = LiveBytes()
        self._reclaim = Reclaim(self)
        self._yield_at = self._sample_at = self._limit_look_at = -math.inf
        self._calm_until = -math.inf
        """Until when the fast path may be used: no reading and no yield is due, no delay."""
        self._delay = 0.0
        measured = self._gauge.first()
        self._ledger = Ledger(
            self._limit.effective_bytes,
            baseline=self._checked_baseline(measured),
            share=rule,
            bypass_limit=self.settings.bypass_limit_bytes,
            others={} if resources is None else resources,
        )
        self._live.start()
        self._components: dict[str, Component] = {}
        self.root = self._node(ROOT)
        self._observe_reading(measured, self._now())
        see_through_forks(self)

    @classmethod
    def noop(cls) -> Self:
        """Give a limiter that limits nothing, measures nothing and needs no limit.

        Grants and components work as ever and are counted; nobody waits. It may be used in
        several event loops at once.
        """
        limiter = cls.__new__(cls)
        limiter.settings = LimiterSettings()
        limiter._mode = "disabled"
        limiter._observe = True
        limiter._fixed_baseline = 0
        limiter._limit = MemoryLimit(MAX_BYTES, 0, "none")
        limiter._reread_limit = limiter._limit_exceeds = limiter._pressure_path = None
        limiter._setup(_NoMemory(), Share(Fraction(1)))
        return limiter

    def __repr__(self) -> str:
        return (
            f"<MemoryLimiter {format_size(self._limit.limit_bytes)} from {self._limit.source}, "
            f"{format_size(self._ledger.free)} free>"
        )

    # --- what it is

    @property
    def limit(self) -> MemoryLimit:
        """The limit that is kept now, its slop factor and who set it."""
        return self._limit

    @property
    def is_noop(self) -> bool:
        """Whether it limits nothing; see ``noop()``."""
        return isinstance(self._gauge.probe, _NoMemory)

    def statistics(self) -> LimiterStatistics:
        """Take a reading of memory, and give everything there is to know as a snapshot.

        From the limiter's event loop, or from a thread. Never waits. Costs time in proportion
        to the number of components, and of senders to those in which anybody waits, whatever
        the number of grants and waiters.
        """
        now = self._now()
        self._sample(now)
        with self._lock:
            ledger = self._ledger
            policy, limit = self.settings.pressure, ledger.limit
            would_wait_seconds = self._rehearsal.seconds(now)
            components = tuple(
                self._describe(ledger.accounts[path], now, would_wait_seconds)
                for path in sorted(self._components)
            )
            return LimiterStatistics(
                limit_bytes=self._limit.limit_bytes,
                limit_source=self._limit.source,
                slop_factor=self._limit.slop_factor,
                effective_limit_bytes=limit,
                threshold_bytes=int(policy.threshold * limit),
                baseline_bytes=ledger.baseline,
                measured_bytes=ledger.measured,
                peak_measured_bytes=self._gauge.peak,
                measured_name=self._gauge.name,
                drift_bytes=ledger.drift,
                free_bytes=ledger.free,
                committed_bytes=ledger.committed,
                granted_bytes=sum(one.granted_bytes for one in components),
                in_flight_bytes=sum(one.in_flight_bytes for one in components),
                level=policy.level(ledger.measured, limit),
                delay_seconds=self._delay,
                samples=self._gauge.readings,
                probe_failures=self._gauge.failures,
                grants=sum(one.grants for one in components),
                waiting=ledger.waiters.count,
                waiting_bytes=sum(one.waiting_bytes for one in components),
                oldest_wait_seconds=max(one.oldest_wait_seconds for one in components),
                stalled_seconds=self._stalls.seconds(now, ledger.moved, ledger.waiters.count),
                age_seconds=time.monotonic() - self._made_at,
                observe=self._observe,
                would_wait=sum(self._rehearsal.waits.values()),
                would_wait_seconds=sum(would_wait_seconds.values()),
                would_refuse=sum(self._rehearsal.refusals.values()),
                tracking=self._live.tracking(),
                pressure_stall=None if self.is_noop else read_pressure(self._pressure_path),
                resources={
                    name: ResourceStatistics(limit=pool.limit, free=pool.free)
                    for name, pool in ledger.pools.items()
                    if name != BYTES
                },
                reclaimers=self._reclaim.statistics(),
                components=components,
            )

    def held_grants(self, most: int | None = None, *, skip: int = 0) -> list[HeldGrant]:
        """Give the grants that are held, the largest first, as a snapshot.

        From the limiter's event loop, or from a thread. Never waits. Costs time in proportion
        to the number of grants.

        Args:
            most: how many to give; None for all.
            skip: how many to leave out before these.

        Raises:
            ValueError: a number is negative.
        """
        _check_page(most, skip)
        with self._lock:
            return held_grants(self._held(), self._now(), most, skip)

    def waiting_requests(self, most: int | None = None, *, skip: int = 0) -> list[WaitingRequest]:
        """Give the requests that wait, the oldest first, as a snapshot.

        As with ``held_grants``; the cost is in proportion to the number of requests that wait.

        Raises:
            ValueError: a number is negative.
        """
        _check_page(most, skip)
        with self._lock:
            return waiting_requests(self._ledger, self._now(), most, skip)

    def add_hook(self, hook: Hook) -> Hooked:
        """Have a function told of every event from now on: waits, delays, refusals, stalls.

        See ``membound_async.hooks``. It is called at once, in whatever thread something happens,
        and must not wait.

        Returns:
            What ends it: ``remove()``, or the end of a ``with`` block.
        """
        return self._hooks.add(hook)

    # --- components

    def component(
        self,
        path: str,
        minimum: int | str = 0,
        firm_limit: int | str | None = None,
        *,
        limits: ResourceLimits | None = None,
    ) -> Component:
        """Give the component of that dotted path, the same one each time.

        Args:
            path: ``"decode"``, ``"ingest.decode"``.
            minimum: bytes it needs to work at all; reserved while it is entered.
            firm_limit: the most it may ever hold, minimum included; None for no limit but
                the quota.
            limits: the most of several resources; its bytes are the firm limit.

        Raises:
            InvalidComponentBounds: the bounds make no sense, or it has others already.
        """
        if limits is not None and BYTES in limits:
            if firm_limit is not None:
                raise InvalidComponentBounds(path, "firm_limit= and the bytes of limits= are one")
            firm_limit = limits[BYTES]
        declared = self._components.get(path)
        if limits is not None and declared is not None:
            before = declared._account.others
            for resource, limit in limits.others.items():
                firm = before[resource].firm_limit if resource in before else NO_LIMIT
                if firm not in (NO_LIMIT, limit):
                    raise InvalidComponentBounds(
                        path, f"its limit of {resource} is {firm} already, not {limit}"
                    )
        found = self._component(path, minimum, firm_limit)
        if limits is not None and limits.others:
            account: Account = found._account
            with self._lock:
                settled = self._ledger.declare(
                    account, account.minimum, account.firm_limit, limits.others
                )
            self._wake(settled)
        return found

    def account(self, name: str, limits: ResourceLimits) -> ComponentAccount:
        """Make an account: components that divide these limits among themselves.

        See `membound_async.accounts.Account`.
        """
        from .accounts import Account

        return Account(name, limits, self)

    def _component(self, path: str, minimum: int | str, firm_limit: int | str | None) -> Component:
        if minimum != 0 or firm_limit is not None:
            self.registry.declare(path, minimum=minimum, firm_limit=firm_limit)
        found = self._components.get(path)
        if found is None:
            if path == ROOT:
                return self.root
            found = self._node(path)
        elif minimum != 0 or firm_limit is not None:
            self._declare(found)
        return found

    def add(self, component: Component) -> Component:
        """Take a component of a subclass in, and declare what it and its parts need.

        Returns:
            The same component.

        Raises:
            InvalidComponentBounds: its bounds make no sense, its path has others already, or
                it belongs to another limiter.
        """
        if component._limiter is not None and component._limiter is not self:
            raise LimitError(f"{component!r} belongs to another limiter; make a new one")
        if component._limiter is None:
            declared = self.registry.register(component.path, component)
            self._join(component)
            self._components.setdefault(component.path, component)
            for node in declared.walk():
                self._declare(self.component(node.path))
        return component

    def find(self, path: str) -> Component:
        """Give the component of that path.

        Raises:
            UnknownComponent: there is none; names those that there are.
        """
        found = self._components.get(path)
        if found is None:
            raise UnknownComponent(path, tuple(list(self._components)[:20]))
        return found

    def verify(self) -> VerifiedBounds:
        """Check that what all components declare fits into the limit.

        Done by itself whenever a component is entered after something new was declared.

        Raises:
            InsufficientMinimumMemory: the minimums do not fit.
            FirmLimitExceedsAvailable: the firm limits do not fit.
        """
        return self._verifier().verify()

    # --- grants

    def grant(
        self,
        nbytes: int | str,
        *,
        up_to: int | str | None = None,
        component: Component | str | None = None,
        sender: Hashable | None = None,
        timeout: float | None = None,
        oversize: Literal["raise", "alone"] = "raise",
        also: Mapping[str, int] = NOTHING,
    ) -> MemoryGrant:
        """Give a grant of this limiter: ``async with limiter.grant(n): ...``.

        For the component named, else the one whose code is running if it belongs to this
        limiter, else ``root``. See ``membound_async.grant`` for the arguments and errors.
        """
        return make_grant(
            self._target(component),
            nbytes,
            up_to=up_to,
            timeout=timeout,
            oversize=oversize,
            also=also,
            sender=sender,
        )

    def grant_nowait(
        self,
        nbytes: int | str,
        *,
        up_to: int | str | None = None,
        component: Component | str | None = None,
        sender: Hashable | None = None,
        also: Mapping[str, int] = NOTHING,
    ) -> MemoryGrant:
        """Give a grant of this limiter that is held already; see ``grant_nowait``."""
        target = self._target(component)
        return make_grant(target, nbytes, up_to=up_to, also=also, sender=sender)._acquire_nowait()

    def _target(self, component: Component | str | None) -> Component:
        if isinstance(component, str):
            return self.find(component)
        if component is None:
            component = current_component()
            if component is None or component._limiter is not self:
                return self.root
        return component._resolve()

    # --- reclaim

    def add_reclaimer(
        self, function: ReclaimFunction, *, name: str | None = None, priority: int = 0
    ) -> Reclaimer:
        """Ask that function for memory from now on, whenever measured memory gets short.

        ::

            limiter.add_reclaimer(cache.shrink, priority=10)  # def shrink(wanted: int) -> int

        It is called with the bytes that are wanted and gives how many it has freed, itself or
        when awaited; see ``membound_async.reclaim`` for when, where and how often. It may
        release and shrink grants, but a request for one raises ``ReclaimReentry``, be it by
        itself or by tasks and threads that it has started and that belong to the call. No
        component is current in it. What it raises is logged and counted, and raised nowhere.

        Args:
            function: frees memory; async, or not if it takes no more than a millisecond or so.
            name: what log events and statistics call it; None for the function's own name.
            priority: who has the higher one is asked first; those of the same, in the order in
                which they came.

        Returns:
            What ends it: ``remove()``, or the end of a ``with`` block.
        """
        return self._reclaim.add(function, name, priority)

    # --- the limit

    def resize(self, limit: int | str) -> None:
        """Change the limit. Nothing is revoked; who waits and fits now comes in.

        A limit below what is out is kept by granting nothing until enough has come back.
        Waiters that could not be met by the new limit any more get ``GrantTooLarge``.

        Raises:
            InvalidLimit: it makes no sense, or the baseline leaves nothing of it.
        """
        self._resize(limit_size(limit, "limit"), "resize()")
        self._reread_limit = None

    def _resize(self, limit_bytes: int, source: str) -> None:
        changed = MemoryLimit(limit_bytes, self._limit.slop_factor, source)
        baseline = self._ledger.baseline
        if changed.effective_bytes <= baseline:
            raise _below_baseline(changed, baseline, self._gauge.name)
        before_bytes = self._limit.limit_bytes
        with self._lock:
            self._limit = changed
            self._verified = None
            settled = self._ledger.resize(changed.effective_bytes)
            settled += self._observe_reading(self._ledger.measured, self._now())
        self._wake(settled)
        self._hooks.tell(LimitChanged(limit_bytes, before_bytes, source))

    # --- its scope

    def install(self) -> None:
        """Make it the process's limiter: the current one of all code outside any other.

        One that is entered goes before one that is installed. What the program imports
        until its first request is part of the baseline.

        Raises:
            BoundsError: in mode strict, what is declared does not fit.
        """
        self._start()
        self._starts_with_first_request = not self._used
        if self not in installed_limiters:
            installed_limiters.append(self)

    def uninstall(self) -> None:
        """Undo ``install()``."""
        if self in installed_limiters:
            installed_limiters.remove(self)
        if not self._entered:
            self._let_go()

    async def __aenter__(self) -> Self:
        self._start()
        self._entered += 1
        if self not in entered_limiters:
            entered_limiters.append(self)
        current_scope.set(Scope(self.root, current_scope.get()))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope = current_scope.get()
        if scope is not None and scope.component is self.root:
            current_scope.set(scope.outer)
        self._entered -= 1
        if self._entered:
            return
        if self in entered_limiters:
            entered_limiters.remove(self)
        self._let_go()
        self._drain()
        leaked = {
            account.name: account.granted + account.in_flight
            for account in self._ledger.accounts.values()
            if account.granted or account.in_flight
        }
        if leaked:
            log().warning("membound.grants_leaked", granted_bytes=leaked)
            if exc_type is None:
                names = ", ".join(f"{name}: {format_size(n)}" for name, n in leaked.items())
                warnings.warn(
                    f"the limiter's block has ended, but grants are still out: {names}",
                    ResourceWarning,
                    stacklevel=2,
                )

    def _start(self) -> None:
        """Measure the baseline again if nothing was granted yet, and verify."""
        if not self._used and self._fixed_baseline is None:
            measured = self._gauge.first()
            baseline = self._checked_baseline(measured)
            with self._lock:
                self._rebase(baseline, measured, self._now())
        self._verify_if_changed()

    def _start_with_first_request(self, now: float) -> None:
        """Take what was imported since ``install()`` into the baseline; with the lock held."""
        if self._starts_with_first_request and not self._used and self._fixed_baseline is None:
            measured = self._gauge.read(now, self._ledger.limit)
            if measured < self._ledger.limit:
                self._rebase(measured, measured, now)

    def _rebase(self, baseline: int, measured: int, now: float) -> None:
        """Begin anew from a baseline; with the lock held."""
        self._live.start()
        self._ledger.rebase(baseline)
        self._observe_reading(measured, now)

    def _let_go(self) -> None:
        """Let components that came by themselves be used with another limiter."""
        for component in self._adopted:
            account: Account = component._account
            if not account.holders.count and not account.entries:
                component._limiter = component._account = None
                if self._components.get(component.path) is component:
                    del self._components[component.path]
        self._adopted.clear()

    # --- components, inside

    def _node(self, path: str) -> Component:
        """Make the component of a path that is not in use yet."""
        self.registry.component(path)
        component = Component.__new__(Component)
        component.path = path
        self._join(component)
        self._components[path] = component  # last: a thread may ask for statistics meanwhile
        return component

    def _join(self, component: Component) -> None:
        component._limiter = self
        component._account = self._ledger.account(component.path)
        self._declare(component)

    def _declare(self, component: Component) -> None:
        """Take over what the registry says of a component's bounds."""
        node = self.registry.component(component.path)
        firm = node.firm_limit_bytes
        minimum, firm_limit = node.minimum_bytes, NO_LIMIT if firm is None else firm
        account: Account = component._account
        if (account.minimum, account.firm_limit) != (minimum, firm_limit):
            with self._lock:
                settled = self._ledger.declare(account, minimum, firm_limit)
            self._wake(settled)

    def _adopt(self, component: Component) -> Component:
        """Give the component to charge for one that is used here without being added."""
        if self is _nobody:
            return self.root
        self.add(component)
        self._adopted.append(component)
        return component

    def _verifier(self) -> BoundsVerifier:
        return BoundsVerifier(
            self.registry,
            self._ledger.limit,
            self._ledger.baseline,
            self.settings.overcommit,
            slop_factor=self._limit.slop_factor,
        )

    def _verify_if_changed(self) -> None:
        registry = self.registry
        totals = (
            registry.total_minimum_bytes,
            registry.total_firm_limit_bytes,
            registry.largest.firm_limit_bytes,
        )
        if self._mode == "disabled" or totals == self._verified:
            return
        try:
            self._verifier().check()
        except BoundsError as error:
            if self._mode == "strict" and not self._observe:
                raise
            log().warning("membound.bounds_do_not_fit", reason=str(error))
        self._verified = totals

    async def _enter(self, component: Component) -> None:
        account: Account = component._account
        self._reclaim.refuse_reentry(account, account.minimum)
        self._verify_if_changed()
        with self._lock:
            if self._ledger.enter_again(account):
                return
        request = Request(account, account.minimum, Kind.ENTER)
        if self._mode != "strict" and not self._observe:
            with self._lock:
                forced = self._ledger.refusal(request) is not None
                settled = self._ledger.force(request) if forced else []
            self._wake(settled)
            if forced:
                return
        await self._acquire(request, None)

    def _leave(self, component: Component) -> None:
        if self._is_inside():
            self._do_later(partial(self._leave, component))
            return
        account: Account = component._account
        with self._lock:
            settled = self._ledger.leave(account)
            out = account.granted if not account.entries else 0
        self._wake(settled)
        if out and component is not self.root:
            log().warning(
                "membound.left_with_grants_out",
                component=component.path,
                granted_bytes=out,
                grants=account.holders.count,
            )

    # --- requests

    def _admit(self, account: Account, nbytes: int) -> bool:
        """Charge a new grant if nothing speaks against it; False says only: ask in order."""
        with self._lock:
            return self._ledger.admit(account, nbytes)

    async def _acquire(
        self,
        request: Request,
        timeout: float | None,
        grant: MemoryGrant | None = None,
        *,
        has_yielded: bool = False,
    ) -> Any:
        """Wait until the request is admitted, and for the delay if there is pressure.

        On any exception, a cancellation included, nothing is charged. It is one coroutine
        from the first step to the last, because there is one for each waiter.

        Args:
            request: what to put to the ledger.
            timeout: how long to wait, in seconds.
            grant: who takes over what was charged.
            has_yielded: whether the caller has just let others run, so that nobody comes first.

        Returns:
            The grant.
        """
        now = 0.0
        try:
            self._reclaim.refuse_reentry(request.account, request.nbytes)
            self._bind()
            now = self._now()
            if has_yielded:
                self._has_yielded(now)
            elif now >= self._yield_at:
                self._has_yielded(now)  # already now, or all who come meanwhile would yield too
                await anyio.lowlevel.checkpoint()
                now = self._now()
                self._has_yielded(now)
            self._sample_if_due(request.nbytes, now)
            self._submit(request, now)
            if request.owner is not None:
                request.gives_up = timeout is not None
                if timeout is None:
                    await request.owner
                else:
                    with anyio.move_on_after(timeout):
                        await request.owner
                self._waited(request, now)
                self._has_yielded(self._now())
            if self._delay:
                await anyio.sleep(self._delay_of(request))
        except BaseException as error:
            self._withdraw(request, now)
            self._end(request)
            if grant is not None:
                grant._state = NEW
                grant._holder = None
            self._tell_of_refusal(request, error)
            raise
        self._end(request)
        if grant is not None:
            grant._hold(request)
        return grant

    def _acquire_nowait(self, request: Request) -> None:
        """Admit the request now or raise ``QuotaExceeded``; never waits and is not delayed."""
        self._reclaim.refuse_reentry(request.account, request.nbytes)
        if asyncio._get_running_loop() is not self._loop_token and running_loop() is not None:
            self._bind()
        now = self._now()
        self._sample_if_due(request.nbytes, now)
        settled: list[Request] = []
        error: GrantError | None = None
        with self._lock:
            self._start_with_first_request(now)
            self._used = True
            if request.state is not State.NEW:
                pass  # called off meanwhile
            elif self._observe:
                self._rehearse(request, now)
            else:
                try:
                    settled = self._ledger.request_nowait(request)
                except GrantError as refused:
                    error = refused
        if error is not None:
            self._tell_of_refusal(request, error)
            raise error
        self._wake(settled)

    def _acquire_blocking(self, request: Request, timeout: float | None) -> None:
        """The same as ``_acquire`` for a thread, which is blocked."""
        if running_loop() is not None:
            raise RuntimeError(
                "`with grant(...)` would block the event loop that runs in this thread; use "
                "`async with`"
            )
        self._reclaim.refuse_reentry(request.account, request.nbytes)
        clock = time.monotonic
        deadline = math.inf if timeout is None else clock() + timeout
        now = self._now()
        self._sample_if_due(request.nbytes, now)
        try:
            self._submit(request, now, ThreadPlace)
            if request.owner is not None:
                while not request.owner.wait(min(self._interval(), max(0.0, deadline - clock()))):
                    if request.state is State.WAITING and clock() >= deadline:
                        break
                    self._look()
                self._waited(request, now)
            if self._delay:
                time.sleep(self._delay_of(request))
        except BaseException as error:
            self._withdraw(request, now)
            self._end(request)
            self._tell_of_refusal(request, error)
            raise
        self._end(request)

    def _tell_of_refusal(self, request: Request, error: BaseException) -> None:
        if isinstance(error, GrantError):
            self._hooks.tell(GrantRefused(request.account.name, request.nbytes, error))

    def _submit(
        self, request: Request, now: float, place: Callable[[], object] | None = None
    ) -> None:
        """Put the request to the ledger; if it has to wait, it has an owner then."""
        with self._lock:
            settled = self._ask(request, now)
            if request.state is State.WAITING:
                request.asked_at = now
                if place is not None:
                    request.owner = place()
                elif self._loop is not None:
                    request.owner = self._loop.place()
                    request.task = current_task()
                    self._arm(self._loop)
        self._wake(settled)
        if self._impatient and request.owner is not None:
            for tell in [*self._impatient.get(request.account, {}).values()]:
                if self._loop is not None and threading.get_ident() not in self._loop:
                    self._loop.call_soon(tell)
                else:
                    tell()

    def _tell_of_waiters(self, account: Account, who: object, tell: Callable[[], None]) -> None:
        """Have somebody who holds something told, in the event loop, if others wait for that."""
        self._impatient.setdefault(account, {})[who] = tell

    def _tell_no_more(self, account: Account, who: object) -> None:
        told = self._impatient.get(account, {})
        told.pop(who, None)
        if not told:
            self._impatient.pop(account, None)

    def _end(self, request: Request) -> None:
        """Note that nobody waits for the request any more."""
        request.owner = request.task = None  # a heap may remember the request for long
        if request in self._ledger.on_its_way:
            if self._is_inside():
                self._do_later(partial(self._end, request))
                return
            with self._lock:
                self._ledger.arrived(request)

    def _delay_of(self, request: Request) -> float:
        """Give how long an admitted request is held back, and note it."""
        delay = 0.0
        if not self._observe and request.pooled and request.kind is Kind.GRANT:
            delay = 0.0 if request.source is not None else self._delay
        if delay:
            self._add(self._delay_seconds, request.account, delay)
            self._hooks.tell(GrantDelayed(request.account.name, request.nbytes, delay))
        with self._lock:
            self._ledger.arrives(request)
            request.task = request.task or SOME_TASK
        return delay

    def _ask(self, request: Request, now: float) -> list[Request]:
        """Put the request to the ledger, unless it was called off; with the lock held."""
        if request.state is not State.NEW:
            return []
        self._start_with_first_request(now)
        self._used = True
        if self._observe:
            self._rehearse(request, now)
            return []
        return self._ledger.request(request)

    def _rehearse(self, request: Request, now: float) -> None:
        """Charge the request whatever the rules say, and note what they would have said."""
        ledger = self._ledger
        self._rehearsal.settle(ledger.free, now)
        possible = ledger.refusal(request) is None
        missing = ledger.missing(request)
        ledger.force(request)
        if not possible:
            self._rehearsal.refused(request.account)
        elif missing > 0:
            self._rehearsal.waited(request.account, ledger.free + missing, now)

    def _waited(self, request: Request, since: float) -> None:
        """Note the end of a wait; raise if it has not ended in an admission."""
        name = request.account.name
        seconds = self._now() - since
        if request.state is State.WAITING:
            raise GrantTimeout(name, request.nbytes, seconds)
        self._add(self._wait_seconds, request.account, seconds)
        if request.state is State.ADMITTED:
            self._hooks.tell(GrantWaited(name, request.nbytes, seconds))
        elif request.state is State.DEADLOCKED:
            raise GrantDeadlock(name, request.nbytes, request.holders)
        elif request.state is State.IMPOSSIBLE:
            with self._lock:
                error = self._ledger.refusal(request)
            raise error or GrantTooLarge(
                name, request.nbytes, 0, "the limit or its bounds have changed"
            )

    def _withdraw(self, request: Request, since: float) -> None:
        """Undo a request that nobody waits for any more, whatever has become of it."""
        if self._is_inside():
            self._do_later(partial(self._withdraw, request, since))
            return
        with self._lock:
            if request.state is State.WAITING:
                self._add(self._wait_seconds, request.account, self._now() - since)
                settled = self._ledger.cancel(request)
            elif request.state is not State.ADMITTED:
                return
            elif request.kind is Kind.ENTER:
                settled = self._ledger.leave(request.account)
            else:
                settled = list(self._ledger.undo(request))
        self._wake(settled)

    def _sender(self, account: Account, name: Hashable | None) -> Sender | None:
        return None if name is None else self._ledger.sender(account, name)

    def _give_back(self, request: Request) -> None:
        """Take back what was charged for a request whose grant is there no more."""
        with self._lock:
            settled = self._ledger.undo(request)
        self._wake(settled)

    def _let_go_of(
        self, account: Account, nbytes: int, exclusive: bool, options: Options | None
    ) -> Iterable[Request]:
        """Give back what a grant held, if it is the last handle of that; with the lock held."""
        options = options or PLAIN
        if options.shares is not None:
            options.shares.count -= 1
            if options.shares.count:
                return ()
        return self._ledger.give_back(
            account,
            nbytes,
            also=options.also,
            sender=self._sender(account, options.sender),
            exclusive=exclusive,
        )

    def _abandon(self, grant: MemoryGrant) -> None:
        """Note what a garbage-collected grant held. Takes no lock: may run anywhere."""
        account, is_alone = grant._component._account, grant._state == ALONE
        self._do_later(
            partial(self._give_back_leaked, account, grant._size, is_alone, grant._options)
        )

    def _give_back_leaked(
        self, account: Account, nbytes: int, exclusive: bool, options: Options | None
    ) -> None:
        with self._lock:
            settled = self._let_go_of(account, nbytes, exclusive, options)
        self._wake(settled)
        self._hooks.tell(GrantLeaked(account.name, nbytes))

    def _is_inside(self) -> bool:
        """Whether this may have come in the midst of something, in the thread that has the lock.

        The collector closes tasks and generators that are garbage wherever it happens to run.
        """
        return self._lock.locked() and is_collecting()

    def _do_later(self, call: Callable[[], None]) -> None:
        """Have something done as soon as nobody has the lock. Takes no lock: from anywhere."""
        self._late.append(call)
        if self._loop is not None:
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Do what was left for later."""
        while self._late:
            self._late.popleft()()

    def _wake(self, settled: Iterable[Request]) -> None:
        """Let those that wait for these requests go on, wherever they wait."""
        for request in settled:
            if request.out_of_turn and not request.alone:
                log().info(
                    "membound.progress",
                    component=request.account.name,
                    wanted_bytes=request.nbytes,
                    free_bytes=self._ledger.free,
                    drift_bytes=self._ledger.drift,
                )
            place = request.owner
            if isinstance(place, ThreadPlace):
                place.wake()
            elif place is not None and self._loop is not None:
                if threading.get_ident() in self._loop:
                    self._loop.wake(place)
                else:
                    self._loop.call_soon(partial(self._loop.wake, place))

    # --- the event loop

    def _bind(self) -> EventLoop:
        """Give the running event loop, after making it the one that is served."""
        loop = self._loop
        if loop is not None and asyncio._get_running_loop() is self._loop_token:
            return loop
        running = running_loop()
        if running is None:
            raise RuntimeError(
                "no event loop runs in this thread; use `with grant(...)`, which blocks it"
            )
        if loop is not None:
            if loop.token is running.token:
                return loop
            held = len(self._held())
            if not loop.ended and (held or self._ledger.waiters.count or self._ledger.arriving):
                if self.is_noop:
                    return running
                raise LimitError(
                    "another event loop is using this limiter: it holds "
                    f"{held} grants, and {self._ledger.waiters.count} requests "
                    "wait; use `with grant(...)` from threads, or a limiter for each loop"
                )
        with self._lock:
            self._serve(running)
        return running

    def _serve(self, loop: EventLoop | None) -> None:
        """Go by the clock of that event loop from now on, or by none's; with the lock held."""
        self._loop = loop
        self._now = time.monotonic if loop is None else loop.now
        self._timer = None
        self._yield_at = self._sample_at = self._limit_look_at = -math.inf
        self._gauge.forget_time()
        self._calm_until = -math.inf
        self._loop_token = self if loop is None else loop.token

    def _forked(self, task: object) -> None:
        """Go on in a child process, in which no event loop runs and nobody waits.

        What grants hold stays charged: the child has that memory, too. But nobody has the pool
        alone, since nobody may be left to give it back.

        Args:
            task: who has forked, and goes on here; None if that is no task.
        """
        ledger = self._ledger
        self._serve(None)
        self._reclaim.run = None
        self._impatient.clear()
        ledger.reopen()

        def is_its_own(request: Request) -> bool:
            if isinstance(request.owner, ThreadPlace):
                return request.owner.thread == threading.get_ident()
            return request.task is None or request.task is task  # None: it is just being made

        everybody = (*ledger.on_its_way, *reversed(ledger.all_waiting()))
        others = [request for request in everybody if not is_its_own(request)]
        for request in others:
            self._withdraw(request, self._now())  # how long it has waited is the parent's to say
            request.state = State.CANCELLED
            self._end(request)

    def _arm(self, loop: EventLoop) -> None:
        """Have memory looked at from time to time while anybody waits."""
        if self._timer is None:
            seconds = UNTANGLE_SECONDS if self._untangled else self._interval()
            self._timer = loop.call_later(seconds, partial(self._tick, loop))

    def _tick(self, loop: EventLoop) -> None:
        if loop is not self._loop:  # another one is served by now
            return
        self._timer = None
        self._look()
        self._look_for_deadlock()
        if self._ledger.waiters.count:
            self._arm(loop)

    def _look(self) -> None:
        """Look at memory and at those who wait."""
        self._drain()
        now = self._now()
        self._sample(now)
        if self._ledger.waiters.count:
            self._lift_barrier(now)
        with self._lock:
            event = self._stalls.look(
                now,
                self._ledger.moved,
                self._ledger.waiters.count,
                partial(describe_stall, self._ledger, now),
            )
        if event is not None:
            self._hooks.tell(event)

    # --- deadlocks

    def _look_for_deadlock(self) -> None:
        """Do something about a deadlock, if there is one: in the loop's thread, on a timer."""
        ledger = self._ledger
        ended: int = ledger.waiters.ended
        looks = (
            self._untangled or ledger.moved == self._moved_at_tick or ended == self._ended_at_tick
        )
        self._moved_at_tick, self._ended_at_tick = ledger.moved, ended
        self._untangled = False
        if not looks or not ledger.waiters.count:
            return
        with self._lock:
            settled = self._untangle()
        if not settled:
            return
        self._untangled = True
        refused = [request for request in settled if request.state is State.DEADLOCKED]
        for request in refused[:REPORTED]:
            log().warning(
                "membound.deadlock",
                component=request.account.name,
                wanted_bytes=request.nbytes,
                free_bytes=ledger.free,
                holders=list(request.holders[:REPORTED]),
            )
        if not refused:
            log().info(
                "membound.order_suspended",
                admitted=len(settled),
                waiting=ledger.waiters.count,
            )
        self._wake(settled)

    def _untangle(self) -> list[Request]:
        """Settle requests if all who hold anything wait; with the lock held.

        Order is suspended first. If that lets nobody in, and nobody could come in if there
        was no drift, or gives up by itself, those who have held something for the shortest
        time are refused until there is enough for one of the others.
        """
        ledger, loop = self._ledger, self._loop
        held = [
            (grant._component._account, grant._holder, grant._size, grant._since)
            for grant in self._held()
        ]
        waiting = ledger.all_waiting()
        holders = waiting_holders(ledger.accounts.values(), held, waiting)
        if not holders or loop is None or not all(loop.is_occupied(r.owner) for r in holders):
            return []
        settled = ledger.suspend_order(
            holders, [request for request in waiting if request not in holders]
        )
        if settled or any(request.gives_up for request in holders):
            return settled
        return ledger.break_deadlock(holders)

    # --- the world

    def _sample_if_due(self, nbytes: int, now: float) -> None:
        if self._late:
            self._drain()
        if now >= self._sample_at or self._ledger.moved + nbytes > self._ledger.look_at:
            self._sample(now)

    def _sample(self, now: float) -> None:
        """Read memory and the limit, and let in who fits now."""
        if self._late:
            self._drain()
        reread = self._reread_limit
        if reread is not None and now >= self._limit_look_at:
            self._limit_look_at = now + LIMIT_LOOK_SECONDS
            self._look_at_limit(reread)
        measured = self._gauge.read(now, self._ledger.limit)
        with self._lock:
            settled = self._observe_reading(measured, now)
        self._wake(settled)
        ledger = self._ledger
        if self._drift.has_risen(ledger.drift, ledger.limit):
            self._hooks.tell(DriftRose(ledger.drift, ledger.measured, ledger.free))
        self._reclaim.look(now)

    def _observe_reading(self, measured: int, now: float) -> list[Request]:
        """Take a reading into account; with the lock held."""
        ledger, policy = self._ledger, self.settings.pressure
        limit = ledger.limit
        self._delay = policy.delay_seconds(measured, limit)
        self._sample_at = now + policy.interval_seconds(measured, limit)
        self._calm()
        settled = ledger.observe(
            measured,
            pressed=measured + ledger.arriving > policy.threshold * limit,
            look_after=policy.unsampled_bytes(measured, limit),
            live=self._live.read(self._components, now, limit),
        )
        if self._observe:
            self._rehearsal.settle(ledger.free, now)
        return settled

    def _has_yielded(self, now: float) -> None:
        self._yield_at = now + self.settings.yield_after_seconds
        self._calm()

    def _calm(self) -> None:
        calm = min(self._yield_at, self._sample_at)
        pressed = (self._delay and not self._observe) or self._reclaim.run is not None
        self._calm_until = -math.inf if pressed else calm

    def _interval(self) -> float:
        return self.settings.pressure.interval_seconds(self._ledger.measured, self._ledger.limit)

    def _checked_baseline(self, measured: int) -> int:
        baseline = measured if self._fixed_baseline is None else self._fixed_baseline
        if baseline >= self._limit.effective_bytes:
            raise _below_baseline(self._limit, baseline, self._gauge.name)
        return baseline

    def _look_at_limit(self, reread: Callable[[], int]) -> None:
        try:
            limit_bytes = reread()
            is_kept = limit_bytes == self._limit.limit_bytes
            if not is_kept and self._reread_limit is reread:  # no resize() in a thread since
                self._resize(limit_bytes, self._limit.source)
        except (OSError, InvalidLimit) as error:
            if self._limit_is_read:
                log().warning("membound.limit_not_read", error=str(error))
            self._limit_is_read = False
        else:
            self._limit_is_read = True

    def _lift_barrier(self, now: float) -> None:
        """Lift the first barrier if it was not served for long: it may wait for ever."""
        first = self._ledger.waiters.first_barrier()
        if first is not self._first_barrier:
            self._first_barrier, self._first_barrier_at = first, now
        if first is None or now - self._first_barrier_at < self.settings.stall_after_seconds:
            return
        with self._lock:
            settled = self._ledger.lift(first) if first.barrier else []
        self._wake(settled)

    # --- snapshots, inside

    @staticmethod
    def _add(totals: dict[Account, float], account: Account, seconds: float) -> None:
        totals[account] = totals.get(account, 0.0) + seconds

    def _held(self) -> list[MemoryGrant]:
        """Give all grants that are held; costs time in proportion to their number."""
        return [
            grant
            for account in self._ledger.accounts.values()
            for grant in account.holders.snapshot()
        ]

    def _component_statistics(self, account: Account) -> ComponentStatistics:
        with self._lock:
            now = self._now()
            return self._describe(account, now, self._rehearsal.seconds(now))

    def _describe(
        self, account: Account, now: float, would_wait_seconds: dict[Account, float]
    ) -> ComponentStatistics:
        oldest = account.oldest()
        peak_live, peak_overdraft = self._live.peaks(account.name)
        return ComponentStatistics(
            path=account.name,
            minimum_bytes=account.minimum,
            firm_limit_bytes=None if account.firm_limit == NO_LIMIT else account.firm_limit,
            entered=account.entries,
            granted_bytes=account.granted,
            in_flight_bytes=account.in_flight,
            senders=account.senders,
            resources={
                name: stock.granted + stock.in_flight for name, stock in account.others.items()
            },
            live_bytes=account.live,
            peak_live_bytes=peak_live,
            overdraft_bytes=max(0, account.live - max(account.granted, account.reserved)),
            peak_overdraft_bytes=peak_overdraft,
            peak_granted_bytes=account.peak,
            grants=account.holders.count,
            waiting=account.waiting,
            waiting_bytes=account.waiting_bytes,
            oldest_wait_seconds=0.0 if oldest is None else max(0.0, now - oldest.asked_at),
            total_wait_seconds=self._wait_seconds.get(account, 0.0),
            total_delay_seconds=self._delay_seconds.get(account, 0.0),
            admissions=account.admissions,
            refusals=account.refusals,
            would_wait=self._rehearsal.waits.get(account, 0),
            would_wait_seconds=would_wait_seconds.get(account, 0.0),
            would_refuse=self._rehearsal.refusals.get(account, 0),
        )


_nobody = MemoryLimiter.noop()
"""Who is asked when there is no limiter."""

_warned_of_nobody = False


def current_limiter(*, besides: Component | None = None) -> MemoryLimiter:
    """Give the limiter that code without a name for one means.

    The one of the context, else the only one that the process has entered or installed; a
    ``noop()`` one, and one warning, if there is none.

    Args:
        besides: a component whose own block does not count as context.

    Raises:
        NoCurrentLimiter: it is not clear which; or there is none, with MEMBOUND_REQUIRED=1.
    """
    scope = current_scope.get()
    while scope is not None:
        if scope.component is not besides and scope.component._limiter is not None:
            found: MemoryLimiter = scope.component._limiter
            return found
        scope = scope.outer
    candidates = entered_limiters or installed_limiters
    if len(candidates) == 1:
        return candidates[0]
    if candidates or parse_switch(given(None, "REQUIRED", False), "required"):
        raise NoCurrentLimiter(len(candidates))
    global _warned_of_nobody
    if not _warned_of_nobody:
        _warned_of_nobody = True
        log().warning(
            "membound.no_limiter",
            remedy="grants limit nothing; use `async with MemoryLimiter():`, "
            "limiter.install() or `membound run`",
        )
    return _nobody


def _check_page(most: int | None, skip: int) -> None:
    if skip < 0 or (most is not None and most < 0):
        raise ValueError(f"most={most}, skip={skip}: neither may be negative")


def _below_baseline(limit: MemoryLimit, baseline: int, measured_name: str) -> InvalidLimit:
    return InvalidLimit(
        f"the limit of {format_size(limit.limit_bytes)} ({limit.source}) less a slop factor of "
        f"{limit.slop_factor:g} is {format_size(limit.effective_bytes)}, but "
        f"{format_size(baseline)} are in use before anything is granted ({measured_name}); "
        "raise the limit, lower slop_factor, or import less"
    )
