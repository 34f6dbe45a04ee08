"""Parse model outputs: the answer, cited document ids and quotes.

Handles what models produce: thinking blocks, bold marks, several answers, missing lines, varying spellings of ids.
"""

import re
import string
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)

_CLOSED_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
# A chat template may open the block in the prompt, and a truncated output may never close it.
_DANGLING_CLOSE = re.compile(r"\A.*</think>", re.DOTALL | re.IGNORECASE)
_DANGLING_OPEN = re.compile(r"<think>.*\Z", re.DOTALL | re.IGNORECASE)
_MARKER = re.compile(r"(?<![A-Za-z0-9])(?:the answer is|answer)[ \t]*[*_]*[ \t]*:", re.IGNORECASE)
_WRAPPING = " \t\r*_`"

_NUMBERS = r"-?\d+(?:\s*(?:,|;|and|&)\s*(?:DOC(?:UMENT)?S?[\s#:.]*)?-?\d+)*"
_WORD = r"DOC(?:UMENT)?S?[\s#:._]*"
# [DOC 3], [DOC 3, 5], [Document 3], DOC 3, Documents 3 and 5, doc #3
_NAMED = re.compile(rf"\[\s*{_WORD}({_NUMBERS})\s*\]|\b{_WORD}({_NUMBERS})", re.IGNORECASE)
# Without brackets only at the start of a line: the text of a document may mention "document 3".
_TAG = re.compile(rf"\[\s*{_WORD}({_NUMBERS})\s*\]|^[\s*_-]*{_WORD}({_NUMBERS})\b", re.IGNORECASE | re.MULTILINE)
_QUOTED = re.compile(r"[\"“”«»]([^\"“”«»\n]+)[\"“”«»]")


class Extraction(NamedTuple):
    """The answer of an output, and whether the output has the required format."""

    answer: str
    parsed: bool


class Passage(NamedTuple):
    """Text that an output attributes to a document."""

    document: int
    text: str


def normalize(text: str) -> str:
    """SQuAD normalisation: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def without_thinking(text: str) -> str:
    """Remove `<think>` blocks, including unopened and unclosed ones."""
    text = _CLOSED_THOUGHT.sub("", text)
    return _DANGLING_OPEN.sub("", _DANGLING_CLOSE.sub("", text)).strip()


def extract(text: str) -> Extraction:
    """Extract the rest of the line after the last `Answer:` or `The answer is:`, else the whole text.

    Thinking blocks are removed first: an answer in one of them is not final. Bold and code marks around the marker and
    the answer are ignored. A marker with nothing after it counts as not parsed.
    """
    reply = without_thinking(text)
    markers = list(_MARKER.finditer(reply))
    if not markers:
        return Extraction(reply, parsed=False)
    line = reply[markers[-1].end() :].split("\n", 1)[0].strip(_WRAPPING)
    return Extraction(line, parsed=bool(line))


def before_answer(text: str) -> str:
    """Return the output before its answer, without thinking: the part with citations and quotes."""
    reply = without_thinking(text)
    markers = list(_MARKER.finditer(reply))
    return reply[: markers[-1].start()] if markers else reply


def document_ids(text: str) -> list[int] | None:
    """Cited document ids, unique and in order; empty for `[DOC -1]`.

    None if the text contains no document tag, not even `[DOC -1]`: it does not have the required format.
    """
    ids = [int(number) for tag in _NAMED.finditer(text) for number in re.findall(r"-?\d+", tag[1] or tag[2])]
    return [*dict.fromkeys(number for number in ids if number >= 0)] if ids else None


def passages(text: str) -> list[Passage]:
    """The text after each document tag, up to the next tag.

    Tags with several documents, or `[DOC -1]`, are skipped.
    """
    tags = list(_TAG.finditer(text))
    tagged = []
    for tag, end in zip(tags, [*(tag.start() for tag in tags[1:]), len(text)], strict=False):
        numbers = re.findall(r"-?\d+", tag[1] or tag[2])
        words = text[tag.end() : end].strip(" \t\r\n:*_`-")
        if len(numbers) == 1 and int(numbers[0]) >= 0 and words:
            tagged.append(Passage(int(numbers[0]), words))
    return tagged


def quotes(text: str) -> list[Passage]:
    """Quotes after each tag, one entry each; the lines after a tag if none has quotation marks."""
    extracted = []
    for document, words in passages(text):
        candidates = _QUOTED.findall(words) or [line.strip(" -\"“”'") for line in words.splitlines()]
        extracted += [Passage(document, quote) for quote in candidates if normalize(quote)]
    return extracted
