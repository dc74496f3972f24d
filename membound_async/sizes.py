"""Numbers of bytes: "64MiB" to int and back, and how large an object is.

What an object takes is known exactly for buffers and text (`size_of`), before it is there
for JSON (`decoded_json`), and roughly for everything else (`deep`).
"""

from __future__ import annotations

import gc
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from itertools import islice
from json import JSONDecoder
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, cast

__all__ = ["decoded_json", "deep", "format_size", "human_size", "parse_size", "size_of"]

MAX_BYTES = 2**53
"""Sizes above this are refused: no machine has them, and a float could not hold them."""

_UNITS = {
    "": 1,
    "b": 1,
    **{prefix + "b": 1000**power for power, prefix in enumerate("kmgtp", 1)},
    **{prefix + "ib": 1024**power for power, prefix in enumerate("kmgtp", 1)},
    **{prefix + "i": 1024**power for power, prefix in enumerate("kmgtp", 1)},
}
_GOLDEN = 0.6180339887
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(size: int | str, name: str = "size") -> int:
    """Give the number of bytes that ``size`` stands for.

    Args:
        size: an ``int``, or a ``str`` of a decimal number and a unit: ``"512"``,
            ``"64KiB"``, ``"1.5 GiB"`` (powers of 1024), ``"2MB"`` (powers of 1000).
        name: what the number is, for the error message.

    Raises:
        TypeError: neither an ``int`` nor a ``str``; a ``bool`` and a ``float`` are not sizes.
        ValueError: it does not parse, is negative, is no whole number of bytes, or is
            above 2**53.
    """
    if type(size) is int:
        value = size
    elif isinstance(size, str):
        match = _SIZE.fullmatch(size)
        factor = _UNITS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ValueError(
                f"{name}={size!r} is no size; write a number of bytes or, for example, "
                '"64KiB", "1.5GiB" or "2MB"'
            )
        exact = Decimal(match[1]) * factor
        value = int(exact)
        if value != exact:
            raise ValueError(f"{name}={size!r} is {exact} bytes, which is no whole number")
    elif isinstance(size, int) and not isinstance(size, bool):
        value = int(size)
    else:
        raise TypeError(
            f'{name} is a number of bytes (int) or a str such as "64KiB", not {size!r} '
            f"({type(size).__name__})"
        )
    if value < 0:
        raise ValueError(f"{name}={size!r} is negative; a size is 0 bytes or more")
    if value > MAX_BYTES:
        raise ValueError(f"{name}={size!r} is above 2**53 bytes, more than any machine has")
    return value


def format_size(nbytes: int) -> str:
    """Say a number of bytes so that it can be read and is still exact.

    ``"512 bytes"``, ``"1 536 bytes (1.50 KiB)"``; negative numbers too.
    """
    exact = f"{nbytes:,} bytes".replace(",", " ")
    human = human_size(nbytes)
    return exact if human.endswith(" B") else f"{exact} ({human})"


