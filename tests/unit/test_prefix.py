"""The boundary between context and question, grouping by context, and truncation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lceval.models.prefix import Job, by_context, find_boundary, truncate


def pairs(text: str) -> list[int]:
    """A tokenizer that merges: each token is two characters, counted from the start."""
    return [hash(text[i : i + 2]) for i in range(0, len(text), 2)]


def test_the_boundary_is_the_end_of_the_context() -> None:
    prompt = "head CONTEXT tail"
    assert find_boundary(prompt, list(prompt), "CONTEXT", list) == len("head CONTEXT")


def test_a_token_across_the_boundary_belongs_to_the_question() -> None:
    prompt = "abcde?!"
    assert find_boundary(prompt, pairs(prompt), "abcde", pairs) == 2


def test_the_last_occurrence_of_the_context_is_used() -> None:
    prompt = "xx-xx-q"
    assert find_boundary(prompt, list(prompt), "xx", list) == 5


def test_at_least_one_token_is_left_for_the_question() -> None:
    assert find_boundary("abc", list("abc"), "abc", list) == 2


def test_a_context_that_is_not_in_the_prompt_has_no_boundary() -> None:
    assert find_boundary("abc", list("abc"), "d", list) is None
    assert find_boundary("abc", list("abc"), None, list) is None
    assert find_boundary("abc", list("abc"), "", list) is None


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
