"""Judges' replies, kept as they arrive: a reply that was paid for is never asked for again.

One SQLite file of plain text and numbers, by default for all runs of this machine. A reply is filed under the judge
with its revision, the rubric with its version, the prompt's digest and the repeat's index. What is filed is the reply,
not the reading of it: a better parser reads old replies again.
"""

from __future__ import annotations

import fcntl
import hashlib
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType

from lceval.errors import InfrastructureError, UserError
from lceval.home import cache_dir


@dataclass(frozen=True)
class Key:
    """What a reply is filed under."""

    judge: str
    revision: str
    rubric: str
    prompt: str
    repeat: int


@dataclass(frozen=True)
class Reply:
    """A judge's reply.

    Attributes:
        tokens_in, tokens_out: as the judge counts them, 0 where it does not.
        served: what the endpoint says it is (model and fingerprint).
        cut: whether the reply hit its limit of tokens.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    served: str = ""
    cut: bool = False


def default_path() -> Path:
    """Where replies are kept unless a command is told otherwise."""
    return cache_dir("judge") / "replies.sqlite"


@contextmanager
def alone(path: Path, judge: str, *, wait: bool = False) -> Iterator[None]:
    """This process alone asks this judge for this file of replies: two would pay for the same replies.

    Raises:
        UserError: another process does, and `wait` is not set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.{hashlib.sha256(judge.encode()).hexdigest()[:8]}.lock")
    with lock.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process asks {judge}: wait for it, or name another file with --replies") from None
        yield


class Store:
    """The file of replies, for any number of threads; each reply is on disk before `put` returns."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=60)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS reply (judge TEXT, revision TEXT, rubric TEXT, prompt TEXT, "
                "repeat INTEGER, text TEXT NOT NULL, tokens_in INTEGER, tokens_out INTEGER, served TEXT, cut INTEGER, "
                "PRIMARY KEY (judge, revision, rubric, prompt, repeat))"
            )
            self._db.commit()
        except (OSError, sqlite3.Error) as error:
            raise InfrastructureError(f"cannot keep replies in {path}: {error}; set LCEVAL_CACHE elsewhere") from None
        self._lock = threading.Lock()

    def get(self, key: Key) -> Reply | None:
        """The reply filed under a key."""
        with self._lock:
            row = self._db.execute(
                "SELECT text, tokens_in, tokens_out, served, cut FROM reply "
                "WHERE judge = ? AND revision = ? AND rubric = ? AND prompt = ? AND repeat = ?",
                astuple(key),
            ).fetchone()
        return None if row is None else Reply(row[0], row[1], row[2], row[3], bool(row[4]))

    def put(self, key: Key, reply: Reply) -> None:
        """File a reply; the first one stays."""
        with self._lock:
            self._db.execute(
                "INSERT OR IGNORE INTO reply VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*astuple(key), *astuple(reply)),
            )
            self._db.commit()

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
