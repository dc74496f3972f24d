"""Sizes: text to bytes and back, and how large things are, exactly or about."""

from __future__ import annotations

import array
import collections
import enum
import functools
import gc
import json
import math
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membound_async.sizes import (
    MAX_BYTES,
    decoded_json,
    deep,
    format_size,
    human_size,
    parse_size,
    size_of,
)

# --- text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1kB", 1000),
        ("1 KB", 1000),
        ("1KiB", 1024),
        ("1Ki", 1024),
        ("1ki", 1024),
        (" 64 MiB ", 64 * 1024**2),
        ("2MB", 2_000_000),
        ("1.5GiB", 3 * 1024**3 // 2),
        (".5KiB", 512),
        ("0.001kB", 1),
        ("2TiB", 2 * 1024**4),
        ("8PiB", MAX_BYTES),
        ("9007199254740992", MAX_BYTES),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        ("", ValueError, "is no size"),
        ("KiB", ValueError, "is no size"),
        ("1 000", ValueError, "is no size"),
        ("1_000", ValueError, "is no size"),
        ("1e3", ValueError, "is no size"),
        ("0x10", ValueError, "is no size"),
        ("1.", ValueError, "is no size"),
        ("nan", ValueError, "is no size"),
        ("inf", ValueError, "is no size"),
        ("-1", ValueError, "is no size"),
        ("64XB", ValueError, "is no size"),
        ("64KiBB", ValueError, "is no size"),
        ("\u0661", ValueError, "is no size"),
        ("64MiB\0", ValueError, "is no size"),
        ("0.5", ValueError, "is 0.5 bytes, which is no whole number"),
        ("1.0001kB", ValueError, "no whole number"),
        (-1, ValueError, "is negative"),
        (MAX_BYTES + 1, ValueError, r"above 2\*\*53"),
        ("8.1PiB", ValueError, r"no whole number|above 2\*\*53"),
        ("9PiB", ValueError, r"above 2\*\*53"),
        ("9" * 60, ValueError, r"above 2\*\*53"),
        (1.0, TypeError, r"not 1.0 \(float\)"),
        (math.nan, TypeError, r"not nan \(float\)"),
        (True, TypeError, r"not True \(bool\)"),
        (None, TypeError, "NoneType"),
        (b"64KiB", TypeError, "bytes"),
    ],
)
def test_what_is_no_size_is_refused(size: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        parse_size(size, "limit")
    assert str(caught.value).startswith("limit")


def test_whole_numbers_of_other_kinds_are_sizes() -> None:
    class Page(enum.IntEnum):
        SIZE = 4096

    size = parse_size(Page.SIZE)
    assert (size, type(size)) == (4096, int)


whole_bytes = st.integers(0, MAX_BYTES)
units = {"": 1, "B": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGTP", 1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("i", 1024))
}


@given(whole_bytes)
def test_a_number_of_bytes_is_itself(nbytes: int) -> None:
    assert parse_size(nbytes) == nbytes
    assert parse_size(str(nbytes)) == nbytes


@given(st.integers(0, 2**60), st.integers(0, 6), st.sampled_from(sorted(units)), st.data())
def test_decimals_and_units_are_exact(
    digits: int, places: int, unit: str, data: st.DataObject
) -> None:
    text = str(digits).rjust(places + 1, "0")
    number = f"{text[:-places]}.{text[-places:]}" if places else text
    written = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in unit)
    nbytes, rest = divmod(digits * units[unit], 10**places)
    if rest or nbytes > MAX_BYTES:
        with pytest.raises(ValueError, match=r"no whole number|above"):
            parse_size(f"{number}{written}")
    else:
        assert parse_size(f"{number} {written}") == nbytes


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        nbytes = parse_size(text)
    except ValueError as refusal:
        error = refusal
    else:
        assert 0 <= nbytes <= MAX_BYTES
        return
    assert repr(text) in str(error)


