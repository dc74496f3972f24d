"""The command line: programs run as `python` runs them, reports, verdicts, exit codes."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest

import membound_async
from membound_async import MemoryLimiter, PressureStall, testing
from membound_async.advice import advise
from membound_async.cli import main
from membound_async.cli import report as reports
from membound_async.cli.layout import columns_of, paragraph, table
from membound_async.cli.program import put_first_on_path
from membound_async.cli.report import Ending, Report
from membound_async.context import installed_limiters
from membound_async.probes import ProcessProbe

MIB = 2**20

# --- what runs the command line


@dataclass
class Ended:
    """What a run of the command line has come to."""

    exit_code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """The JSON document in the last line on stderr."""
        document: dict[str, Any] = json.loads(self.err.splitlines()[-1])
        return document


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to be in, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    # Hooks would stay in this process; tests/test_live.py has what tracking adds to a report.
    monkeypatch.setenv("MEMBOUND_TRACK", "0")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # file times are too coarse for it
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    sys.path_importer_cache.clear()
    gc.collect()  # what they have loaded would be measured in the next test


@pytest.fixture
def membound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """Calls the command line in this process, and does at its end what Python does."""
    at_exit: list[Callable[[], object]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", ["of membound itself", *sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def run(*arguments: str) -> Ended:
        try:
            exit_code = main(arguments)
        except SystemExit as error:
            exit_code = Ending.of(error).exit_code
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException as error:  # noqa: BLE001
            exit_code = Ending.of(error).exit_code
            sys.excepthook(type(error), error, error.__traceback__)
        while at_exit:
            at_exit.pop()()
        return Ended(exit_code, *capsys.readouterr())

    yield run
    installed_limiters.clear()


def environment(**variables: str) -> dict[str, str]:
    """Where a child process finds the package that is tested."""
    home = str(Path(membound_async.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": home, **variables}


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "membound_async.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**variables),
        text=True,
    )


def in_a_process(*arguments: str, **variables: str) -> Ended:
    with start(*arguments, **variables) as process:
        out, err = process.communicate(timeout=60)
    return Ended(process.returncode, out, err)


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text), encoding="utf-8")
    return name


NO_SIZE = 'is no size; write a number of bytes or, for example, "64KiB", "1.5GiB" or "2MB"'

NO_BOUNDS = (
    "which declares no bounds; name a MemoryLimiter, a ComponentRegistry, a Component, something "
    "with specify_bounds(), or a function that gives one"
)

# --- programs run as python runs them

FACTS = """\
import json, sys
main = sys.modules["__main__"]
facts = {
    "argv": sys.argv,
    "path": sys.path[0],
    "name": __name__,
    "file": __file__,
    "package": __package__,
    "cached": __cached__,
    "spec": __spec__ and __spec__.name,
    "loader": type(__loader__).__name__,
    "is main": vars(main) is globals(),
    "builtins": type(__builtins__).__name__,
}
print(json.dumps(facts))
"""


def facts_by(*command: str) -> dict[str, Any]:
    python = [sys.executable, *command]
    done = subprocess.run(python, env=environment(), capture_output=True, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@pytest.mark.parametrize(
    "command",
    [
        ["apps/script.py", "-m", "--limit", "3"],
        ["link.py"],
        ["-m", "apps.script", "--", "-x"],
        ["-m", "apps", "--report", "json"],
        ["apps", "one"],
        ["app.zip", "one"],
    ],
    ids=" ".join,
)
def test_a_program_sees_what_it_sees_under_python(command: list[str]) -> None:
    write("apps/script.py", FACTS)
    write("apps/__main__.py", FACTS)
    write("apps/__init__.py", "")
    Path("link.py").symlink_to("apps/script.py")
    with zipfile.ZipFile("app.zip", "w") as archive:
        archive.writestr("__main__.py", FACTS)
    bare = facts_by(*command)
    assert bare["is main"]
    run = ["-m", "membound_async.cli", "run", "--limit", "1GiB", "--report", "none"]
    assert facts_by(*run, *command) == bare


def test_the_installed_command_leaves_its_directory_off_the_path(project: Path) -> None:
    write(
        "bin/membound",
        "import sys\nfrom membound_async.cli import main\nsys.exit(main())\n",
    )
    write("app.py", FACTS)
    facts = facts_by("bin/membound", "run", "--limit", "1GiB", "app.py")
    assert facts["path"] == str(project)
    assert facts["argv"] == ["app.py"]


def test_a_safe_path_stays_as_it_is() -> None:
    write("app.py", FACTS)
    assert facts_by("-P", "-m", "membound_async.cli", "run", "app.py") == facts_by("-P", "app.py")


def test_packages_directories_and_zip_files_run_in_this_process(
    membound: Callable[..., Ended], project: Path
) -> None:
    write("apps/__main__.py", "import sys\nprint(__name__, __spec__.name, sys.path[0])\n")
    ended = membound("run", "--report", "none", "-m", "apps")
    assert ended.out == f"__main__ apps.__main__ {project}\n"
    ended = membound("run", "--report", "none", "--", "apps")
    assert ended.out == f"__main__ __main__ {project}/apps\n"
    Path("apps/__main__.py").unlink()
    sys.path_importer_cache.clear()
    assert membound("run", "-m", "apps").err == (
        "membound: 'apps' is a package without a __main__ module\n"
    )
    assert membound("run", "apps").err == "membound: can't find '__main__' module in 'apps'\n"


def test_no_directory_goes_on_a_safe_path(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [*sys.path]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "flags", SimpleNamespace(safe_path=True))
        put_first_on_path("apps")
    assert sys.path == before


def test_child_processes_and_pickles_find_what_the_script_defines() -> None:
    write(
        "app.py",
        """
        import multiprocessing, pickle, sys

        class Record:
            def __init__(self, number):
                self.number = number

        def doubled(record):
            return Record(2 * record.number)

        if __name__ == "__main__":
            assert pickle.loads(pickle.dumps(Record(3))).number == 3
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(doubled, [Record(21)]).number)
        """,
    )
    ended = in_a_process("run", "--limit", "1GiB", "--report", "json", "app.py")
    assert (ended.exit_code, ended.out) == (0, "42\n")
    assert len(ended.err.splitlines()) == 1  # the child reports nothing


def test_grants_of_an_unchanged_program_meet_the_limiter(membound: Callable[..., Ended]) -> None:
    write(
        "app.py",
        """
        import asyncio
        from membound_async import Component, current_limiter, grant

        async def main():
            async with Component("decode") as decode:
                async with decode.grant("2MiB"), grant("1MiB"):
                    pass

        asyncio.run(main())
        """,
    )
    ended = membound("run", "--limit", "1GiB", "--report", "json", "app.py")
    assert ended.exit_code == 0
    peaks = {
        component["path"]: (component["peak_granted_bytes"], component["admissions"])
        for component in ended.report["limiter"]["components"]
    }
    assert peaks["decode"][0] == 3 * MIB


FUNCTION = """\
import asyncio, os, sys
from membound_async import current_limiter, grant

