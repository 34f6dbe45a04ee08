"""Rows of `lc_kvlookup_ao_*`: the value of one key in a list of UUID pairs (Liu et al. 2023, section 3).

No pair says more than another before the question is read, so this is what a cache loses by dropping
tokens at all. The lists come from a local folder (`kv_retrieval/` of LCEVAL_DATA); a row has the first
pairs of its list in their order, as many as fit, and always the asked one. That one stands at the same
relative depth as in the whole list: merely kept in line, every asked pair of the part that was cut off
would be the last of its context. The paper prints one JSON object; we print a pair a line.

A context grows by whole pairs (about 70 tokens of SmolLM2). That keeps the 2% with the chat template
applied; without it a 4k prompt may fall short of them by the template's tokens.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.compose import Contract
from lceval.tasks.prompts import key_question, pair_line
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import read_sources

RECORDS = "kv_retrieval/kv_140_keys.jsonl"
SCHEMA: dict[str, type] = {"key": str, "value": str}  # and the pairs, which `checked` checks


@dataclass(frozen=True)
class Lookup:
    """A list of pairs and the place in it of the one that is asked for."""

    id: str
    pairs: tuple[tuple[str, str], ...]
    asked: int

    def first(self, count: int) -> list[tuple[str, str]]:
        """The asked pair at its relative depth among the first `count - 1` others."""
        others = [*self.pairs[: self.asked], *self.pairs[self.asked + 1 :]]
        place = round(self.asked * (count - 1) / max(len(others), 1))
        return [*others[:place], self.pairs[self.asked], *others[place : count - 1]]


def rows(request: Request) -> Plan:
    """One row a list, each on a context of its own."""
    (records,) = read_sources(request.task, {RECORDS: SCHEMA})
    lookups = [checked(number, record) for number, record in enumerate(records.records)]
    return Plan({"source": records.identity}, lambda: [_row(request, lookup, records.identity) for lookup in lookups])


def checked(number: int, record: dict[str, Any]) -> Lookup:
    """A record of the source, checked.

    Raises:
        UserError: It has no list of pairs, a key twice, or not the pair that it asks for.
    """
    where = f"{RECORDS} record {number + 1}"
    pairs = record.get("ordered_kv_records")
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise UserError(f"{where} has no ordered_kv_records of the form [[key, value], ...], all of them strings.")
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise UserError(f"{where} has a key twice in ordered_kv_records: each must be unique.")
    asked = [record["key"], record["value"]]
    if asked not in pairs:
        raise UserError(f"{where} asks for the pair {asked} that its ordered_kv_records do not have.")
    return Lookup(f"kvlookup-{number:03d}", tuple((key, value) for key, value in pairs), pairs.index(asked))


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)


def _row(request: Request, lookup: Lookup, source: str) -> Row:
    """The row with the most pairs that fit."""
    _, limit = request.fitted
    key, value = lookup.pairs[lookup.asked]
    question = key_question(key)

    def docs(count: int) -> list[Document]:
        return [Document(pid=pid, title="", text=pair_line(pid, of)) for pid, of in lookup.first(count)]

    count = bisect_right(
        range(1, len(lookup.pairs) + 1), limit, key=lambda count: request.totals(docs(count), [question])[0]
    )
    length = request.totals(docs(count), [question])[0] if count else 0
    if not Contract.promised(limit).holds([length]):
        if count == len(lookup.pairs):
            raise UserError(
                f"{request.task} needs lists of about {limit} tokens and the {count} pairs of {lookup.id} ({RECORDS}) "
                f"come to {length} with this tokenizer: choose a shorter task or longer lists."
            )
        raise UserError(f"{request.task} cannot come within 2% of {limit} tokens of this tokenizer: use a longer task.")
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
