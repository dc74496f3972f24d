"""A hostile sender takes next to nothing from 99 well-behaved ones; see benchmarks/fairness.py."""

from __future__ import annotations

import functools

import pytest

from tests.benchmarks import fairness
from tests.benchmarks.fairness import ATTACKS, LIMIT_BYTES, PLACES, WELL_BEHAVED

through_inbox = functools.cache(functools.partial(fairness.through_inbox, seconds=1.5))
through_stream = functools.cache(functools.partial(fairness.through_stream, seconds=1.5))

*FLOODS, LARGEST = ATTACKS
FLOOD = FLOODS[1]


def of(attack: fairness.Attack) -> str:
    return attack.name


@pytest.mark.slow
def test_without_an_attack_all_get_the_same_and_the_receiver_has_no_rest():
    alone = through_inbox()
    assert alone.throughput == pytest.approx(1.5 / 0.001124, rel=0.01)
    assert alone.throughput == pytest.approx(through_stream().throughput, rel=0.01)
    assert alone.jain_index > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("attack", FLOODS, ids=of)
def test_a_flood_leaves_the_others_nine_tenths_and_more(attack):
    alone, attacked = through_inbox(), through_inbox(attack)
    assert attacked.throughput >= 0.95 * alone.throughput
    assert min(attacked.well_behaved) >= 0.9 * min(alone.well_behaved)
    assert attacked.jain_index > 0.99
    assert attacked.hostile > 0
    assert attacked.peak_bytes <= LIMIT_BYTES


@pytest.mark.slow
def test_the_largest_messages_get_a_fifth():
    # A large message waits until a whole limit of others has passed, and then is let in before
    # all others: a quarter of the limit for each limit of others.
    alone, attacked = fairness.through_inbox(), fairness.through_inbox(LARGEST)
    assert attacked.throughput >= 0.75 * alone.throughput
    assert attacked.jain_index > 0.99
    assert attacked.peak_bytes <= LIMIT_BYTES


def test_who_waits_for_each_answer_keeps_a_half():
    # Messages are received in the order in which they were sent: the hostile sender has half of
    # what the others leave in the inbox, and so a part of the receiver's time.
    alone, attacked = through_inbox(answered=True), through_inbox(FLOOD, answered=True)
    assert attacked.throughput >= 0.5 * alone.throughput
    assert attacked.throughput / alone.throughput >= WELL_BEHAVED / (WELL_BEHAVED + PLACES / 2)


def test_without_quotas_the_others_get_next_to_nothing():
    alone, attacked = through_stream(), through_stream(FLOOD)
    assert attacked.throughput < 0.15 * alone.throughput
    assert attacked.hostile > 5 * attacked.throughput


def test_without_quotas_large_messages_fill_the_memory():
    attacked = through_stream(LARGEST)
    assert attacked.throughput < 0.05 * through_stream().throughput
    assert attacked.peak_bytes > 10 * LIMIT_BYTES
