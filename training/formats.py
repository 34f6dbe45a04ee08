"""Target replies: the correct reply to a row in every output format, as lceval.tasks.parsing parses it.

A reply cites exactly the gold documents in the row's context (`[DOC -1]` without any) and gives the row's first answer.
Quotes are verbatim. The four steps of `rj` are a template that states which documents are relevant and quotes them; it
contains no further reasoning.
"""

import re
from collections.abc import Callable, Sequence

from lceval.core.errors import UserError
from lceval.tasks.parsing import document_ids, normalize
from lceval.tasks.prompts import ANSWER_PREFIX, FINAL_PREFIX
from lceval.tasks.rows import Row
from lceval.tasks.scoring import em, gold_places

QUOTE_TOKENS = 30
SHORT_FORMATS = ("ao", "pair", "short", "number", "label", "target")
CITED_FORMATS = ("id", "docid", "idc", "idq", "rj")
OUTPUT_FORMATS = (*SHORT_FORMATS, "list", *CITED_FORMATS)

_CHARACTERS_PER_TOKEN = 3  # a lower bound for English text
_SEGMENT = re.compile(r"[^“”«»\n]+")  # text that can be put in quotation marks
_SENTENCE_END = re.compile(r"[.!?;]['\")\]]*$")
_KINDS = {
    "who": "a person or a group",
    "whose": "a person or a group",
    "whom": "a person or a group",
    "when": "a time",
    "where": "a place",
    "why": "a reason",
    "how many": "a number",
    "how much": "an amount",
    "how long": "a length or a time",
    "how old": "an age",
    "what year": "a year",
    "which year": "a year",
}


def estimated_tokens(text: str) -> int:
    """An upper bound on the tokens of English text: one per three characters."""
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def target(row: Row, output_format: str, count: Callable[[str], int] = estimated_tokens) -> str:
    """The target reply.

    Args:
        row: the question, with the documents of the prompt.
        output_format: one of OUTPUT_FORMATS (templates in `tasks/modes/`).
        count: number of tokens of a text, for the length of quotes.

    Raises:
        UserError: an output format without a target reply.
    """
    if output_format in SHORT_FORMATS:
        return f"{ANSWER_PREFIX} {_answer(row)}"
    if output_format == "list":
        return f"{ANSWER_PREFIX} {', '.join(' '.join(answer.split()) for answer in row['answers'])}"
    if output_format not in CITED_FORMATS:
        raise UserError(
            f"no target reply for the output format {output_format!r}: expected one of {', '.join(OUTPUT_FORMATS)}."
        )
    gold = sorted(gold_places(row))
    if output_format in ("id", "docid"):
        body = f"Relevant documents: {_tags(gold)}"
    elif output_format == "idc":
        body = "\n".join(f"[DOC {place}] {' '.join(row['docs'][place]['text'].split())}" for place in gold)
    elif output_format == "idq":
        quotes = [(place, _quote(row, place, count)) for place in gold]
        body = "\n".join(f'[DOC {place}] "{words}"' for place, words in quotes)
    else:
        body = _steps(row, gold, count)
    return (body or _tags([])) + ("" if output_format == "docid" else f"\n{FINAL_PREFIX} {_answer(row)}")


def _answer(row: Row) -> str:
    """The first answer that is not empty after normalisation, on one line."""
    answers = [" ".join(answer.split()) for answer in row["answers"]]
    return next((answer for answer in answers if em(answer, row["answers"])), answers[0])


def _tags(places: Sequence[int]) -> str:
    return ", ".join(f"[DOC {place}]" for place in places) or "[DOC -1]"


def _steps(row: Row, gold: Sequence[int], count: Callable[[str], int]) -> str:
    words = normalize(row["question"]).split()
    kind = next((kind for start, kind in _KINDS.items() if words[: len(start.split())] == start.split()), "a fact")
    question = " ".join(row["question"].split())
    subject = f'{kind}: "{question}"' if document_ids(question) is None else kind
    bear = "bears" if len(gold) == 1 else "bear"
    quotes = [(place, _quote(row, place, count)) for place in gold]
    evidence = [f'[DOC {place}] says: "{words}"{"" if words[-1:] in ".!?" else "."}' for place, words in quotes]
    review = f"{_tags(gold)} {bear} on it." if gold else "none of the documents bears on it ([DOC -1])."
    documents = len(row["docs"])
    return "\n".join(
        [
            f"Question analysis: it asks for {subject}",
            f"Document review: of the {documents} documents {review}" if documents else f"Document review: {review}",
            f"Reasoning: {' '.join([*evidence, f'So it is {_answer(row)}.'])}",
        ]
    )


def _quote(row: Row, place: int, count: Callable[[str], int]) -> str:
    """At most 30 tokens of the document: the sentence with an answer, or else the one with most words of the question.

    A longer sentence is truncated. Double quotation marks become single ones, which normalise to the same text, and
    words that would be parsed as a document id are excluded.
    """
    text = row["docs"][place]["text"]
    segments = [words for part in _SEGMENT.findall(text) if normalize(" ".join(words := part.split()))]
    answers = [normalized for answer in row["answers"] if (normalized := normalize(answer))]
    keywords = {word for word in normalize(row["question"]).split() if len(word) > 3}

    def fits(words: Sequence[str]) -> bool:
        joined = _plain(words)
        return count(joined) <= QUOTE_TOKENS and document_ids(joined) is None

    for answer in answers:
        for words in segments:
            span = _span(words, answer)
            if span is not None and fits(words[span[0] : span[1]]):
                return _plain(_widened(words, *span, fits))
    starts = [
        (len(keywords.intersection(normalize(_plain(words[at : _sentence(words, at)])).split())), words, at)
        for words in segments
        for at in range(len(words))
        if at == 0 or _SENTENCE_END.search(words[at - 1])
    ]
    for _, words, at in sorted(starts, key=lambda start: -start[0]):
        for first in range(at, len(words)):
            if fits(words[first : first + 1]) and normalize(words[first]):
                return _plain(_widened(words, first, first + 1, fits))
    return _plain(text.split()[:1])


def _plain(words: Sequence[str]) -> str:
    return " ".join(words).replace('"', "'")


def _sentence(words: Sequence[str], at: int) -> int:
    """End of the sentence that contains the word `at`."""
    return next((n + 1 for n in range(at, len(words)) if _SENTENCE_END.search(words[n])), len(words))


def _span(words: Sequence[str], answer: str) -> tuple[int, int] | None:
    """The first shortest span of words that contains the normalised answer."""
    if answer not in normalize(" ".join(words)):
        return None
    end = next(end for end in range(1, len(words) + 1) if answer in normalize(" ".join(words[:end])))
    start = next(start for start in range(end - 1, -1, -1) if answer in normalize(" ".join(words[start:end])))
    return start, end


def _widened(words: Sequence[str], start: int, end: int, fits: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """The span of words, widened alternately on both sides up to its sentence, while it fits."""
    left = right = True
    while left or right:
        if right:
            right = not _SENTENCE_END.search(words[end - 1]) and end < len(words) and fits(words[start : end + 1])
            end += right
        if left:
            left = start > 0 and not _SENTENCE_END.search(words[start - 1]) and fits(words[start - 1 : end])
            start -= left
    return words[start:end]
