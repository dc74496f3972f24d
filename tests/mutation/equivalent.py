"""Mutants that do what the module does, and why, by name: no check can find them."""

from __future__ import annotations

__all__ = ["EQUIVALENT"]

_BY_REASON: dict[str, tuple[str, ...]] = {
    "a heap built anew a little earlier gives the same order, at nearly the same cost": (
        (
            "waiters Ranking.put: if len(heap) > 2 * len(self) + 64: -> if len(heap) >= 2 * l"
            "en(self) + 64:"
        ),
        (
            "waiters Ranking.put: if len(heap) > 2 * len(self) + 64: -> if len(heap) > 2 * le"
            "n(self) - 64:"
        ),
        (
            "waiters Ranking.put: if len(heap) > 2 * len(self) + 64: -> if len(heap) > 2 * le"
            "n(self) + 63:"
        ),
        (
            "waiters Ranking.discard: if self.pop(request, None) is not None and len(self._he"
            "ap) > 2 * len(self) + 64: -> if self.pop(request, None) is not None and len(self"
            "._heap) >= 2 * len(self) + 64:"
        ),
        (
            "waiters Ranking.discard: if self.pop(request, None) is not None and len(self._he"
            "ap) > 2 * len(self) + 64: -> if self.pop(request, None) is not None and len(self"
            "._heap) > 2 * len(self) + 63:"
        ),
    ),
    "a barrier has the same rank in all the orders that it draws on": (
        (
            "waiters Queue.head: return min(barriers, key=lambda front: front.orders[0].barri"
            "ers[front]) -> return min(barriers, key=lambda front: front.orders[-1].barriers["
            "front])"
        ),
    ),
    "a new dictionary is empty": ("waiters Ranking.__init__: super().__init__() -> pass",),
    "it is only compared with what it was before": (
        "waiters Order.__init__: self.passed = 0 -> self.passed = 1",
        "waiters Order.__init__: self.passed = 0 -> self.passed = -1",
    ),
    "a part that does not depend on consumers is the same for all, and else it is not used": (
        "quota Quota.__init__: p, q = self.rule.part(0) -> p, q = self.rule.part(1)",
        "quota Quota.__init__: p, q = self.rule.part(0) -> p, q = self.rule.part(-1)",
    ),
    "what is below 0 becomes 0 in the end": (
        (
            "quota Quota._room: rooms.append(room if self._is_open(pool) else 0) -> rooms.app"
            "end(room if self._is_open(pool) else -1)"
        ),
    ),
    "no request names bytes among other resources, and a group's result is not used": (
        "quota Quota._stock: return account -> return None",
    ),
    "to enter concerns one stock": (
        (
            "quota Quota._need: return self._demands(request)[0][1] -> return self._demands(r"
            "equest)[-1][1]"
        ),
    ),
    "a stock's thresholds are all ready or none, and the limiter's pool is its last": (
        "quota Quota._lacks: continue -> break",
    ),
    "a barrier is one only in pools that it draws on, so that the loop's end is not reached": (
        "quota Quota._bars: return False -> return True (2)",
    ),
    "no most is below 0": ("quota Quota.refusal: alone = 0 -> alone = -1",),
    "only a short cut: without it, what keeps a request out is looked at in full": (
        (
            "quota Quota._is_plain: return request.sender is None and (not request.also) and "
            "(not request.account.grouped) -> return None"
        ),
    ),
    "an amount is the same with 0 added": (
        (
            "quota Quota._inner: draw = amount if excess > 0 else amount + excess -> draw = a"
            "mount if excess > -1 else amount + excess"
        ),
        (
            "quota Quota._inner: draw = amount if excess > 0 else amount + excess -> draw = a"
            "mount if excess >= 0 else amount + excess"
        ),
    ),
    "0 added changes nothing": (
        "quota Quota._threshold: if stock.excess > 0: -> if stock.excess > -1:",
        "quota Quota._threshold: if stock.excess > 0: -> if stock.excess >= 0:",
    ),
}

EQUIVALENT = {name: reason for reason, names in _BY_REASON.items() for name in names}
