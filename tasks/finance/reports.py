"""Rows of TAT-QA, ConvFinQA, FinQA and DocFinQA: a figure to look up in or compute from a filing.

A context of TAT-QA, ConvFinQA and FinQA is a page: a table and the text around it. DocFinQA has FinQA's questions on
the whole filing, about 123,000 words. The questions on a page are adjacent and share its documents.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.finance.numbers import as_number
from lceval.tasks.parsing import normalize
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row, together
from lceval.tasks.sources import SourceFile, read_local_or_hub

_OPEN_ENDS = {"inc", "corp", "co", "ltd", "llc", "no", "nos", "mr", "mrs", "ms", "dr", "st", "vs", "approx"}
_OPEN_ENDS |= {"u.s", "u.k", "n.a", "n.v", "s.a", "e.g", "i.e"}
_SHORT = 3  # words, including the full stop, that are not a separate sentence


def _plan(
    request: Request,
    fields: Mapping[str, type],
    rows_of: Callable[[Request, SourceFile, int, Mapping[str, Any]], list[Row]],
) -> RowPlan:
    """Rows of each record of the dataset's source, grouped by context."""
    source = read_local_or_hub(request.task, request.dataset, fields)

    def build() -> list[Row]:
        records = enumerate(source.records, start=1)
        return together(row for number, record in records for row in rows_of(request, source, number, record))

    return RowPlan({"source": source.identity}, build)


def _damaged(source: SourceFile, number: int, reason: str) -> UserError:
    return UserError(f"{source.name} record {number} {reason}: download the file again.")


def _context_id(name: str, *parts: object) -> str:
    return f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def table_text(cells: Sequence[Sequence[str]]) -> str:
    """Render a table as lines of cells between pipes; empty rows are left out."""
    lines = (" | ".join(" ".join(cell.split()) for cell in row) for row in cells if any(cell.strip() for cell in row))
    return "\n".join(f"| {line} |" for line in lines)


def _is_table(cells: object) -> bool:
    rows = isinstance(cells, list) and bool(cells) and all(isinstance(row, list) for row in cells)
    return rows and all(isinstance(cell, str) for row in cells for cell in row)  # type: ignore[attr-defined]


# TAT-QA


def tatqa_rows(request: Request) -> RowPlan:
    """TAT-QA: a table with its paragraphs, about six questions each; the source annotates the evidence."""
    return _plan(request, {}, _tatqa)


