"""Haystack text: the stories of SQuALITY, split into paragraphs.

Facts are inserted between paragraphs as separate documents, so that their slots can be located in a compressed cache. A
context has the stories in a seeded order, truncated to its length, and repeats them if it is longer than all of them.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from lceval.core.errors import UserError
from lceval.tasks.compose import Fitter
from lceval.tasks.prompts import block
from lceval.tasks.request import Request
from lceval.tasks.rows import Document
from lceval.tasks.sources import SourceFile

STORIES = "squality/squality_v1-3_dev.jsonl"
SCHEMA: dict[str, type] = {"document": str}

_WORD = "Then"
_NOTE = re.compile(r"transcriber|gutenberg|etext|produced by|illustrated by|copyright|\*\*\*", re.IGNORECASE)
_SENTENCE = re.compile(r"[a-z].*[.!?:;—…]\W*$")


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a story, each on one line, without titles, bylines and edition notes."""
    lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [line for line in lines if _SENTENCE.search(line) and not _NOTE.search(line)]


class Haystack:
    """Paragraphs from which contexts are built.

    Attributes:
        text: all paragraphs in lower case, to test whether a word occurs.
    """

    def __init__(self, request: Request, stories: SourceFile, without: re.Pattern[str] | None = None) -> None:
        """
        Args:
            request: Request of a task with a length.
            stories: Records of SCHEMA.
            without: Pattern of paragraphs to leave out.

        Raises:
            UserError: No paragraph remains.
        """
        meter, limit = request.meter_and_limit
        self._request = request
        self._stories: list[list[Document]] = []
        for number, record in enumerate(stories.records):
            lines = [line for line in paragraphs(record["document"]) if without is None or not without.search(line)]
            named = [Document(pid=f"story-{number}-{place}", title="", text=line) for place, line in enumerate(lines)]
            self._stories += [named] if named else []
        if not self._stories:
            raise UserError(f"{request.task} finds no usable paragraph in the stories of {STORIES}.")
        documents = [document for story in self._stories for document in story]
        self.text = "\n".join(document["text"].lower() for document in documents)
        # Line feeds may be one token at the end of a text and two before a word, so a word is appended.
        costs = meter.pieces([f"{document['text']}\n\n{_WORD}" for document in documents])
        (word,) = meter.pieces([_WORD])
        costs = [cost - word for cost in costs]
        self._costs = {document["pid"]: cost for document, cost in zip(documents, costs, strict=True)}
        self._passes = 1 + limit // max(sum(costs), 1)
        # The questions on a context may differ too much in length for the preferred contract.
        self._fitter = Fitter.preferred(limit, meter)

    def context(
        self, needles: Sequence[Document], depths: Sequence[float], questions: Sequence[str], rng: random.Random
    ) -> tuple[list[Document], list[int]] | None:
        """Build a context with the needles.

        Args:
            needles: Documents to insert, in order.
            depths: Depth of each needle in [0, 1]; ascending.
            questions: All questions on this context.
            rng: Determines the order of the stories.

        Returns:
            The documents in order and each question's total; None if no selection of paragraphs meets the length.
        """
        order = rng.sample(self._stories, len(self._stories))
        candidates = [document for story in order for document in story]
        costs = [self._costs[document["pid"]] for document in candidates] * self._passes
        for repetition in range(1, self._passes):
            candidates += [
                Document(pid=f"{document['pid']}-{repetition}", title="", text=document["text"])
                for story in order
                for document in story
            ]

        def arrange(chosen: Sequence[int]) -> tuple[list[Document], list[int]]:
            documents = placed([candidates[index] for index in sorted(chosen)], needles, depths)
            return documents, self._request.totals(documents, questions)

        return self._fitter.fit(costs, arrange)


def placed(text: Sequence[Document], needles: Sequence[Document], depths: Sequence[float]) -> list[Document]:
    """Insert each needle at the paragraph boundary nearest to its depth, measured in characters."""
    boundaries = [0, *accumulate(len(document["text"]) + 2 for document in text)]
    arranged: list[Document] = []
    copied = 0
    for needle, depth in zip(needles, depths, strict=True):
        target = depth * boundaries[-1]
        index = bisect_left(boundaries, target)
        if index and target - boundaries[index - 1] <= boundaries[index] - target:
            index -= 1
        arranged += [*text[copied:index], needle]
        copied = max(copied, index)
    return [*arranged, *text[copied:]]


def depth_of(layout: str, docs: Sequence[Document], pids: Sequence[str]) -> float:
    """Mean depth of the documents `pids`: 0 at the beginning of the context, 1 at its end."""
    texts = [document["text"] for document in docs]
    positions = [position for position, document in enumerate(docs) if document["pid"] in pids]
    length = len(block(layout, texts))
    starts = [len(block(layout, [*texts[:position], ""])) for position in positions]
    depths = [start / max(length - len(texts[position]), 1) for start, position in zip(starts, positions, strict=True)]
    return round(sum(depths) / len(depths), 4)


def unable(request: Request, what: str) -> UserError:
    """Error for a length at which no context fits."""
    return UserError(
        f"{request.task} cannot place {what} within 2% of {request.limit} tokens of this tokenizer: use a longer task."
    )
