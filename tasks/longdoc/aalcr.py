"""Rows of `lc_aalcr_*`: AA-LCR, questions on sets of long documents, graded by a judge.

The documents of a question are in the order of the benchmark; their texts are in one archive of its repository.
"""

import unicodedata
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row, content_id, together
from lceval.tasks.sources import SourceFile, hub_file, read_hub

_FIELDS: dict[str, type] = {
    "document_category": str,
    "document_set_id": str,
    "question": str,
    "answer": str,
    "data_source_filenames": str,
}


def rows(request: Request) -> RowPlan:
    """One row per question; those on the same documents are adjacent."""
    hub = request.dataset.hub
    assert hub is not None
    source = read_hub(request.task, hub, "test", _FIELDS)
    archive, identity = hub_file(request.task, hub, "documents")
    return RowPlan({"source": source.identity, "documents": identity}, lambda: _rows(request, source, archive))


def _rows(request: Request, source: SourceFile, archive: Path) -> list[Row]:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {_name(member): member for member in opened.namelist()}
            return together(
                [_row(request, source, number, record, opened, members) for number, record in enumerate(source.records)]
            )
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is damaged ({error}): download it again.") from None


def _name(member: str) -> str:
    """A member's name in one form: archives made elsewhere have names in another normalization or encoding."""
    with suppress(UnicodeError):
        member = member.encode("cp437").decode()
    return unicodedata.normalize("NFC", member)


def _row(
    request: Request,
    source: SourceFile,
    number: int,
    record: Mapping[str, Any],
    opened: zipfile.ZipFile,
    members: Mapping[str, str],
) -> Row:
    folder = f"lcr/{record['document_category']}/{record['document_set_id']}"
    docs = []
    for name in record["data_source_filenames"].split(";"):
        member = members.get(unicodedata.normalize("NFC", f"{folder}/{name.strip()}"))
        if member is None:
            raise UserError(f"{source.name} record {number + 1}: {folder}/{name.strip()} is not in the archive.")
        docs.append(
            Document(pid=member, title=name.strip(), text=opened.read(member).decode("utf-8", "replace").strip())
        )
    return request.row(
        id=str(record.get("question_id", number)),
        question=record["question"].strip(),
        answers=[record["answer"].strip()],
        docs=docs,
        gold_pids=[],
        cluster=content_id("\n".join(document["text"] for document in docs)),
        source=source.identity,
        category=record["document_category"],
    )
