"""Parse model outputs: the answer, cited document ids and quotes.

Handles what models produce: thinking blocks, bold marks, several answers, missing lines, varying spellings of ids.
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)

_THINK = re.compile(r"(</?think>)", re.IGNORECASE)
_MARKER = re.compile(r"(?<![A-Za-z0-9])(?:the answer is|answer)[ \t]*[*_]*[ \t]*:", re.IGNORECASE)
_WRAPPING = " \t\r*_`"


def _tag(space: str) -> tuple[str, str]:
    """Patterns of "DOC", "Document #", "documents:", and of the numbers after it; `space` may separate their parts."""
    # A hyphen separates too ("DOC-3"), but "DOC-1" is no document, as "DOC -1".
    word = rf"DOC(?:UMENT)?S?(?:{space}|[#:._]|-(?=\d\d|[02-9]))*"
    following = rf"(?:{space}*(?:,|;|and\b|or\b|&))+{space}*(?:{word})?-?\d+"
    return word, rf"(-?\d+(?:{following})*)"


_WORD, _NUMBERS = _tag(r"\s")
_WORD_INLINE, _NUMBERS_INLINE = _tag(r"[ \t]")
# The ways to cite documents; a text counts in one of them only, since the text of a document may mention "document 3".
_CITED = (
    re.compile(rf"\[\s*{_WORD}{_NUMBERS}\s*\]", re.IGNORECASE),  # [DOC 3], [DOC 3, 5], [Document 3]
    re.compile(rf"\b{_WORD_INLINE}{_NUMBERS_INLINE}", re.IGNORECASE),  # DOC 3, Documents 3 and 5, doc #3
    re.compile(rf"\[\s*{_NUMBERS}\s*\]"),  # [3], [5]
)
# Before a copy or a quote, without brackets, only at the start of a line.
_TAGS = (
    _CITED[0],
    re.compile(rf"^[\s*_-]*{_WORD_INLINE}{_NUMBERS_INLINE}\b", re.IGNORECASE | re.MULTILINE),
    re.compile(rf"^[\s*_-]*\[\s*{_NUMBERS}\s*\]", re.MULTILINE),
)
_YEARS = range(1900, 2100)
_HUGE = 10**9  # more digits name no document, and Python refuses to parse thousands of them
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
    """Remove `<think>` blocks, including unopened and unclosed ones.

    A chat template may open the block in the prompt, and a truncated output may never close it.
    """
    kept: list[str] = []
    thinking = False
    for part in _THINK.split(text):  # texts and tags in turn
        if part.lower() == "<think>":
            thinking = True
        elif part.lower() == "</think>":
            if not thinking:
                kept.clear()
            thinking = False
        elif not thinking:
            kept.append(part)
    return "".join(kept).strip()


def extract(text: str) -> Extraction:
    """Extract the line after the last `Answer:` or `The answer is:`, else the whole text.

    The line is the rest of the marker's own or, if that is empty, the next one with text. Thinking blocks are removed
    first: an answer in one of them is not final. Bold and code marks around the marker and the answer are ignored. A
    marker with nothing after it counts as not parsed.
    """
    reply = without_thinking(text)
    markers = list(_MARKER.finditer(reply))
    if not markers:
        return Extraction(reply, parsed=False)
    lines = (line.strip(_WRAPPING) for line in reply[markers[-1].end() :].split("\n"))
    line = next(filter(None, lines), "")
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
    tags = _tags(text, _CITED)
    ids = [number for tag in tags for number in _numbers(tag[1]) if number >= 0]
    return [*dict.fromkeys(ids)] if tags else None


def _tags(text: str, kinds: Sequence[re.Pattern[str]]) -> list[re.Match[str]]:
    """The tags of one kind: [DOC ...] if there are any, else of the kind that comes first in the text."""
    bracketed, *others = ([*pattern.finditer(text)] for pattern in kinds)
    # "documents: 2019 figures" are of a year.
    named = [[tag for tag in tags if not {*_numbers(tag[1])} & {*_YEARS}] for tags in others]
    return bracketed or min(filter(None, named), key=lambda tags: tags[0].start(), default=[])


def _numbers(tag: str) -> list[int]:
    return [int(digits) if len(digits) < 10 else _HUGE for digits in re.findall(r"(?<!\d)-?\d+", _unhyphened(tag))]


def _unhyphened(tag: str) -> str:
    """Numbers without the hyphen of "DOC-3"."""
    return re.sub(r"(?<=[A-Za-z])-(?=\d\d|[02-9])", " ", tag)


def passages(text: str, documents: Sequence[str] = ()) -> list[Passage]:
    """The text after each document tag, up to the next tag.

    Tags with several documents, or `[DOC -1]`, are skipped.

    Args:
        documents: texts of the documents by number; a tag within a copy of the cited one is part of the copy.
    """
    tags = _tags(text, _TAGS)
    tagged = []
    while tags:
        tag = tags.pop(0)
        numbers = _numbers(tag[1])
        if len(numbers) != 1 or numbers[0] < 0:
            continue
        if numbers[0] < len(documents) and (own := normalize(documents[numbers[0]])):
            copied = normalize(text[tag.end() :]).startswith(own)
            while copied and tags and len(normalize(text[tag.end() : tags[0].start()])) < len(own):
                tags.pop(0)
        words = text[tag.end() : tags[0].start() if tags else len(text)].strip(" \t\r\n:*_`-")
        if words:
            tagged.append(Passage(numbers[0], words))
    return tagged


def quotes(text: str) -> list[Passage]:
    """Quotes after each tag, one entry each; the lines after a tag if none has quotation marks."""
    extracted = []
    for document, words in passages(text):
        candidates = _QUOTED.findall(words) or [line.strip(" -\"“”'") for line in words.splitlines()]
        extracted += [Passage(document, quote) for quote in candidates if normalize(quote)]
    return extracted
