"""The command line: ``membound run``, ``membound top`` and ``membound verify``.

What a command needs is imported when it is chosen, so that a program that is run pays
for nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["CannotStart", "main"]

REPORTS = ("text", "json", "none")
SORTS = (
    "urgency",
    "component",
    "granted",
    "live",
    "peak",
    "minimum",
    "firm",
    "waiting",
    "wanted",
    "oldest",
    "waited",
    "refused",
    "grants",
)
"""What the components of `membound top` can be sorted by."""


EXAMPLES = """\
examples:
  membound run pipeline.py input.json       the limit is detected: container,
                                            rlimits, or the machine's memory
  membound run --limit 512MiB pipeline.py   a limit of your own
  membound run --observe -m shop.worker     limit nothing, report what it would
                                            have done
  membound run --progress pipeline.py       a live table of what it uses
  membound top localhost:8000               the same of a running service
  membound verify shop.bounds:registry --limit 512MiB

`membound COMMAND --help` says more.
"""

RUN = """\
Run a program like `python` does, with a limiter that all of it shares. The
program needs no change: its grant() calls find the limiter. One that asks for
no grants is only measured.

what to run:
  FILE.py [ARGS...]        a script, or a directory or zip file with __main__.py
  -m MODULE [ARGS...]      a module or package, found like `python -m` does
  MODULE:FUNC [ARGS...]    an async function, called without arguments on an
                           event loop made for it; ARGS are in sys.argv
Options come before the program; all that follows it belongs to the program.
"""

RUN_NOTES = """\
examples:
  membound run --limit 512MiB pipeline.py --verbose input.json
  membound run --report json --report-file memory.json -m shop.worker --fast
  membound run --limit 256MiB --uvloop shop.worker:main
  membound run --serve 8000 --progress pipeline.py
  MEMBOUND_LIMIT=512MiB membound run pipeline.py

The exit code is the program's: 1 after an exception that nobody caught; after
Ctrl-C it ends by SIGINT, which a shell shows as 130. It is 2 with one line on
stderr if the limit makes no sense, the program is not found, or the port of
--serve is in use.

Every setting of a limiter has a variable: MEMBOUND_SHARE, MEMBOUND_OVERCOMMIT,
MEMBOUND_STALL_AFTER_SECONDS, ...; see the reference of LimiterSettings.
The limiter serves this process; its child processes are not limited.
"""

TOP = """\
Show what a running service uses of its memory, and who waits, as a live table.
The service has membound_async.api.MemoryAPI mounted, or was started with
`membound run --serve`.

ADDRESS is one of
  PORT, :PORT, HOST:PORT             of a server
  http://HOST:PORT/PREFIX            where the API is mounted
  http://HOST:PORT/PREFIX/memory/    its page in the browser

keys:
  q quits; a shows advice instead of the table; the arrow keys scroll; u sorts
  by urgency, n by component, and the others by the column that the last line
  names. The same key again turns the order round.
"""

TOP_NOTES = """\
examples:
  membound top 8000
  membound top http://shop.internal/worker --sort peak
  membound top 8000 --once --advise
  membound top 8000 --json --interval 10 >> memory.jsonl

Without a terminal, or without rich (pip install 'membound-async[cli]'), it
prints a plain table at each interval. NO_COLOR leaves out the colours.

The exit code is 0 after q or --once, 1 if the service is not reached or gives
no status, 2 if the command line makes no sense, and 130 after Ctrl-C. A live
view that has seen the service waits for it to come back.
"""

VERIFY = """\
Check that the memory bounds which a program declares fit into a limit, and
print them as a tree, largest first. Nothing is run but the import of MODULE.

OBJECT is one of
  a MemoryLimiter or ComponentRegistry     with what was declared in it
  a Component                              such as an instance of your subclass
  anything with specify_bounds()           registered under the name OBJECT
  a function or class that gives one of these when it is called without
  arguments
"""

VERIFY_NOTES = """\
examples:
  membound verify shop.worker:limiter
  membound verify shop.decoding:Decoder --limit 512MiB --baseline 60MiB
  membound verify shop.bounds:registry --limit 1GiB --overcommit 1.5

