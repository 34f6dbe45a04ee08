"""Metrics of summaries: ROUGE F-measures, each the maximum over the references, by the rules of two benchmarks.

SQuALITY (Wang et al. 2022) stems the words, and the units of ROUGE-Lsum are sentences. InfiniteBench does not stem, and
its units are lines: for one-line texts, its ROUGE-Lsum equals ROUGE-L.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lceval.tasks.parsing import without_thinking
from lceval.tasks.scoring import with_telemetry

_MEASURES = ("rougeLsum", "rougeL", "rouge1", "rouge2")
# Not after the titles of persons. NLTK's splitter, which SQuALITY uses, requires a download.
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)([.!?]['\"\u201d\u2019)]*)\s+(?=\W?[A-Z])")


@cache
def _scorer(stem: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # heavy

    return RougeScorer([*_MEASURES], use_stemmer=stem)


def rouge(summary: str, references: Sequence[str], *, stem: bool = False) -> dict[str, float]:
    """ROUGE F-measures of a summary, each the maximum over the references; the units of ROUGE-Lsum are lines."""
    scores = [_scorer(stem).score(reference, summary) for reference in references]
    return {name: max((float(score[name].fmeasure) for score in scores), default=0.0) for name in _MEASURES}


def by_sentence(text: str) -> str:
    """The text with one sentence per line."""
    return _SENTENCE_END.sub(r"\1\n", text)


def squality_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of SQuALITY: the whole output without thinking."""
    summary = without_thinking(str(results[0]))
    scores = rouge(by_sentence(summary), [*map(by_sentence, doc["answers"])], stem=True)
    return with_telemetry(scores, results[0], parsed=bool(summary))


def infinite_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of InfiniteBench's summaries: the whole output without thinking."""
    summary = without_thinking(str(results[0]))
    return with_telemetry(rouge(summary, doc["answers"]), results[0], parsed=bool(summary))