def human_size(nbytes: int) -> str:
    """Say a number of bytes in a unit a person can read: ``"64.0 MiB"``."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    value, unit = nbytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if abs(value) >= 1023.95:
            value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def size_of(obj: object) -> int:
    """Give the exact size in bytes of a buffer or a ``str``.

    What has the buffer protocol (``bytes``, ``bytearray``, ``memoryview``, arrays) counts as
    many bytes as it holds; a ``str`` counts what it takes in memory.

    Raises:
        TypeError: it is neither; nothing tells what else such an object holds on to.
    """
    if isinstance(obj, bytes):
        return len(obj)
    if isinstance(obj, str):
        return sys.getsizeof(obj)
    try:
        view = memoryview(cast("bytes", obj))
    except TypeError:
        raise TypeError(
            f"no size is known for a {type(obj).__name__}; pass size=, a function that gives "
            "the bytes of an item, for example size=membound_async.sizes.deep"
        ) from None
    with view:
        return view.nbytes


# --- JSON, before it is decoded

_PIECE_CHARACTERS = 1024
_READY = frozenset({b"true", b"false", b"null", *(b"%d" % number for number in range(-5, 257))})
_READY_TEXT = frozenset({"", *map(chr, range(256))})
"""What Python keeps ready, so that a document takes nothing for it."""

_DECODER = JSONDecoder(strict=False)  # takes the control character that separates strings
_TO_BLANKS = bytes.maketrans(b",:[]{}", b"      ")
_AFTER_STRING = frozenset(",:]}\n\r")
_NO_STRINGS = b" \t\r\n0123456789+-.eE,:[]{}truefalsn"
_CUT_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{0,3})?\Z")
_ROUNDED_UP = 6
"""Strings are allocated in steps of 8 or 16 bytes; ``sys.getsizeof`` does not count that."""


def decoded_json(raw: bytes | bytearray | memoryview | str) -> int:
    """Estimate how many bytes the objects take that ``json.loads(raw)`` would make.

    Besides the objects, ``json.loads`` needs a copy of its input while it works if that is no
    ``str``; add ``len(raw)`` for that.

    It looks at 8 to 64 pieces of 1 KiB each from all over the document (at all of a short
    one), counts the strings, numbers, keys and brackets in them, and takes the rest to be
    alike. So it takes a few milliseconds at most: for documents of 2 MB 0.08 of the time of
    ``json.loads`` in all, up to 0.4 where that has little to do. For 50 to 100 KB of records
    it is 0.2 to 0.6, and about as long as ``json.loads`` itself, or for 100 bytes four times
    as long (15 microseconds), where the document is short.

    Against ``tracemalloc`` on CPython 3.11, 3.12 and 3.13 it was within -10 % and +25 % of the
    truth for 92 kinds of documents of 150 bytes to 380 KB, each written in 6 ways (compact,
    indented, with and without escapes), and within -21 % and +23 % for mixtures of unlike
    parts. What the pieces do not show it cannot know: it was 40 % too low where one emoji
    widens a string of 16 KB, and 90 % too high for 300 dicts in each other, indented. Who
    makes a document in order to deceive it can do worse.

    Args:
        raw: JSON, or several JSON documents in a row; it need not be valid.
    """
    pieces, scale = _pieces(raw)
    met = Counter[str]()
    keys = elements = numbers = texts = 0
    # Of each, how many there are, and how many are empty.
    dicts = empty_dicts = lists = empty_lists = 0
    for position, piece in enumerate(pieces):
        escaped = "\\" in piece
        if escaped:
            piece = piece.replace("\\\\", "\\n").replace('\\"', "\\n")
            piece = _CUT_ESCAPE.sub("", piece)
        parts = piece.split('"')
        cut = position > 0 and _begins_in_string(parts)
        strings = parts[not cut :: 2]
        if escaped:
            strings = _unescaped(strings)
        pairs = zip(strings, parts[2 - cut :: 2], strict=False)  # a cut string has nothing after
        names = [name for name, after in pairs if ":" in after]
        structure = "".join(parts[cut::2]).encode("ascii", "replace")
        tokens = structure.translate(_TO_BLANKS).split()
        numbers += sum(map(_number_bytes, [token for token in tokens if token not in _READY]))
        texts += _text_bytes(strings) - _text_bytes(names) - cut * sys.getsizeof("")
        elements += len(tokens) + len(strings) - cut - 2 * len(names)
        keys += len(names)
        met.update(names[cut:])
        dicts += structure.count(b"{")
        lists += structure.count(b"[")
        empty_dicts += structure.count(b"{}")
        empty_lists += structure.count(b"[]")
    # json.loads makes every key once. Those met once are taken to be as rare everywhere.
    once = [name for name, times in met.items() if times == 1]
    nbytes = (
        texts
        + numbers
        + _text_bytes(once)
        + _dicts_bytes(dicts - empty_dicts, keys)
        + _lists_bytes(lists - empty_lists, elements + dicts + lists)
        + empty_dicts * sys.getsizeof({})
        + empty_lists * sys.getsizeof([])
    )
    return max(0, round(scale * nbytes) + _text_bytes(met.keys() - once))


def _pieces(raw: bytes | bytearray | memoryview | str) -> tuple[list[str], float]:
    """Give pieces from all over a document, and of how many times as much they are part."""
    if isinstance(raw, str):
        places, scale = _places(len(raw))
        return [raw[place] for place in places], scale
    with memoryview(raw) as view, view.cast("B") as flat:
        places, scale = _places(len(flat))
        return [str(flat[place], "utf-8", "ignore") for place in places], scale


def _places(length: int) -> tuple[list[slice], float]:
    count = min(max(8, length // (12 * _PIECE_CHARACTERS)), 64)
    step = length / count
    if step <= _PIECE_CHARACTERS:
        return [slice(0, length)], 1.0
    # Even steps would meet only one kind of things that alternate.
    starts = [int(i * step + i * _GOLDEN % 1 * (step - _PIECE_CHARACTERS)) for i in range(count)]
    places = [slice(start, start + _PIECE_CHARACTERS) for start in starts]
    return places, step / _PIECE_CHARACTERS


def _begins_in_string(parts: list[str]) -> bool:
    """Tell whether the first of the parts between quotes belongs to a string."""
    if len(parts) == 1:
        return bool(parts[0].encode("ascii", "replace").translate(None, _NO_STRINGS))
    odd = sum(part[:1] in _AFTER_STRING for part in parts[1:9:2])
    return odd > sum(part[:1] in _AFTER_STRING for part in parts[2:10:2])


def _unescaped(strings: list[str]) -> list[str]:
    try:
        return cast("str", _DECODER.decode('"' + "\x1f".join(strings) + '"')).split("\x1f")
    except ValueError:  # it is no JSON
        return strings


def _text_bytes(strings: Iterable[str]) -> int:
    made = [text for text in strings if text not in _READY_TEXT]
    return sum(map(str.__sizeof__, made)) + _ROUNDED_UP * len(made)


def _number_bytes(token: bytes) -> int:
    return 24 if 46 in token or 101 in token else 28 + len(token) // 10 * 4  # 46 ".", 101 "e"


def _dicts_bytes(count: int, keys: int) -> int:
    """Give the size of so many dicts with so many keys in all, which were added one by one."""
    if count <= 0:
        return 0
    each = max(1, round(keys / count))
    slots = 8
    while slots * 2 // 3 < each:
        slots *= 2
    index_bytes = 1 if slots <= 1 << 8 else 2 if slots <= 1 << 16 else 4
    # Where the average dict is small, some are larger, and step up to twice the slots.
    larger = 6 * each if slots == 8 else 0
    return count * (96 + slots * index_bytes + slots * 2 // 3 * 16 + larger)


def _lists_bytes(count: int, elements: int) -> int:
    """Give the size of so many lists with so many elements in all, appended one by one."""
    if count <= 0:
        return 0
    each = round(elements / count)
    slots = 4 if each <= 4 else each + -each % 8 if each <= 40 else each * 17 // 16
    return count * (sys.getsizeof([]) + 8 * slots)


# --- anything, once it is there

_PLAIN = frozenset({int, float, complex, bool, str, bytes, bytearray, type(None)})
_CONTAINERS = frozenset(
    {list, tuple, set, frozenset, deque, dict, OrderedDict, defaultdict, Counter}
)
_BUILT_IN: tuple[type[Collection[Any]], ...] = (list, tuple, set, frozenset, deque, dict)
_PROGRAM = (
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    CodeType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    WrapperDescriptorType,
)
"""What belongs to the program rather than to its data."""


def deep(obj: object) -> int:
    """Estimate how many bytes an object takes, with everything that it holds on to.

    It follows containers, attributes, slots, dataclasses and whatever else the garbage
    collector can follow; objects that are shared count once, cycles end, and classes,
    functions and modules count nothing. No code of the objects runs but ``__sizeof__``.

    Of whatever holds many objects it looks at no more than 128 all over it, at 16 once it has
    seen 2000 objects, and at 2 after 10 000. So a long container costs little more than a
    short one, and lists in lists end soon. Objects that hold few others, as the nodes of a
    tree do, are all looked at. It is a guess for what is unlike; of 95 kinds of decoded JSON
    it was within -10 % and +15 % of the truth on CPython 3.11, 3.12 and 3.13.

    Takes one to ten microseconds for each object looked at. Memory that an extension module
    holds counts if the object tells (``sys.getsizeof``), as NumPy's arrays do.
    """
    total = 0.0
    seen: set[int] = set()
    rest: list[tuple[Any, float]] = [(obj, 1.0)]
    """What is to be looked at, and for how many of its kind it stands."""
    while rest:
        item, weight = rest.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        kind = cast("Any", type(item))
        if kind in _PLAIN:
            total += weight * sys.getsizeof(item)
            continue
        if issubclass(kind, _BUILT_IN):
            parts = _parts(item, kind)
        elif issubclass(kind, _PROGRAM):
            continue
        else:
            held = gc.get_referents(item)
            parts = [held]
            if kind.__dictoffset__ < 0:
                total += weight * 8 * len(held)  # its attributes, which getsizeof leaves out
        total += weight * sys.getsizeof(item)
        size = 128 if len(seen) < 2000 else 16 if len(seen) < 10_000 else 2
        for part in parts:
            rest += [(each, weight * times) for each, times in _elements(part, size)]
    return round(total)


def _parts(item: Any, kind: Any) -> list[Collection[Any]]:
    """Give what a container holds and its attributes, and call no method of a subclass."""
    parts: list[Collection[Any]]
    if issubclass(kind, dict):
        as_dict = cast("type[dict[Any, Any]]", dict)
        parts = [as_dict.keys(item), as_dict.values(item)]
    elif kind in _CONTAINERS:
        parts = [item]
    else:
        parts = [list(next(base for base in _BUILT_IN if base in kind.__mro__).__iter__(item))]
    if kind.__dictoffset__:
        parts.append([vars(item)])
    if kind not in _CONTAINERS:
        parts.append([*_in_slots(item, cast("type[Any]", kind))])
    return parts


def _in_slots(item: object, kind: type[Any]) -> Iterator[Any]:
    for each in kind.__mro__:
        if vars(each).get("__slots__"):
            for member in vars(each).values():
                if isinstance(member, MemberDescriptorType):
                    with suppress(AttributeError):  # nothing was assigned to it
                        yield member.__get__(item, kind)


def _elements(items: Collection[Any], size: int) -> Iterable[tuple[Any, float]]:
    """Give elements of a container, each with the number of objects for which it stands."""
    if len(items) <= size:
        return [(item, 1.0) for item in items]
    spread = _spread(items, size)
    # Python keeps small numbers ready; they would look like objects that are shared.
    sample = [item for item in spread if not _is_ready(item)]
    times = Counter(map(id, sample))
    if len(times) == len(sample):
        each = len(items) / len(spread)
        return [(item, each) for item in sample]
    met = Counter(times.values())
    once, twice = met[1], met[2]
    rare = len(items) * (once + 2 * twice) / len(spread)
    if 20 * twice >= once:
        # So many met again: how many there are, by how many were met once and twice (Chao).
        rare = min(rare, once + twice + once * once / max(2 * twice, 1))
    each = rare / max(once + twice, 1)
    return [(item, each if times[id(item)] <= 2 else 1.0) for item in sample]


def _is_ready(item: object) -> bool:
    return type(item) is int and -5 <= item <= 256


def _spread(items: Collection[Any], size: int) -> list[Any]:
    """Give about so many elements from all over a container, at uneven steps."""
    # Even steps would meet only one kind of elements that alternate.
    places = {int((i + i * _GOLDEN % 1) * len(items) / size): None for i in range(size)}
    if isinstance(items, (list, tuple)):
        return [items[place] for place in places]
    stream, position, found = iter(items), 0, list[Any]()
    for place in places:
        found += islice(stream, place - position, place - position + 1)
        position = place + 1
    return found
