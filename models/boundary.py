"""Where the context of a prompt ends and its question begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from lceval.core.errors import UserError

AUTO, NONE = "auto", "none"
CONTEXT = "context"
# The long-context tasks of lm-eval 0.4.13, and those of lceval without a field `context` in their prompts, as patterns
# -> their `context_from`. A task without an entry has its context in the field `context`.
KNOWN = {
    "babilong_*": "input",
    "graphwalks_*": r"\nOperation:",
    "infinitebench_*": CONTEXT,
    "lc_mrcr_*": r"Prepend ",
    "longbench_*": CONTEXT,
    "longbench2_*": CONTEXT,
    "longproc_countdown_*": r"\[Problem\]",
    "longproc_html_to_tsv_*": r"\[TARGET INFORMATION\]",
    "longproc_path_traversal_*": r"Now find the route",
    "longproc_pseudo_to_code_*": r"\[CODE\]",
    "longproc_tom_tracking_*": r"\[QUESTION\]",
    "longproc_travel_planning_*": r"YOUR TASK:",
    "niah_*": r"What (?:is|are all) the special magic ",
    "ruler_cwe": r"Question: ",
    "ruler_fwe": r"Question: ",
    "ruler_qa_*": r"Answer the question based on ",
    "ruler_vt": r"Question: ",
    "scrolls_govreport": "input",
    "scrolls_summscreenfd": "input",
    "scrolls_*": "text",
}


@dataclass(frozen=True)
class ContextEnd:
    """Finds the end of the context in a task's prompts.

    Attributes:
        context_from: `auto`, `none`, a word that names a field of the task's rows with the context, or a regular
            expression whose last match in a prompt is where the question begins.
    """

    context_from: str = AUTO

    def find(self, task: str, prompt: str, doc: Mapping[str, Any]) -> int | None:
        """The number of characters of a prompt up to the end of its context, including everything before the context.

        Few-shot examples are part of the context: the last occurrence in the prompt counts. None if there is none.

        Args:
            task: name of the task.
            doc: row from which the prompt was rendered.
        """
        source = self._source(task)
        if source == NONE:
            return None
        if not source.isidentifier():
            *_, last = [0, *(match.start() for match in re.finditer(source, prompt))]
            return last or None
        context = doc.get(source)
        if not isinstance(context, str) or not context.strip():
            return None
        # Templates strip the message, and tasks their fields.
        for text in (context, context.strip()):
            at = prompt.rfind(text)
            if at >= 0:
                return at + len(text)
        return None

    def is_expected(self, task: str, prompt: str, doc: Mapping[str, Any]) -> bool:
        """Whether a prompt must have a context: not under `none`, not without text, and not in a row whose field is
        empty (lceval's `context=none`)."""
        source = self._source(task)
        return bool(prompt) and source != NONE and not (source.isidentifier() and doc.get(source) == "")

    def not_found(self, task: str, doc: Mapping[str, Any], kv: object) -> UserError:
        """The error for a prompt in which no context was found, and that therefore cannot be compressed."""
        source = self._source(task)
        what = f"its field {source!r}" if source.isidentifier() else f"a match of {source!r}"
        fields = ", ".join(sorted(key for key, value in doc.items() if isinstance(value, str))) or "none"
        return UserError(
            f"{task}: no context to compress under kv={kv}: {what} is not in the prompt; pass in --model_args "
            f"context_from=FIELD (of {fields}), a regular expression that matches where the question begins, "
            f"or context_from=none to run uncompressed"
        )

    def _source(self, task: str) -> str:
        return known(task) if self.context_from == AUTO else self.context_from


@cache
def known(task: str) -> str:
    """The `context_from` of a task under `auto`."""
    return next((source for pattern, source in KNOWN.items() if fnmatchcase(task, pattern)), CONTEXT)


def check_context_from(value: object) -> str | None:
    """What is wrong with a value of `context_from`, or None."""
    if not isinstance(value, str) or not value:
        return "auto, none, the name of a field, or a regular expression"
    try:
        re.compile(value)
    except re.error as error:
        return f"not a regular expression ({error})"
    return None


def boundary_of(text: str, ids: Sequence[int], encode: Callable[[str], Sequence[int]]) -> int:
    """The number of a prompt's tokens up to the end of its context.

    Tokens may merge across the boundary, so it lies after the last token that the prompt shares with its own text up
    to the end of the context. At least one token is left for the question.

    Args:
        text: prompt up to the end of its context.
        ids: tokens of the whole prompt.
    """
    shared = 0
    for prefix_id, prompt_id in zip(encode(text), ids, strict=False):
        if prefix_id != prompt_id:
            break
        shared += 1
    return min(shared, len(ids) - 1)
