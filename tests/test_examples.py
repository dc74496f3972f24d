"""Every example runs, and does what it says; see also faults/test_survive.py."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import zstandard

EXAMPLES = Path(__file__).parent.parent / "examples"
DATA = EXAMPLES / "data"

COMMON = b'192.0.2.7 - ann [10/Oct/2000:13:55:36 -0700] "GET /a.gif HTTP/1.0" 200 2326\n'
COMBINED = (
    b'2001:db8::1 - - [29/Feb/2024:00:00:01 +0000] "POST /b?q=\\"x\\" HTTP/2.0" 304 - '
    b'"https://example.org/" "Mozilla/5.0 (X11; \\"quoted\\")"\n'
)
NDJSON = b'{"id": 1, "name": "\xc3\xa4"}\n\n{"id": 2}\n'
CSV = b'carrier,flight,note\nUA,1545,"first, ""best"""\nAA,1141,"two\nlines"\n'


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pipeline = example("log_pipeline")
survive = example("survive")


def run(*arguments: object, output: Path) -> list[dict]:
    """Run the pipeline in this process; give the records it wrote."""
    assert pipeline.main([*map(str, arguments), "--rate=0", f"--output={output}"]) == 0
    return [json.loads(line) for line in output.read_bytes().splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output.ndjson"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_says_what_it_is_for(path):
    outcome = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, text=True, check=True
    )
    assert outcome.stdout.startswith(f"usage: {path.name}")
    assert outcome.stderr == ""


# --- what is read


@pytest.mark.parametrize(
    ("text", "records"),
    [
        (NDJSON, [{"id": 1, "name": "ä"}, {"id": 2}]),
        (b"\xef\xbb\xbf" + NDJSON, [{"id": 1, "name": "ä"}, {"id": 2}]),
        (NDJSON.rstrip(), [{"id": 1, "name": "ä"}, {"id": 2}]),
        (
            CSV,
            [
                {"carrier": "UA", "flight": "1545", "note": 'first, "best"'},
                {"carrier": "AA", "flight": "1141", "note": "two\nlines"},
            ],
        ),
        (b"a;b\r\n1,5;2\r\n", [{"a": "1,5", "b": "2"}]),
        (b"a\tb\n1\t2\n", [{"a": "1", "b": "2"}]),
        (b"", []),
    ],
    ids=["ndjson", "byte order mark", "no last line break", "csv", "semicolons", "tabs", "empty"],
)
@pytest.mark.parametrize("block_bytes", [1, 7, 65536])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_finds_out_what_it_is_given(
    tmp_path, output, monkeypatch, text, records, block_bytes, suffix
):
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", block_bytes)
    path = tmp_path / f"whatever{suffix}"
    compressed = {"": text, ".gz": gzip.compress(text), ".zst": zstandard.compress(text)}
    path.write_bytes(compressed[suffix])
    assert run(path, output=output) == records


def test_reads_access_logs(tmp_path, output):
    path = tmp_path / "access.log"
    path.write_bytes(COMMON + COMBINED)
    first, second = run(path, output=output)
    assert first == {
        "host": "192.0.2.7",
        "ident": "-",
        "user": "ann",
        "time": "2000-10-10T13:55:36-07:00",
        "request": "GET /a.gif HTTP/1.0",
        "method": "GET",
        "path": "/a.gif",
        "protocol": "HTTP/1.0",
        "status": 200,
        "size": 2326,
        "referer": None,
        "agent": None,
    }
    assert second["host"] == "2001:db8::1"
    assert second["time"] == "2024-02-29T00:00:01+00:00"
    assert second["path"] == '/b?q=\\"x\\"'
    assert second["size"] is None
    assert second["referer"] == "https://example.org/"
    assert second["agent"] == 'Mozilla/5.0 (X11; \\"quoted\\")'


@pytest.mark.parametrize(
    ("name", "text", "records", "rejected"),
    [
        ("ndjson", NDJSON + b"{\n[1]\n7\n\xff\n" + b"[" * 100_000 + b"\n", 2, 5),
        ("csv", CSV + b"one,two\n\nUA,1,2,3\nUA,1,2\n", 3, 2),
        ("log", COMMON + b"nonsense\n" + COMMON.replace(b"10/Oct", b"32/Oct") + COMBINED, 2, 2),
    ],
    ids=["ndjson", "csv", "log"],
)
def test_counts_what_makes_no_sense(tmp_path, capsys, name, text, records, rejected):
    path = tmp_path / "input"
    path.write_bytes(text)
    assert pipeline.main([str(path), f"--format={name}", "--rate=0", "--report=json"]) == 0
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (last["records"], last["rejected"], last["done"]) == (records, rejected, True)


def test_a_stray_quote_does_not_swallow_the_rest(monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 100)
    blocks = pipeline.Blocks(io.BytesIO(b'a,b\n5" pipe,1\n' + b"x,y\n" * 500))
    blocks.quoted = True
    assert sum(block.count(b"\n") for block in blocks) == 502


@pytest.mark.parametrize("quoted", [False, True])
def test_a_record_without_end_is_refused(monkeypatch, quoted):
    monkeypatch.setattr(pipeline, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 100)
    blocks = pipeline.Blocks(io.BytesIO(b'"' + b"x" * 5000))
    blocks.quoted = quoted
    with pytest.raises(ValueError, match="no record ends within 1,000 bytes"):
        blocks.read()


