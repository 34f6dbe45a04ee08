"""Rows of `lc_mrcr_*`: OpenAI-MRCR, multi-round coreference in a conversation (after Vodrahalli et al. 2024,
arXiv 2409.12640).

A row is a conversation whose last message asks for one of several replies to the same request, after a random prefix.
A length of Nk has the conversations of more than N * 512 and at most N * 1024 tokens, reply included.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks import catalogue
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Row
from lceval.tasks.scoring import with_telemetry
from lceval.tasks.sources import SourceFile, read_hub

_FIELDS: dict[str, type] = {"prompt": str, "answer": str, "random_string_to_prepend": str, "n_chars": int}
# No tokenizer has more characters per token than this, or fewer, over a conversation in English.
_MOST_CHARACTERS, _FEWEST_CHARACTERS = 10, 1


def rows(request: Request) -> RowPlan:
    """The conversations with the mode's number of needles that have the length."""
    assert request.dataset.hub is not None
    source = read_hub(request.task, request.dataset.hub, catalogue.find(request.task).mode, _FIELDS)
    return RowPlan({"source": source.identity}, lambda: _rows(request, source))


def _rows(request: Request, source: SourceFile) -> list[Row]:
    meter, limit = request.meter_and_limit
    built = []
    for number, record in enumerate(source.records):
        if not _FEWEST_CHARACTERS * limit // 2 <= record["n_chars"] <= _MOST_CHARACTERS * limit:
            continue
        messages = _messages(source, number, record["prompt"])
        (tokens,) = meter.prompts([messages])
        tokens += meter.pieces([record["answer"]])[0]
        if limit // 2 < tokens <= limit:
            built.append(_row(request, source, number, record, messages, tokens))
    return built


def _messages(source: SourceFile, number: int, prompt: str) -> list[dict[str, str]]:
    try:
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in json.loads(prompt)]
    except (ValueError, TypeError, KeyError):
        messages = []
    if len(messages) < 2 or messages[-1]["role"] != "user":
        raise UserError(
            f"{source.name} record {number + 1}: prompt is not a JSON list of messages that ends with a user's"
        )
    return messages


def _row(
    request: Request,
    source: SourceFile,
    number: int,
    record: Mapping[str, Any],
    messages: list[dict[str, str]],
    tokens: int,
) -> Row:
    mode = catalogue.find(request.task).mode
    return request.row(
        id=f"{mode}-{number}",
        question=messages[-1]["content"],
        answers=[record["answer"]],
        docs=[],
        gold_pids=[],
        cluster=f"{mode}-{number}",
        source=source.identity,
        length_tokens=tokens,
        context="\n\n".join(message["content"] for message in messages[:-1]),
        messages=messages,
        prefix=record["random_string_to_prepend"],
    )


def match_ratio(output: str, answer: str, prefix: str) -> float:
    """`SequenceMatcher.ratio` of output and answer behind their prefix; 0 for an output that does not begin with it."""
    if not output.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, output.removeprefix(prefix), answer.removeprefix(prefix)).ratio()


def results(doc: Mapping[str, Any], outputs: Sequence[Any]) -> dict[str, Any]:
    """`process_results`."""
    output = str(outputs[0])
    ratio = match_ratio(output, doc["answers"][0], doc["prefix"])
    return with_telemetry({"match_ratio": ratio}, outputs[0], parsed=output.startswith(doc["prefix"]))
