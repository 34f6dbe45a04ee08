"""Rows of FinanceBench: analyst questions on whole filings, with annotated evidence pages.

A context of `financebench` is a whole filing, page by page (context=gold: the evidence pages, the oracle setting).
`financebenchmulti` has a fixed length: the evidence pages at seeded depths among other pages of the same filing, then
of other filings. Pages are in `document_pages.jsonl`; only questions on its filings are used.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.compose import Fitter, spread
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, by_key, joint_identity, read_sources

_QUESTION: Mapping[str, type] = {"id": str, "question": str, "answer": str, "doc_name": str}
_PAGE: Mapping[str, type] = {"doc_name": str, "page_num": int, "text": str}
_UNINFORMATIVE = frozenset({"yes", "no"})  # answers that occur on every page


@dataclass(frozen=True)
class _FilingQuestion:
    """A question with its evidence pages."""

    id: str
    question: str
    answer: str
    filing: str
    gold: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class _Library:
    """Pages by id; page ids by filing, in order of the source."""

    pages: Mapping[str, Document]
    filings: Mapping[str, Sequence[str]]

    @cached_property
    def _leaks(self) -> LeakIndex:
        return LeakIndex([page["text"] for page in self.pages.values()])

    def leaking(self, answer: str) -> set[str]:
        """Ids of the pages that contain the normalised answer; empty for yes and no."""
        gold = normalize(answer)
        if not gold or gold in _UNINFORMATIVE:
            return set()
        pids = [*self.pages]
        return {pids[index] for index in self._leaks.containing([gold])}


def _pid(filing: str, page: int) -> str:
    return f"{filing}-p{page}"


def _plan(
    request: Request, rows_of: Callable[[Request, _Library, Sequence[_FilingQuestion], str], list[Row]]
) -> RowPlan:
    questions, pages = request.dataset.files
    question_file, page_file = read_sources(request.task, {questions: _QUESTION, pages: _PAGE})
    identity = joint_identity([question_file, page_file])

    def build() -> list[Row]:
        library = _library(page_file)
        return rows_of(request, library, _questions(question_file, library), identity)

    return RowPlan({"source": identity}, build)


def _library(source: SourceFile) -> _Library:
    pages: dict[str, Document] = {}
    filings: dict[str, list[str]] = {}
    for record in sorted(source.records, key=lambda record: record["page_num"]):
        filing, number, text = record["doc_name"], record["page_num"], record["text"].strip()
        pid, title = _pid(filing, number), f"{filing} page {number}"
        if pid in pages:
            raise UserError(f"{source.name}: duplicate {title}: each page must be unique.")
        if text:  # skips blank pages and pages with images only
            pages[pid] = Document(pid=pid, title=title, text=f"{title}\n{text}")
            filings.setdefault(filing, []).append(pid)
    return _Library(pages, filings)


def _questions(source: SourceFile, library: _Library) -> list[_FilingQuestion]:
    """Questions whose evidence pages are available, grouped by filing."""
    usable = []
    for record in by_key(source, "id").values():
        gold_pages = record.get("gold_pages")
        if not isinstance(gold_pages, list) or not gold_pages or not all(_is_page(page) for page in gold_pages):
            raise UserError(
                f"{source.name} id={record['id']!r}: invalid gold_pages={gold_pages!r:.80}: expected [[filing, page]]."
            )
        gold = tuple(dict.fromkeys(_pid(filing, number) for filing, number in gold_pages))
        if record["doc_name"] in library.filings and all(pid in library.pages for pid in gold):
            filing, kind = record["doc_name"], record.get("question_type") or ""
            usable.append(_FilingQuestion(record["id"], record["question"], record["answer"], filing, gold, kind))
    order = [*library.filings]
    return sorted(usable, key=lambda question: order.index(question.filing))


def _is_page(page: Any) -> bool:
    return isinstance(page, list) and len(page) == 2 and isinstance(page[0], str) and isinstance(page[1], int)


def rows(request: Request) -> RowPlan:
    """Whole filings, one document per page."""
    return _plan(request, _whole)


def _whole(request: Request, library: _Library, questions: Sequence[_FilingQuestion], source: str) -> list[Row]:
    return [
        _row(
            request, question, [library.pages[pid] for pid in library.filings[question.filing]], question.filing, source
        )
        for question in questions
    ]


def _row(
    request: Request,
    question: _FilingQuestion,
    docs: Sequence[Document],
    cluster: str,
    source: str,
    length: int | None = None,
) -> Row:
    return request.row(
        id=question.id,
        question=question.question,
        answers=[question.answer],
        docs=docs,
        gold_pids=question.gold,
        cluster=cluster,
        source=source,
        length_tokens=length,
        kind=question.kind,
    )


def multi_rows(request: Request) -> RowPlan:
    """Pages of several filings, fitted to the length; questions whose evidence does not fit are skipped."""
    return _plan(request, _fitted)


def _fitted(request: Request, library: _Library, questions: Sequence[_FilingQuestion], source: str) -> list[Row]:
    meter, limit = request.meter_and_limit
    tokens = meter.pieces([f"[DOC 100]\n{page['text']}\n\n" for page in library.pages.values()])
    costs = dict(zip(library.pages, tokens, strict=True))
    fitter = Fitter.preferred(limit, meter)

    def fit(question: _FilingQuestion) -> Row | None:
        rng = random.Random(f"financebench {request.seed} {question.id}")
        others, order_seed = _others(question, library, rng), rng.getrandbits(32)

        def arrange(chosen: Sequence[int]) -> tuple[list[Document], list[int]]:
            page_ids = spread(question.gold, [others[index] for index in chosen], random.Random(order_seed))
            docs = [library.pages[pid] for pid in page_ids]
            return docs, request.totals(docs, [question.question])

        fitted = fitter.fit([costs[pid] for pid in others], arrange)
        if fitted is None:
            return None
        docs, (length,) = fitted
        return _row(request, question, docs, f"{question.id}-{limit // 1024}k", source, length)

    return [row for question in questions if (row := fit(question)) is not None]


def _others(question: _FilingQuestion, library: _Library, rng: random.Random) -> list[str]:
    """Filler pages, those of the same filing first, without pages that contain the answer."""
    excluded = {*question.gold, *library.leaking(question.answer)}
    same = [pid for pid in library.filings[question.filing] if pid not in excluded]
    other_filings = [pid for filing, pids in library.filings.items() if filing != question.filing for pid in pids]
    other_filings = [pid for pid in other_filings if pid not in excluded]
    rng.shuffle(same)
    rng.shuffle(other_filings)
    return [*same, *other_filings]
