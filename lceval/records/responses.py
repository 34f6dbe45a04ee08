"""Response cache of one run: responses are stored as they arrive, so that a killed run can be resumed.

One SQLite file per run folder, with JSON values (never pickles). The key of a response is its request; the file is
valid only under the run's identity (lceval.records.identity).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lceval.core.answers import Score, Text
from lceval.core.errors import InfrastructureError
from lceval.core.io import decode

METHODS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


class Responses:
    """Responses by request. A repeated request has one response per repeat, in order.

    Attributes:
        reused: (task, doc_id) of the samples answered from the file alone.
        requested: (task, doc_id) of all samples.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._db = sqlite3.connect(path)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS response "
                "(request TEXT, place INTEGER, value TEXT NOT NULL, PRIMARY KEY (request, place))"
            )
            self._db.commit()
        self._lm: Any = None
        self.reused: set[tuple[str, Any]] = set()
        self.requested: set[tuple[str, Any]] = set()

    def close(self) -> None:
        """Close the file and detach the model."""
        self._db.close()
        for method in METHODS if self._lm is not None else ():
            delattr(self._lm, method)
        self._lm = None

    def attach(self, lm: Any) -> None:
        """Make `lm` store every response as it is generated, and reuse stored responses."""
        self._lm = lm
        lm.set_cache_hook(self)
        for method in METHODS:
            original = getattr(lm, method)
            setattr(lm, method, partial(self.serve, method, original))

    def add_partial(self, method: str, args: Iterable[Any], response: Any) -> None:
        """lm-eval's cache hook: models call this with each response as it is generated."""
        request = _key(method, args)
        with self._errors():
            self._db.execute(
                "INSERT INTO response SELECT ?, count(*), ? FROM response WHERE request = ?",
                (request, _encode(response), request),
            )
            self._db.commit()

    def find(self, request: str) -> list[Any]:
        """All responses stored under a request key, oldest first."""
        with self._errors():
            rows = self._db.execute("SELECT value FROM response WHERE request = ? ORDER BY place", (request,))
            return [_decode(value) for (value,) in rows]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say in one line what to do about a file that cannot be read or written."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise InfrastructureError(
                f"cannot store answers in {self._path} ({error}): those so far are kept; free the disk and rerun"
            ) from error
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:  # of its bytes, or of a stored value
            raise InfrastructureError(f"{self._path} is damaged ({error}): delete it to answer again") from error

    def serve(self, method: str, original: Callable[..., list[Any]], requests: list[Any], **options: Any) -> list[Any]:
        """Responses to `requests`: from the file where stored, else from the model's method `original`."""
        keys = [_key(method, request.args) for request in requests]
        stored = {key: self.find(key) for key in set(keys)}
        used: Counter[str] = Counter()
        responses: list[Any] = [None] * len(requests)
        missing = []
        for index, key in enumerate(keys):
            if used[key] < len(stored[key]):
                responses[index] = stored[key][used[key]]
                used[key] += 1
            else:
                missing.append(index)
        self._count(requests, missing)
        fresh = original([requests[i] for i in missing], **options) if missing else []
        added: dict[str, list[Any]] = defaultdict(list)
        for index, response in zip(missing, fresh, strict=True):
            responses[index] = response
            added[keys[index]].append((requests[index].args, response))
        # Responses of models that do not call the hook are stored here, after the whole batch.
        for key, answered in added.items():
            hooked = len(self.find(key)) - len(stored[key])
            for args, response in answered[hooked:]:
                self.add_partial(method, args, response)
        return responses

    def _count(self, requests: list[Any], missing: list[int]) -> None:
        """A sample is reused if all its requests are."""
        samples = {(request.task_name, request.doc_id) for request in requests}
        self.requested |= samples
        self.reused |= samples - {(requests[i].task_name, requests[i].doc_id) for i in missing}


def _key(method: str, args: Iterable[Any]) -> str:
    text = json.dumps([method, *args], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _encode(response: Any) -> str:
    return json.dumps({"value": response, "meta": getattr(response, "meta", None)})


def _decode(text: str) -> Any:
    stored = decode(text)
    value, meta = stored["value"], stored["meta"]
    kinds = (str, list, float, int) if meta is None else (str, list)
    if not isinstance(value, kinds) or not isinstance(meta, dict | None):
        raise TypeError("a response of another type")
    if isinstance(value, list):
        return tuple(value) if meta is None else Score(value, meta)
    return value if meta is None else Text(str(value), meta)
