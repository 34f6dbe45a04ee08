"""The responses of one run, kept as they arrive, so that a killed run goes on where it stopped.

One SQLite file per run folder holds JSON, never pickles. A response is filed under the request that it answers; the
run's identity (lceval.identity) guards the file as a whole.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lceval.models.response import Score, Text

METHODS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


class Responses:
    """Responses by request. A request asked several times (repeats) has as many responses, in order."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path)
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS response "
            "(request TEXT, place INTEGER, value TEXT NOT NULL, PRIMARY KEY (request, place))"
        )
        self._db.commit()
        self._lm: Any = None
        self.reused: set[tuple[str, Any]] = set()
        self.asked: set[tuple[str, Any]] = set()

    def close(self) -> None:
        """Close the file; a model that was attached answers by itself again."""
        self._db.close()
        for method in METHODS if self._lm is not None else ():
            delattr(self._lm, method)
        self._lm = None

    def attach(self, lm: Any) -> None:
        """Make `lm` file every response as it is made, and answer from the file what was answered before."""
        self._lm = lm
        lm.set_cache_hook(self)
        for method in METHODS:
            original = getattr(lm, method)
            setattr(lm, method, _Serving(self, method, original))

    def add_partial(self, method: str, args: Iterable[Any], response: Any) -> None:
        """lm-eval's cache hook: models call this with each response as soon as they have it."""
        request = _key(method, args)
        self._db.execute(
            "INSERT INTO response SELECT ?, count(*), ? FROM response WHERE request = ?",
            (request, _encode(response), request),
        )
        self._db.commit()

    def find(self, request: str) -> list[Any]:
        """All responses filed under a request key, oldest first."""
        rows = self._db.execute("SELECT value FROM response WHERE request = ? ORDER BY place", (request,))
        return [_decode(value) for (value,) in rows]

    def serve(self, method: str, original: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        """Responses to `requests`: from the file where there are any, else from the model."""
        keys = [_key(method, request.args) for request in requests]
        found = {key: self.find(key) for key in set(keys)}
        taken: Counter[str] = Counter()
        responses: list[Any] = [None] * len(requests)
        missing = []
        for index, key in enumerate(keys):
            if taken[key] < len(found[key]):
                responses[index] = found[key][taken[key]]
                taken[key] += 1
            else:
                missing.append(index)
        self._count(requests, missing)
        fresh = original([requests[i] for i in missing]) if missing else []
        added: dict[str, list[Any]] = defaultdict(list)
        for index, response in zip(missing, fresh, strict=True):
            responses[index] = response
            added[keys[index]].append((requests[index].args, response))
        # Models that call no hook are filed here, after the whole batch.
        for key, answered in added.items():
            filed = len(self.find(key)) - len(found[key])
            for args, response in answered[filed:]:
                self.add_partial(method, args, response)
        return responses

    def _count(self, requests: list[Any], missing: list[int]) -> None:
        """A sample was reused if all its requests were."""
        asked = {(request.task_name, request.doc_id) for request in requests}
        self.asked |= asked
        self.reused |= asked - {(requests[i].task_name, requests[i].doc_id) for i in missing}


class _Serving:
    """A model's method, answered by `Responses.serve`."""

    def __init__(self, store: Responses, method: str, original: Callable[..., list[Any]]) -> None:
        self.store, self.method, self.original = store, method, original

    def __call__(self, requests: list[Any], **kwargs: Any) -> list[Any]:
        return self.store.serve(self.method, lambda missing: self.original(missing, **kwargs), requests)


def _key(method: str, args: Iterable[Any]) -> str:
    text = json.dumps([method, *args], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _encode(response: Any) -> str:
    return json.dumps({"value": response, "meta": getattr(response, "meta", None)}, ensure_ascii=False)


def _decode(text: str) -> Any:
    stored = json.loads(text)
    value, meta = stored["value"], stored["meta"]
    if isinstance(value, list):
        return tuple(value) if meta is None else Score(value, meta)
    return value if meta is None else Text(value, meta)
