"""Real text to hide facts in: the stories of SQuALITY, cut into paragraphs.

The facts stand between paragraphs as documents of their own, so that their slots can be found again in a compressed
cache. A context takes the stories in an order that its seed decides, from the first paragraph on, as far as its length
reaches; where it is longer than all of them together they begin again.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from lceval.errors import UserError
from lceval.tasks.build import Request
from lceval.tasks.compose import Contract, Fitter
from lceval.tasks.prompts import block
from lceval.tasks.rows import Document
from lceval.tasks.sources import SourceFile

STORIES = "squality/squality_v1-3_dev.jsonl"
SCHEMA: dict[str, type] = {"document": str}

_WORD = "Then"
_NOTE = re.compile(r"transcriber|gutenberg|etext|produced by|illustrated by|copyright|\*\*\*", re.IGNORECASE)
_SENTENCE = re.compile(r"[a-z].*[.!?:;—…]\W*$")


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a story, each on one line; titles, bylines and notes of the edition are left out."""
    lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [line for line in lines if _SENTENCE.search(line) and not _NOTE.search(line)]


class Haystack:
    """The paragraphs that contexts are made of.

    Attributes:
        text: all of them in lower case, to look words up in.
    """

    def __init__(self, request: Request, stories: SourceFile, without: re.Pattern[str] | None = None) -> None:
        """
        Args:
            request: What is asked for; it has a length.
            stories: Records of SCHEMA.
            without: Paragraphs that match it are left out.

        Raises:
            UserError: Nothing is left.
        """
        meter, self._limit = request.fitted
        self._request = request
        self._stories: list[list[Document]] = []
        for number, record in enumerate(stories.records):
            kept = [line for line in paragraphs(record["document"]) if without is None or not without.search(line)]
            named = [Document(pid=f"story-{number}-{place}", title="", text=line) for place, line in enumerate(kept)]
            self._stories += [named] if named else []
        if not self._stories:
            raise UserError(f"{request.task} finds no paragraph to hide anything in among the stories of {STORIES}.")
        every = [document for story in self._stories for document in story]
        self.text = "\n".join(document["text"].lower() for document in every)
        # Line feeds may be one token at the end of a text and two before a word, so a word follows here too.
        costs = meter.pieces([f"{document['text']}\n\n{_WORD}" for document in every])
        (word,) = meter.pieces([_WORD])
        costs = [cost - word for cost in costs]
        self._costs = {document["pid"]: cost for document, cost in zip(every, costs, strict=True)}
        self._passes = 1 + self._limit // max(sum(costs), 1)
        # Where the questions on a context differ too much in length for the tighter promise, the other one holds.
        self._fitters = [Fitter(Contract.preferred(self._limit, meter)), Fitter(Contract.promised(self._limit))]

    def context(
        self, needles: Sequence[Document], depths: Sequence[float], questions: Sequence[str], rng: random.Random
    ) -> tuple[list[Document], list[int]] | None:
        """Documents that the questions can be asked on, and their totals.

        Args:
            needles: What is hidden, in order.
            depths: Where, as a share of the text; ascending.
            questions: All that are asked on this context.
            rng: Decides the order of the stories.

        Returns:
            The documents in order and each question's total, or None if no choice of paragraphs keeps the length.
        """
        order = rng.sample(self._stories, len(self._stories))
        candidates = [document for story in order for document in story]
        costs = [self._costs[document["pid"]] for document in candidates] * self._passes
        for turn in range(1, self._passes):
            again = [document for story in order for document in story]
            candidates += [Document(pid=f"{of['pid']}-{turn}", title="", text=of["text"]) for of in again]

        def arrange(chosen: Sequence[int]) -> list[Document]:
            return placed([candidates[index] for index in sorted(chosen)], needles, depths)

        for fitter in self._fitters:
            fitted = fitter.fit(costs, lambda chosen: self._request.totals(arrange(chosen), questions))
            if fitted is not None:
                return arrange(fitted[0]), fitted[1]
        return None


def placed(text: Sequence[Document], needles: Sequence[Document], depths: Sequence[float]) -> list[Document]:
    """The text with each needle at the end of a paragraph that is nearest to its depth, measured in characters."""
    edges = [0, *accumulate(len(document["text"]) + 2 for document in text)]
    made: list[Document] = []
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        target = depth * edges[-1]
        at = bisect_left(edges, target)
        if at and target - edges[at - 1] <= edges[at] - target:
            at -= 1
        made += [*text[done:at], needle]
        done = max(done, at)
    return [*made, *text[done:]]


def depth_of(layout: str, docs: Sequence[Document], pids: Sequence[str]) -> float:
    """How deep the named documents stand, on average: 0 at the beginning of the context, 1 at its end."""
    texts = [document["text"] for document in docs]
    places = [n for n, document in enumerate(docs) if document["pid"] in pids]
    whole = len(block(layout, texts))
    starts = [len(block(layout, [*texts[:n], ""])) for n in places]
    return round(sum(s / max(whole - len(texts[n]), 1) for s, n in zip(starts, places, strict=True)) / len(places), 4)


def unable(request: Request, what: str) -> UserError:
    """The error of a length in which nothing fits."""
    return UserError(
        f"{request.task} cannot place {what} within 2% of {request.limit} tokens of this tokenizer: use a longer task."
    )
