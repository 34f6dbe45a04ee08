"""Plain text for context extension: sequences of one length, with a language modelling loss on every token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from lceval.core.errors import UserError
from lceval.core.io import read_objects


class Texts(BaseModel, extra="forbid", frozen=True):
    """Documents, split into sequences.

    Attributes:
        files: `.txt` with one document each, or `.jsonl` with one document per line.
        field: field of a line with the text.
        group: field that joins the lines with the same value into one document, in order.
        tokens: tokens per sequence; the remainder at the end of a document is dropped.
        seed: seed of the order of sequences.
    """

    files: list[Path] = Field(min_length=1)
    field: str = "text"
    group: str | None = None
    tokens: int = Field(gt=1)
    seed: int = 0


def documents(spec: Texts) -> list[str]:
    """All documents, in the order of the files.

    Raises:
        UserError: an unreadable file, or a line without the field.
    """
    texts: list[str] = []
    for file in spec.files:
        try:
            texts += _lines(file, spec) if file.suffix == ".jsonl" else [file.read_text(encoding="utf-8")]
        except OSError as error:
            raise UserError(f"texts.files: cannot read {file} ({error.strerror})") from None
    return texts


def _lines(file: Path, spec: Texts) -> list[str]:
    parts_of: dict[str, list[str]] = {}
    for where, row in read_objects(file):
        if missing := [key for key in (spec.field, spec.group) if key is not None and key not in row]:
            raise UserError(f"texts.files: {where} has no field {missing[0]!r}")
        parts_of.setdefault(str(row[spec.group]) if spec.group else where, []).append(row[spec.field])
    return ["\n\n".join(parts) for parts in parts_of.values()]


def sequences(spec: Texts, encode: Callable[[str], Sequence[int]]) -> list[tuple[int, ...]]:
    """Sequences of `tokens` tokens, shuffled.

    Raises:
        UserError: all documents are shorter than `tokens`.
    """
    sequences: list[tuple[int, ...]] = []
    for text in documents(spec):
        ids = encode(text)
        sequences += [tuple(ids[at : at + spec.tokens]) for at in range(0, len(ids) - spec.tokens + 1, spec.tokens)]
    if not sequences:
        raise UserError(f"texts: no document has {spec.tokens} tokens: reduce texts.tokens, or set texts.group")
    random.Random(spec.seed).shuffle(sequences)
    return sequences


def dataset(sequences: Sequence[Sequence[int]]) -> Any:
    """The sequences as a dataset for TRL's trainer."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"input_ids": list(ids), "position_ids": [*range(len(ids))], "labels": list(ids)} for ids in sequences]
    )
