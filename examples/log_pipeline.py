"""Read records as a stream, decode and enrich them, write them in batches to a slow sink.

The everyday shape of an ingest service, in three parts joined by two streams::

    read --blocks of text--> decode --records--> write --batches--> a slow sink

Reading and decoding are fast, the sink is not, and a decoded record is some twenty times
as large in memory as its line of text. So everything piles up before the sink, until the
kernel kills the process:

    python log_pipeline.py data/flights.csv.gz

The same file, unchanged, within the memory it is given:

    membound run --limit 256MiB log_pipeline.py data/flights.csv.gz

Four words below do that, and do nothing at all where no limiter runs: ``Component`` names
a part, ``bounded`` reads under a grant, ``create_memory_stream`` bounds what lies between
two parts in bytes, and ``batches`` gathers what is written at a time.

Reads NDJSON, CSV and access logs (Apache's and nginx's common and combined formats), plain
or compressed with gzip or zstd, from a file or from standard input.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
import sys
import time
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, BinaryIO, Protocol, Self, cast

import anyio
import anyio.to_thread

from membound_async import Component, bounded, create_memory_stream
from membound_async.sizes import deep, parse_size
from membound_async.streams import MemoryReceiveStream, MemorySendStream

BLOCK_BYTES = 64 * 1024
"""How much text is read and decoded at a time."""

MAX_RECORD_BYTES = 1024 * 1024
"""The longest record there may be: what never ends must not be gathered for ever."""

Record = dict[str, Any]
Table = dict[str, Record]


# --- reading: bytes from anywhere, cut where a record ends


@contextmanager
def open_records(path: str) -> Iterator[BinaryIO]:
    """Open a file, or standard input for ``-``, and look through gzip and zstd."""
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        magic = cast("io.BufferedReader", file).peek(4)
        if magic.startswith(b"\x1f\x8b"):
            yield cast("BinaryIO", gzip.GzipFile(fileobj=file))
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            yield _open_zstd(file)
        else:
            yield file


def _open_zstd(file: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise ValueError("this is zstd; install it with: pip install zstandard") from None
    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return cast("BinaryIO", reader)


class Blocks:
    """Gives the text of a stream in blocks that end where a record ends.

    Reads what there is, so that a slow source is passed on line by line. ``read()`` blocks;
    ``async for`` has a thread do that.

    Args:
        file: an open stream of bytes.
    """

    quoted = False
    """Whether a line break within double quotes belongs to the record (CSV)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rest = b""

    def first_line(self) -> bytes:
        """Give the first line that is not empty, and leave it where it is."""
        while True:
            self._rest = self._rest.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")
            line, end, _ = self._rest.partition(b"\n")
            if end or not self._read_more():
                return line

    def read(self) -> bytes:
        """Give the next block; an empty one at the end of the stream.

        Raises:
            ValueError: a record does not end within ``MAX_RECORD_BYTES``.
        """
        while not (cut := self._end_of_records()):
            if not self._read_more():
                cut = len(self._rest)
                break
        block, self._rest = self._rest[:cut], self._rest[cut:]
        return block

    def _read_more(self) -> bool:
        if len(self._rest) > MAX_RECORD_BYTES:
            raise ValueError(
                f"no record ends within {MAX_RECORD_BYTES:,} bytes; are these lines of text?"
            )
        data = self._file.read1(BLOCK_BYTES)  # type: ignore[attr-defined]
        self._rest += data
        return bool(data)

    def _end_of_records(self) -> int:
        rest = self._rest
        cut = last = rest.rfind(b"\n") + 1
        if self.quoted:
            while cut and rest.count(b'"', 0, cut) % 2:
                cut = rest.rfind(b"\n", 0, cut - 1) + 1
            if not cut and len(rest) > MAX_RECORD_BYTES:
                return last  # a stray quote, rather than a record of this length
        return cut

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.read, b"")

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        block = await anyio.to_thread.run_sync(self.read, abandon_on_cancel=True)
        if not block:
            raise StopAsyncIteration
        return block


# --- decoding: a block of text to records


