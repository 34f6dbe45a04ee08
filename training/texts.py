"""Plain text to learn, as context extension does: sequences of one length, every token predicted from those before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lceval.errors import UserError


class Texts(BaseModel):
    """Documents, cut into sequences.

    Attributes:
        files: `.txt`, each a document, or `.jsonl` with a document a line.
        field: which field of a line is the text; lines that agree in `group` are one document, in order.
        tokens: of a sequence; what is left of a document at its end is not learned.
        seed: of the sequences' order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[Path] = Field(min_length=1)
    field: str = "text"
    group: str | None = None
    tokens: int = Field(gt=1)
    seed: int = 0


def documents(spec: Texts) -> list[str]:
    """All documents, in the order of the files.

    Raises:
        UserError: a file that cannot be read, or a line without the field.
    """
    found: list[str] = []
    for file in spec.files:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"texts.files: cannot read {file} ({error.strerror})") from None
        found += _lines(file, text, spec) if file.suffix == ".jsonl" else [text]
    return found


def _lines(file: Path, text: str, spec: Texts) -> list[str]:
    together: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            together.setdefault(str(row[spec.group]) if spec.group else str(number), []).append(row[spec.field])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"texts.files: {file}:{number}: no document in it ({error!r:.60})") from None
    return ["\n\n".join(parts) for parts in together.values()]


def sequences(spec: Texts, encode: Callable[[str], Sequence[int]]) -> list[tuple[int, ...]]:
    """Sequences of `tokens` tokens, shuffled.

    Raises:
        UserError: no document is long enough.
    """
    found: list[tuple[int, ...]] = []
    for text in documents(spec):
        ids = encode(text)
        found += [tuple(ids[at : at + spec.tokens]) for at in range(0, len(ids) - spec.tokens + 1, spec.tokens)]
    if not found:
        raise UserError(f"texts: no document has {spec.tokens} tokens: choose fewer, or set texts.group")
    random.Random(spec.seed).shuffle(found)
    return found


def dataset(found: Sequence[Sequence[int]]) -> Any:
    """What TRL's trainer takes."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"input_ids": list(ids), "position_ids": [*range(len(ids))], "labels": list(ids)} for ids in found]
    )
