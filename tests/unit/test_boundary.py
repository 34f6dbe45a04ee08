"""Where the context of a prompt ends: fields, patterns, and the long-context tasks that lm-eval ships."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from lceval.models.arguments import check_arguments
from lceval.models.boundary import KNOWN, ContextEnd, boundary_of


def pairs(text: str) -> list[int]:
    """A tokenizer that merges: each token is two characters, counted from the start."""
    return [hash(text[i : i + 2]) for i in range(0, len(text), 2)]


def context_of(source: str, prompt: str, **doc: Any) -> str | None:
    end = ContextEnd(source).find("mine", prompt, doc)
    return None if end is None else prompt[:end]


def test_a_context_ends_where_the_field_ends() -> None:
    assert context_of("auto", "head CONTEXT tail", context="CONTEXT") == "head CONTEXT"
    assert context_of("passage", "head TEXT tail", context="head", passage="TEXT") == "head TEXT"


def test_the_last_occurrence_counts_because_examples_come_first() -> None:
    assert context_of("auto", "xx-xx-q", context="xx") == "xx-xx"
    assert context_of("Q:", "a Q: b\n\nc Q: d") == "a Q: b\n\nc "


def test_a_field_that_the_template_stripped_is_found() -> None:
    assert context_of("auto", "<user>text</user>", context="\n text\n") == "<user>text"


def test_what_is_not_in_the_prompt_is_not_found() -> None:
    for context in ("d", "", " ", None, ["a"], 3):
        assert context_of("auto", "a bc", context=context) is None
    assert context_of("Q:", "no question") is None
    assert context_of("Q:", "Q: nothing before it") is None
    assert context_of("none", "head CONTEXT tail", context="CONTEXT") is None


def test_only_a_prompt_that_has_a_context_must_have_its_end_found() -> None:
    end = ContextEnd()
    assert end.is_expected("mine", "a prompt", {"context": "lost"})
    assert end.is_expected("mine", "a prompt", {})
    assert not end.is_expected("mine", "a prompt", {"context": ""})
    assert not end.is_expected("mine", "", {})
    assert ContextEnd("passage").is_expected("mine", "a prompt", {"context": "", "passage": "lost"})
    assert ContextEnd("Q:").is_expected("mine", "a prompt", {"context": ""})
    assert not ContextEnd("none").is_expected("mine", "a prompt", {"context": "lost"})


def test_the_error_says_what_to_pass() -> None:
    error = str(ContextEnd().not_found("mine", {"passage": "p", "query": "q", "n": 1}, "snapkv:0.5"))
    assert error == (
        "mine: no context to compress under kv=snapkv:0.5: its field 'context' is not in the prompt; pass in "
        "--model_args context_from=FIELD (of passage, query), a regular expression that matches where the question "
        "begins, or context_from=none to run uncompressed"
    )
    assert "a match of 'Q:' is not in the prompt" in str(ContextEnd("Q:").not_found("mine", {}, "int4"))


@pytest.mark.parametrize(
    ("value", "problem"), [("(", "not a regular expression"), ("", "auto, none"), (3, "auto, none")]
)
def test_a_bad_value_is_refused(value: object, problem: str) -> None:
    with pytest.raises(Exception, match=f"bad model argument context_from=.*{problem}"):
        check_arguments({"pretrained": "model", "context_from": value})


def test_a_token_across_the_boundary_belongs_to_the_question() -> None:
    assert boundary_of("abcde", pairs("abcde?!"), pairs) == 2


@given(st.text(), st.text(min_size=1))
def test_the_boundary_is_the_end_of_the_context_and_leaves_a_token(context: str, question: str) -> None:
    assert boundary_of(context, list(context + question), list) == len(context)
    assert boundary_of(context + question, list(context + question), list) == len(context + question) - 1


# lm-eval's own long-context tasks ---------------------------------------------------------------------

END = "the last word of the context."
TEXT = f"Some text.\n\nQuestion: not yet? {END}"
QUESTION = "Who came first?"
EDGES = "The graph has the following edges:\nab -> cd\ncd -> ef"
LONGBENCH = {"context": TEXT, "question": QUESTION, "answers": ["it"], "length": 9, "all_classes": ["a"]}
INFINITE = {"context": TEXT, "input": f"func_1(2) {QUESTION}", "answer": ["it"], "options": ["a", "b", "c", "d"]}
CHOICES = {"context": TEXT, "question": QUESTION, "choices": ["a", "b", "c", "d"], "answer": 0}
SCROLLS = {"id": "a", "pid": "a", "input": f"{QUESTION}\n\n{TEXT}", "output": "it", "outputs": ["it"], "text": TEXT}


def longproc(prompt: str) -> dict[str, Any]:
    return {"input_prompt": prompt, "reference_output": "it", "metadata": json.dumps({})}


def ruler(context: str, question: str) -> dict[str, Any]:
    return {"input": f"{context}\n{question}", "outputs": ["it"], "gen_prefix": "Answer: it is", "max_length": 4096}


# Pattern of tasks -> a row, the end of its context, and the beginning of what follows (behind white space).
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "babilong_*": ({"input": f" {TEXT}\n", "question": QUESTION, "target": "it"}, END, QUESTION),
    "graphwalks_*": (
        {"prompt": f"Operation:\nan example\n\n{EDGES}\n\nOperation:\nFind it.", "answer_nodes": ["ab"]},
        EDGES,
        "Operation:\nFind it.",
    ),
    "infinitebench_*": (INFINITE, END, ""),
    "longbench_*": (LONGBENCH, END, ""),
    "longbench2_*": (CHOICES, END, "</text>"),
    "longproc_countdown_*": (longproc(f"[EXAMPLES]\n{TEXT}\n\n[Problem]\nNow solve"), END, "[Problem]"),
    "longproc_html_to_tsv_*": (longproc(f"[INPUT WEBPAGE]\n{TEXT}\n\n[TARGET INFORMATION]\nx"), END, "[TARGET"),
    "longproc_path_traversal_*": (
        longproc(f"[EXAMPLE]\nNow find the route from a to b.\n\n[PROBLEM]\n{TEXT}\n\nNow find the route from c to d."),
        END,
        "Now find the route from c",
    ),
    "longproc_pseudo_to_code_*": (longproc(f"[PSEUDOCODE]:\n{TEXT}\n\n[CODE]:"), END, "[CODE]:"),
    "longproc_tom_tracking_*": (longproc(f"[STORY]\n{TEXT}\n\n[QUESTION]\n{QUESTION}"), END, "[QUESTION]"),
    "longproc_travel_planning_*": (longproc(f"EXAMPLES:\n{TEXT}\n\nYOUR TASK:\nNow plan"), END, "YOUR TASK:"),
    "niah_multi[vq]*": (ruler(TEXT, "What are all the special magic numbers for it?"), END, "What are all"),
    "niah_*": (ruler(TEXT, "What is the special magic number for it?"), END, "What is the"),
    "ruler_qa_*": (
        ruler(f"Answer the question based on them.\n{TEXT}", f"Answer the question based on them.\n{QUESTION}"),
        END,
        "Answer the question",
    ),
    "ruler_*": (ruler(TEXT, "Question: What are they?"), END, "Question: What are"),
    "scrolls_govreport": (SCROLLS, END, "Question: What is a summary"),
    "scrolls_summscreenfd": (SCROLLS, END, "Question: What is a summary"),
    "scrolls_quality": (
        {**SCROLLS, "input": f"{QUESTION}\n\n(A) it (B) b (C) c (D) d\n\n{TEXT}"},
        END,
        "Question: Who",
    ),
    "scrolls_contractnli": (
        {**SCROLLS, "output": "Entailment", "outputs": ["Entailment"]},
        END,
        "Hypothesis: Who",
    ),
    "scrolls_*": (SCROLLS, END, f"Question: {QUESTION}"),
}
# Tasks whose prompt ends with the context.
NO_QUESTION = {"infinitebench_longbook_sum_en"}


@cache
def manager() -> TaskManager:
    return TaskManager(include_defaults=True)


@cache
def long_context_tasks() -> tuple[str, ...]:
    """The tasks of lm-eval that the table knows."""
    return tuple(
        task
        for task in manager().all_subtasks
        if any(fnmatchcase(task, pattern) for pattern in KNOWN) and not task.startswith("lc_")
    )


def row_of(task: str) -> tuple[dict[str, Any], str, str]:
    return next(row for pattern, row in ROWS.items() if fnmatchcase(task, pattern))


def template(messages: list[dict[str, str]], **_: Any) -> str:
    return "<bos>" + "".join(f"<{m['role']}>{m['content'].strip()}</{m['role']}>" for m in messages) + "<assistant>"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that loads lm-eval's task of a name, with these rows as its data set."""
    rows: dict[str, list[dict[str, Any]]] = {}

    def download(self: Any, *_: Any, **__: Any) -> None:
        docs = datasets.Dataset.from_list(rows[self.config.task or self.DATASET_NAME])
        splits = {
            self.config.test_split,
            self.config.validation_split,
            self.config.training_split,
            "train",
            "validation",
        }
        self.dataset = datasets.DatasetDict({split: docs for split in splits if split})

    # transformers 5 has no longer the module that scrolls imports, and its metric is downloaded.
    metrics = ModuleType("transformers.data.metrics")
    metrics.squad_metrics = SimpleNamespace(normalize_answer=str.lower)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.data.metrics", metrics)
    monkeypatch.setattr(ConfigurableTask, "download", download)

    def load(task: str, docs: list[dict[str, Any]]) -> Any:
        rows[task] = docs
        if not task.startswith("scrolls_"):
            return manager().load([task])["tasks"][task]
        from lm_eval.tasks.scrolls import task as scrolls

        names = {name.lower(): name for name in vars(scrolls)}
        cls = getattr(scrolls, names[task.removeprefix("scrolls_")])
        rows[cls.DATASET_NAME] = docs
        monkeypatch.setattr(scrolls, "_download_metric", str)
        monkeypatch.setattr(scrolls, "load", lambda *_, **__: None)
        monkeypatch.setattr(scrolls._SCROLLSTask, "download", download)
        return cls()

    return load


