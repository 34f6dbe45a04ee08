"""Judges for training: the reward of R+Judge, and the second stage of relabelling negatives as gold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lceval.judge import rubrics, scores
from lceval.judge.client import Client
from lceval.judge.connect import connect
from lceval.judge.rubrics import Case
from lceval.training.promotion import Judge, Match


class Grader:
    """Grades outputs by the rubric `rj`.

    Attributes:
        unjudged: number of outputs without grades, by reason.
    """

    def __init__(self, client: Client) -> None:
        self.unjudged: Counter[str] = Counter()
        self._client, self._rubric = client, rubrics.load(scores.RUBRIC)

    def __call__(self, rows: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> list[float | None]:
        """J, the sum of the three 0/1 grades, per output; None without a verdict.

        Raises:
            UserError: no call can succeed (a wrong key, an unknown model).
        """
        cases = [scores.case(row, output) for row, output in zip(rows, outputs, strict=True)]
        verdicts = self._client.judge_all(self._rubric, cases)
        self.unjudged.update(verdict.reason for verdict in verdicts if verdict.grades is None)
        return [None if v.grades is None else float(sum(int(grade) for grade in v.grades.values())) for v in verdicts]


@contextmanager
def configured() -> Iterator[Grader]:
    """A grader with the judge of LCEVAL_JUDGE; replies are stored in the cache of `lceval judge`.

    Raises:
        UserError: LCEVAL_JUDGE is unset, or there is no such judge.
    """
    with connect(None, None, wait=True) as client:
        yield Grader(client)


@contextmanager
def of_passages(judge: str) -> Iterator[Judge]:
    """A function that grades the relevance of passages to their questions (rubric `relevance`).

    Raises:
        UserError: there is no such judge, or (when called) no call can succeed.
    """
    rubric = rubrics.load("relevance")
    with connect(judge, "passages", wait=True) as client:

        def relevant(matches: Sequence[Match]) -> list[bool | None]:
            cases = [Case(match.question, match.answers, "", (match.passage,)) for match in matches]
            verdicts = client.judge_all(rubric, cases)
            return [None if verdict.grades is None else verdict.grades["relevant"] == 1 for verdict in verdicts]

        yield relevant