@given(st.integers(-MAX_BYTES, MAX_BYTES))
def test_sizes_are_written_exactly_and_for_people(nbytes: int) -> None:
    exact, unit, human = format_size(nbytes).partition(" bytes")
    assert unit
    assert int(exact.replace(" ", "")) == nbytes
    assert human == ("" if abs(nbytes) < 1024 else f" ({human_size(nbytes)})")
    value, name = human_size(nbytes).split()
    factor = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}[name]
    assert abs(float(value) * factor - nbytes) <= 0.0501 * factor
    assert abs(float(value)) < 1024 or name == "TiB"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1 023 bytes"),
        (1536, "1 536 bytes (1.5 KiB)"),
        (-1536, "-1 536 bytes (-1.5 KiB)"),
        (1024**2 - 1, "1 048 575 bytes (1.0 MiB)"),
        (64 * 1024**2, "67 108 864 bytes (64.0 MiB)"),
        (MAX_BYTES, "9 007 199 254 740 992 bytes (8192.0 TiB)"),
    ],
)
def test_how_sizes_read(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


# --- exact


def test_buffers_and_text_are_measured_exactly() -> None:
    assert size_of(b"") == 0
    assert size_of(bytes(1000)) == 1000
    assert size_of(bytearray(7)) == 7
    assert size_of(memoryview(bytes(100))[::3]) == 34
    assert size_of(array.array("d", [1.0] * 5)) == 40
    for text in ("", "ascii", "zürich", "東京", "\U0001f600"):
        assert size_of(text) == sys.getsizeof(text)
    buffer = bytearray(3)
    size_of(buffer)
    buffer += b"x"  # no view is left open on it


@pytest.mark.parametrize("thing", [1, 1.5, None, True, [b""], {"a": 1}, (), object()])
def test_other_things_need_a_size(thing: object) -> None:
    with pytest.raises(TypeError, match=f"no size is known for a {type(thing).__name__}; pass"):
        size_of(thing)


# --- JSON


def documents() -> dict[str, Any]:
    """Give what people send: made up, but shaped like the real thing."""
    random = Random(20260)
    words = ["request", "failed", "timeout", "user", "order", "payment", "region", "retry"]

    def text(count: int) -> str:
        return " ".join(random.choice(words) for _ in range(count))

    def number(low: float = -180, high: float = 180) -> float:
        return round(random.uniform(low, high), 6)

    def hexadecimal(bits: int) -> str:
        return f"{random.getrandbits(bits):0{bits // 4}x}"

    def tree(depth: int) -> Any:
        if not depth:
            return None
        return {"value": random.randrange(1000), "left": tree(depth - 1), "right": tree(depth - 1)}

    return {
        "records": [
            {
                "year": "2013",
                "month": str(random.randint(1, 12)),
                "dep_time": str(random.randint(100, 2359)),
                "carrier": random.choice(["UA", "AA", "B6"]),
                "flight": str(random.randint(1, 9999)),
                "tailnum": f"N{random.randint(10000, 99999)}",
                "origin": "EWR",
                "dest": "IAH",
                "distance": random.randint(80, 5000),
                "time_hour": "2013-01-01T10:00:00Z",
            }
            for _ in range(500)
        ],
        "log lines": [
            {
                "ts": f"2024-05-{random.randint(1, 28):02}T10:{random.randint(0, 59):02}:07.123Z",
                "level": "INFO",
                "msg": text(random.randint(4, 20)),
                "trace": hexadecimal(128),
                "ctx": {"user_id": random.randint(1, 10**6), "ms": random.random(), "ok": True},
            }
            for _ in range(300)
        ],
        "posts": [
            {
                "id": random.getrandbits(60),
                "text": text(15),
                "user": {"name": text(1), "followers": random.randint(0, 10**5), "url": None},
                "entities": {"tags": [{"text": text(1), "at": [1, 2]}], "urls": []},
                "link": f"https://example.org/{hexadecimal(32)}",
            }
            for _ in range(300)
        ],
        "geography": {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "properties": {"name": text(1), "people": random.randint(0, 10**6)},
                    "geometry": {
                        "type": "Polygon",
                        "coordinates": [
                            [[number(), number()] for _ in range(random.randint(5, 60))]
                        ],
                    },
                }
                for _ in range(40)
            ],
        },
        "embeddings": {
            "data": [{"i": i, "v": [number(-1, 1) for _ in range(500)]} for i in range(9)]
        },
        "metrics": [
            {
                "metric": {"job": "api", "instance": f"10.0.0.{i}:90"},
                "values": [[1.7e9 + j, str(number())] for j in range(60)],
            }
            for i in range(30)
        ],
        "lock file": {
            f"node_modules/{text(1)}-{i}": {
                "version": f"{i}.0.1",
                "resolved": f"https://registry.example/{i}.tgz",
                "integrity": "sha512-" + hexadecimal(512),
                "dependencies": {f"{text(1)}{random.randint(0, 99)}": "^1.2" for _ in range(3)},
            }
            for i in range(200)
        },
        "map": {hexadecimal(128): random.randint(0, 10**5) for _ in range(2000)},
        "tree": tree(9),
        "whole numbers": [random.randint(0, 10**6) for _ in range(5000)],
        "wide": [
            {f"field_{i}": random.choice([number(), text(2), None]) for i in range(120)}
            for _ in range(40)
        ],
        "prose": [
            {"title": text(6), "body": ". ".join(text(30) for _ in range(20))} for _ in range(40)
        ],
        "russian": [{"текст": "съешь ещё этих мягких булок " * 6, "id": i} for i in range(200)],
        "chinese": [{"body": "中文内容测试文本许多字符。" * 8, "id": i} for i in range(200)],
        "german": [
            {"text": "Die größte Straße führt über Köln. " * 5, "id": i} for i in range(200)
        ],
        "messages": [
            {
                "id": hexadecimal(128),
                "body": json.dumps({"user": text(1), "values": [1, 2, 3], "ok": {"a": {}}}),
                "code": "if (x) { return {a: [y[0]]}; }",
            }
            for _ in range(200)
        ],
        "emoji": [{"text": text(20) + "\U0001f600", "id": i} for i in range(200)],
        "some emoji": [{"text": text(15) + "\U0001f389" * (i % 9 == 0)} for i in range(500)],
        "reactions": [{"by": text(1), "with": "\U0001f44d", "at": i * 999} for i in range(800)],
        "languages": [
            {"en": text(10), "ru": "мягких булок " * i, "de": "Stra\xdfe " * 9, "id": i}
            for i in range(100)
        ],
        "umlauts": [
            {"name": random.choice(["M\xfcller", "Wei\xdf", "Meyer"]), "zip": f"{i:05}"}
            for i in range(600)
        ],
        "typography": [{"body": text(30) + "\u2019s \u2014 " + text(30)} for _ in range(200)],
        "one string": text(5000),
        "base64": [{"name": f"f{i}", "data": "QUJDREVGRw/+" * 500} for i in range(10)],
        "program": [
            {"code": 'def f(x):\n\tif "a" in x:\n\t\treturn [x[0], {"k": 1}]\n' * 5}
            for _ in range(200)
        ],
        "paths": [f"C:\\Users\\me\\{i}\\file.txt" for i in range(2000)],
        "html": [{"html": f'<a href="/p/{i}">{text(4)}</a>\n' * 4} for i in range(200)],
        "addresses": [f"https://example.org:80/{i}?q={text(1)}&r=1,2,3" for i in range(2000)],
        "log text": [
            {"log": f"2024-05-01T10:00:07,123 INFO [main:{i}] {text(8)} n={i * 7}, m={i}"}
            for i in range(500)
        ],
        "table": [["2024-05-01", text(1), str(i), f"{number():.2f}", ""] for i in range(1000)],
        "columns": {
            "at": [1_700_000_000 + 60 * i for i in range(2000)],
            "value": [round(random.gauss(20, 5), 2) for _ in range(2000)],
            "ok": [1] * 2000,
        },
        "search results": {
            "took": 5,
            "hits": [
                {
                    "_id": hexadecimal(80),
                    "_score": random.random(),
                    "_source": {
                        "message": text(12),
                        "host": {"name": f"h{i % 9}", "ip": ["10.0.0.1"]},
                        "status": random.choice([200, 404, 500]),
                    },
                }
                for i in range(300)
            ],
        },
        "pixels": [[random.randrange(256) for _ in range(100)] for _ in range(50)],
        "small numbers": [random.randint(100, 256) for _ in range(5000)],
        "numbers to 999": [random.randint(0, 999) for _ in range(5000)],
        "large numbers": [random.getrandbits(64) for _ in range(3000)],
        "times": [1_700_000_000_000 + i * 1000 for i in range(5000)],
        "tenths": [random.randrange(10) / 10 for _ in range(5000)],
        "long fractions": [random.random() * 1e-9 for _ in range(3000)],
        "nothing": [None] * 5000,
        "truth": [random.random() < 0.5 for _ in range(5000)],
        "empty lists": [[] for _ in range(3000)],
        "empty dicts": [{} for _ in range(3000)],
        "empty strings": [""] * 3000,
        "letters": [random.choice("abcdefg") for _ in range(3000)],
        "words": [text(1) for _ in range(3000)],
        "pairs": [[i, i * 2] for i in range(3000)],
        "one key": [{"id": i} for i in range(3000)],
        "lists in lists": [[[[[i]]]] for i in range(1000)],
    }


