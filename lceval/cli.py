"""The command line: results on stdout, progress on stderr, one line per error.

Exit codes: 0 done, 1 regression, 2 bad usage, 3 not comparable, 4 infrastructure or unexpected, 5 inconclusive,
130 or 143 stopped by Ctrl-C or SIGTERM.
Each package has the commands of its own; each command imports its heavy dependencies itself.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

import typer

from lceval.adapt.commands import app as adapt
from lceval.analysis.commands import app as analysis
from lceval.bench.commands import app as bench
from lceval.core import interrupt
from lceval.core.credentials import without_secrets
from lceval.core.errors import LcevalError, one_line
from lceval.core.safe_text import echo, printable
from lceval.data.commands import app as data
from lceval.judge.commands import app as judge
from lceval.runs.commands import app as runs

# What a disk says: full, over quota, read-only, no permission.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}

app = typer.Typer(
    help="Evaluate long-context language models over compressed KV caches.",
    epilog="Exit codes: 0 done, 1 regression, 2 bad usage, 3 not comparable, 4 infrastructure or unexpected error, "
    "5 inconclusive, 130 or 143 stopped by Ctrl-C or SIGTERM.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for commands in (runs, analysis, data):
    app.add_typer(commands)
app.add_typer(judge, name="judge")
app.add_typer(adapt, name="train")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the `lceval` command."""
    interrupt.stop_on(signal.SIGINT, signal.SIGTERM)
    sys.exit(invoke(sys.argv[1:]))


def invoke(argv: list[str]) -> int:
    """Run one command line; returns its exit code."""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Texts of runs may contain half of a surrogate pair, which no encoding has.
            sys.stdout.reconfigure(errors="backslashreplace")
        command = typer.main.get_command(app)
        result = command.main(argv or ["--help"], prog_name="lceval", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LcevalError as error:
        return _fail(str(error), error.exit_code)
    except interrupt.Stopped as stopped:
        return _fail(f"stopped by {stopped}; rerun the same command to resume", stopped.exit_code)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _fail(f"{error.filename!s:.60}…: the name is too long; pass a shorter one", 2)
        if error.errno not in _DISK:
            return _unexpected(error)
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{os.strerror(error.errno)}{where}; nothing stored is lost: rerun the same command to resume", 4)
    except Exception as error:
        # Typer's usage errors are private classes; only they have `format_message`.
        if usage := getattr(error, "format_message", None):
            return _fail(f"{usage()} (see lceval --help)", 2)
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if os.environ.get("LCEVAL_DEBUG"):
        raise error
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return _fail(f"unexpected {type(error).__name__}: {first_line} (LCEVAL_DEBUG=1 shows the traceback)", 4)


def _fail(message: str, code: int) -> int:
    echo(printable(f"lceval: error: {one_line(without_secrets(message))}"), err=True)
    return code