class Decoder(Protocol):
    """Makes records of blocks of text, in their order."""

    rejected: int
    """How many records made no sense so far; they are counted and left out."""

    def decode(self, block: bytes) -> list[Record]:
        """Give the records of a block."""
        ...


class NdjsonDecoder:
    """One JSON object a line."""

    def __init__(self) -> None:
        self.rejected = 0

    def decode(self, block: bytes) -> list[Record]:
        """Give the records of a block."""
        records: list[Record] = []
        for line in block.split(b"\n"):
            if line and not line.isspace():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    records.append(record)
                else:
                    self.rejected += 1
        return records


class CsvDecoder:
    """Rows under a header; the header says what separates them."""

    def __init__(self, header: bytes) -> None:
        self.rejected = 0
        self._delimiter = max(",;\t|", key=header.decode("utf-8", "replace").count)
        self._fields: list[str] | None = None
        csv.field_size_limit(MAX_RECORD_BYTES)

    def decode(self, block: bytes) -> list[Record]:
        """Give the records of a block."""
        text = io.StringIO(block.decode("utf-8", "replace"), newline="")
        rows = csv.reader(text, delimiter=self._delimiter)
        records: list[Record] = []
        fields = self._fields
        for row in rows:
            if not row:
                continue
            if fields is None:
                fields = self._fields = row
            elif len(row) == len(fields):
                records.append(dict(zip(fields, row, strict=True)))
            else:
                self.rejected += 1
        return records


class AccessLogDecoder:
    """Apache's and nginx's common and combined log formats."""

    LINE = re.compile(
        r"(?P<host>\S+) (?P<ident>\S+) (?P<user>[^\[]{1,256}) \[(?P<time>[^\]]{1,64})\] "
        r'"(?P<request>[^"\\]*(?:\\.[^"\\]*)*)" (?P<status>\d{3}) (?P<size>\d+|-)'
        r'(?: "(?P<referer>[^"\\]*(?:\\.[^"\\]*)*)" "(?P<agent>[^"\\]*(?:\\.[^"\\]*)*)")?\s*'
    )

    def __init__(self) -> None:
        self.rejected = 0

    def decode(self, block: bytes) -> list[Record]:
        """Give the records of a block."""
        records: list[Record] = []
        for line in block.decode("utf-8", "replace").split("\n"):
            if line and not line.isspace():
                match = self.LINE.fullmatch(line)
                try:
                    record = self._record(match.groupdict()) if match else None
                except ValueError:  # no such day
                    record = None
                if record is None:
                    self.rejected += 1
                else:
                    records.append(record)
        return records

    @staticmethod
    def _record(record: Record) -> Record:
        record["time"] = datetime.strptime(record["time"], "%d/%b/%Y:%H:%M:%S %z").isoformat()
        record["method"], _, rest = record["request"].partition(" ")
        record["path"], _, record["protocol"] = rest.partition(" ")
        record["status"] = int(record["status"])
        record["size"] = None if record["size"] == "-" else int(record["size"])
        return record


def choose_decoder(name: str, first_line: bytes) -> Decoder:
    """Give the decoder of a format, or for ``auto`` the one that the first line calls for.

    Raises:
        ValueError: the line looks like none of them.
    """
    if name == "auto":
        if not first_line or first_line.startswith(b"{"):
            name = "ndjson"
        elif AccessLogDecoder.LINE.fullmatch(first_line.decode("utf-8", "replace")):
            name = "log"
        elif any(mark in first_line for mark in b",;\t|"):
            name = "csv"
        else:
            raise ValueError(f"what format is this? say it with --format: {first_line[:60]!r}")
    if name == "csv":
        return CsvDecoder(first_line)
    return NdjsonDecoder() if name == "ndjson" else AccessLogDecoder()


# --- enriching: what is known about the value of a field