def _tatqa(request: Request, source: SourceFile, number: int, record: Mapping[str, Any]) -> list[Row]:
    try:
        uid, cells = record["table"]["uid"], record["table"]["table"]
        paragraphs = {str(part["order"]): part for part in record["paragraphs"]}
        docs = [Document(pid=uid, title="table", text=table_text(cells))]
        docs += [Document(pid=part["uid"], title="paragraph", text=part["text"]) for part in paragraphs.values()]
        questions = [dict(question) for question in record["questions"]]
        built_rows = []
        for question in questions:
            gold = [paragraphs[order]["uid"] for order in question["rel_paragraphs"]]
            spans = _printed(question["answer"])
            if not spans:
                raise _damaged(source, number, f"has no answer to {question['question']!r:.60}")
            built_rows.append(
                request.row(
                    id=question["uid"],
                    question=question["question"],
                    answers=[_with_scale(spans, question["scale"])],
                    docs=docs,
                    gold_pids=[uid, *gold] if "table" in question["answer_from"] else gold,
                    cluster=uid,
                    source=source.identity,
                    spans=spans,
                    scale=question["scale"],
                    answer_type=question["answer_type"],
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(source, number, f"is not a TAT-QA context ({type(error).__name__}: {error})") from error
    return built_rows


def _printed(answer: object) -> list[str]:
    """Spans of the gold answer as printed in the source; a few lists have empty spans, which are dropped."""
    parts = answer if isinstance(answer, list) else [answer]
    return [str(part) for part in parts if str(part).strip()]


def _with_scale(spans: Sequence[str], scale: str) -> str:
    """The gold answer in the required output format."""
    ending = "%" if scale == "percent" else f" {scale}" if scale else ""
    return "; ".join(spans) + ("" if spans[-1].endswith("%") else ending)


# ConvFinQA


def convfinqa_rows(request: Request) -> RowPlan:
    """ConvFinQA: the last question of a conversation on a page, with the previous questions."""
    fields: dict[str, type] = {"id": str, "questions": list, "text": str, "table": str}
    return _plan(request, {**fields, "golden_text": str, "golden_table": str}, _convfinqa)


def _convfinqa(request: Request, source: SourceFile, number: int, record: Mapping[str, Any]) -> list[Row]:
    answer = _plain(source, number, record, "answer")
    page = _context_id("convfinqa", record["table"], record["text"])
    text_sentences = sentences(record["text"])
    docs = [Document(pid=f"{page}-table", title="table", text=record["table"].strip())]
    docs += [Document(pid=f"{page}-s{n:02d}", title="text", text=text) for n, text in enumerate(text_sentences)]
    evidence = _evidence(text_sentences, record["golden_text"])
    gold = [docs[1 + place]["pid"] for place in evidence]
    if record["golden_table"].strip():
        gold.insert(0, docs[0]["pid"])
    row = request.row(
        id=record["id"],
        question=_conversation(record["questions"]),
        answers=[answer],
        docs=docs,
        # a few conversations have no evidence annotation: all documents are gold
        gold_pids=gold or [document["pid"] for document in docs],
        cluster=page,
        source=source.identity,
    )
    return [row]


def _plain(source: SourceFile, number: int, record: Mapping[str, Any], field: str) -> str:
    """Gold answer as text; sources have numbers or text."""
    answer = record.get(field)
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not isfinite(answer):
        raise UserError(f"{source.name} record {number}: invalid {field}={answer!r:.40}: expected a number or text.")
    return str(int(answer)) if answer == int(answer) else repr(float(answer))


def _conversation(questions: Sequence[str]) -> str:
    cleaned = [" ".join(question.split()) for question in questions]
    if len(cleaned) == 1:
        return cleaned[0]
    before = "\n".join(f"{number}. {question}" for number, question in enumerate(cleaned[:-1], start=1))
    return f"{cleaned[-1]}\nThe questions asked before this one, on which it may build:\n{before}"


def sentences(text: str) -> list[str]:
    """Split a tokenised text into sentences, each ending with " . "; not after abbreviations or three words."""
    split: list[list[str]] = [[]]
    for word in text.split():
        before = split[-1][-2] if split[-1][-1:] == ["."] and len(split[-1]) > _SHORT else ""
        if before and before not in _OPEN_ENDS and not (len(before) == 1 and before.isalpha()):
            split.append([])
        split[-1].append(word)
    return [" ".join(words) for words in split if words]


def _evidence(text_sentences: Sequence[str], golden: str) -> list[int]:
    """Indices of the sentences of the golden text: 90% of the words of one are in the other.

    The golden text may differ in spacing and sentence boundaries. Without a match, all sentences are returned, so that
    evidence is never lost.
    """
    parts = [set(normalize(part).split()) for part in sentences(golden)]
    if not (words := set().union(*parts)):
        return []
    sentence_words = [set(normalize(text).split()) for text in text_sentences]
    matches = [
        n
        for n, sentence in enumerate(sentence_words)
        if _within(sentence, words) or any(_within(part, sentence) for part in parts if len(part) > _SHORT)
    ]
    return matches or [*range(len(text_sentences))]


def _within(words: set[str], others: set[str]) -> bool:
    return bool(words) and len(words & others) >= 0.9 * len(words)


# FinQA and DocFinQA


def finqa_rows(request: Request) -> RowPlan:
    """FinQA: the text before the table, the table, the text after it."""
    return _plan(request, {"id": str, "question": str, "answers": str}, _finqa)


def _finqa(request: Request, source: SourceFile, number: int, record: Mapping[str, Any]) -> list[Row]:
    """No row if the answer is empty, as a few are in FinQA."""
    if not _is_table(record.get("table")):
        raise _damaged(source, number, "has no table (a list of rows of strings)")
    parts = {}
    for side in ("pre_text", "post_text"):
        if not isinstance(record.get(side), list) or not all(isinstance(part, str) for part in record[side]):
            raise _damaged(source, number, f"has no {side} (a list of strings)")
        parts[side] = " ".join(part.strip() for part in record[side] if part.strip(" ."))
    if not answerable(record["answers"]):
        return []
    page = _context_id("finqa", record["table"], parts)
    texts = {"before": parts["pre_text"], "table": table_text(record["table"]), "after": parts["post_text"]}
    row = request.row(
        id=record["id"],
        question=record["question"],
        answers=[record["answers"].strip()],
        docs=[Document(pid=f"{page}-{place}", title=place, text=text) for place, text in texts.items() if text],
        gold_pids=[],
        cluster=page,
        source=source.identity,
    )
    return [row]


def answerable(answer: str) -> bool:
    """Whether a gold answer is a number, yes or no, so that a reply can be compared with it."""
    return as_number(answer) is not None or normalize(answer) in ("yes", "no")


def docfinqa_rows(request: Request) -> RowPlan:
    """DocFinQA: FinQA's questions on whole filings."""
    return _plan(request, {"Context": str, "Question": str}, _docfinqa)


def _docfinqa(request: Request, source: SourceFile, number: int, record: Mapping[str, Any]) -> list[Row]:
    answer = _plain(source, number, record, "Answer")
    if not answerable(answer):
        return []
    filing = _context_id("docfinqa", record["Context"])
    row = request.row(
        id=f"docfinqa-{number:04d}",
        question=record["Question"].strip(),
        answers=[answer],
        docs=[Document(pid=filing, title="filing", text=record["Context"].strip())],
        gold_pids=[],
        cluster=filing,
        source=source.identity,
    )
    return [row]
