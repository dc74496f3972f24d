"""The real ledger with the face of the model, for the driver of both.

It does with a `Ledger` what `MemoryGrant` and `MemoryLimiter` do: a plain new request tries
`admit` first, and only then waits in order. After each operation it also finds anew whatever
the ledger keeps up to date.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from membound_async.exceptions import GrantTooLarge, QuotaExceeded
from membound_async.ledger import NO_LIMIT, Account, Ledger
from membound_async.quota import READY
from membound_async.waiters import Kind, Ranking, Request, State
from tests.model import Admission, Live, Outcome, Snapshot, Status

__all__ = ["LedgerAdapter"]


class _Grant:
    """What `MemoryGrant` remembers: whose it is, and how much."""

    def __init__(self, account: Account, alone: bool) -> None:
        self.account = account
        self.alone = alone
        self.size_bytes = 0
        self.exclusive = False


class LedgerAdapter:
    """A ledger in which tickets name requests and grants; see `tests.model.Core`."""

    def __init__(
        self,
        limit_bytes: int,
        *,
        baseline_bytes: int = 0,
        share: Fraction = Fraction(1, 2),
        bypass_limit_bytes: int | None = None,
    ) -> None:
        self.ledger = Ledger(
            limit_bytes, baseline=baseline_bytes, share=share, bypass_limit=bypass_limit_bytes
        )
        self._grants: dict[int, _Grant] = {}
        self._waiting: dict[int, Request] = {}

    # What is asked for.

    def add(self, component: str, minimum_bytes: int, firm_limit_bytes: int | None) -> Outcome:
        self.ledger.account(component, minimum_bytes, _firm(firm_limit_bytes))
        return Outcome("done")

    def declare(self, component: str, minimum_bytes: int, firm_limit_bytes: int | None) -> Outcome:
        account = self.ledger.accounts[component]
        return self._done(self.ledger.declare(account, minimum_bytes, _firm(firm_limit_bytes)))

    def request(
        self,
        ticket: int,
        component: str,
        nbytes: int,
        up_to: int | None = None,
        alone: bool = False,
    ) -> Outcome:
        account = self.ledger.accounts[component]
        if up_to is None and not alone and self.ledger.admit(account, nbytes):
            grant = self._grants[ticket] = _Grant(account, alone)
            grant.size_bytes = nbytes
            return Outcome("admitted", (Admission(ticket, nbytes),))
        grant = _Grant(account, alone)
        request = Request(account, nbytes, up_to=up_to, alone=alone, owner=(ticket, grant))
        return self._ask(request)

    def request_nowait(self, ticket: int, component: str, nbytes: int) -> Outcome:
        account = self.ledger.accounts[component]
        return self._ask_now(Request(account, nbytes, owner=(ticket, _Grant(account, False))))

    def grow(self, ticket: int, grant: int, nbytes: int) -> Outcome:
        return self._ask(self._grow_request(ticket, self._grants[grant], nbytes))

    def grow_nowait(self, ticket: int, grant: int, nbytes: int) -> Outcome:
        return self._ask_now(self._grow_request(ticket, self._grants[grant], nbytes))

    def enter(self, ticket: int, component: str) -> Outcome:
        account = self.ledger.accounts[component]
        if self.ledger.enter_again(account):
            return Outcome("admitted", (Admission(ticket, 0),))
        return self._ask(Request(account, account.minimum, Kind.ENTER, owner=(ticket, None)))

    # What is given back, and what the world says.

    def shrink(self, grant: int, nbytes: int) -> Outcome:
        held = self._grants[grant]
        held.size_bytes -= nbytes
        ordinary = held.exclusive and held.size_bytes <= self.ledger.most(held.account)
        held.exclusive = held.exclusive and not ordinary
        return self._done(self.ledger.give_back(held.account, nbytes, exclusive=ordinary))

    def release(self, grant: int) -> Outcome:
        held = self._grants.pop(grant)
        return self._done(
            self.ledger.give_back(held.account, held.size_bytes, exclusive=held.exclusive)
        )

    def cancel(self, ticket: int) -> Outcome:
        request = self._waiting.pop(ticket)
        settled = self.ledger.cancel(request)
        assert request.state is State.CANCELLED
        return self._done(settled)

    def leave(self, component: str) -> Outcome:
        return self._done(self.ledger.leave(self.ledger.accounts[component]))

    def observe(self, measured_bytes: int, live: Live = ()) -> Outcome:
        limit_bytes, accounts = self.ledger.limit, self.ledger.accounts
        return self._done(
            self.ledger.observe(
                measured_bytes,
                pressed=measured_bytes > Fraction(95, 100) * limit_bytes,
                look_after=max(0, limit_bytes - measured_bytes) // 4,
                live=[(accounts[component], live_bytes) for component, live_bytes in live],
            )
        )

    def resize(self, limit_bytes: int) -> Outcome:
        return self._done(self.ledger.resize(limit_bytes))

    def lift_barrier(self) -> Outcome:
        barrier = self.ledger.waiters.first_barrier()
        return self._done([] if barrier is None else self.ledger.lift(barrier))

    def snapshot(self) -> Snapshot:
        self.check()
        ledger = self.ledger
        accounts = ledger.accounts.values()
        waiting = sorted(self._waiting.items(), key=lambda item: item[1].arrival)
        return Snapshot(
            free_bytes=ledger.free,
            drift_bytes=ledger.drift,
            high_water_bytes=ledger.highest_committed,
            granted_bytes=tuple([account.granted for account in accounts]),
            minimum_bytes=tuple([account.reserved for account in accounts]),
            committed_bytes=tuple([a.reserved + a.held for a in accounts]),
            waiting=tuple([ticket for ticket, _ in waiting]),
            barriers=tuple([ticket for ticket, request in waiting if request.barrier]),
            exclusive=tuple([t for t, grant in self._grants.items() if grant.exclusive]),
            available_bytes=tuple([ledger.available(account) for account in accounts]),
        )

    # How it is done.

    def _grow_request(self, ticket: int, held: _Grant, nbytes: int) -> Request:
        return Request(
            held.account,
            nbytes,
            Kind.GROW,
            held=held.size_bytes,
            alone=held.alone,
            exclusive=held.exclusive,
            owner=(ticket, held),
        )

    def _ask(self, request: Request) -> Outcome:
        ticket: int = request.owner[0]
        try:
            settled = self.ledger.request(request)
        except GrantTooLarge:
            assert request.state is State.NEW
            return Outcome("too_large")
        self._waiting[ticket] = request
        outcome = self._done(settled)
        status: dict[State, Status] = {
            State.WAITING: "waiting",
            State.ADMITTED: "admitted",
            State.IMPOSSIBLE: "too_large",
        }
        return outcome._replace(status=status[request.state])

    def _ask_now(self, request: Request) -> Outcome:
        available_bytes = self.ledger.available(request.account)
        try:
            settled = self.ledger.request_nowait(request)
        except GrantTooLarge:
            return Outcome("too_large")
        except QuotaExceeded:
            # Behind waiters of its component not even nothing is to be had.
            assert available_bytes < request.nbytes or request.account.queue is not None
            assert request.state is State.NEW
            return Outcome("refused")
        assert request.state is State.ADMITTED
        assert request.nbytes <= available_bytes
        return self._done([request, *settled])._replace(status="admitted")

    def _done(self, settled: Iterable[Request]) -> Outcome:
        """Hand over what was charged for those who need not wait any more."""
        admitted: list[Admission] = []
        infeasible: list[int] = []
        for request in settled:
            ticket, grant = request.owner
            self._waiting.pop(ticket, None)
            if request.state is State.IMPOSSIBLE:
                infeasible.append(ticket)
                continue
            assert request.state is State.ADMITTED
            self.ledger.arrived(request)
            if request.kind is Kind.ENTER:
                admitted.append(Admission(ticket, 0))
                continue
            if request.kind is Kind.GRANT:
                self._grants[ticket] = grant
            grant.size_bytes += request.nbytes
            grant.exclusive = request.exclusive
            admitted.append(Admission(ticket, request.nbytes))
        return Outcome("done", tuple(admitted), tuple(infeasible))

    def check(self) -> None:
        """Find anew what the ledger keeps up to date.

        Raises:
            AssertionError: it has not kept it so.
        """
        ledger, waiters = self.ledger, self.ledger.waiters
        accounts = ledger.accounts.values()
        reserved = sum([account.reserved for account in accounts])
        committed = sum([max(a.reserved, a.granted, a.live) for a in accounts])
        assert ledger.free == ledger.limit - ledger.baseline - ledger.drift - committed
        assert (ledger.committed, ledger._reserved) == (committed, reserved)
        assert ledger.highest_committed >= committed
        sizes = dict.fromkeys(accounts, 0)
        for grant in self._grants.values():
            sizes[grant.account] += grant.size_bytes
        alone = [grant.account for grant in self._grants.values() if grant.exclusive]
        assert alone == ([] if ledger._exclusive is None else [ledger._exclusive])
        assert ledger._closed == (bool(alone) or bool(waiters.barriers))
        requests: list[Request] = []
        heads = 0
        for account in accounts:
            assert account.granted == sizes[account] <= account.peak
            assert account.excess == max(account.granted, account.live) - account.reserved
            assert account.reserved == 0 or account.entries > 0
            if account.queue is not None:
                requests += account.requests()
                heads += self._check_queue(account)
        assert set(requests) == set(self._waiting.values())
        assert all(request.state is State.WAITING for request in requests)
        assert waiters.count == len(requests)
        assert waiters.alone == sum([request.alone for request in requests])
        assert len(waiters.heads) == heads
        assert len(waiters.growing) == sum([head.kind is Kind.GROW for head in waiters.heads])
        assert len(waiters.barriers) == sum([request.barrier for request in requests])
        for ranking in (waiters.heads, waiters.growing, waiters.counting, waiters.barriers):
            assert_bounded(ranking)

    def _check_queue(self, account: Account) -> int:
        """Check what is known of the waiters of an account; give how many it has in order."""
        ledger, waiters, queue = self.ledger, self.ledger.waiters, account.queue
        assert queue is not None
        fronts = queue.fronts()
        head = queue.head()
        blocked = account.granted + head.nbytes > account.firm_limit and head.kind is not Kind.ENTER
        assert (head in waiters.heads) == (not blocked)
        for request in account.requests():
            assert request is head or request not in waiters.heads
            assert request in fronts or not (request.barrier or request in waiters.counting)
        if blocked:
            return 0
        draw = ledger._need(head)
        if head.kind is Kind.ENTER or draw <= 0:
            threshold = max(draw, 0) or READY
        else:
            # The smallest R for which q*(s + c) <= p*(R + s).
            p, q = ledger.rule.part(1)
            held = max(account.excess, 0)
            threshold = waiters.heads[head]
            assert p is not None
            assert q * (held + draw) <= p * (threshold + held)
            assert q * (held + draw) > p * (threshold - 1 + held)
        assert waiters.heads[head] == threshold != READY
        if head in waiters.growing:
            assert waiters.growing[head] == account.reserved - account.granted
        return 1


def assert_bounded(ranking: Ranking) -> None:
    """Check that a ranking remembers little that is out of date.

    Raises:
        AssertionError: it does not.
    """
    assert len(ranking._heap) <= 2 * len(ranking) + 64


def _firm(firm_limit_bytes: int | None) -> int:
    return NO_LIMIT if firm_limit_bytes is None else firm_limit_bytes