def load_table(path: str, field: str) -> Table:
    """Give what a CSV file says by its first column, under names that begin with ``field``."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        _, *columns = next(rows)
        names = [f"{field}_{column}" for column in columns]
        return {key: dict(zip(names, values, strict=True)) for key, *values in rows}


class Enricher:
    """Adds to each record what the tables know about it.

    Args:
        joins: ``"FIELD=FILE.csv"`` each.

    Raises:
        ValueError: one is not of that form.
    """

    def __init__(self, joins: Iterable[str] = ()) -> None:
        self._tables: list[tuple[str, Table]] = []
        for join in joins:
            field, equals, path = join.partition("=")
            if not (field and equals and path):
                raise ValueError(f"--join {join!r} is not of the form FIELD=FILE.csv")
            self._tables.append((field, load_table(path, field)))

    def enrich(self, records: Iterable[Record]) -> None:
        """Add to these records."""
        for field, table in self._tables:
            for record in records:
                known = table.get(str(record.get(field)))
                if known is not None:
                    record.update(known)


# --- writing: the slow end


@dataclass
class Totals:
    """What the sink has taken so far."""

    records: int = 0
    batches: int = 0
    bytes: int = 0
    checksum: int = 0
    """CRC-32 of all that was written, in order: one record lost, twice or changed shows."""


class SlowSink:
    """Stands in for a database or an API at the far end of a slow line.

    Args:
        bytes_per_second: how fast it takes JSON; 0 for as fast as it comes.
        stall_seconds: how long it takes nothing at all, once, after ten batches.
        output: where to write besides; nowhere if None.
    """

    def __init__(
        self,
        bytes_per_second: int = 0,
        stall_seconds: float = 0.0,
        output: BinaryIO | None = None,
    ) -> None:
        self.totals = Totals()
        self._bytes_per_second = bytes_per_second
        self._stall_seconds = stall_seconds
        self._output = output

    async def write(self, records: Iterable[Record]) -> None:
        """Write a batch, and wait until the other end has taken it."""
        payload = self.account(records)
        if self._output is not None:
            await anyio.to_thread.run_sync(self._output.write, payload)
        seconds = len(payload) / self._bytes_per_second if self._bytes_per_second else 0.0
        if self.totals.batches == 10:
            seconds += self._stall_seconds
        await anyio.sleep(seconds)

    def account(self, records: Iterable[Record]) -> bytes:
        """Count a batch, and give the bytes that are written for it."""
        totals = self.totals
        lines = [json.dumps(record) for record in records]
        payload = "".join(f"{line}\n" for line in lines).encode()
        totals.records += len(lines)
        totals.batches += 1
        totals.bytes += len(payload)
        totals.checksum = zlib.crc32(payload, totals.checksum)
        return payload


class Report:
    """Tells how far the sink is: to people, or as lines of JSON to a program."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._begun = time.monotonic()

    def progress(self, totals: Totals) -> None:
        """Tell that a batch was written."""
        if self._as_json:
            self._line(totals)
        elif sys.stderr.isatty():
            print(f"\r{totals.records:,} records written", end="", file=sys.stderr, flush=True)

    def done(self, totals: Totals, rejected: int) -> None:
        """Tell that there is no more."""
        if self._as_json:
            self._line(totals, rejected=rejected, done=True)
            return
        seconds = time.monotonic() - self._begun
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(
            f"{totals.records:,} records in {totals.batches:,} batches, {rejected:,} rejected; "
            f"{totals.bytes:,} bytes, checksum {totals.checksum:08x}; {seconds:.1f} s, "
            f"{totals.records / seconds:,.0f} records/s"
        )

    def _line(self, totals: Totals, **more: object) -> None:
        seconds = round(time.monotonic() - self._begun, 3)
        print(json.dumps({"seconds": seconds, **asdict(totals), **more}), flush=True)


# --- the pipeline: three components, joined by streams