The exit code is 0 if the bounds fit, 1 if they do not, and 2 if that could not
be checked.
"""


class CannotStart(Exception):
    """What was asked for cannot be done; nothing was started. The message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and where to read on."""
        self.exit(2, f"membound: {message}; see `{self.prog} --help`\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from .report import version

        print(f"membound {version()}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; does not return before the program that it runs has ended.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: the command line makes no sense, or the program has raised it.
        BaseException: what the program has raised. For ``sys.excepthook`` it begins in
            the program.
    """
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unknown: {' '.join(unknown)}")
    try:
        if arguments.command == "run":
            from .run import run

            run(arguments)
            return 0
        if arguments.command == "top":
            from .top import top

            return top(arguments)
        from .verify import verify

        return verify(arguments)
    except CannotStart as error:
        print(f"membound: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="membound",
        description="Keeps an async Python program inside its memory limit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands"
    )
    _add_run(commands)
    _add_top(commands)
    _add_verify(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "run",
        help="run a program under a memory limit, and report what it used",
        usage="membound run [OPTIONS] {FILE.py | -m MODULE | MODULE:FUNC} [ARGS...]",
        description=RUN,
        epilog=RUN_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("-m", dest="is_module", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    _add_limit(parser)
    parser.add_argument(
        "--mode",
        choices=("strict", "permissive", "disabled"),
        help="what to do with bounds that do not fit: raise, warn, or nothing "
        "(MEMBOUND_MODE, else strict)",
    )
    parser.add_argument(
        "--observe",
        action=argparse.BooleanOptionalAction,
        help="grant everything at once, and report what would have been done (MEMBOUND_OBSERVE)",
    )
    parser.add_argument(
        "--track",
        action=argparse.BooleanOptionalAction,
        help="count what each component's code really allocates (MEMBOUND_TRACK, else yes where "
        "the extension was built and no rlimit is set on what may be mapped)",
    )
    parser.add_argument(
        "--report",
        metavar="{" + ",".join(REPORTS) + "}",
        default=os.environ.get("MEMBOUND_REPORT", "").strip() or "text",
        help="the report at the end: a table, or a JSON document as the last line on "
        "stderr (MEMBOUND_REPORT, else text)",
    )
    parser.add_argument(
        "--report-file",
        metavar="PATH",
        default=os.environ.get("MEMBOUND_REPORT_FILE", "").strip() or None,
        help="write the report there instead of to stderr (MEMBOUND_REPORT_FILE)",
    )
    parser.add_argument(
        "--progress",
        action="store_true",
        help="show what the program uses while it runs: a live table in the last lines of the "
        "terminal, or a line on stderr now and then",
    )
    parser.add_argument(
        "--serve",
        metavar="[HOST:]PORT",
        help="serve the status API and its page beside the program; the host is 127.0.0.1 unless "
        "it is given, and port 0 is any that is free",
    )
    _add_token(parser, "what clients of --serve must send as bearer token")
    parser.add_argument(
        "--backend",
        choices=("asyncio", "trio"),
        help="event loop for MODULE:FUNC (default: asyncio)",
    )
    parser.add_argument(
        "--uvloop", action="store_true", help="run MODULE:FUNC on asyncio with uvloop"
    )


def _add_top(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "top",
        help="show what a running service uses",
        description=TOP,
        epilog=TOP_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("url", metavar="ADDRESS", help="of the service")
    parser.add_argument(
        "--sort",
        metavar="COLUMN",
        choices=SORTS,
        default="urgency",
        help=f"the largest of a column first: {', '.join(SORTS[1:])}; or urgency, the default: "
        "who waits longest, then who has most",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="how often the service is asked (default: 1)",
    )
    parser.add_argument("--once", action="store_true", help="print a plain table and exit")
    parser.add_argument(
        "--json", action="store_true", help="print the status as JSON, a line each time"
    )
    parser.add_argument(
        "--advise",
        action="store_true",
        help="say what the components had better declare, from what they used so far",
    )
    _add_token(parser, "bearer token that the service wants")


def _add_verify(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="check that declared bounds fit into a limit",
        description=VERIFY,
        epilog=VERIFY_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    parser.add_argument("object", metavar="MODULE:OBJECT", help="what knows the bounds")
    _add_limit(parser)
    parser.add_argument(
        "--overcommit",
        type=float,
        metavar="FACTOR",
        help="how many times the available memory the firm limits together may promise "
        "(MEMBOUND_OVERCOMMIT, else 1.0)",
    )
    parser.add_argument(
        "--baseline",
        metavar="SIZE",
        help="bytes in use before any component starts (default: what this process uses "
        "once MODULE is imported)",
    )


def _add_token(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--token",
        default=os.environ.get("MEMBOUND_API_TOKEN", "").strip() or None,
        help=f"{purpose} (MEMBOUND_API_TOKEN, which other users of the machine cannot see)",
    )


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit",
        metavar="SIZE",
        help="bytes that may be used: 512MiB, 2GB, 1073741824 (MEMBOUND_LIMIT, else detected)",
    )
    parser.add_argument(
        "--slop",
        type=float,
        metavar="PART",
        help="part of the limit to hold back for what nobody can account "
        "(MEMBOUND_SLOP_FACTOR, else 0.15)",
    )