WRITERS: dict[str, Callable[[Any], str]] = {
    "plain": json.dumps,
    "compact": lambda value: json.dumps(value, separators=(",", ":"), ensure_ascii=False),
    "pretty": lambda value: json.dumps(value, indent=2),
}


def allocated(make: Callable[[], object]) -> int:
    """Give the bytes that are allocated for what a function gives."""
    was_tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        tracemalloc.get_traced_memory()  # so that the measuring itself allocates nothing new
        gc.collect()  # also what Python keeps ready of freed objects
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        after = tracemalloc.get_traced_memory()[0]
        del made
    finally:
        if not was_tracing:
            tracemalloc.stop()
    return after - before


def errors(values: dict[str, Any], writer: Callable[[Any], str]) -> dict[str, float]:
    """Tell by what part the estimate of each document is too high (or, below 0, too low)."""
    texts = {name: writer(value).encode() for name, value in values.items()}
    return {
        name: decoded_json(raw) / allocated(functools.partial(json.loads, raw)) - 1
        for name, raw in texts.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_decoded_json_is_about_right(writer: str) -> None:
    wrong = errors(documents(), WRITERS[writer])
    assert len(wrong) > 45
    assert {name: error for name, error in wrong.items() if not -0.15 <= error <= 0.3} == {}
    assert 0 < sum(wrong.values()) / len(wrong) < 0.1  # rather too much


@pytest.mark.slow
def test_decoded_json_of_unlike_parts() -> None:
    random, values = Random(3), documents()
    mixed = {
        str(i): {name: values[name] for name in random.sample(sorted(values), 8)} for i in range(20)
    }
    wrong = errors(mixed, json.dumps)
    assert {name: error for name, error in wrong.items() if not -0.25 <= error <= 0.25} == {}


def test_what_looks_like_more_is_estimated_too_high() -> None:
    chain: Any = None
    for i in range(300):
        chain = {"child": chain, "n": i * 1000}
    # Its deepest lines are nothing but blanks; what lies between them differs from place to place.
    wrong = errors({"chain": chain}, WRITERS["pretty"])
    assert 0.5 < wrong["chain"] < 1.1
    assert -0.15 < errors({"chain": chain}, json.dumps)["chain"] < 0.15


def test_what_one_character_widens_is_estimated_too_low() -> None:
    texts = ["words and words " * 1000] * 3
    wrong = errors({"ascii": texts, "emoji": [*texts, texts[0] + "\U0001f600"]}, json.dumps)
    assert -0.05 < wrong["ascii"] < 0.05
    assert -0.5 < wrong["emoji"] < -0.35


def test_decoded_json_looks_at_64_kib_of_any_document() -> None:
    looked: list[int] = []

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, place: Any) -> str:
            looked.append(len(range(len(self))[place]))
            return super().__getitem__(place)

    short = json.dumps(documents()["posts"])
    for times, most in ((1, 8 * 1024), (3, 25 * 1024), (100, 64 * 1024)):
        looked.clear()
        nbytes = decoded_json(Counted(f"[{', '.join([short] * times)}]"))
        assert most * 0.8 < sum(looked) <= most
        assert nbytes == pytest.approx(times * decoded_json(short), rel=0.1)


