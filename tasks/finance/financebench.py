"""Rows of FinanceBench: questions of analysts on whole filings, the pages that hold the evidence known by number.

`financebench` shows every page of the filing in order (context=gold: the evidence pages alone, the benchmark's oracle).
`financebenchmulti` is for a length: the evidence pages at seeded depths among other pages of the same filing, then
pages of other filings. Pages come from `document_pages.jsonl`; only questions whose filing it holds are asked.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.compose import Contract, Fitter, spread
from lceval.tasks.leakage import LeakIndex
from lceval.tasks.parsing import normalize
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, by_key, joint_identity, read_sources

_SCHEMAS: Mapping[str, Mapping[str, type]] = {
    "question": {"id": str, "question": str, "answer": str, "doc_name": str},
    "page": {"doc_name": str, "page_num": int, "text": str},
}
_TELL_NOTHING = frozenset({"yes", "no"})  # as answers: they stand on every page


@dataclass(frozen=True)
class _Asked:
    """A question, and the pages that hold its evidence."""

    id: str
    question: str
    answer: str
    filing: str
    gold: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class _Library:
    """Every page at hand, by its id; filings in the order of the source, their pages in theirs."""

    pages: Mapping[str, Document]
    filings: Mapping[str, Sequence[str]]

    @cached_property
    def _leaks(self) -> LeakIndex:
        return LeakIndex([page["text"] for page in self.pages.values()])

    def giving_away(self, answer: str) -> set[str]:
        """Ids of the pages that hold the answer, normalised; a yes or no gives nothing away."""
        gold = normalize(answer)
        if not gold or gold in _TELL_NOTHING:
            return set()
        pids = [*self.pages]
        return {pids[index] for index in self._leaks.holders([gold])}


def _pid(filing: str, page: int) -> str:
    return f"{filing}-p{page}"


def _read(request: Request) -> tuple[SourceFile, SourceFile]:
    questions, pages = request.dataset.files
    asked, told = read_sources(request.task, {questions: _SCHEMAS["question"], pages: _SCHEMAS["page"]})
    return asked, told


def _library(source: SourceFile) -> _Library:
    pages: dict[str, Document] = {}
    filings: dict[str, list[str]] = {}
    for record in sorted(source.records, key=lambda record: record["page_num"]):
        filing, number, text = record["doc_name"], record["page_num"], record["text"].strip()
        pid, title = _pid(filing, number), f"{filing} page {number}"
        if pid in pages:
            raise UserError(f"{source.name} has {title} twice: each page must be there once.")
        if text:  # a picture alone, or a blank page
            pages[pid] = Document(pid=pid, title=title, text=f"{title}\n{text}")
            filings.setdefault(filing, []).append(pid)
    return _Library(pages, filings)


def _questions(source: SourceFile, library: _Library) -> list[_Asked]:
    """The questions whose evidence is at hand, those on a filing together."""
    made = []
    for record in by_key(source, "id").values():
        pages = record.get("gold_pages")
        if not isinstance(pages, list) or not pages or not all(_is_page(page) for page in pages):
            raise UserError(
                f"{source.name} id={record['id']!r} has gold_pages={pages!r:.80}: expected [[filing, page]]."
            )
        gold = tuple(dict.fromkeys(_pid(filing, number) for filing, number in pages))
        if record["doc_name"] in library.filings and all(pid in library.pages for pid in gold):
            filing, kind = record["doc_name"], record.get("question_type") or ""
            made.append(_Asked(record["id"], record["question"], record["answer"], filing, gold, kind))
    order = [*library.filings]
    return sorted(made, key=lambda asked: order.index(asked.filing))


def _is_page(page: Any) -> bool:
    return isinstance(page, list) and len(page) == 2 and isinstance(page[0], str) and isinstance(page[1], int)


def rows(request: Request) -> Plan:
    """Whole filings, every page a document."""
    asked, told = _read(request)
    identity = joint_identity([asked, told])

    def build() -> list[Row]:
        library = _library(told)
        return [
            _row(request, one, [library.pages[pid] for pid in library.filings[one.filing]], one.filing, identity)
            for one in _questions(asked, library)
        ]

    return Plan({"source": identity}, build)


def _row(
    request: Request, asked: _Asked, docs: Sequence[Document], cluster: str, source: str, length: int | None = None
) -> Row:
    return request.row(
        id=asked.id,
        question=asked.question,
        answers=[asked.answer],
        docs=docs,
        gold_pids=asked.gold,
        cluster=cluster,
        source=source,
        length_tokens=length,
        kind=asked.kind,
    )


def multi_rows(request: Request) -> Plan:
    """Pages of several filings, fitted to the task's length; a question whose evidence does not fit is passed over."""
    asked, told = _read(request)
    identity = joint_identity([asked, told])
    return Plan({"source": identity}, lambda: _fitted(request, asked, told, identity))


def _fitted(request: Request, asked: SourceFile, told: SourceFile, identity: str) -> list[Row]:
    meter, limit = request.fitted
    library = _library(told)
    tokens = meter.pieces([f"[DOC 100]\n{page['text']}\n\n" for page in library.pages.values()])
    costs = dict(zip(library.pages, tokens, strict=True))
    fitters = [Fitter(contract) for contract in (Contract.preferred(limit, meter), Contract.promised(limit))]

    def fit(one: _Asked) -> Row | None:
        rng = random.Random(f"financebench {request.seed} {one.id}")
        others, places = _others(one, library, rng), rng.getrandbits(32)

        def docs(chosen: Sequence[int]) -> list[Document]:
            shown = spread(one.gold, [others[index] for index in chosen], random.Random(places))
            return [library.pages[pid] for pid in shown]

        for fitter in fitters:
            found = fitter.fit(
                [costs[pid] for pid in others], lambda chosen: request.totals(docs(chosen), [one.question])
            )
            if found is not None:
                chosen, (length,) = found
                return _row(request, one, docs(chosen), f"{one.id}-{limit // 1024}k", identity, length)
        return None

    fitted = (fit(one) for one in _questions(asked, library))
    return [row for row in fitted if row is not None]


def _others(asked: _Asked, library: _Library, rng: random.Random) -> list[str]:
    """Pages to fill with, those of the same filing first, without any that gives the answer away."""
    left_out = {*asked.gold, *library.giving_away(asked.answer)}
    same = [pid for pid in library.filings[asked.filing] if pid not in left_out]
    rest = [pid for filing, pids in library.filings.items() if filing != asked.filing for pid in pids]
    rest = [pid for pid in rest if pid not in left_out]
    rng.shuffle(same)
    rng.shuffle(rest)
    return [*same, *rest]