loaded = b"x" * 50_000_000
limiter = current_limiter()

async def main():
    async with grant("1MiB"):
        loop = asyncio._get_running_loop()
    loop = "trio" if loop is None else type(loop).__module__
    print(loop.split(".")[0], sys.argv, sys.path[0] == os.getcwd(), __name__)

class Service:
    async def __call__(self):
        print("called")
    async def serve(self):
        raise SystemExit(5)

service = Service()

def no():
    pass

async def wants(what, *, how):
    pass
"""


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ([], "asyncio"),
        (["--backend", "asyncio"], "asyncio"),
        (["--uvloop"], "uvloop"),
        (["--backend", "trio"], "trio"),
    ],
)
def test_a_function_runs_on_the_event_loop_asked_for(
    membound: Callable[..., Ended], options: list[str], loop: str
) -> None:
    write("app.py", FUNCTION)
    ended = membound(
        "run", "--limit", "1GiB", "--report", "json", *options, "app:main", "--backend", "x"
    )
    assert ended.out == f"{loop} ['app:main', '--backend', 'x'] True app\n"
    assert ended.exit_code == 0
    assert ended.report["program"] == "app:main"
    root = ended.report["limiter"]["components"][-1]
    assert (root["path"], root["peak_granted_bytes"]) == ("root", MIB)
    # What the module has loaded by itself was there before anything was granted.
    assert ended.report["limiter"]["baseline_bytes"] > 50_000_000


def test_objects_and_methods_are_functions_too(membound: Callable[..., Ended]) -> None:
    write("app.py", FUNCTION)
    assert membound("run", "--report", "none", "app:service").out == "called\n"
    assert membound("run", "--report", "none", "app:service.serve").exit_code == 5


# --- what cannot be run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "what is to be run? See `membound run --help`"),
        ("--", "what is to be run? See `membound run --help`"),
        ("nope.py", "can't open file 'nope.py': No such file or directory"),
        ("/", "can't find '__main__' module in '/'"),
        ("-m nope", "no module named 'nope'"),
        ("-m nope.part", "no module named 'nope.part'"),
        ("-m app.part", "no module named 'app.part'"),
        ("-m .app", "no module named '.app'"),
        ("-m __main__", "no module named '__main__'"),
        ("-m package", "'package' is a package without a __main__ module"),
        ("-m math", "'math' has no Python code to run"),
        ("nope:main", "no module named 'nope'"),
        ("app.part:main", "no module named 'app.part'"),
        ("app:mian", "'app' has no 'mian'; is it 'main'?"),
        ("app:main.xyzzy", "'app' has no 'main.xyzzy'"),
        ("app:no", "app:no is a function, but must be an async function"),
        ("app:loaded", "app:loaded is a bytes, but must be an async function"),
        (
            "app:wants",
            (
                "app:wants must do without arguments: missing a required argument: 'what'; what "
                "follows it on the command line is in sys.argv"
            ),
        ),
        ("--uvloop --backend trio app:main", "--uvloop is for asyncio; leave it or --backend out"),
        (
            "--uvloop app.py",
            (
                "--backend and --uvloop are for MODULE:FUNC; scripts and modules choose their own "
                "event loop"
            ),
        ),
        ("--frob app.py", "unknown: --frob; see `membound run --help`"),
        ("--report xml app.py", "--report xml: use one of text, json, none"),
        (
            "--report-file no/where app.py",
            "the report cannot be written: [Errno 2] No such file or directory: 'no/where'",
        ),
        ("--limit 12parsecs app.py", f"limit='12parsecs' {NO_SIZE}"),
        ("--slop x app.py", "argument --slop: invalid float value: 'x'; see `membound run --help`"),
        (
            "--slop 1.5 app.py",
            (
                "slop_factor=1.5 (or MEMBOUND_SLOP_FACTOR) makes no sense: use a number of at "
                "least 0 and below 1, for example 0.15"
            ),
        ),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_code_2(
    membound: Callable[..., Ended], arguments: str, message: str
) -> None:
    write("app.py", FUNCTION)
    write("package/__init__.py", "")
    ended = membound("run", *arguments.split())
    assert ended == Ended(2, "", f"membound: {message}\n")
    assert installed_limiters == []


@pytest.mark.parametrize("command", ["app:main", "app.py"])
def test_a_limit_below_the_baseline_is_one_line_and_exit_code_2(
    membound: Callable[..., Ended], command: str
) -> None:
    write("app.py", FUNCTION)
    ended = membound("run", "--limit", "1MiB", command)
    assert (ended.exit_code, ended.out) == (2, "")
    assert re.fullmatch(
        r"membound: the limit of 1 048 576 bytes \(1.0 MiB\) .* are in use before .*\n", ended.err
    )


@pytest.mark.parametrize("report", ["text", "none"])
def test_a_module_that_loads_more_than_the_limit_is_one_line_and_exit_code_2(
    membound: Callable[..., Ended], report: str
) -> None:
    write("app.py", FUNCTION.replace("50_000_000", "150_000_000"))
    effective = ProcessProbe().read() + 75_000_000
    ended = membound("run", "--report", report, "--limit", f"{int(effective / 0.85)}", "app:main")
    assert (ended.exit_code, ended.out) == (2, "")
    assert re.fullmatch(r"membound: the limit of .* are in use .* import less\n", ended.err)
    assert installed_limiters == []


@pytest.mark.parametrize(
    ("options", "missing"), [(["--uvloop"], "uvloop"), (["--backend", "trio"], "trio")]
)
def test_an_event_loop_that_is_not_installed_is_named(
    membound: Callable[..., Ended],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    missing: str,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", {"asyncio": "there"}.get)
    ended = membound("run", *options, "app:main")
    assert ended.err == (
        f"membound: {missing} is not installed: pip install 'membound-async[{missing}]'\n"
    )
    assert ended.exit_code == 2


# --- how programs end


@pytest.mark.parametrize(
    ("statement", "exit_code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit(-1)", 255, ""),
        ("sys.exit('in vain')", 1, "in vain\n"),
    ],
)
def test_the_exit_code_is_passed_on_and_reported(
    membound: Callable[..., Ended], statement: str, exit_code: int, said: str
) -> None:
    write("app.py", f"import sys\n{statement}\n")
    ended = membound("run", "--limit", "1GiB", "app.py")
    assert ended.exit_code == exit_code
    first = rf"membound: app.py ended after \d+ m?s, exit code {exit_code}\n"
    assert re.match(re.escape(said) + first + r"limit     1.0 GiB \(--limit\)", ended.err)
    ended = membound("run", "--report", "json", "app.py")
    assert (ended.report["exit_code"], ended.report["exception"]) == (exit_code, None)
    assert ended.report["membound_version"] == reports.version()


def without_report(err: str) -> str:
    return err[: err.index("membound: ")]


@pytest.mark.parametrize("command", [["app.py"], ["-m", "app"]])
def test_a_traceback_is_the_program_s_own_and_the_report_follows(command: list[str]) -> None:
    write("app.py", "def work():\n    raise LookupError('lost')\n\nwork()\n")
    ended = in_a_process("run", *command)
    bare = subprocess.run([sys.executable, "app.py"], check=False, capture_output=True, text=True)
    assert (ended.exit_code, ended.out) == (1, "")
    assert without_report(ended.err) == bare.stderr
    name = " ".join(command)
    assert re.search(
        rf"^membound: {name} ended by LookupError after .* m?s, exit code 1$",
        ended.err,
        re.MULTILINE,
    )


def test_a_syntax_error_is_shown_like_python_shows_it(membound: Callable[..., Ended]) -> None:
    write("app.py", "async def main(:\n")
    ended = membound("run", "app.py")
    bare = subprocess.run([sys.executable, "app.py"], check=False, capture_output=True, text=True)
    assert ended.exit_code == 1
    assert without_report(ended.err) == bare.stderr


@pytest.mark.parametrize("command", [["app:main"], ["-m", "app"], ["-m", "app.part"]])
def test_a_module_that_fails_to_import_another_is_not_called_missing(
    membound: Callable[..., Ended], command: list[str]
) -> None:
    write("app/__init__.py", "import xyzzy\n")
    write("app/__main__.py", "")
    ended = membound("run", *command)
    assert ended.exit_code == 1
    assert "ModuleNotFoundError: No module named 'xyzzy'\nmembound: " in ended.err


def test_the_hook_of_the_program_is_asked_first(membound: Callable[..., Ended]) -> None:
    write(
        "app.py",
        """
        import sys
        def hook(kind, error, traceback):
            print(kind.__name__, traceback.tb_frame.f_code.co_filename.rpartition("/")[2])
        sys.excepthook = hook
        raise KeyboardInterrupt
        """,
    )
    ended = membound("run", "--report", "json", "app.py")
    assert (ended.exit_code, ended.out) == (130, "KeyboardInterrupt app.py\n")


def test_other_exceptions_are_shown_as_ever(
    membound: Callable[..., Ended], capsys: pytest.CaptureFixture[str]
) -> None:
    write("app.py", "raise ValueError")
    membound("run", "app.py")
    other = TypeError("at the very end")
    sys.excepthook(TypeError, other, None)
    assert capsys.readouterr().err == "TypeError: at the very end\n"


INTERRUPTED = """\
import asyncio, sys
import anyio, trio
from membound_async import grant

