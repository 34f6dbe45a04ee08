"""Tasks shorter than their names say, for tests in which length is not the point."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from unittest import mock

from lceval.tasks import build


def short_contexts(limit_tokens: int = 400) -> AbstractContextManager[object]:
    """Rows built inside have so many tokens of prompt and reply: a filing has about 250."""
    return mock.patch.object(build, "rows_of", partial(build.rows_of, limit_tokens=limit_tokens))