def test_standard_input_is_passed_on_as_it_comes():
    command = [sys.executable, str(EXAMPLES / "log_pipeline.py"), "-", "--report=json", "--rate=0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(COMMON * 2)
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["records"] == 2  # and the input is still open
        child.stdin.write(COMBINED)
        child.stdin.close()
        *_, last = map(json.loads, child.stdout.read().splitlines())
    assert child.returncode == 0
    assert last["records"] == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["missing.csv"], "missing.csv"),
        (["words"], "what format is this? say it with --format: b'hello world'"),
        (["cut.gz"], "end-of-stream marker"),
        (["good.csv", "--join=carrier"], "--join 'carrier' is not of the form FIELD=FILE.csv"),
        (["good.csv", "--output=no/such/directory"], "no/such/directory"),
    ],
)
def test_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    Path("words").write_bytes(b"hello world\n")
    Path("good.csv").write_bytes(CSV)
    Path("cut.gz").write_bytes(gzip.compress(NDJSON * 1000)[:-12])
    assert pipeline.main(arguments) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("log_pipeline.py: ")
    assert complaint in line


# --- what comes out


def test_joins_tables(tmp_path, output):
    path = tmp_path / "flights.csv"
    path.write_bytes(CSV + b"??,1,\n")
    first, second, third = run(
        path, f"--join=carrier={DATA / 'airlines.csv'}", "--join", f"x={path}", output=output
    )
    assert first["carrier_name"] == "United Air Lines Inc."
    assert second["carrier_name"] == "American Airlines Inc."
    assert third == {"carrier": "??", "flight": "1", "note": ""}


def test_the_shipped_flights_are_what_the_readme_says():
    with gzip.open(DATA / "flights.csv.gz") as file:
        lines = file.readlines()
    assert len(lines) == 200_001
    assert sum(map(len, lines)) == 18_468_009
    assert len(pipeline.load_table(DATA / "airlines.csv", "")) == 16
    assert len(pipeline.load_table(DATA / "airports.csv", "")) == 1458


@pytest.fixture(scope="module")
def some_flights(tmp_path_factory):
    path = tmp_path_factory.mktemp("flights") / "flights.csv"
    with gzip.open(DATA / "flights.csv.gz") as file:
        path.write_bytes(b"".join(file.readlines()[:20_001]))
    return path


def outcome(capsys, *arguments):
    assert pipeline.main([*map(str, arguments), "--rate=0", "--report=json"]) == 0
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    return {name: last[name] for name in ("records", "rejected", "bytes", "checksum")}


def test_writes_the_same_records_as_its_steps_one_by_one(some_flights, capsys):
    expected = outcome(capsys, some_flights, "--one-by-one")
    assert expected["records"] == 20_000
    assert outcome(capsys, some_flights) == expected


# --- how the comparison is shown; that it comes out right is in faults/test_survive.py

LIMIT_BYTES = 256 * 2**20


def a_run(seconds, peak_bytes, **more):
    samples = [(seconds * i / 100, peak_bytes * i // 100) for i in range(101)]
    return survive.Run(seconds=seconds, samples=samples, **more)


def died(status=-9, errors=""):
    return a_run(
        5.0,
        LIMIT_BYTES,
        status=status,
        died_of_the_limit=True,
        progress={"records": 14_000},
        errors=errors,
    )


def finished(**more):
    return a_run(
        20.0, LIMIT_BYTES // 2, progress={"records": 200_000, "checksum": 7, "done": True}, **more
    )


EXPECTED = {"records": 200_000, "checksum": 7}


def test_outcomes_are_shown_side_by_side():
    lines = survive.compare(died(), finished(), EXPECTED, LIMIT_BYTES)
    assert lines[:7] == [
        "             bare                    under membound run",
        "outcome      killed (OOM)            finished",
        "time         5.0 s                   20.0 s",
        "peak memory  256.0 MiB               128.0 MiB",
        "written      14,000 of 200,000       200,000 of 200,000",
        "throughput   2,800 records/s         10,000 records/s",
        "checksum     -                       as expected",
    ]
    assert max(map(len, lines)) <= 80


def test_memory_is_drawn_over_the_same_time_for_both():
    bare = list(survive.chart(died(), LIMIT_BYTES, 20.0, "red", width=20))
    bounded = list(survive.chart(finished(), LIMIT_BYTES, 20.0, "green", width=20))
    assert bare == [
        "    ▇█ died",
        "   ▇██",
        "  ▇███",
        " ▇████",
        "▇█████",
    ]
    assert bounded[:2] == [" " * 20] * 2
    assert bounded[2].endswith("▁▂▄ finished")
    assert bounded[-1].endswith("█" * 10)


@pytest.mark.parametrize(
    ("bare", "bounded", "said"),
    [
        (died(), finished(), "bare it died, bounded every record arrived"),
        (finished(), finished(), "bare, it had enough memory"),
        (a_run(1.0, 9, status=1, errors="no such file"), finished(), "no such file"),
        (died(), died(status=1, errors="MemoryError"), "bounded, it did not finish:\nMemoryError"),
        (
            died(),
            a_run(1.0, 9, progress={"records": 200_000, "checksum": 8, "done": True}),
            "wrote something else",
        ),
    ],
)
def test_only_the_whole_story_is_a_success(capsys, bare, bounded, said):
    status = survive.verdict(bare, bounded, EXPECTED)
    output = capsys.readouterr().out
    assert said in output
    assert (status == 0) == ("every record arrived" in output)
