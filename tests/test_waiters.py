"""The order among waiters, without a ledger: lines, ranks, counts and barriers."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest

from membound_async import waiters as waiters_module
from membound_async.stocks import BYTES, NO_LIMIT, Account, Pool, Sender
from membound_async.waiters import Kind, Order, Queue, Ranking, Request, State, Waiters


def account(name: str = "a") -> Account:
    return Account(name, 0, NO_LIMIT)


def numbered(count: int) -> list[Request]:
    """Requests that have arrived one after the other."""
    requests = [Request(account(), 1) for _ in range(count)]
    for arrival, request in enumerate(requests):
        request.arrival = arrival
    return requests


def test_a_request_as_it_is_made():
    request = Request(account(), 5)
    assert (request.nbytes, request.up_to, request.held) == (5, 5, 0)
    assert (request.kind, request.state) == (Kind.GRANT, State.NEW)
    assert (request.arrival, request.asked_at, request.gives_up) == (0, 0.0, False)
    assert (request.pooled, request.out_of_turn, request.barrier) == (False, False, False)
    assert (request.alone, request.exclusive) == (False, False)
    assert Request(account(), 5, up_to=7).up_to == 7
    assert not hasattr(request, "__dict__")


# --- rankings


def test_the_smallest_number_is_first_and_of_equals_the_oldest():
    ranking = Ranking()
    assert ranking.first() is None
    old, middle, new = numbered(3)
    for request, number in ((new, 5), (middle, 7), (old, 5)):
        ranking.put(request, number)
    assert (ranking.first(), len(ranking), ranking[middle]) == (old, 3, 7)
    ranking.discard(old)
    assert (ranking.first(), old in ranking, new in ranking) == (new, False, True)
    ranking.discard(old)
    assert list(ranking) == [new, middle]


def test_a_new_number_replaces_the_one_before():
    ranking = Ranking()
    first, second = numbered(2)
    ranking.put(first, 1)
    ranking.put(second, 2)
    ranking.put(first, 3)
    assert (ranking.first(), ranking[first], len(ranking)) == (second, 3, 2)
    ranking.put(first, 1)
    assert ranking.first() is first
    ranking.discard(first)
    ranking.put(first, 3)
    assert ranking.first() is second


def test_the_first_that_fits():
    ranking = Ranking()
    requests = numbered(4)
    for request, number in zip(requests, (4, 2, 3, 3), strict=True):
        ranking.put(request, number)
    assert ranking.first_that(lambda request: request is not requests[1]) is requests[2]
    assert ranking.first_that(lambda _: False) is None


def test_a_ranking_does_as_a_sorted_list_and_forgets_what_is_out_of_date():
    random = Random(1)
    requests = numbered(300)
    ranking = Ranking()
    numbers: dict[Request, int] = {}
    for step in range(10_000):
        request = random.choice(requests)
        if random.random() < (0.3 if step < 7_500 else 0.6):
            ranking.discard(request)
            numbers.pop(request, None)
        else:
            numbers[request] = random.randrange(50)
            ranking.put(request, numbers[request])
        expected = min(numbers, key=lambda each: (numbers[each], each.arrival), default=None)
        if step % 50 == 0:  # rarely, so that what is out of date may pile up
            assert ranking.first() is expected
        assert len(ranking._heap) <= 2 * len(numbers) + 64
    assert {request: ranking[request] for request in ranking} == numbers


def test_it_is_put_in_order_anew_once_most_of_it_is_out_of_date(monkeypatch: pytest.MonkeyPatch):
    built: list[int] = []
    monkeypatch.setattr(waiters_module, "heapify", lambda heap: built.append(len(heap)))
    requests = numbered(1000)

    def ranked(number: int) -> Ranking:
        for request in requests:
            ranking.put(request, number)
        return ranking

    ranking = Ranking()
    ranked(0)
    ranked(1)
    assert built == []  # as many are out of date as are not
    ranked(2)
    assert built == [1000]
    ranking = Ranking()
    ranked(0)
    built.clear()
    for request in requests[:500]:
        ranking.discard(request)
    assert built == []
    for request in requests[500:600]:
        ranking.discard(request)
    assert len(built) == 1
    assert 400 < built[0] < 500


@pytest.mark.parametrize("again", [3, 4])
def test_putting_and_taking_out_in_turns_leaves_no_trace(again: int):
    ranking = Ranking()
    (request,) = numbered(1)
    for _ in range(3_000):
        ranking.put(request, 3)
        ranking.discard(request)
        ranking.put(request, again)
    assert len(ranking._heap) <= 66
    for _ in range(3):
        ranking.discard(request)
    assert (len(ranking), ranking.first(), ranking._heap) == (0, None, [])


# --- lines


def waiting(waiters: Waiters, owner: Account, kind: Kind = Kind.GRANT, **options: Any) -> Request:
    request = Request(owner, 1, kind, **options)
    assert waiters.add(request) == (
        request.exclusive or len(owner.queue.line(request)) == 1  # type: ignore[union-attr]
    )
    return request


def test_there_is_a_queue_only_while_anybody_waits():
    waiters, owner = Waiters(), account()
    request = waiting(waiters, owner)
    grow = waiting(waiters, owner, Kind.GROW)
    assert isinstance(owner.queue, Queue)
    assert (waiters.count, request.state) == (2, State.WAITING)
    waiters.remove(request, State.CANCELLED)
    assert (owner.waiting, [*owner.requests()]) == (1, [grow])
    waiters.remove(grow, State.ADMITTED)
    assert owner.queue is None
    assert (waiters.count, request.state, grow.state) == (0, State.CANCELLED, State.ADMITTED)


def test_grows_go_first_otherwise_who_came_first():
    waiters, owner = Waiters(), account()
    entry = waiting(waiters, owner, Kind.ENTER)
    request = waiting(waiters, owner)
    assert owner.queue is not None
    assert (owner.queue.head(), owner.queue.fronts()) == (entry, [entry])
    first = waiting(waiters, owner, Kind.GROW)
    second = waiting(waiters, owner, Kind.GROW)
    assert (owner.queue.head(), owner.queue.fronts()) == (first, [first, entry])
    assert [*owner.queue.grows, *owner.queue.requests] == [first, second, entry, request]
    assert sorted(each.arrival for each in owner.requests()) == [1, 2, 3, 4]


def test_the_oldest_of_an_account_is_found_in_whatever_line_it_stands():
    waiters, owner = Waiters(), account()
    assert owner.oldest() is None
    owner.by_sender["s"] = sender = Sender("s")
    oldest = Request(owner, 1, sender=sender)
    assert waiters.add(oldest)
    request = waiting(waiters, owner)
    grow = waiting(waiters, owner, Kind.GROW)
    exclusive = waiting(waiters, owner, Kind.GROW, exclusive=True)
    assert next(iter(owner.queue.grows)) is exclusive  # type: ignore[union-attr]
    for each in (oldest, request, grow, exclusive):
        assert owner.oldest() is each
        waiters.remove(each, State.CANCELLED)
    assert (owner.oldest(), owner.waiting, owner.lines()) == (None, 0, [])


def test_an_older_barrier_goes_before_the_first_grow():
    waiters, owner = Waiters(), account()
    request = waiting(waiters, owner)
    grow = waiting(waiters, owner, Kind.GROW)
    queue = owner.queue
    assert queue is not None
    for barrier, head in ((request, request), (grow, request)):
        waiters.start_counting(barrier)
        waiters.bar(barrier)
        assert queue.head() is head
    waiters.lift(request)
    assert queue.head() is grow


def test_the_grow_of_an_exclusive_grant_goes_before_all():
    waiters, owner = Waiters(), account()
    request = waiting(waiters, owner)
    grow = waiting(waiters, owner, Kind.GROW)
    pool = Pool(BYTES, 100, waiters)
    waiters.rank(grow, 10, 5)
    grow.stock, owner.ranked[grow] = owner, pool
    for front in (grow, request):
        waiters.start_counting(front)
        waiters.bar(front)
    waiters.passed += 3
    exclusive = waiting(waiters, owner, Kind.GROW, exclusive=True)
    queue = owner.queue
    assert queue is not None
    assert (queue.head(), queue.fronts()) == (exclusive, [exclusive, request])
    # The one that it has displaced is no front any more.
    assert (grow.barrier, grow in waiters.heads, grow in waiters.growing) == (False, False, False)
    assert waiters.first_barrier() is request
    waiters.remove(exclusive, State.ADMITTED)
    assert queue.head() is request
    alone = account("alone")
    first = waiting(waiters, alone, Kind.GROW, exclusive=True)
    assert alone.queue is not None
    assert alone.queue.head() is first


def test_it_counts_who_may_have_the_pool_alone():
    waiters, owner = Waiters(), account()
    requests = [waiting(waiters, owner, alone=alone) for alone in (True, False, True)]
    assert waiters.alone == 2
    for request, left in zip(requests, (1, 1, 0), strict=True):
        waiters.remove(request, State.CANCELLED)
        assert waiters.alone == left


def test_it_counts_who_waits_no_more():
    waiters, owner = Waiters(), account()
    requests = [waiting(waiters, owner) for _ in range(3)]
    assert (waiters.ended, waiters.count) == (0, 3)
    for ended, request in enumerate(requests, 1):
        waiters.remove(request, State.CANCELLED)
        assert (waiters.ended, waiters.count) == (ended, 3 - ended)


def test_ranks():
    waiters = Waiters()
    requests = [waiting(waiters, account()) for _ in range(2)]
    grow = waiting(waiters, account(), Kind.GROW)
    waiters.rank(requests[0], 20, 9)
    waiters.rank(requests[1], 10, 8)
    waiters.rank(grow, 30, 7)
    other = waiting(waiters, account(), Kind.GROW)
    waiters.rank(other, 5, 6)
    assert (waiters.heads.first(), waiters.growing.first()) == (other, grow)
    waiters.unrank(other)
    assert (waiters.heads.first(), len(waiters.heads)) == (requests[1], 3)
    waiters.unrank(grow)
    assert (waiters.growing.first(), len(waiters.heads)) == (None, 2)


# --- counts and barriers


def passed_by(waiters: Waiters, front: Request) -> int:
    return waiters.passed - waiters.counting[front]


def test_a_front_counts_while_it_is_let():
    waiters = Waiters()
    front = waiting(waiters, account())
    waiters.passed = 100
    waiters.stop_counting(front)  # which it does not
    waiters.start_counting(front)
    assert passed_by(waiters, front) == 0
    waiters.passed += 10
    waiters.start_counting(front)  # again, which changes nothing
    waiters.stop_counting(front)
    assert (waiters.bypassed[front], front in waiters.counting) == (10, False)
    waiters.passed += 1000
    waiters.start_counting(front)
    waiters.passed += 5
    assert passed_by(waiters, front) == 15


def test_what_is_granted_past_a_front_is_known_while_it_counts_and_while_it_does_not():
    waiters = Waiters()
    front = waiting(waiters, account())
    assert waiters.bypassed_by(front) == 0
    waiters.passed += 100
    waiters.start_counting(front)
    waiters.passed += 10
    assert waiters.bypassed_by(front) == 10
    waiters.stop_counting(front)
    waiters.passed += 1000
    assert waiters.bypassed_by(front) == 10


def test_who_was_passed_most_is_first():
    waiters = Waiters()
    fronts = []
    for _ in range(3):
        fronts.append(waiting(waiters, account()))
        waiters.start_counting(fronts[-1])
        waiters.passed += 10
    for front in fronts:
        assert waiters.counting.first() is front
        waiters.bar(front)
    assert waiters.counting.first() is None
    assert [waiters.bypassed[front] for front in fronts] == [30, 20, 10]


def test_barriers_are_in_order_of_arrival_and_count_no_more():
    waiters = Waiters()
    fronts = [waiting(waiters, account()) for _ in range(3)]
    assert (len(waiters.barriers), waiters.first_barrier()) == (0, None)
    for front in reversed(fronts):
        waiters.start_counting(front)
        waiters.passed += 1
        waiters.bar(front)
        assert waiters.first_barrier() is front
        waiters.start_counting(front)
        assert front not in waiters.counting
    waiters.remove(fronts[0], State.ADMITTED)
    assert (fronts[0].barrier, waiters.first_barrier()) == (False, fronts[1])
    waiters.stop_counting(fronts[1])
    assert (fronts[1].barrier, waiters.bypassed[fronts[1]]) == (False, 1)
    assert waiters.first_barrier() is fronts[2]
    waiters.stop_counting(fronts[2])
    assert not waiters.barriers


def test_a_barrier_with_a_place_goes_before_all_that_have_none():
    waiters = Waiters()
    old, second, first = fronts = [waiting(waiters, account()) for _ in range(3)]
    for front, place in zip(fronts, (None, 1, 0), strict=True):
        waiters.start_counting(front)
        waiters.bar(front, place)
    for front in (first, second, old):
        assert waiters.first_barrier() is front
        waiters.remove(front, State.ADMITTED)


def test_who_is_forgotten_has_counted_nothing_and_is_no_barrier():
    order = Order()
    counting, paused, barrier = numbered(3)
    for front in (counting, paused):
        order.begin(front)
    order.pause(paused)
    order.barriers.put(barrier, 1)
    for front in (counting, paused, barrier):
        order.forget(front)
    assert [len(each) for each in (order.counting, order.bypassed, order.barriers)] == [0, 0, 0]


def test_lifted_it_counts_from_nothing():
    waiters = Waiters()
    front = waiting(waiters, account())
    waiters.start_counting(front)
    waiters.passed += 50
    waiters.bar(front)
    waiters.lift(front)
    assert (front.barrier, len(waiters.barriers), passed_by(waiters, front)) == (False, 0, 0)
    waiters.passed += 7
    assert passed_by(waiters, front) == 7


@pytest.mark.parametrize("passed_bytes", [0, 1])
def test_becoming_a_barrier_and_none_again_and_again_leaves_no_trace(passed_bytes: int):
    waiters = Waiters()
    # Somebody is always before it, so that what is out of date never comes to the top.
    first, front = waiting(waiters, account()), waiting(waiters, account())
    waiters.start_counting(first)
    waiters.bar(first)
    other = waiting(waiters, account())
    waiters.start_counting(other)
    waiters.rank(other, 0, 1000)
    for number in range(3_000):
        waiters.start_counting(front)
        waiters.passed += passed_bytes
        waiters.rank(front, 10 + number % 3, number)
        waiters.bar(front)
        waiters.lift(front) if number % 2 else waiters.stop_counting(front)
        waiters.unrank(front)
    assert waiters.first_barrier() is first
    for ranking in (waiters.heads, waiters.growing, waiters.counting, waiters.barriers):
        assert len(ranking._heap) <= 70


def test_arrivals_are_told_apart_for_ever():
    waiters, owner = Waiters(), account()
    seen = set()
    for _, kind in zip(range(30), itertools.cycle(Kind), strict=False):
        request = waiting(waiters, owner, kind)
        seen.add(request.arrival)
        if len(seen) % 3:
            waiters.remove(request, State.CANCELLED)
    assert len(seen) == 30
