"""The real ledger with the face of the model, used as a grant and a limiter use it."""

from __future__ import annotations

from fractions import Fraction

from membound_async.exceptions import GrantTooLarge, QuotaExceeded
from membound_async.quota import NO_LIMIT, Account, Ledger
from membound_async.waiters import Kind, Request, State
from tests.model import Admission, Outcome, Snapshot, Status

THRESHOLD = Fraction(95, 100)


class Held:
    """What a `MemoryGrant` keeps of its grant."""

    def __init__(self, account: Account, size: int, *, alone: bool, exclusive: bool) -> None:
        self.account = account
        self.size = size
        self.alone = alone
        self.exclusive = exclusive


class LedgerAdapter:
    """A `Ledger`, with tickets for requests and grants."""

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
        self.grants: dict[int, Held] = {}
        self.waiting: dict[int, Request] = {}

    # --- operations

    def add(self, component: str, minimum_bytes: int, firm_limit_bytes: int | None) -> Outcome:
        firm = NO_LIMIT if firm_limit_bytes is None else firm_limit_bytes
        self.ledger.account(component, minimum_bytes, firm)
        return Outcome("done")

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
            self.grants[ticket] = Held(account, nbytes, alone=False, exclusive=False)
            return Outcome("admitted", (Admission(ticket, nbytes),))
        return self._ask(Request(account, nbytes, up_to=up_to, alone=alone, owner=(ticket, None)))

    def request_nowait(self, ticket: int, component: str, nbytes: int) -> Outcome:
        account = self.ledger.accounts[component]
        return self._ask_nowait(Request(account, nbytes, owner=(ticket, None)))

    def grow(self, ticket: int, grant: int, nbytes: int) -> Outcome:
        return self._ask(self._grow(ticket, grant, nbytes))

    def grow_nowait(self, ticket: int, grant: int, nbytes: int) -> Outcome:
        return self._ask_nowait(self._grow(ticket, grant, nbytes))

    def shrink(self, grant: int, nbytes: int) -> Outcome:
        held = self.grants[grant]
        held.size -= nbytes
        ordinary = held.exclusive and held.size <= self.ledger.most(held.account)
        held.exclusive = held.exclusive and not ordinary
        return self._outcome(self.ledger.give_back(held.account, nbytes, exclusive=ordinary))

    def release(self, grant: int) -> Outcome:
        held = self.grants.pop(grant)
        return self._outcome(
            self.ledger.give_back(held.account, held.size, exclusive=held.exclusive)
        )

    def cancel(self, ticket: int) -> Outcome:
        return self._outcome(self.ledger.cancel(self.waiting.pop(ticket)))

    def enter(self, ticket: int, component: str) -> Outcome:
        account = self.ledger.accounts[component]
        if self.ledger.enter_again(account):
            return Outcome("admitted", (Admission(ticket, 0),))
        return self._ask(Request(account, account.minimum, Kind.ENTER, owner=(ticket, None)))

    def leave(self, component: str) -> Outcome:
        return self._outcome(self.ledger.leave(self.ledger.accounts[component]))

    def set_live(self, component: str, live_bytes: int) -> Outcome:
        return self._outcome(self.ledger.set_live(self.ledger.accounts[component], live_bytes))

    def observe(self, measured_bytes: int) -> Outcome:
        pressed = measured_bytes > THRESHOLD * self.ledger.limit
        return self._outcome(
            self.ledger.observe(measured_bytes, pressed=pressed, look_after=NO_LIMIT >> 1)
        )

    def resize(self, limit_bytes: int) -> Outcome:
        return self._outcome(self.ledger.resize(limit_bytes))

    def lift_barrier(self) -> Outcome:
        first = self.ledger.waiters.first_barrier()
        return self._outcome(self.ledger.lift(first) if first is not None else [])

    def snapshot(self) -> Snapshot:
        ledger = self.ledger
        accounts = ledger.accounts.values()
        waiting = [request for account in accounts for request in account.queue or ()]
        waiting.sort(key=lambda request: request.arrival)
        return Snapshot(
            free_bytes=ledger.free,
            drift_bytes=ledger.drift,
            high_water_bytes=ledger.highest_committed,
            granted_bytes=tuple(account.granted for account in accounts),
            minimum_bytes=tuple(account.reserved for account in accounts),
            committed_bytes=tuple(
                max(account.reserved, account.granted, account.live) for account in accounts
            ),
            waiting=tuple(request.owner[0] for request in waiting),
            barriers=tuple(request.owner[0] for request in waiting if request.barrier),
            exclusive=tuple(ticket for ticket, held in self.grants.items() if held.exclusive),
        )

    # --- inside

    def _grow(self, ticket: int, grant: int, nbytes: int) -> Request:
        held = self.grants[grant]
        return Request(
            held.account,
            nbytes,
            Kind.GROW,
            held=held.size,
            alone=held.alone,
            exclusive=held.exclusive,
            owner=(ticket, held),
        )

    def _ask(self, request: Request) -> Outcome:
        ticket = request.owner[0]
        self.waiting[ticket] = request
        try:
            outcome = self._outcome(self.ledger.request(request))
        except GrantTooLarge:
            del self.waiting[ticket]
            return Outcome("too_large")
        status: Status = "waiting"
        if request.state is State.ADMITTED:
            status = "admitted"
        elif request.state is State.IMPOSSIBLE:
            status = "too_large"
        return outcome._replace(status=status)

    def _ask_nowait(self, request: Request) -> Outcome:
        ticket = request.owner[0]
        try:
            others = self.ledger.request_nowait(request)
        except (GrantTooLarge, QuotaExceeded):
            return Outcome("refused")
        self.waiting[ticket] = request
        return self._outcome([request, *others])._replace(status="admitted")

    def _outcome(self, settled: list[Request] | tuple[()]) -> Outcome:
        admitted: list[Admission] = []
        impossible: list[int] = []
        for request in settled:
            ticket, held = request.owner
            del self.waiting[ticket]
            if request.state is State.IMPOSSIBLE:
                impossible.append(ticket)
                continue
            size = 0 if request.kind is Kind.ENTER else request.nbytes
            admitted.append(Admission(ticket, size))
            if held is not None:
                held.size += size
                held.exclusive = held.exclusive or request.exclusive
            elif request.kind is Kind.GRANT:
                self.grants[ticket] = Held(
                    request.account, size, alone=request.alone, exclusive=request.exclusive
                )
        return Outcome("done", tuple(admitted), tuple(impossible))
