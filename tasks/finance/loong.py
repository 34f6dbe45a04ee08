"""Rows of Loong's English financial questions on several whole reports.

Levels: 1 locates a figure in one report, 2 compares reports, 3 clusters them, 4 follows a figure over years. `set` is
the length range, 1 to 4 (10-50k, 50-100k, 100-200k, over 200k tokens by the benchmark's count). An answer is a text or
a JSON object of lists, graded by a judge; without a judge, by token overlap (`judged_results`). The prompt is ours, not
the benchmark's.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row, content_id
from lceval.tasks.sources import SourceFile, read_hub

LEVELS = (1, 2, 3, 4)
_FIELDS: Mapping[str, type] = {"id": str, "level": int, "set": int, "language": str, "question": str, "docs": str}
# Each report begins with a line that has the company name in these brackets.
_HEADING = re.compile(r"^\u300a(?P<name>[^\u300a\u300b\n]*)\u300b[ \t]*$", re.MULTILINE)


def rows(request: Request) -> RowPlan:
    """The English questions in order of the source; the dataset's `options: {levels: [...]}` selects levels."""
    hub = request.dataset.hub
    assert hub is not None, request.task
    source = read_hub(request.task, hub, "financial", _FIELDS)
    levels = tuple(request.dataset.options.get("levels", LEVELS))
    if unknown := [level for level in levels if level not in LEVELS]:
        raise UserError(f"{request.task}: invalid levels={unknown}: expected some of {', '.join(map(str, LEVELS))}.")

    def build() -> list[Row]:
        return [
            _row(request, source, record)
            for record in source.records
            if record["language"] == "en" and record["level"] in levels
        ]

    return RowPlan({"source": source.identity, "levels": list(levels)}, build)


def _row(request: Request, source: SourceFile, record: Mapping[str, Any]) -> Row:
    context = content_id(record["docs"])
    docs = reports(record["docs"], f"loong-{context}")
    answer = compact(record.get("answer"))
    if not docs or not answer:
        missing = "answer" if docs else "docs"
        raise UserError(f"{source.name} id={record['id']!r}: no {missing}: download the file again.")
    return request.row(
        id=record["id"],
        question=record["question"],
        answers=[answer],
        docs=docs,
        gold_pids=[],
        cluster=f"loong-{context}",
        source=source.identity,
        level=record["level"],
        set=record["set"],
    )


def reports(text: str, name: str) -> list[Document]:
    """Split a record into reports at their headings; one report without headings."""
    headings = [*_HEADING.finditer(text)]
    starts = [(match.start(), match["name"].strip(), match.end()) for match in headings]
    if not starts or text[: starts[0][0]].strip():
        starts.insert(0, (0, "", 0))
    ends = [start for start, _, _ in starts[1:]] + [len(text)]
    documents: list[Document] = []
    for (_, title, body_start), end in zip(starts, ends, strict=True):
        if body_text := text[body_start:end].strip():
            pid = f"{name}-{len(documents)}"
            documents.append(Document(pid=pid, title=title, text=f"{title}\n{body_text}".strip()))
    return documents


def compact(answer: object) -> str:
    """Gold answer on one line: text unchanged, JSON in compact form; "" without an answer."""
    if isinstance(answer, str):
        try:
            parsed = json.loads(answer)
        except ValueError:
            return answer.strip()
        answer = parsed if isinstance(parsed, dict | list) else answer.strip()
    if answer is None or answer in ("", {}, []):
        return ""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, separators=(", ", ": "))