def test_decoded_json_takes_buffers_and_text_of_any_length() -> None:
    value = documents()["posts"] * 10
    raw = json.dumps(value, ensure_ascii=False)
    nbytes = decoded_json(raw)
    assert len(raw) > 10 * 65536
    encoded = raw.encode()
    array_view = memoryview(array.array("b", encoded))
    for buffer in (encoded, bytearray(encoded), memoryview(encoded), array_view):
        assert decoded_json(buffer) == nbytes
    tenth = decoded_json(json.dumps(value[:300], ensure_ascii=False))
    assert nbytes / tenth == pytest.approx(10, rel=0.05)
    lines = "\n".join(json.dumps(each) for each in value[:300])
    assert decoded_json(lines) / tenth == pytest.approx(1, rel=0.05)


def test_decoded_json_of_little() -> None:
    for raw in ("", "null", "1", '"', "]]]]"):
        assert 0 <= decoded_json(raw) < 100
    assert 64 <= decoded_json("{}") < 100
    assert 56 <= decoded_json("[]") < 100
    assert decoded_json('"' + "\\u4e2d" * 1000 + '"') == pytest.approx(2050, abs=100)
    assert decoded_json('"' + "\\\\" * 1000 + '\\"' * 1000 + '"') == pytest.approx(2050, abs=20)
    assert decoded_json("\ud800") >= 0
    assert decoded_json(b'"\\q' + b"x" * 1000 + b'"') == pytest.approx(1050, abs=20)  # no JSON