def prompts(task: Any, **options: Any) -> list[tuple[str, Mapping[str, Any]]]:
    task.build_all_requests(chat_template=template, **options)
    return [(request.args[0], request.doc) for request in task.instances]


def test_the_table_knows_the_tasks_that_lm_eval_ships() -> None:
    families = {}
    for task in long_context_tasks():
        families.setdefault(task.partition("_")[0], []).append(task)
    assert {family: len(names) for family, names in families.items()} == {
        "babilong": 20, "graphwalks": 2, "infinitebench": 11, "longbench": 34, "longbench2": 20, "longproc": 16,
        "niah": 8, "ruler": 5, "scrolls": 7,
    }  # fmt: skip


@pytest.mark.parametrize("family", sorted({pattern.partition("_")[0] for pattern in KNOWN}))
def test_the_context_of_every_task_of_lm_eval_ends_before_its_question(load: Any, family: str) -> None:
    for name in long_context_tasks():
        if name.partition("_")[0] != family:
            continue
        row, context_end, question = row_of(name)
        task = load(name, [row, row])
        for options in ({}, {"apply_chat_template": True}):
            for prompt, doc in prompts(task, **options):
                end = ContextEnd().find(name, prompt, doc)
                assert end is not None, (name, prompt)
                assert prompt[:end].rstrip().endswith(context_end), (name, prompt[:end])
                assert prompt[end:].lstrip().startswith(question), (name, prompt[end:])
                assert prompt[end:].strip() or (name in NO_QUESTION and not options), name


def test_the_context_of_rulers_rows_is_that_of_kvpress(load: Any, data_folder: Path) -> None:
    """kvpress splits NVIDIA's rows into context and question; the pattern finds the same place."""
    lines = (data_folder / "ruler" / "4096.jsonl").read_text().splitlines()
    names = {
        "vt": "ruler_vt",
        "cwe": "ruler_cwe",
        "fwe": "ruler_fwe",
        "qa_1": "ruler_qa_squad",
        "qa_2": "ruler_qa_hotpot",
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        name = names.get(row["task"], row["task"])
        doc = {"input": row["context"] + row["question"].rstrip(), "outputs": row["answer"], "max_length": 4096}
        rows.setdefault(name, []).append(
            {**doc, "gen_prefix": row["answer_prefix"], "context_chars": len(row["context"])}
        )
    assert len(rows) == 13
    for name, docs in rows.items():
        for prompt, doc in prompts(load(name, docs)):
            at = prompt.index(doc["input"])
            assert ContextEnd().find(name, prompt, doc) == at + doc["context_chars"], name