async def main():
    async with grant("5MiB"):
        try:
            print("ready", flush=True)
            await anyio.sleep(3600)
        finally:
            print("cleaned up", flush=True)

async def many():
    async with anyio.create_task_group() as group:
        group.start_soon(main)

def waits():
    import threading
    try:
        print("ready", flush=True)
        threading.Event().wait()
    finally:
        print("cleaned up", flush=True)

if __name__ == "__main__":
    match sys.argv[1]:
        case "asyncio": asyncio.run(main())
        case "trio": trio.run(main)
        case "nursery": trio.run(many)
        case "nothing": waits()
"""


@pytest.mark.parametrize(
    "command",
    [
        "app.py asyncio",
        "app.py trio",
        "app.py nursery",
        "app.py nothing",
        "-m app asyncio",
        "app:main",
        "--backend trio app:main",
        "--uvloop app:many",
    ],
)
def test_ctrl_c_ends_the_program_cleanly(command: str) -> None:
    write("app.py", INTERRUPTED)
    with start("run", "--limit", "1GiB", "--report", "json", *command.split()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    # Ended by the signal, as python itself does it: a shell shows 130 and ends its loop.
    assert process.returncode == -signal.SIGINT
    assert out == "cleaned up\n"
    ended = Ended(0, out, err)
    assert len(err.splitlines()) == 1  # no traceback
    assert (ended.report["exit_code"], ended.report["exception"]) == (130, "KeyboardInterrupt")


def test_a_program_in_need_of_text_says_that_it_was_interrupted(
    membound: Callable[..., Ended],
) -> None:
    write("app.py", "raise BaseExceptionGroup('group', [KeyboardInterrupt()])")
    ended = membound("run", "app.py")
    assert ended.exit_code == 130
    assert re.match(r"membound: app.py was interrupted after \d+ m?s\nlimit ", ended.err)
    write("app.py", "raise BaseExceptionGroup('group', [KeyboardInterrupt(), OSError()])")
    assert membound("run", "app.py").exit_code == 1


def test_a_forked_process_reports_nothing(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", os.getpid)
    write("app.py", "import os\nos.getpid = lambda: 1\n")
    assert membound("run", "app.py") == Ended(0, "", "")


def test_the_report_comes_after_threads_exit_handlers_and_output() -> None:
    write(
        "app.py",
        """
        import atexit, os, sys, threading, time
        from membound_async import current_limiter

        def late():
            threading.main_thread().join()
            with current_limiter().component("late").grant("3MiB"):
                print("thread")

        atexit.register(print, "exit handler of", __name__)
        threading.Thread(target=late).start()
        os.chdir("/")
        sys.stderr = None
        if os.fork() == 0:
            sys.exit()
        os.wait()
        print("main")
        """,
    )
    with subprocess.Popen(
        [sys.executable, "-m", "membound_async.cli", "run", "--report", "json", "app.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        text=True,
    ) as process:
        out, _ = process.communicate(timeout=60)
    *before, last = out.splitlines()
    assert before[-3:] == ["main", "thread", "exit handler of __main__"]
    assert out.count("membound_version") == 1
    (late,) = (
        component
        for component in json.loads(last)["limiter"]["components"]
        if component["path"] == "late"
    )
    assert late["peak_granted_bytes"] == 3 * MIB


# --- options and variables


def test_options_reach_the_limiter(membound: Callable[..., Ended]) -> None:
    write(
        "app.py",
        """
        from membound_async import current_limiter
        limiter = current_limiter()
        print(limiter.limit.limit_bytes, limiter.limit.slop_factor, limiter._mode, limiter._observe)
        """,
    )
    options = ["--limit", "1GiB", "--slop", "0.25", "--mode", "permissive", "--observe"]
    ended = membound("run", "--report", "none", *options, "app.py")
    assert ended == Ended(0, "1073741824 0.25 permissive True\n", "")


def test_variables_are_the_defaults(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("app.py", "")
    monkeypatch.setenv("MEMBOUND_LIMIT", "2GiB")
    monkeypatch.setenv("MEMBOUND_SLOP_FACTOR", "0.5")
    monkeypatch.setenv("MEMBOUND_OBSERVE", "1")
    monkeypatch.setenv("MEMBOUND_REPORT", "json")
    monkeypatch.setenv("MEMBOUND_REPORT_FILE", "report.json")
    assert membound("run", "app.py") == Ended(0, "", "")
    limiter = json.loads(Path("report.json").read_text())["limiter"]
    assert limiter["limit_bytes"] == 2 * 2**30
    assert limiter["limit_source"] == "MEMBOUND_LIMIT"
    assert limiter["slop_factor"] == 0.5
    assert limiter["observe"] is True
    options = ["--limit", "1GiB", "--slop", "0", "--no-observe"]
    membound("run", *options, "app.py")
    limiter = json.loads(Path("report.json").read_text())["limiter"]
    assert (limiter["limit_source"], limiter["effective_limit_bytes"]) == ("explicit", 2**30)
    assert limiter["observe"] is False


def test_a_report_file_is_where_the_program_was_started(
    membound: Callable[..., Ended], project: Path
) -> None:
    Path("elsewhere").mkdir()
    write("app.py", "import os\nos.chdir('elsewhere')\n")
    assert membound("run", "--report-file", "report.txt", "app.py") == Ended(0, "", "")
    assert (project / "report.txt").read_text().startswith("membound: app.py ended after ")


def test_a_report_that_cannot_be_written_any_more_goes_to_stderr(
    membound: Callable[..., Ended],
) -> None:
    write("app.py", "import os\nos.remove('out/report.txt')\nos.rmdir('out')\n")
    Path("out").mkdir()
    ended = membound("run", "--report-file", "out/report.txt", "app.py")
    assert ended.exit_code == 0
    first, second, *_ = ended.err.splitlines()
    assert first.startswith("membound: the report cannot be written: [Errno 2] No such file")
    assert second.startswith("membound: app.py ended after ")


def test_a_closed_stderr_is_left_alone(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("app.py", "import sys\nsys.stdout.close()\n")
    for stream in (closed := io.StringIO(), None):
        closed.close()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            patch.setattr(sys, "stdout", io.StringIO())
            assert membound("run", "app.py").exit_code == 0


def test_a_program_that_does_not_say_its_peak_has_none_reported(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "open", lambda *_: io.BytesIO(b"Name:\tx\n"), raising=False)
    peak = reports.peak_rss_bytes()
    assert peak is not None
    assert MIB < peak < 2**40  # ru_maxrss, in KiB
    monkeypatch.setattr(sys, "platform", "darwin")
    assert reports.peak_rss_bytes() == peak // 1024  # in bytes there

    def no_proc(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(reports, "open", no_proc)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert reports.peak_rss_bytes() is None


def test_the_kernel_s_peak_is_the_program_s_own() -> None:
    hog = bytes(200 * MIB)
    write("app.py", "import sys\nballast = b'x' * 50_000_000\ndel ballast\n")
    ended = in_a_process("run", "--limit", "1GiB", "--report", "json", "app.py")
    assert 50_000_000 < ended.report["peak_rss_bytes"] < len(hog)
    # Sampled only at both ends, so it did not see it.
    assert ended.report["limiter"]["peak_measured_bytes"] < 75_000_000


# --- the report


def busy_limiter(**options: Any) -> MemoryLimiter:
    limiter = testing.limiter("64MiB", **options)
    limiter.component("decode", minimum="8MiB", firm_limit="32MiB").grant_nowait("20MiB").release()
    limiter.component("write").grant_nowait("1MiB").release()
    limiter.component("ingest.idle")
    return limiter


def report_of(limiter: MemoryLimiter, **facts: Any) -> Report:
    known: dict[str, Any] = {
        "program": "app.py",
        "ending": Ending(),
        "seconds": 12.34,
        "statistics": limiter.statistics(),
        "membound_version": "1.2.3",
        "has_limit_option": True,
        "peak_rss_bytes": 60 * MIB,
        "stalled_seconds": None,
    }
    return Report(**known | facts)


def lines(text: str) -> list[str]:
    return dedent(text).strip("\n").splitlines()


def test_the_text_tells_what_each_component_did() -> None:
    report = report_of(busy_limiter())
    assert report.to_text().splitlines() == lines(
        f"""
        membound: app.py ended after 12.3 s, exit code 0
        limit     64.0 MiB (--limit), 64.0 MiB effective (slop 0)
        peak      0 B scripted, the highest of {report.statistics.samples} readings
                  60.0 MiB resident by the kernel's count
        baseline  0 B before anything was granted
        component  minimum  firm limit      peak  grants
        ------------------------------------------------
        decode     8.0 MiB    32.0 MiB  20.0 MiB       1
        write            -           -   1.0 MiB       1
        """
    )


def test_the_text_tells_of_waits_refusals_and_troubles() -> None:
    statistics = busy_limiter().statistics()
    decode, idle, root, sink = statistics.components
    sink = replace(
        sink,
        path="write.to.the.slow.sink.of.the.other.department",
        total_wait_seconds=1234.56,
        total_delay_seconds=0.25,
        refusals=1200,
        admissions=1234567,
        granted_bytes=3 * MIB,
    )
    statistics = replace(
        statistics,
        components=(decode, idle, root, sink),
        limit_source="explicit, divided by processes=2",
        slop_factor=0.15,
        samples=12345,
        probe_failures=2,
        grants=3,
    )
    text = report_of(
        busy_limiter(),
        statistics=statistics,
        ending=Ending.of(LookupError()),
        peak_rss_bytes=65 * MIB,
        stalled_seconds=0.0999,
        seconds=0.0,
    ).to_text(columns=76)
    assert text.splitlines() == lines(
        """
        membound: app.py ended by LookupError after 0 s, exit code 1
        limit     64.0 MiB (--limit, divided by processes=2), 64.0 MiB effective
                  (slop 0.15)
        peak      0 B scripted, the highest of 12 345 readings
                  65.0 MiB resident by the kernel's count, above the limit
        baseline  0 B before anything was granted
        failed    2 readings of memory
        leaked    3.0 MiB in 3 grants never given back
        stalled   100 ms for want of memory, by the kernel's count of all processes
        component  minimum  firm limit      peak     grants  refused     waited  delayed
        --------------------------------------------------------------------------------
        decode     8.0 MiB    32.0 MiB  20.0 MiB          1        -          -        -
        write.to.the.slow.sink.of.the.other.department
                         -           -   1.0 MiB  1 234 567    1 200  1 234.6 s   250 ms
        """
    )


def test_the_text_tells_what_observing_would_have_done() -> None:
    limiter = busy_limiter(observe=True)
    limiter.grant_nowait("40MiB").release()
    text = report_of(limiter, peak_rss_bytes=None).to_text()
    assert (
        "observed  nobody was held up; 0 requests would have waited (0 s in all), 1 would" in text
    )
    assert text.splitlines()[-5:] == lines(
        """
        component  minimum  firm limit      peak  grants  would refuse
        --------------------------------------------------------------
        root             -           -  40.0 MiB       1             1
        decode     8.0 MiB    32.0 MiB  20.0 MiB       1             -
        write            -           -   1.0 MiB       1             -
        """
    )
    assert "kernel" not in text


def test_the_text_ends_with_advice_if_there_is_any() -> None:
    limiter = busy_limiter()
    (decode,) = (one for one in limiter.statistics().components if one.path == "decode")
    decode = replace(decode, admissions=100, peak_granted_bytes=5 * MIB, minimum_bytes=0)
    components = tuple(replace(decode, path=f"part{number:02}") for number in range(12))
    statistics = replace(limiter.statistics(), components=components, age_seconds=7200.0)
    shown = report_of(limiter, statistics=statistics).to_text().splitlines()
    advice = shown[
        shown.index(
            "advice    the firm limits add up to 78.0 MiB, but the limit leaves 64.0 MiB:"
        ) :
    ]
    assert advice[:4] == lines(
        """
        advice    the firm limits add up to 78.0 MiB, but the limit leaves 64.0 MiB:
                  together they need overcommit 1.3, or a limit of 80 MiB
                  part00: granted peak 5.0 MiB of firm 32 MiB in 2 h, never waited: firm
                  6.5 MiB would do
        """
    )
    assert shown[-1] == "          ... and 2 more"
    statistics = replace(statistics, age_seconds=59.0)
    assert "advice" not in report_of(limiter, statistics=statistics).to_text()


def test_the_text_names_the_largest_components_only() -> None:
    limiter = testing.limiter("64MiB")
    for number in range(reports.ROWS + 5):
        limiter.component(f"part{number:02}").grant_nowait(1000 + number).release()
    shown = report_of(limiter).to_text().splitlines()
    assert shown[7].split() == ["part34", "1.0", "KiB", "1"]
    assert shown[-2].split() == ["part05", "1005", "B", "1"]
    assert shown[-1] == "... and 5 more"


def test_the_text_says_that_a_program_asks_for_no_grants() -> None:
    last = report_of(testing.limiter()).to_text().splitlines()[-1]
    assert last == "No memory was asked for: the program was only measured."


def test_the_json_has_everything() -> None:
    limiter = busy_limiter()
    stall = PressureStall(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    statistics = replace(limiter.statistics(), pressure_stall=stall)
    text = report_of(limiter, statistics=statistics, stalled_seconds=0.5).to_json()
    document = json.loads(text)
    assert "\n" not in text
    assert document.pop("limiter") == json.loads(json.dumps(statistics.to_dict()))
    assert document.pop("advice") == json.loads(json.dumps(advise(statistics).to_dict()))
    assert document == {
        "membound_version": "1.2.3",
        "program": "app.py",
        "exit_code": 0,
        "exception": None,
        "seconds": 12.34,
        "peak_rss_bytes": 60 * MIB,
        "stalled_seconds": 0.5,
    }


@pytest.mark.parametrize("stalls", [[None, None], [None, 7.0], [5.0, 7.0]])
def test_stalls_are_those_of_the_program(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, stalls: list[float | None]
) -> None:
    write("app.py", "")
    readings = [
        None if seconds is None else PressureStall(0, 0, 0, 0, seconds, 0) for seconds in stalls
    ]
    monkeypatch.setattr("membound_async.limiter.read_pressure", lambda _: readings.pop(0))
    ended = membound("run", "--report", "json", "app.py")
    assert (
        ended.report["stalled_seconds"] == {None: None, 7.0: 2.0 if stalls[0] else 7.0}[stalls[1]]
    )


def test_long_paragraphs_do_not_break_numbers() -> None:
    assert paragraph("peak of 1 234.5 MiB after 12 s", 18, label="peak  ", indent=6) == [
        "peak  peak of",
        "      1 234.5 MiB",
        "      after 12 s",
    ]


def test_a_table_keeps_what_does_not_fit() -> None:
    assert list(table([("name", ["a"]), ("much too long", ["12345678"])], 10)) == [
        "name         a",
        "--------------",
        "much too long",
        "      12345678",
    ]


def test_columns_are_those_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert columns_of(None) == columns_of(io.StringIO()) == 80
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((132, 24)))
    with open(os.devnull, "w") as stream:
        assert columns_of(stream) == 132
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((3, 24)))
        assert columns_of(stream) == 40


# --- verify

DECLARED = """\
from membound_async import Component, ComponentRegistry, MemoryLimiter

