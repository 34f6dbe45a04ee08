"""Context settings: all documents (`full`), the gold documents (`gold`), none (`none`) or retrieved chunks (`rag`).

`rag` retrieves from exactly the documents of `full`. Documents longer than `chunk` tokens are split into chunks; the
best chunks that fit into `budget` tokens, or into a share of the full context's tokens, are used, in the order of the
full context (better than by rank: Yu et al. 2024).

For datasets built from passage pools, `split`, `questions`, `negatives` and `length_matched` control how contexts are
drawn. They are part of the setting because samples from different draws are not comparable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lceval.core.errors import UserError
from lceval.tasks.catalogue import CONTEXTS, Task, datasets

CHUNK_TOKENS = 2048
BUDGET_TOKENS = 4096
POOL_KEYS = ("split", "questions", "negatives", "length_matched")
_MOST_QUESTIONS = 64  # per context


@dataclass(frozen=True)
class ContextSetting:
    """A context setting of `--metadata`; its string is part of a row's identity.

    Attributes:
        kind: full, gold, none or rag.
        retriever: one of RETRIEVERS (rag).
        chunk: maximum tokens per chunk (rag).
        budget: maximum tokens of all retrieved chunks; below 1, as a share of those of all documents (rag).
        split: `train` or `test`, the split of questions and documents; empty for all.
        questions: questions per context; 0 for the dataset's default.
        negatives: ranking of hard negatives, one of RETRIEVERS or `random`; empty for the dataset's default.
        length_matched: whether filler documents are selected to match the lengths of the gold documents.
    """

    kind: str = "full"
    retriever: str = ""
    chunk: int = 0
    budget: int | float = 0
    split: str = ""
    questions: int = 0
    negatives: str = ""
    length_matched: bool = False

    @property
    def requires_meter(self) -> bool:
        """Whether the setting requires a token meter."""
        return self.kind == "rag"

    def __str__(self) -> str:
        parts = [f"rag:{self.retriever}:chunk={self.chunk}:budget={self.budget}" if self.kind == "rag" else self.kind]
        parts += [f"{key}={value}" for key in ("split", "questions", "negatives") if (value := getattr(self, key))]
        return ":".join([*parts, *(["length_matched"] if self.length_matched else [])])


def setting(task: Task, metadata: Mapping[str, Any]) -> ContextSetting:
    """Parse the context setting of a run's metadata.

    Raises:
        UserError: a context, retriever, size, split or number of questions that the task does not support.
    """
    kind, allowed = metadata.get("context", "full"), task.dataset.contexts
    if kind not in CONTEXTS:
        raise UserError(f"context={kind!r}: expected one of {', '.join(CONTEXTS)}.")
    if kind not in allowed:
        raise UserError(f"{task.name} does not support context={kind}: expected one of {', '.join(allowed)}.")
    pool = _pool(task, metadata)
    if kind != "rag":
        rag_keys = [key for key in ("chunk", "budget") if key in metadata]
        if rag_keys or ("retriever" in metadata and "rag" in allowed):
            key = (rag_keys or ["retriever"])[0]
            raise UserError(f"{task.name}: {key}= requires context=rag, got context={kind}.")
        return ContextSetting(kind, **pool)
    retriever = metadata.get("retriever", task.dataset.retrievers[0])
    if retriever not in task.dataset.retrievers:
        allowed = task.dataset.retrievers
        raise UserError(f"{task.name} does not support retriever={retriever!r}: expected one of {', '.join(allowed)}.")
    sizes = {"chunk": metadata.get("chunk", CHUNK_TOKENS), "budget": metadata.get("budget", BUDGET_TOKENS)}
    for key, value in sizes.items():
        is_share = key == "budget" and isinstance(value, float) and 0 < value < 1
        if not is_share and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            share = ", or a share of the full context's tokens between 0 and 1" if key == "budget" else ""
            raise UserError(f"{task.name}: invalid {key}={value!r}: expected a positive number of tokens{share}.")
    return ContextSetting(kind, retriever, **sizes, **pool)


def _pool(task: Task, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Pool settings of the metadata that differ from the dataset's defaults."""
    dataset = task.dataset
    overrides = {key: metadata[key] for key in POOL_KEYS if key in metadata}
    if overrides and not dataset.splits:
        pooled = [name for name, other in datasets().items() if other.splits]
        raise UserError(
            f"{task.name} does not support {next(iter(overrides))}=: only the passage pools do ({', '.join(pooled)})."
        )
    if not overrides:
        return {}
    defaults = {
        "split": "all",
        "questions": dataset.per_context,
        "negatives": dataset.retrievers[0],
        "length_matched": False,
    }
    for key, allowed in (("split", ("all", *dataset.splits)), ("negatives", (*dataset.retrievers, "random"))):
        if key in overrides and overrides[key] not in allowed:
            raise UserError(
                f"{task.name} does not support {key}={overrides[key]!r}: expected one of {', '.join(allowed)}."
            )
    questions, length_matched = overrides.get("questions", 1), overrides.get("length_matched", False)
    if isinstance(questions, bool) or not isinstance(questions, int) or not 1 <= questions <= _MOST_QUESTIONS:
        raise UserError(f"{task.name}: invalid questions={questions!r}: expected a number from 1 to {_MOST_QUESTIONS}.")
    if not isinstance(length_matched, bool):
        raise UserError(f"{task.name}: invalid length_matched={length_matched!r}: expected true or false.")
    return {key: value for key, value in overrides.items() if value != defaults[key]}
