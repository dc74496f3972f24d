"""Accounts: components that divide limits of their own among themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .component import Component
from .resources import ResourceLimits
from .stocks import Group

if TYPE_CHECKING:
    from .limiter import MemoryLimiter

__all__ = ["Account", "AccountUsage"]


class AccountUsage(NamedTuple):
    """How much of one resource an account's components have."""

    limit: int  #: how much there is for all of them
    free: int  #: how much of that nobody of them has


class Account:
    """A user, a tenant or a peer: components whose limits are shared and divided.

    Made by `MemoryLimiter.account()`. Each of its components may have half of what the
    others of the account leave of its limits, by the same rule by which all components
    divide the limiter, which holds besides. So whatever they do together takes no more than
    the account has, and none of them can use that up.
    """

    def __init__(self, name: str, limits: ResourceLimits, limiter: MemoryLimiter) -> None:
        self.name = name
        self.limits = limits
        self._limiter = limiter
        self._group: Group = limiter._ledger.group(limits)

    def __repr__(self) -> str:
        return f"<Account {self.name!r}: {self.limits}>"

    def component(
        self, path: str, minimum: int | str = 0, firm_limit: int | str | None = None
    ) -> Component:
        """Give the component of that dotted path, as one of this account.

        See `MemoryLimiter.component`.

        Raises:
            InvalidComponentBounds: the bounds make no sense, or it has others already.
            ValueError: it has a grant, is entered, is waited for, or is another account's.
        """
        return self.add(self._limiter.component(path, minimum, firm_limit))

    def add(self, component: Component) -> Component:
        """Make a component one of this account; give it back.

        Raises:
            ValueError: it has a grant, is entered, is waited for, or is another account's.
        """
        node = component._resolve()
        limiter, account = self._limiter, node._account
        if node._limiter is not limiter:
            raise ValueError(f"{component!r} belongs to another limiter")
        with limiter._lock:
            if account.group is self._group:
                return component
            if account.group is not None:
                raise ValueError(f"{component!r} is another account's already")
            if (
                account.entries
                or account.queue
                or account.by_sender
                or any(stock.granted or stock.in_flight for stock in account.stocks())
            ):
                raise ValueError(
                    f"{component!r} is in use; make it one of {self.name!r} before it is used"
                )
            limiter._ledger.join(account, self._group)
        return component

    def usage(self) -> dict[str, AccountUsage]:
        """Give what its components have of each resource; a snapshot."""
        return {
            resource: AccountUsage(pool.limit, pool.free) for resource, pool in self._group.items()
        }