@given(st.binary(max_size=300), st.sampled_from([1, 100]))
def test_decoded_json_of_anything_is_a_number(raw: bytes, times: int) -> None:
    assert 0 <= decoded_json(raw * times) <= 300 + 250 * len(raw) * times


# --- deep


@dataclass
class Point:
    x: float
    label: str


@dataclass(slots=True)
class Slotted:
    x: float
    label: str


class Named(NamedTuple):
    x: float
    label: str


class Attributes:
    def __init__(self, start: int) -> None:
        for i in range(20):
            setattr(self, f"field_{i}", start + i + 0.5)


class Node:
    __slots__ = ("__weakref__", "left", "right", "value")

    def __init__(self, depth: int) -> None:
        self.value = depth + 0.5
        self.left = Node(depth - 1) if depth else None
        self.right = Node(depth - 1) if depth else None


def test_deep_of_plain_things_is_their_size() -> None:
    things: list[Any] = [None, 1, 10**30, 1.5, True, 1j, "text", "東京", b"abc", [], (), {}, set()]
    for thing in things:
        assert deep(thing) == sys.getsizeof(thing)
    assert deep([1000, "abc"]) == sys.getsizeof([1, 2]) + sys.getsizeof(1000) + sys.getsizeof("abc")
    assert deep({"key": b"value"}) == sum(map(sys.getsizeof, ({"k": 1}, "key", b"value")))
    assert deep(memoryview(bytes(5000))) == pytest.approx(5033 + 300, abs=100)


def test_what_belongs_to_the_program_counts_nothing() -> None:
    assert deep([Point, len, json, allocated, Point.__init__]) == sys.getsizeof([1] * 5)
    assert deep(Node) == 0


def test_what_is_shared_counts_once_and_cycles_end() -> None:
    text = "x" * 1000
    assert deep([text, text, [text]]) == deep([text, None, []]) - sys.getsizeof(None) + 8
    cycle: list[Any] = [text]
    cycle.append(cycle)
    cycle.append({"self": cycle})
    assert deep(cycle) < 1600
    assert deep([text] * 100_000) == pytest.approx(800_056 + 1049, abs=20)
    few = [f"{i:500}" for i in range(20)]
    assert deep([few[i % 20] for i in range(100_000)]) == pytest.approx(
        sys.getsizeof([None] * 100_000) + 20 * 549, rel=0.12
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: [i + 1000 for i in range(20_000)],
        lambda: tuple(i * 1.5 for i in range(20_000)),
        lambda: {f"key {i}": i * 1000 for i in range(20_000)},
        lambda: {i * 1.5 for i in range(20_000)},
        lambda: collections.deque(f"{i:09}" for i in range(20_000)),
        lambda: collections.OrderedDict((f"key {i}", i * 1000) for i in range(2000)),
        lambda: collections.Counter({f"key {i}": i * 1000 for i in range(2000)}),
        lambda: collections.defaultdict(list, {i * 1.5: [i * 0.5] for i in range(2000)}),
        lambda: [{"id": i * 1000, "name": f"n{i}", "tags": [f"a{i}"]} for i in range(5000)],
        lambda: [[i * j * 1.1 for i in range(200)] for j in range(200)],
        lambda: [[[i * j * k * 1.1 for i in range(30)] for j in range(30)] for k in range(30)],
        lambda: [Point(i * 1.5, f"point {i}") for i in range(3000)],
        lambda: [Slotted(i * 1.5, f"point {i}") for i in range(3000)],
        lambda: [Named(i * 1.5, f"point {i}") for i in range(3000)],
        lambda: [Attributes(i * 1000) for i in range(500)],
        lambda: Node(12),
        lambda: [("short" if i % 2 else "long" * 50) + str(i) for i in range(5000)],
        lambda: [bytearray(1000) for _ in range(500)],
    ],
)
def test_deep_is_about_right(make: Callable[[], object]) -> None:
    assert deep(make()) == pytest.approx(allocated(make), rel=0.15)


