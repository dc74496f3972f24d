"""Defects that the core could have had, one at a time, each of which has to be found.

Eight more are in `tests.test_simulation`, which says what of them the simulator has to say.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFECTS", "Defect"]


@dataclass(frozen=True)
class Defect:
    """A wrong line.

    Attributes:
        name: what is wrong.
        module: in which file.
        old: what it says there, once.
        new: what it says instead.
    """

    name: str
    module: str
    old: str
    new: str

    def source(self, text: str) -> str:
        """Give a module with the defect.

        Raises:
            ValueError: the module has changed; so must the defect.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} is {text.count(self.old)} times there")
        return text.replace(self.old, self.new)


DEFECTS = (
    # --- the rule
    Defect(
        "a threshold is rounded down",
        "quota.py",
        "(self._p, self._q)\n            return -((-q * x - unit * (q - p) * held) // (unit * p))",
        "(self._p, self._q)\n            return (q * x + unit * (q - p) * held) // (unit * p)",
    ),
    Defect(
        "what a component holds itself is not in its threshold",
        "quota.py",
        "            held += stock.excess\n",
        "            pass\n",
    ),
    Defect(
        "what a transfer frees is forgotten",
        "quota.py",
        "// (unit * p)) - credit",
        "// (unit * p))",
    ),
    Defect(
        "what a transfer frees counts twice",
        "quota.py",
        "// (unit * p)) - credit",
        "// (unit * p)) - 2 * credit",
    ),
    Defect(
        "who wants up to so much gets a byte more than the rule allows",
        "quota.py",
        "allowed = max(0, (p * pool.free - (q - p) * account.held) // q)",
        "allowed = max(0, (p * pool.free - (q - p) * account.held) // q + 1)",
    ),
    Defect(
        "the firm limit is not looked at",
        "quota.py",
        "return stock.granted + amount > left",
        "return False",
    ),
    Defect(
        "the firm limit cannot be reached",
        "quota.py",
        "return stock.granted + amount > left",
        "return stock.granted + amount >= left",
    ),
    Defect(
        "what others take is not kept from what a barrier needs",
        "quota.py",
        "return threshold > pool.free - amount",
        "return threshold > pool.free",
    ),
    Defect(
        "the reserve counts as drawn from the pool",
        "quota.py",
        "draw = request.nbytes + min(request.account.excess, 0)",
        "draw = request.nbytes",
    ),
    Defect(
        "grants are given at once though memory is at the limit",
        "quota.py",
        "elif pool is self and self.measured >= self.limit:",
        "elif pool is self and self.measured > self.limit:",
    ),
    Defect(
        "one consumer too many is counted",
        "rules.py",
        "return 1, consumers + 1",
        "return 1, consumers + 2",
    ),
    # --- the fast path
    Defect(
        "the fast path gives one byte more than the rule allows",
        "ledger.py",
        "self._q * (held + draw) > self._p * (free + held):",
        "self._q * (held + draw - 1) > self._p * (free + held):",
    ),
    Defect(
        "the fast path passes those who wait",
        "ledger.py",
        "if self.waiters.count or moved > self.look_at or account.grouped:",
        "if moved > self.look_at or account.grouped:",
    ),
    Defect(
        "the fast path does not ask whether a reading is due",
        "ledger.py",
        "if self.waiters.count or moved > self.look_at or account.grouped:",
        "if self.waiters.count or account.grouped:",
    ),
    Defect(
        "the fast path leaves what is in flight out of the firm limit",
        "ledger.py",
        "        if granted + in_flight > account.firm_limit:",
        "        if granted > account.firm_limit:",
    ),
    Defect(
        "the fast path counts what was held before once more",
        "ledger.py",
        "free = free + held - in_flight - (now if now > 0 else 0)",
        "free = free - (now if now > 0 else 0)",
    ),
    Defect(
        "the fast path gives a sender what the others have left",
        "ledger.py",
        "if q * (q * nbytes + (q - p) * mine) + p * (q - p) * held > p * p * free:",
        "if q * q * nbytes + p * (q - p) * held > p * p * free:",
    ),
    Defect(
        "what was delivered at once is in flight still",
        "ledger.py",
        "        account.in_flight -= nbytes\n",
        "",
    ),
    # --- what is charged
    Defect(
        "heap that was granted once is taken for drift",
        "ledger.py",
        "drift = max(0, in_use - self.baseline - highest)",
        "drift = max(0, in_use - self.baseline - committed)",
    ),
    Defect(
        "the drift has the wrong sign",
        "ledger.py",
        "drift = max(0, in_use - self.baseline - highest)",
        "drift = max(0, self.baseline + highest - in_use)",
    ),
    Defect(
        "what memory has fallen by is kept by the allocator all the same",
        "ledger.py",
        "min(highest - max(0, self.measured - measured), measured - self.baseline)",
        "min(highest, measured - self.baseline)",
    ),
    Defect(
        "what is charged and not handed over yet is forgotten under pressure",
        "ledger.py",
        "in_use = measured + self.arriving",
        "in_use = measured",
    ),
    Defect(
        "live bytes are forgotten",
        "ledger.py",
        "self._update(account, account.granted, account.reserved, live)",
        "self._update(account, account.granted, account.reserved, 0)",
    ),
    Defect(
        "the last to leave does not give the minimum back",
        "ledger.py",
        "self._update(account, account.granted, 0, account.live)",
        "self._update(account, account.granted, account.reserved, account.live)",
    ),
    Defect(
        "the first to leave gives the minimum of all back",
        "ledger.py",
        "if account.entries or not account.reserved:",
        "if not account.reserved:",
    ),
    Defect(
        "a transfer that is called off leaves its source nothing",
        "ledger.py",
        "for owner, sign in ((account, -1), (source, 1)):",
        "for owner, sign in ((account, -1),):",
    ),
    Defect(
        "the pool stays with a grant that had it alone",
        "ledger.py",
        "_exclusive = None\n        self._closed = bool(self.waiters.barriers)\n",
        "_closed = bool(self.waiters.barriers)\n",
    ),
    Defect(
        "what is transferred is not in use yet",
        "ledger.py",
        "request.kind is Kind.ENTER or request.source is not None",
        "request.kind is Kind.ENTER",
    ),
    Defect(
        "who gives nothing back takes the sender of that name along",
        "ledger.py",
        "elif not sender.held and by_sender.get(sender.name) is sender:",
        "elif not sender.held and sender.name in by_sender:",
    ),
    # --- who comes in
    Defect(
        "who leaves lets nobody in",
        "ledger.py",
        "0, account.live)\n        return self._bounds_changed(account)",
        "0, account.live)\n        return []",
    ),
    Defect(
        "a higher limit lets nobody in",
        "ledger.py",
        "return dropped + self._dispatch()\n\n    # --- what changes",
        "return dropped\n\n    # --- what changes",
    ),
    Defect(
        "a reading lets nobody in",
        "ledger.py",
        "drift, committed, highest)\n        return self._dispatch()",
        "drift, committed, highest)\n        return []",
    ),
    Defect(
        "a barrier is put up one byte too early",
        "ledger.py",
        "order.counting[front] < least:",
        "order.counting[front] <= least:",
    ),
    Defect(
        "a barrier is put up one byte too late",
        "ledger.py",
        "order.counting[front] < least:",
        "order.counting[front] + 1 < least:",
    ),
    Defect(
        "what is granted out of turn passes nobody",
        "ledger.py",
        "        if draw > 0:\n            self._pass(account, draw)",
        "        if draw > 0 and in_turn:\n            self._pass(account, draw)",
    ),
    Defect(
        "senders are passed by others for ever",
        "ledger.py",
        "                    self._pass_senders(stock, amount)\n",
        "                    pass\n",
    ),
    Defect(
        "nobody works on when memory must fall for that",
        "ledger.py",
        "return (first, False) if is_only and not self._pool_is_held(but_for=account) else None",
        "return None",
    ),
    Defect(
        "one works on out of turn though others hold something",
        "ledger.py",
        "return (first, False) if is_only and not self._pool_is_held(but_for=account) else None",
        "return (first, False) if is_only else None",
    ),
    Defect(
        "of a deadlock the oldest is refused",
        "ledger.py",
        "refused = [left.pop() for _",
        "refused = [left.pop(0) for _",
    ),
    Defect(
        "of a deadlock all are refused but one",
        "ledger.py",
        "while out < fewest and self._would_fit(request, self.drift):",
        "while False:",
    ),
    # --- those who wait
    Defect(
        "requests go before grows",
        "waiters.py",
        "for line in (self.grows, self.requests) if line]",
        "for line in (self.requests, self.grows) if line]",
    ),
    Defect(
        "who does not wait any more stays in the order",
        "waiters.py",
        "        request.state = state\n        self._step_back(request)\n",
        "        request.state = state\n        self.stop_counting(request)\n",
    ),
    Defect(
        "the youngest barrier goes first",
        "waiters.py",
        "order.barriers.put(front, front.arrival if place is None",
        "order.barriers.put(front, -front.arrival if place is None",
    ),
    Defect(
        "of equal thresholds the youngest goes first",
        "waiters.py",
        "heappush(heap, (number, request.arrival, request))",
        "heappush(heap, (number, -request.arrival, request))",
    ),
    Defect(
        "who was passed by a little and stepped back counts from 0 again",
        "waiters.py",
        "self.bypassed[front] = self.passed - self.counting[front]",
        "self.bypassed[front] = 0",
    ),
    Defect(
        "a barrier that is lifted counts on",
        "waiters.py",
        "            order.bypassed.pop(barrier, None)\n",
        "            pass\n",
    ),
    # --- what a limiter does
    Defect(
        "grants are not delayed",
        "limiter.py",
        "                await anyio.sleep(self._delay_of(request))",
        "                self._delay_of(request)",
    ),
    Defect(
        "grows are delayed",
        "limiter.py",
        "and request.pooled and request.kind is Kind.GRANT:",
        "and request.pooled:",
    ),
    Defect(
        "the timer is not started again",
        "limiter.py",
        "        if self._ledger.waiters.count:\n            self._arm(loop)\n",
        "",
    ),
    Defect(
        "a time limit is no limit",
        "limiter.py",
        "with anyio.move_on_after(timeout):",
        "with anyio.move_on_after(None):",
    ),
    Defect(
        "what a lost grant held is not given back",
        "limiter.py",
        "settled = self._let_go_of(account, nbytes, exclusive, options)\n        self._wake",
        "settled = ()\n        self._wake",
    ),
    Defect(
        "who comes in by what a lost grant held is not woken",
        "limiter.py",
        "        self._wake(settled)\n        self._hooks.tell(GrantLeaked",
        "        self._hooks.tell(GrantLeaked",
    ),
    Defect(
        "who comes in by a higher limit is not woken",
        "limiter.py",
        "        self._wake(settled)\n        self._hooks.tell(LimitChanged",
        "        self._hooks.tell(LimitChanged",
    ),
    Defect(
        "who comes in when a component is left is not woken",
        "limiter.py",
        "if not account.entries else 0\n        self._wake(settled)\n",
        "if not account.entries else 0\n",
    ),
    Defect(
        "who is cancelled while he enters stays in",
        "limiter.py",
        "settled = self._ledger.leave(request.account)",
        "settled = []",
    ),
    Defect(
        "a barrier is never lifted",
        "limiter.py",
        "settled = self._ledger.lift(first) if first.barrier else []",
        "settled = []",
    ),
    Defect(
        "memory is looked at by time alone",
        "limiter.py",
        "if now >= self._sample_at or self._ledger.moved + nbytes > self._ledger.look_at:",
        "if now >= self._sample_at:",
    ),
    Defect(
        "a container's limit that was raised is not noticed",
        "limiter.py",
        "is_kept = limit_bytes == self._limit.limit_bytes",
        "is_kept = limit_bytes >= self._limit.limit_bytes",
    ),
    Defect(
        "the first handle gives back what all share",
        "limiter.py",
        "            if options.shares.count:\n                return ()\n",
        "",
    ),
    # --- what a grant does
    Defect(
        "a grant that is released twice is given back twice",
        "grant.py",
        "                self._state = RELEASED\n"
        "                size = self._size\n"
        "                self._size = 0\n",
        "                size = self._size\n",
    ),
    Defect(
        "a grant that is transferred is given back where it was",
        "grant.py",
        "                self._component = target\n",
        "                pass\n",
    ),
    Defect(
        "the grow of a grant that was released meanwhile is kept",
        "grant.py",
        'limiter._give_back(request)\n        raise GrantReleased(self._component.path, "grow")',
        'raise GrantReleased(self._component.path, "grow")',
    ),
    Defect(
        "what was split off is held twice",
        "grant.py",
        "            self._size -= nbytes\n            part._become_held(nbytes)",
        "            part._become_held(nbytes)",
    ),
    Defect(
        "a grant that is small enough now has the pool alone still",
        "grant.py",
        "ordinary = self._state == ALONE and self._size <= limiter._ledger.most(account)",
        "ordinary = False",
    ),
    # --- deadlocks, pressure, reclaim, readings
    Defect(
        "what was handed on does not rule a deadlock out",
        "deadlocks.py",
        "                return {}\n            out[account] -= nbytes\n",
        "                out[account] -= nbytes\n                continue\n"
        "            out[account] -= nbytes\n",
    ),
    Defect(
        "what is in flight does not rule a deadlock out",
        "deadlocks.py",
        "        if account.in_flight:  # a receiver takes it\n            return {}\n",
        "",
    ),
    Defect(
        "the youngest grant says for how long a task has held something",
        "deadlocks.py",
        "min(since, oldest.get(request_or_none, since))",
        "max(since, oldest.get(request_or_none, since))",
    ),
    Defect(
        "the delay is longer than the longest",
        "pressure.py",
        "level * (self.max_delay_seconds - self.min_delay_seconds)",
        "level * self.max_delay_seconds",
    ),
    Defect(
        "half of the headroom may go before memory is looked at",
        "pressure.py",
        "measured_bytes) // 4",
        "measured_bytes) // 2",
    ),
    Defect(
        "the last good reading is believed for ever",
        "gauge.py",
        "measured = max(measured, limit_bytes)",
        "pass",
    ),
    Defect(
        "a stall is reported again and again",
        "stalls.py",
        "            self.stalled = True\n",
        "",
    ),
    Defect(
        "a reclaimer may ask for grants",
        "reclaim.py",
        "if call is not None and not call.over and call.limiter is self.limiter:",
        "if call is not None and call.over and call.limiter is self.limiter:",
    ),
    Defect(
        "a reclaimer that fails is asked again at once",
        "reclaim.py",
        "useful=useful and not call.failed)",
        "useful=useful or call.failed)",
    ),
    Defect(
        "reclaim ends as soon as memory is below the threshold",
        "reclaim.py",
        "pressure.threshold**2)",
        "pressure.threshold)",
    ),
)
