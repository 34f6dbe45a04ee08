"""What a model is to learn to write: a row's right reply in every form, as lceval.tasks.parsing reads it.

The replies name exactly the gold documents that the row shows (`[DOC -1]` where it shows none) and give its first
answer. Quotes are a document's own words. The four steps of `rj` are templated from the row: they say which documents
bear on the question and what stands in them, and no more than that.
"""

import re
from collections.abc import Callable, Sequence

from lceval.errors import UserError
from lceval.tasks.parsing import document_ids, normalize
from lceval.tasks.prompts import ANSWER_PREFIX, FINAL_PREFIX
from lceval.tasks.rows import Row
from lceval.tasks.scoring import em, gold_places

QUOTE_TOKENS = 30
SHORT_FORMS = ("ao", "pair", "short", "number", "label", "target")
CITED_FORMS = ("id", "docid", "idc", "idq", "rj")
OUTPUT_FORMATS = (*SHORT_FORMS, "list", *CITED_FORMS)

_CHARACTERS_PER_TOKEN = 3  # fewer than any tokenizer has on English text
_SEGMENT = re.compile(r"[^“”«»\n]+")  # what can stand between quotation marks
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
    """Tokens of English text in any tokenizer, or more: one for three characters."""
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def target(row: Row, output_format: str, count: Callable[[str], int] = estimated_tokens) -> str:
    """The reply to be learned.

    Args:
        row: The question, with the documents as the prompt shows them.
        form: The form of the reply (a template of `tasks/modes/`), of FORMS.
        count: Tokens of a text, for the length of quotes.

    Raises:
        UserError: a form that has no reply to be learned.
    """
    if output_format in SHORT_FORMS:
        return f"{ANSWER_PREFIX} {_answer(row)}"
    if output_format == "list":
        return f"{ANSWER_PREFIX} {', '.join(' '.join(answer.split()) for answer in row['answers'])}"
    if output_format not in CITED_FORMS:
        raise UserError(
            f"no reply can be made for the form {output_format!r}: training rows have {', '.join(OUTPUT_FORMATS)}."
        )
    places = sorted(gold_places(row))
    if output_format in ("id", "docid"):
        body = f"Relevant documents: {_tags(places)}"
    elif output_format == "idc":
        body = "\n".join(f"[DOC {place}] {' '.join(row['docs'][place]['text'].split())}" for place in places)
    elif output_format == "idq":
        quoted = [(place, _quote(row, place, count)) for place in places]
        body = "\n".join(f'[DOC {place}] "{words}"' for place, words in quoted)
    else:
        body = _steps(row, places, count)
    return (body or _tags([])) + ("" if output_format == "docid" else f"\n{FINAL_PREFIX} {_answer(row)}")


def _answer(row: Row) -> str:
    """The first answer, on one line; another where the first is nothing after normalisation."""
    answers = [" ".join(answer.split()) for answer in row["answers"]]
    return next((answer for answer in answers if em(answer, row["answers"])), answers[0])


def _tags(places: Sequence[int]) -> str:
    return ", ".join(f"[DOC {place}]" for place in places) or "[DOC -1]"


def _steps(row: Row, places: Sequence[int], count: Callable[[str], int]) -> str:
    words = normalize(row["question"]).split()
    kind = next((kind for start, kind in _KINDS.items() if words[: len(start.split())] == start.split()), "a fact")
    question = " ".join(row["question"].split())
    asked = f'{kind}: "{question}"' if document_ids(question) is None else kind
    bear = "bears" if len(places) == 1 else "bear"
    quoted = [(place, _quote(row, place, count)) for place in places]
    said = [f'[DOC {place}] says: "{words}"{"" if words[-1:] in ".!?" else "."}' for place, words in quoted]
    review = f"{_tags(places)} {bear} on it." if places else "none of the documents bears on it ([DOC -1])."
    shown = len(row["docs"])
    return "\n".join(
        [
            f"Question analysis: it asks for {asked}",
            f"Document review: of the {shown} documents {review}" if shown else f"Document review: {review}",
            f"Reasoning: {' '.join([*said, f'So it is {_answer(row)}.'])}",
        ]
    )


def _quote(row: Row, place: int, count: Callable[[str], int]) -> str:
    """At most 30 tokens of the document: the sentence with an answer, or else with most words of the question.

    A part of the sentence where it is longer. No quotation marks but single ones, which is the same after
    normalisation, and no words that would be read as naming another document.
    """
    text = row["docs"][place]["text"]
    segments = [words for part in _SEGMENT.findall(text) if normalize(" ".join(words := part.split()))]
    answers = [said for answer in row["answers"] if (said := normalize(answer))]
    asked = {word for word in normalize(row["question"]).split() if len(word) > 3}

    def fits(words: Sequence[str]) -> bool:
        joined = _plain(words)
        return count(joined) <= QUOTE_TOKENS and document_ids(joined) is None

    for answer in answers:
        for words in segments:
            found = _span(words, answer)
            if found is not None and fits(words[found[0] : found[1]]):
                return _plain(_widened(words, *found, fits))
    starts = [
        (len(asked.intersection(normalize(_plain(words[at : _sentence(words, at)])).split())), words, at)
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
    """Where the sentence ends in which the word `at` stands."""
    return next((n + 1 for n in range(at, len(words)) if _SENTENCE_END.search(words[n])), len(words))


def _span(words: Sequence[str], answer: str) -> tuple[int, int] | None:
    """The first shortest run of words that contains the normalised answer."""
    if answer not in normalize(" ".join(words)):
        return None
    end = next(end for end in range(1, len(words) + 1) if answer in normalize(" ".join(words[:end])))
    start = next(start for start in range(end - 1, -1, -1) if answer in normalize(" ".join(words[start:end])))
    return start, end


def _widened(words: Sequence[str], start: int, end: int, fits: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """The run of words, widened on both sides in turn up to the ends of its sentence, as far as it fits."""
    left = right = True
    while left or right:
        if right:
            right = not _SENTENCE_END.search(words[end - 1]) and end < len(words) and fits(words[start : end + 1])
            end += right
        if left:
            left = start > 0 and not _SENTENCE_END.search(words[start - 1]) and fits(words[start - 1 : end])
            start -= left
    return words[start:end]
