"""What a model's output says: the answer, the documents it names, the words it quotes.

Written for real outputs: thinking blocks, bold marks, several answers, missing lines, ids in all the usual spellings.
"""

import re
import string
from typing import NamedTuple

NORMALIZER_VERSION = 1
"""Raised with any change to `normalize`: scores under different versions are not comparable."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)

_CLOSED_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
# A chat template may open the block in the prompt, and a cut-off answer may never close it.
_DANGLING_CLOSE = re.compile(r"\A.*</think>", re.DOTALL | re.IGNORECASE)
_DANGLING_OPEN = re.compile(r"<think>.*\Z", re.DOTALL | re.IGNORECASE)
_MARKER = re.compile(r"(?<![A-Za-z0-9])(?:the answer is|answer)[ \t]*[*_]*[ \t]*:", re.IGNORECASE)
_WRAPPING = " \t\r*_`"

_NUMBERS = r"-?\d+(?:\s*(?:,|;|and|&)\s*(?:DOC(?:UMENT)?S?[\s#:.]*)?-?\d+)*"
_WORD = r"DOC(?:UMENT)?S?[\s#:._]*"
# [DOC 3], [DOC 3, 5], [Document 3], DOC 3, Documents 3 and 5, doc #3
_NAMED = re.compile(rf"\[\s*{_WORD}({_NUMBERS})\s*\]|\b{_WORD}({_NUMBERS})", re.IGNORECASE)
# Without brackets only where a line begins: a document's own words may speak of "document 3".
_TAG = re.compile(rf"\[\s*{_WORD}({_NUMBERS})\s*\]|^[\s*_-]*{_WORD}({_NUMBERS})\b", re.IGNORECASE | re.MULTILINE)
_QUOTED = re.compile(r"[\"“”«»]([^\"“”«»\n]+)[\"“”«»]")


class Extraction(NamedTuple):
    """The answer found in an output, and whether the output had the required form."""

    answer: str
    parsed: bool


class Passage(NamedTuple):
    """Words that an output gives as a document's."""

    document: int
    text: str


def normalize(text: str) -> str:
    """SQuAD normalisation: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def without_thinking(text: str) -> str:
    """The text less its `<think>` blocks, also those left open on either side."""
    text = _CLOSED_THOUGHT.sub("", text)
    return _DANGLING_OPEN.sub("", _DANGLING_CLOSE.sub("", text)).strip()


def extract(text: str) -> Extraction:
    """The rest of the line after the last `Answer:` or `The answer is:`, else the whole text.

    Thinking blocks are dropped first: an answer considered in one of them was not given. Bold and code
    marks around the marker and the answer are ignored. A marker with nothing after it counts as not parsed.
    """
    spoken = without_thinking(text)
    markers = list(_MARKER.finditer(spoken))
    if not markers:
        return Extraction(spoken, parsed=False)
    line = spoken[markers[-1].end() :].split("\n", 1)[0].strip(_WRAPPING)
    return Extraction(line, parsed=bool(line))


def before_answer(text: str) -> str:
    """What an output says before its answer, thinking left out: where documents are named and quoted."""
    spoken = without_thinking(text)
    markers = list(_MARKER.finditer(spoken))
    return spoken[: markers[-1].start()] if markers else spoken


def document_ids(text: str) -> list[int] | None:
    """The documents that a text names, each once, in order; `[DOC -1]` names none.

    None if the text names no document at all, not even `[DOC -1]`: then it did not have the required form.
    """
    named = [int(number) for tag in _NAMED.finditer(text) for number in re.findall(r"-?\d+", tag[1] or tag[2])]
    return [*dict.fromkeys(number for number in named if number >= 0)] if named else None


def passages(text: str) -> list[Passage]:
    """What follows each document tag up to the next one: the words said to be the document's.

    A tag that names several documents, or none, is passed over. Quotation marks around the words are removed.
    """
    tags = list(_TAG.finditer(text))
    found = []
    for tag, end in zip(tags, [*(tag.start() for tag in tags[1:]), len(text)], strict=False):
        numbers = re.findall(r"-?\d+", tag[1] or tag[2])
        words = text[tag.end() : end].strip(" \t\r\n:*_`-")
        if len(numbers) == 1 and int(numbers[0]) >= 0 and words:
            found.append(Passage(int(numbers[0]), words))
    return found


def quotes(text: str) -> list[Passage]:
    """The quoted words after each tag, each quotation by itself; where none is in quotation marks, each line."""
    found = []
    for document, words in passages(text):
        quoted = _QUOTED.findall(words) or [line.strip(" -\"“”'") for line in words.splitlines()]
        found += [Passage(document, quote) for quote in quoted if normalize(quote)]
    return found
