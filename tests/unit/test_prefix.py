"""Grouping by context, and truncation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lceval.models.prefix import Job, by_context, truncate


def test_jobs_are_grouped_by_context_in_order_of_appearance() -> None:
    jobs = [Job(i, (*context, 9, i), len(context), True) for i, context in enumerate([(1, 2), (3,), (1, 2), (3,)])]
    assert [[job.index for job in group] for group in by_context(jobs)] == [[0, 2], [1, 3]]


@given(st.integers(1, 50), st.integers(1, 20), st.data())
def test_truncation_removes_only_context_tokens(context: int, question: int, data: st.DataObject) -> None:
    ids = tuple(range(context + question))
    excess = data.draw(st.integers(0, context))
    for where in ("end", "middle"):
        kept, boundary = truncate(ids, context, excess, where)
        assert kept[boundary:] == ids[context:]
        assert boundary == context - excess
        assert list(kept) == sorted(set(kept))
    assert truncate(ids, context, excess, "end")[0][:boundary] == ids[:boundary]
