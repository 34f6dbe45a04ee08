"""Reply cache of judges: replies are stored as they arrive and never paid for twice.

One SQLite file of plain text and numbers, by default shared by all runs of this machine. The key of a reply is the
judge with its revision, the rubric with its version, the prompt's digest and the repeat's index. The reply itself is
stored, not its grades, so that an improved parser applies to old replies.
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

from lceval.core.errors import InfrastructureError, UserError
from lceval.core.paths import named


@dataclass(frozen=True)
class Key:
    """The key of a reply."""

    judge: str
    revision: str
    rubric: str
    prompt: str
    repeat: int


@dataclass(frozen=True)
class Reply:
    """A judge's reply.

    Attributes:
        tokens_in, tokens_out: as counted by the judge; 0 if unknown.
        served: model and fingerprint reported by the endpoint.
        cut: whether the reply is truncated at its token limit.
    """

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    served: str = ""
    cut: bool = False


@contextmanager
def alone(path: Path, judge: str, *, wait: bool = False) -> Iterator[None]:
    """Lock a judge in a reply cache, since two processes would pay for the same replies.

    Raises:
        UserError: another process has the lock, and `wait` is not set.
    """
    lock = named(path).with_name(f"{path.name}.{hashlib.sha256(judge.encode()).hexdigest()[:8]}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = lock.open("w")
    except OSError as error:
        raise _unusable(path, error) from None
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process uses {judge}: wait for it, or pass another file with --replies") from None
        yield


def _unusable(path: Path, error: Exception) -> InfrastructureError:
    return InfrastructureError(f"cannot store replies in {path}: {error}; set LCEVAL_CACHE to another folder")


class Store:
    """The reply cache, thread-safe; each reply is on disk before `put` returns."""

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
        except (OSError, sqlite3.Error, ValueError) as error:  # a name in a damaged file is not UTF-8
            raise _unusable(path, error) from None
        self._path, self._lock = path, threading.Lock()

    def get(self, key: Key) -> Reply | None:
        """The reply stored under a key, or None."""
        with self._locked():
            row = self._db.execute(
                "SELECT text, tokens_in, tokens_out, served, cut FROM reply "
                "WHERE judge = ? AND revision = ? AND rubric = ? AND prompt = ? AND repeat = ?",
                astuple(key),
            ).fetchone()
        return None if row is None else Reply(row[0], row[1], row[2], row[3], bool(row[4]))

    def put(self, key: Key, reply: Reply) -> None:
        """Store a reply, unless its key exists."""
        with self._locked():
            self._db.execute(
                "INSERT OR IGNORE INTO reply VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*astuple(key), *astuple(reply)),
            )
            self._db.commit()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, ValueError) as error:  # a damaged file, or a full disk
            raise _unusable(self._path, error) from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
