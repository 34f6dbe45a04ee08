"""Rows of Loong's English financial questions: several whole reports, and an answer that needs one or all of them.

Four levels: 1 finds a figure in one report, 2 compares reports, 3 sorts them into groups, 4 follows a figure over
years. `set` is the band of length, 1 to 4 (10-50k, 50-100k, 100-200k, over 200k tokens as the benchmark counts them).
An answer is a text or a JSON object of lists; a judge grades it, and without one its words are compared
(`judged_results`). The prompt is our own, not the record's.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, read_hub

LEVELS = (1, 2, 3, 4)
_FIELDS: Mapping[str, type] = {"id": str, "level": int, "set": int, "language": str, "question": str, "docs": str}
# Each report begins with its company's name on a line of its own, in these brackets.
_HEADING = re.compile(r"^\u300a(?P<name>[^\u300a\u300b\n]*)\u300b[ \t]*$", re.MULTILINE)


def rows(request: Request) -> Plan:
    """The English questions in the order of the source; `options: {levels: [...]}` of the dataset keeps some levels."""
    hub = request.dataset.hub
    assert hub is not None, request.task
    source = read_hub(request.task, hub, "financial", _FIELDS)
    levels = tuple(request.dataset.options.get("levels", LEVELS))
    if unknown := [level for level in levels if level not in LEVELS]:
        raise UserError(f"{request.task} has levels={unknown}: expected some of {', '.join(map(str, LEVELS))}.")

    def build() -> list[Row]:
        return [
            _row(request, source, record)
            for record in source.records
            if record["language"] == "en" and record["level"] in levels
        ]

    return Plan({"source": source.identity, "levels": list(levels)}, build)


def _row(request: Request, source: SourceFile, record: Mapping[str, Any]) -> Row:
    context = hashlib.sha256(record["docs"].encode()).hexdigest()[:12]
    docs = reports(record["docs"], f"loong-{context}")
    answer = compact(record.get("answer"))
    if not docs or not answer:
        raise UserError(f"{source.name} id={record['id']!r} has no {'answer' if docs else 'docs'}: get it anew.")
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
    """The reports of a record, cut at their headings; the whole text is one where there is no heading."""
    headings = [*_HEADING.finditer(text)]
    starts = [(match.start(), match["name"].strip(), match.end()) for match in headings]
    if not starts or text[: starts[0][0]].strip():
        starts.insert(0, (0, "", 0))
    ends = [start for start, _, _ in starts[1:]] + [len(text)]
    made: list[Document] = []
    for (_, title, body), end in zip(starts, ends, strict=True):
        if words := text[body:end].strip():
            made.append(Document(pid=f"{name}-{len(made)}", title=title, text=f"{title}\n{words}".strip()))
    return made


def compact(answer: object) -> str:
    """The gold answer as one line: a text as it is, JSON without spaces to spare; "" if there is none."""
    if isinstance(answer, str):
        try:
            parsed = json.loads(answer)
        except ValueError:
            return answer.strip()
        answer = parsed if isinstance(parsed, dict | list) else answer.strip()
    if answer is None or answer in ("", {}, []):
        return ""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, separators=(", ", ": "))