@pytest.mark.parametrize("count", [*range(129, 260), 1000, 10_000])
def test_deep_of_sets_of_any_length(count: int) -> None:
    floats = {i * 1.5 for i in range(count)}
    assert deep(floats) == pytest.approx(sys.getsizeof(floats) + count * 24, rel=0.001)


class Watched:
    """Tells how many of its kind were looked at."""

    __slots__ = ()
    looked_at = 0

    def __sizeof__(self) -> int:
        Watched.looked_at += 1
        return 100 - 16  # and what the garbage collector keeps with it


def nested(count: int, depth: int) -> list[Any] | Watched:
    return [nested(count, depth - 1) for _ in range(count)] if depth else Watched()


@pytest.mark.parametrize(
    ("count", "depth", "least", "most"),
    [
        (128, 1, 128, 128),
        (129, 1, 90, 128),
        (200_000, 1, 128, 128),
        (500, 2, 2000, 4000),  # all of 15 lists, 16 elements each of 113 others
        (60, 3, 5000, 10_500),
        (11, 5, 5000, 11_000),
    ],
)
def test_deep_looks_at_few_of_many(count: int, depth: int, least: int, most: int) -> None:
    things = nested(count, depth)
    Watched.looked_at = 0
    nbytes = deep(things)
    assert least <= Watched.looked_at <= most
    of_lists = sum(count**level for level in range(depth)) * sys.getsizeof([None] * count)
    each = sys.getsizeof(Watched())
    assert nbytes == pytest.approx(of_lists + count**depth * each, rel=0.15)


@pytest.mark.parametrize(
    ("base", "content"),
    [
        (list, [bytes(500)]),
        (tuple, [bytes(500)]),
        (set, [bytes(500)]),
        (frozenset, [bytes(500)]),
        (collections.deque, [bytes(500)]),
        (dict, {"key": bytes(500)}),
        (collections.OrderedDict, {"key": bytes(500)}),
        (collections.Counter, {bytes(500): 1}),
        (collections.UserList, [bytes(500)]),
        (collections.UserDict, {"key": bytes(500)}),
    ],
)
def test_all_that_a_subclass_holds_counts(base: type[Any], content: Any) -> None:
    class Tagged(base):  # type: ignore[misc]
        tag: bytes

    things = Tagged(content)
    plain = deep(things)
    assert 500 < plain < 1900
    things.tag = bytes(10_000)
    assert 10_000 < deep(things) - plain < 10_500


def test_slots_of_a_subclass_count_and_its_methods_are_not_called() -> None:
    class Strict(dict[str, bytes]):
        __slots__ = ("not_set", "tag")
        tag: bytes

        def refuse(self) -> Any:
            raise AssertionError("this is the program's business")

        __iter__ = __len__ = keys = values = items = refuse

    things = Strict({f"key {i}": bytes(100 + i) for i in range(2000)})
    plain = {f"key {i}": bytes(100 + i) for i in range(2000)}
    things.tag = bytes(1_000_000)
    assert deep(things) == pytest.approx(deep(plain) + 1_000_000, rel=0.05)


def test_attributes_of_an_ordered_dict_count() -> None:
    ordered = collections.OrderedDict(a=1)
    ordered.tag = bytes(5000)  # type: ignore[attr-defined]
    assert 5000 < deep(ordered) - deep(collections.OrderedDict(a=1)) < 5500