@dataclass
class Decoded:
    """The records of one block, and how much memory they take."""

    records: list[Record]
    nbytes: int

    @classmethod
    def of(cls, records: list[Record]) -> Self:
        """Weigh a few records for all; they are of a kind."""
        sample = records[:: len(records) // 8 + 1]
        return cls(records, deep(sample) * len(records) // max(len(sample), 1))


async def read(part: Component, blocks: Blocks, out: MemorySendStream[bytes]) -> None:
    """Pass on blocks of text."""
    async with part, out:
        async for block in bounded(blocks, ahead=BLOCK_BYTES):
            await out.send(block)


async def decode(
    part: Component,
    blocks: MemoryReceiveStream[bytes],
    decoder: Decoder,
    enricher: Enricher,
    out: MemorySendStream[Decoded],
) -> None:
    """Make records of text. Room for a block's is asked for before there are any."""
    expansion = 32.0  # times the text; known better after the first block
    async with part, blocks, out:
        async for block in blocks:
            async with part.grant(int(len(block) * expansion)):
                records = decoder.decode(block)
                enricher.enrich(records)
                decoded = Decoded.of(records)
                expansion = max(1.0, decoded.nbytes / len(block))
                await out.send(decoded)


async def write(
    part: Component, source: MemoryReceiveStream[Decoded], sink: SlowSink, report: Report
) -> None:
    """Gather records to batches, for the sink likes them large, but not late."""
    async with part, source:
        async for batch in part.batches(source, max_items=4, max_seconds=1.0):
            await sink.write(record for decoded in batch for record in decoded.records)
            report.progress(sink.totals)


async def run_pipeline(
    blocks: Blocks, decoder: Decoder, enricher: Enricher, sink: SlowSink, report: Report
) -> None:
    """Run the three parts side by side, each as fast as the streams let it."""
    reading, decoding, writing = Component("read"), Component("decode"), Component("write")
    text_in, text_out = create_memory_stream[bytes](component=decoding)
    records_in, records_out = create_memory_stream[Decoded](
        size=lambda decoded: decoded.nbytes, component=writing
    )
    async with anyio.create_task_group() as parts:
        parts.start_soon(read, reading, blocks, text_in)
        parts.start_soon(decode, decoding, text_out, decoder, enricher, records_in)
        parts.start_soon(write, writing, records_out, sink, report)


def run_one_by_one(blocks: Blocks, decoder: Decoder, enricher: Enricher, sink: SlowSink) -> None:
    """Do the same without a pipeline and at once: what should come out of one."""
    for block in blocks:
        records = decoder.decode(block)
        enricher.enrich(records)
        sink.account(records)


# --- the command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="log_pipeline.py", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("file", help="what to read, plain, .gz or .zst; - for standard input")
    parser.add_argument(
        "--format", choices=("auto", "csv", "ndjson", "log"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--join",
        action="append",
        default=[],
        metavar="FIELD=FILE.csv",
        help="add to each record what this table says about the value of FIELD; repeatable",
    )
    parser.add_argument(
        "--rate",
        type=parse_size,
        default="12MB",
        metavar="BYTES",
        help="how much the sink takes a second; 0 for as fast as it comes; default: 12MB",
    )
    parser.add_argument(
        "--stall",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long the sink takes nothing at all, after ten batches; default: 0",
    )
    parser.add_argument("--output", metavar="FILE", help="write the records here, as NDJSON")
    parser.add_argument("--report", choices=("text", "json"), default="text")
    parser.add_argument(
        "--one-by-one", action="store_true", help="no pipeline and no slow sink; to compare with"
    )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Run what the command line asks for."""
    report = Report(as_json=arguments.report == "json")
    with (
        open_records(arguments.file) as file,
        open(arguments.output, "wb") if arguments.output else nullcontext() as output,
    ):
        blocks = Blocks(file)
        decoder = choose_decoder(arguments.format, blocks.first_line())
        blocks.quoted = isinstance(decoder, CsvDecoder)
        enricher = Enricher(arguments.join)
        sink = SlowSink(arguments.rate, arguments.stall, output)
        if arguments.one_by_one:
            run_one_by_one(blocks, decoder, enricher, sink)
        else:
            anyio.run(run_pipeline, blocks, decoder, enricher, sink, report)
    report.done(sink.totals, decoder.rejected)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; give its exit status."""
    arguments = parse_arguments(argv)
    status = 0
    try:
        run(arguments)
    except* (OSError, ValueError, EOFError, zlib.error) as errors:
        print(f"log_pipeline.py: {_first(errors)}", file=sys.stderr)
        status = 1
    return status


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
