"""Rows of `lc_kvlookup_ao_*`: the value of one key in a list of UUID pairs (Liu et al. 2023, section 3).

Before the question, all pairs are equally important, so the task measures the loss of evicting tokens at all. The lists
are local files (`kv_retrieval/` of LCEVAL_DATA). A row has the first pairs of its list that fit, in order, and always
the target pair, at its relative depth in the full list: otherwise every target of the truncated part would be the last
pair of its context. The paper prints one JSON object; we print one pair per line.

A context has whole pairs (about 70 tokens of SmolLM2). The length is within 2% with the chat template applied; without
the template a 4k prompt may be below that by the template's tokens.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.compose import Contract
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import read_sources

RECORDS = "kv_retrieval/kv_140_keys.jsonl"
SCHEMA: dict[str, type] = {"key": str, "value": str}  # and the pairs, validated by `checked`


@dataclass(frozen=True)
class Lookup:
    """A list of key-value pairs and the index of the target pair."""

    id: str
    pairs: tuple[tuple[str, str], ...]
    target: int

    def first(self, count: int) -> list[tuple[str, str]]:
        """The target pair at its relative depth among the first `count - 1` other pairs."""
        others = [*self.pairs[: self.target], *self.pairs[self.target + 1 :]]
        place = round(self.target * (count - 1) / max(len(others), 1))
        return [*others[:place], self.pairs[self.target], *others[place : count - 1]]


def rows(request: Request) -> RowPlan:
    """One row per list, each with its own context."""
    (records,) = read_sources(request.task, {RECORDS: SCHEMA})
    lookups = [checked(number, record) for number, record in enumerate(records.records)]
    return RowPlan(
        {"source": records.identity}, lambda: [_row(request, lookup, records.identity) for lookup in lookups]
    )


def checked(number: int, record: dict[str, Any]) -> Lookup:
    """Validate a record.

    Raises:
        UserError: No list of pairs, a duplicate key, or a target pair that is not in the list.
    """
    where = f"{RECORDS} record {number + 1}"
    pairs = record.get("ordered_kv_records")
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise UserError(f"{where}: invalid ordered_kv_records: expected [[key, value], ...], all strings.")
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise UserError(f"{where}: duplicate key in ordered_kv_records: each must be unique.")
    target = [record["key"], record["value"]]
    if target not in pairs:
        raise UserError(f"{where}: the pair {target} is not in its ordered_kv_records.")
    return Lookup(f"kvlookup-{number:03d}", tuple((key, value) for key, value in pairs), pairs.index(target))


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)


def _row(request: Request, lookup: Lookup, source: str) -> Row:
    """Build the row with the maximum number of pairs that fit."""
    _, limit = request.meter_and_limit
    key, value = lookup.pairs[lookup.target]
    question = f'What is the value of the key "{key}"?'

    def docs(count: int) -> list[Document]:
        return [Document(pid=pid, title="", text=f'"{pid}": "{of}"') for pid, of in lookup.first(count)]

    count = bisect_right(
        range(1, len(lookup.pairs) + 1), limit, key=lambda count: request.totals(docs(count), [question])[0]
    )
    length = request.totals(docs(count), [question])[0] if count else 0
    if not Contract.guaranteed(limit).allows([length]):
        if count == len(lookup.pairs):
            raise UserError(
                f"{request.task} requires lists of about {limit} tokens, and the {count} pairs of {lookup.id} "
                f"({RECORDS}) are {length} tokens of this tokenizer: choose a shorter task or longer lists."
            )
        raise UserError(f"{request.task} cannot reach {limit} tokens of this tokenizer within 2%: use a longer task.")
    return request.row(
        id=lookup.id,
        question=question,
        answers=[value],
        docs=docs(count),
        gold_pids=[key],
        cluster=f"{lookup.id}-{limit // 1024}k",
        source=source,
        length_tokens=length,
    )
