"""LOFT's own metrics, for predictions in LOFT's format (Lee et al. 2024): ids of documents, or answers found in them.

A prediction is a list of ids or answers for each turn of a conversation, the best one first. Each turn is scored by
itself. Text is normalised as for SQuAD after decomposing its characters (NFD), so that an accent is a character of its
own and is compared.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lceval.tasks.parsing import normalize

CUTOFFS = (1, 2, 3, 5)


def recall_at(ranked: Sequence[str], golds: Sequence[str], k: int) -> float:
    """The share of the gold documents among the first k."""
    return len(set(ranked[:k]) & set(golds)) / len(golds)


def mrecall_at(ranked: Sequence[str], golds: Sequence[str], k: int) -> float:
    """1.0 if the first k hold min(k, golds) of the gold documents (Min et al. 2021)."""
    return float(len(set(ranked[:k]) & set(golds)) == min(k, len(golds)))


def retrieval_metrics(outputs: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Recall and mrecall of ids at LOFT's cutoffs."""
    ranked, wanted = [output.strip() for output in outputs], [gold.strip() for gold in golds]
    return {
        **{f"recall_{k}": recall_at(ranked, wanted, k) for k in CUTOFFS},
        **{f"mrecall_{k}": mrecall_at(ranked, wanted, k) for k in CUTOFFS},
    }


def normalized(text: str) -> str:
    """SQuAD's normalisation of the decomposed text."""
    return normalize(unicodedata.normalize("NFD", text))


def answer_metrics(outputs: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """The first answer against golds of which any will do; further answers are not looked at."""
    said = normalized(outputs[0]) if outputs else ""
    wanted = [normalized(gold) for gold in golds]
    return {
        "subspan_em": float(bool(said) and any(gold and gold in said for gold in wanted)),
        "em": float(bool(said) and said in wanted),
        "f1": max(_f1(said.split(), gold.split()) for gold in wanted),
    }


def _f1(said: Sequence[str], gold: Sequence[str]) -> float:
    common = (Counter(said) & Counter(gold)).total()
    return 2.0 * common / (len(said) + len(gold)) if common else 0.0


def set_metrics(outputs: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Answers against golds that must all be given.

    `subspan_em` is 1.0 if every gold can be paired with an answer of its own of which the one contains the other.
    """
    said, wanted = [normalized(output) for output in outputs], [normalized(gold) for gold in golds]
    return {
        "subspan_em": float(bool(said) and _all_paired(said, wanted)),
        "em": float(set(said) == set(wanted)),
        "coverage": len(set(said) & set(wanted)) / len(wanted),
    }


def _all_paired(said: Sequence[str], wanted: Sequence[str]) -> bool:
    import numpy as np
    from scipy.optimize import linear_sum_assignment  # heavy

    # An answer that vanishes in normalisation would stand in every gold.
    match = np.array([[bool(one) and (gold in one or one in gold) for one in said] for gold in wanted], dtype=float)
    rows, columns = linear_sum_assignment(match, maximize=True)
    return len(rows) == len(wanted) and bool(match[rows, columns].all())


SCORERS: Mapping[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "loft_retrieval": retrieval_metrics,
    "loft_rag": answer_metrics,
    "loft_rag_multi": set_metrics,
}
"""By the name that `lceval score` knows."""


def turns(outputs: Sequence[Sequence[Any]], golds: Sequence[Any]) -> list[tuple[list[str], list[str]]]:
    """What was predicted and what is right, turn by turn.

    Args:
        outputs: a list for each turn.
        golds: LOFT's `answers`: of one turn, or a list for each of several. An id comes as `[id, relevance]`.

    Raises:
        ValueError: outputs and golds do not have the same turns, or a turn has no gold.
    """
    of_turns = [golds] if len(outputs) == 1 else [*golds]
    if len(of_turns) != len(outputs):
        raise ValueError(f"{len(outputs)} turns of outputs and {len(of_turns)} of answers")
    made = []
    for said, wanted in zip(outputs, of_turns, strict=True):
        # One id of a turn need not stand in a list of its own.
        listed = [wanted] if _is_id(wanted) else wanted if isinstance(wanted, list) else [wanted]
        right = [str(gold[0] if _is_id(gold) else gold) for gold in listed]
        if not right:
            raise ValueError("a turn without an answer")
        made.append(([str(one) for one in said], right))
    return made


def turns_of(golds: Sequence[Any]) -> int:
    """How many turns LOFT's `answers` are of, where no prediction says it: lists of answers are one for each turn."""
    return len(golds) if all(isinstance(gold, list) and not _is_id(gold) for gold in golds) else 1


def _is_id(gold: object) -> bool:
    return isinstance(gold, list) and len(gold) == 2 and isinstance(gold[0], str) and isinstance(gold[1], int)