class Decoder(Component):
    def specify_bounds(self, b):
        b.minimum.fixed("input buffer", "8MiB")
        b.firm.array("batch", count=500, each="64KiB")

class Cache:
    def specify_bounds(self, b):
        b.firm.config("cache_bytes", "20MiB")

class Plain:
    cache = Cache()

decoder = Decoder("ingest.decode")
registry = ComponentRegistry()
registry.register("ingest.decode", decoder)
limiter = MemoryLimiter("1GiB", slop_factor=0.5, baseline="100MiB")
limiter.component("write", minimum="4MiB", firm_limit="300MiB")
part = limiter.component("write.part", minimum="1MiB", firm_limit="2MiB")
bounds = registry.tree()
noop = MemoryLimiter.noop()
noop.add(Decoder("of.noop"))

def make():
    return limiter

def broken():
    registry.declare("bad", minimum=2, firm_limit=1)

def crash():
    raise OSError("disk on fire")

def no_limit():
    MemoryLimiter("12 parsecs")

async def serve():
    pass

def returns_nothing():
    pass
"""


@pytest.mark.parametrize(
    ("name", "root"),
    [
        ("decoder", "8.0 MiB     39.2 MiB"),
        ("registry", "8.0 MiB     39.2 MiB"),
        ("bounds", "8.0 MiB     39.2 MiB"),
        ("noop", "8.0 MiB     39.2 MiB"),
        ("Cache", "-     20.0 MiB"),
        ("Plain.cache", "-     20.0 MiB"),
        ("limiter", "5.0 MiB    302.0 MiB"),
        ("make", "5.0 MiB    302.0 MiB"),
    ],
)
def test_anything_that_declares_bounds_can_be_verified(
    membound: Callable[..., Ended], name: str, root: str
) -> None:
    write("app.py", DECLARED)
    options = ["--limit", "1GiB", "--slop", "0.25", "--baseline", "0"]
    ended = membound("verify", f"app:{name}", *options)
    assert (ended.exit_code, ended.err) == (0, "")
    shown = ended.out.splitlines()
    assert re.fullmatch(rf"root +{root}", shown[2])
    assert shown[-2] == "FITS 1.0 GiB (--limit)"
    assert shown[-1].startswith("smallest limit that fits: ")


def test_a_verdict_is_a_tree_that_says_why(membound: Callable[..., Ended]) -> None:
    write("app.py", DECLARED)
    ended = membound("verify", "app:decoder", "--limit", "64MiB", "--baseline", "4MiB")
    assert (ended.exit_code, ended.err) == (0, "")
    assert ended.out.splitlines() == lines(
        """
        component                     minimum   firm limit
        --------------------------------------------------
        root                          8.0 MiB     39.2 MiB
          ingest.decode               8.0 MiB     39.2 MiB
            batch = 500 x 64 KiB            -     31.2 MiB
            input buffer = 8 MiB      8.0 MiB      8.0 MiB
        --------------------------------------------------
        available                    50.4 MiB     50.4 MiB
        left                         42.4 MiB     11.1 MiB
        available: effective limit 54.4 MiB, less baseline 4.0 MiB
        FITS 64.0 MiB (--limit)
        smallest limit that fits: 53 354 015 bytes (50.9 MiB)
        """
    )


def test_bounds_that_do_not_fit_are_exit_code_1(membound: Callable[..., Ended]) -> None:
    write("app.py", DECLARED)
    options = ["--limit", "32MiB", "--slop", "0", "--baseline", "0"]
    ended = membound("verify", "app:Cache", *options, "--limit", "10MiB")
    assert (ended.exit_code, ended.err) == (1, "")
    assert ended.out.splitlines()[-4:] == [
        "DOES NOT FIT 10.0 MiB (--limit): component 'Cache' has a firm limit of",
        "  20 971 520 bytes (20.0 MiB), but at most 10 485 760 bytes (10.0 MiB) is",
        "  allowed (overcommit 1); lower it, or raise the limit to 20 971 520 bytes",
        "  (20.0 MiB)",
    ]
    ended = membound("verify", "app:registry", *options, "--baseline", "32MiB")
    assert ended.exit_code == 1
    assert "DOES NOT FIT 32.0 MiB (--limit): the effective limit of 33 554 432" in ended.out


def test_overcommit_lets_the_sum_exceed_what_is_there(membound: Callable[..., Ended]) -> None:
    write("app.py", DECLARED)
    options = ["--limit", "301MiB", "--slop", "0", "--baseline", "0"]
    assert membound("verify", "app:limiter", *options).exit_code == 1
    assert membound("verify", "app:limiter", *options, "--overcommit", "1.01").exit_code == 0


def test_a_limiter_brings_its_own_numbers(membound: Callable[..., Ended]) -> None:
    write("app.py", DECLARED)
    ended = membound("verify", "app:limiter")
    assert "available: effective limit 512.0 MiB, less baseline 100.0 MiB" in ended.out
    assert "baseline: the limiter's own; see --baseline" in ended.out
    assert "FITS 1.0 GiB (explicit)" in ended.out
    ended = membound("verify", "app:part", "--slop", "0")
    assert "write.part" in ended.out.splitlines()[2]
    assert "available: effective limit 1.0 GiB, less baseline 100.0 MiB" in ended.out


def test_without_a_limit_it_is_detected(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("app.py", DECLARED)
    assert re.search(r"^FITS .* \((?!--limit)", membound("verify", "app:decoder").out, re.MULTILINE)
    monkeypatch.setenv("MEMBOUND_LIMIT", "100GiB")
    monkeypatch.setenv("MEMBOUND_SLOP_FACTOR", "0.5")
    out = membound("verify", "app:noop").out
    assert "available: effective limit 50.0 GiB, less baseline " in out
    assert "baseline: RSS of this process with the module imported; see --baseline" in out
    assert "FITS 100.0 GiB (MEMBOUND_LIMIT)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("app.py", "'app.py' is not MODULE:OBJECT, such as shop.bounds:registry"),
        ("nope:limiter", "no module named 'nope'"),
        ("app:limitr", "'app' has no 'limitr'; is it 'limiter'?"),
        ("app:serve", "app:serve is async; name a function that is not, or an object"),
        (
            "app:Decoder",
            "app:Decoder cannot be called without arguments: missing a required argument: 'path'",
        ),
        ("app:returns_nothing", f"app:returns_nothing gives a NoneType, {NO_BOUNDS}"),
        ("app:Plain", f"app:Plain gives a Plain, {NO_BOUNDS}"),
        ("app:decoder --limit x", f"limit='x' {NO_SIZE}"),
        ("app:decoder --baseline x", f"baseline='x' {NO_SIZE}"),
        ("app:decoder --overcommit 0.5", "overcommit=0.5 must be a finite number of at least 1"),
        ("app:decoder --frob", "unknown: --frob; see `membound verify --help`"),
        ("app:no_limit", f"limit='12 parsecs' {NO_SIZE}"),
        ("quits:anything", "importing it ended by SystemExit(0)"),
    ],
)
def test_what_cannot_be_verified_is_one_line_and_exit_code_2(
    membound: Callable[..., Ended], arguments: str, message: str
) -> None:
    write("app.py", DECLARED)
    write("quits.py", "raise SystemExit(0)")
    ended = membound("verify", *arguments.split())
    assert ended == Ended(2, "", f"membound: {message}\n")


def test_a_slop_factor_in_the_environment_that_is_no_number_is_named(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("app.py", DECLARED)
    monkeypatch.setenv("MEMBOUND_SLOP_FACTOR", "little")
    ended = membound("verify", "app:decoder")
    message = "membound: MEMBOUND_SLOP_FACTOR='little' is no number; write 0.15\n"
    assert ended == Ended(2, "", message)


def test_bounds_that_make_no_sense_are_exit_code_1(membound: Callable[..., Ended]) -> None:
    write("app.py", DECLARED)
    ended = membound("verify", "app:broken")
    assert (ended.exit_code, ended.err) == (1, "")
    assert ended.out.startswith("INVALID: bounds of component 'bad': its minimum of 2 bytes is")


def test_a_program_that_fails_is_exit_code_2(membound: Callable[..., Ended]) -> None:
    write("app.py", DECLARED)
    ended = membound("verify", "app:crash")
    assert (ended.exit_code, ended.out) == (2, "")
    assert ended.err.splitlines()[-1] == "OSError: disk on fire"
    assert "membound_async" not in ended.err
    write("imports.py", "import xyzzy")
    ended = membound("verify", "imports:anything")
    assert ended.exit_code == 2
    assert ended.err.splitlines()[-1] == "ModuleNotFoundError: No module named 'xyzzy'"


# --- help


def test_the_version_is_the_package_s(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"membound-async": "1.2.3"}.__getitem__)
    assert membound("--version") == Ended(0, "membound 1.2.3\n", "")

    def not_found(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", not_found)
    assert membound("--version") == Ended(0, "membound (not installed)\n", "")


@pytest.mark.parametrize("command", [[], ["run"], ["top"], ["verify"]])
def test_the_help_has_examples_and_fits_a_terminal(
    membound: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = membound(*command, "--help")
    assert (ended.exit_code, ended.err) == (0, "")
    assert "\nexamples:\n  membound " in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80


def test_the_package_can_be_run_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["membound", "verify", "nope:nope"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("membound_async.cli", run_name="__main__")
    assert ended.value.code == 2
    monkeypatch.setattr(sys, "argv", ["membound", "verify"])
    runpy.run_module("membound_async.cli.__main__", run_name="imported by a child process")


def test_a_command_that_does_not_exist_is_exit_code_2(membound: Callable[..., Ended]) -> None:
    ended = membound("frobnicate")
    assert (ended.exit_code, ended.out) == (2, "")
    assert ended.err.startswith("membound: argument COMMAND: invalid choice: 'frobnicate'")
    assert ended.err.count("\n") == 1


def test_running_costs_little_more_than_the_package() -> None:
    write("app.py", "")
    code = (
        "import sys, membound_async; before = set(sys.modules); sys.argv[1:] = ['run', 'app.py']\n"
        "from membound_async.cli import main; main()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    own = {name for name in done.stdout.split() if name.startswith("membound_async")}
    assert own == {
        "membound_async.advice",
        "membound_async.cli",
        *(
            f"membound_async.cli.{name}"
            for name in ("counsel", "figures", "layout", "program", "report", "run")
        ),
    }
    assert not {"trio", "uvloop", "difflib", "importlib.metadata"} & set(done.stdout.split())
