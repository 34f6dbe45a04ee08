"""Bad input on every surface: whatever is passed, the outcome is a value or an error of one short line.

Inputs are valid ones with some edits, so that they reach deep, and free text. Each input that once failed is an
explicit example. `--hypothesis-profile=many -o timeout=0` draws 10,000 inputs for most surfaces.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scorers import random_scorer

from lceval.cli import invoke
from lceval.core import yaml_config
from lceval.core.errors import LcevalError

T = TypeVar("T")
MANY = settings.get_current_profile_name() == "many"
# The texts of 100 kB are in the printed examples too.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
SLOWEST = timedelta(seconds=20)  # of one input, on a slow machine; a hang takes longer

DEEP = "[" * 20_000
LEVELS = json.loads("[" * 400 + "]" * 400)
HUGE = 10**400
DIGITS = "9" * 5000  # more than Python parses as an integer
LONG = "a" * 100_000
NASTY = [
    *("", " ", "\0", "\ufeff", "\ud83d", "\udcff", "\n", "\r\n", "\u2028", "\x1b[31m", "é", "²", "٣", "{}", "%s"),
    *("nan", "inf", "-1", "0", "1e999", "0.5", "true", "null", "-", "--", "=", ",", ":", "+", "[", "{", "'", '"'),
    *(DIGITS, LONG, DEEP, '{"a":' * 20_000, "0x" + "f" * 6000, "!!int x", "&a [*a]", "2024-99-99", "\\ud83d", "*"),
]  # fmt: skip
# Hypothesis excludes halves of surrogate pairs by default.
JUNK = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=()), max_size=12)
NUMBERS = st.sampled_from([0, -1, 1, 2, 2**31, 2**63, -HUGE, HUGE]) | st.floats() | st.integers(-300, 300)
VALUES = st.one_of(
    st.none() | st.booleans(),
    NUMBERS,
    JUNK,
    st.sampled_from([LEVELS, [], {}, [[]], {"": None}]),
    st.lists(NUMBERS | JUNK, max_size=3),
    st.dictionaries(JUNK, NUMBERS | JUNK, max_size=2),
)


def examples(few: int, many: int = 10_000) -> Callable[[T], T]:
    """Settings of one surface: its number of inputs by default and under the profile `many`."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=many if MANY else few, deadline=SLOWEST, suppress_health_check=checks)  # type: ignore[return-value]


def outcome(call: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
    """The value of a call, None after an error that a user can act on; any other exception fails the test."""
    try:
        return call(*arguments, **options)
    except LcevalError as error:
        message = str(error)
        assert 0 < len(message) < 1000
        assert message.isprintable()
        return None


def edited(*valid: str) -> st.SearchStrategy[str]:
    """One of the valid texts with up to four edits; free text one time in eight."""

    @st.composite
    def edit(draw: st.DrawFn) -> str:
        if draw(st.integers(0, 7)) == 7:
            return draw(JUNK)
        text = draw(st.sampled_from(valid))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(text)))
            end = draw(st.integers(start, min(len(text), start + 16)))
            other = draw(st.integers(0, len(text)))
            piece = draw(
                st.sampled_from(["", text[start:end] * 2, text[other : other + 8], text[start:end][::-1]]) | JUNK
            )
            text = text[:start] + piece + text[end:]
        return text

    return edit()


def damaged(valid: Any, values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    """A JSON value of which up to three members are deleted, repeated, renamed or replaced; any one time in eight."""

    @st.composite
    def edit(draw: st.DrawFn) -> Any:
        if draw(st.integers(0, 7)) == 7:
            return draw(values)
        value = copy.deepcopy(valid)
        for _ in range(draw(st.integers(0, 3))):
            parents = [node for node in nodes(value) if isinstance(node, dict | list) and node]
            if not parents:
                break
            parent = draw(st.sampled_from(parents))
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
            match draw(st.sampled_from(["replace", "replace", "delete", "repeat", "rename"])):
                case "replace":
                    parent[key] = copy.deepcopy(draw(values))
                case "delete":
                    del parent[key]
                case "repeat" if isinstance(parent, list):
                    parent.insert(key, copy.deepcopy(parent[key]))
                case _ if isinstance(parent, dict):
                    parent[draw(JUNK)] = parent.pop(key)
        return value

    return edit()


def nodes(value: Any) -> Iterator[Any]:
    """A JSON value and all values inside, outermost first; not inside of LEVELS."""
    waiting = [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        yield node
        inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if depth < 12:
            waiting += [(child, depth + 1) for child in inside]


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def put(file: Path, text: str | bytes) -> Path:
    """A file with a text, of which halves of surrogate pairs become invalid bytes."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    return file


def as_json(value: Any) -> str:
    return json.dumps(value)


# Recipe strings


def recipe_texts() -> list[str]:
    from lceval.models import recipe

    texts = [
        "full",
        "snapkv:0.25+int4+quest:0.1:page=32",
        " streaming:2048:sinks=4:when=always",
        "adakv:0.5:of=knorm:floor=0.1",
        "kvzap:threshold=-4:recent=128+int8",
    ]
    for name in recipe.NAMES[1:]:
        amount = [] if name in recipe.QUANTIZERS else ["0.25"]
        keys = (f"{key}={recipe.spelled(value)}" for key, value in recipe.defaults(name).items() if value is not None)
        texts.append(":".join([name, *amount, *keys]))
    return texts


@examples(300)
@given(edited(*recipe_texts()))
@example(LONG)
@example("snapkv:0." + "3" * 50_000)
@example(f"snapkv:{DIGITS}")
@example("h2o:0.5:recent=nan")
@example("knorm:1.e-320")
def test_a_recipe_string_is_rejected_in_one_line_or_equals_its_canonical_form(text: str) -> None:
    from lceval.models import recipe

    parsed = outcome(recipe.parse, text)
    if parsed is not None:
        assert recipe.parse(str(parsed)) == parsed
        json.dumps(parsed.expanded(), allow_nan=False)


# Sweep grids and training recipes

GRID: dict[str, Any] = {
    "models": ["smollm2-135m", "no/model"],
    "adapters": [None, "runs/a"],
    "recipes": ["full", "snapkv:0.5"],
    "contexts": ["full", {"context": "rag", "chunk": 512}],
    "tasks": ["lc_filings_ao_1k", "nqopen"],
    "modes": ["ao"],
    "lengths": [2],
    "seeds": [None, 7],
    "limit": 4,
    "batch_size": 1,
    "model_args": {"diagnose": "gold"},
    "gen_kwargs": {"max_gen_toks": 16, "until": ["x"]},
}
RECIPE: dict[str, Any] = {
    "output": "runs/x",
    "model": {"pretrained": "smollm2-135m", "shape": {"model_type": "llama", "x": 0.5}},
    "data": {"datasets": ["squad"], "modes": ["ao"], "length_k": 1.5, "seeds": [1, 2], "promote": 0.6},
    "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ["q_proj"]},
    "optim": {"learning_rate": 1e-4, "max_steps": 2, "warmup": 0.1},
    "texts": {"files": ["a.txt"], "tokens": 64},
    "longlora": {"group": 0.25, "window_tokens": 16384},
    "compression_aware": {"evictors": ["snapkv"], "keep": [0.2, 0.9]},
    "grpo": {"max_steps": 2, "temperature": 1.0},
    "report_to": ["tensorboard"],
}
SCORER: dict[str, Any] = {
    "output": "runs/x",
    "model": {"pretrained": "smollm2-135m", "dtype": "float32", "peft": "runs/a"},
    "data": {"datasets": ["squad"], "length_k": 1.5, "promote": None},
    "texts": {"files": ["a.txt"], "tokens": 64},
    "contexts": 8,
    "target": "kvzip+",
    "floor": 1e-6,
    "mlp": {"hidden": 64, "tokens": 1000, "learning_rate": 1e-3},
}
VALID_RECIPE = {
    key: RECIPE[key] for key in ("output", "model", "data", "lora", "optim", "report_to", "compression_aware")
}
LAUGHS = "models: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"m{i}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)  # a value of 9^10 texts


def yaml_texts(*valid: dict[str, Any]) -> st.SearchStrategy[str]:
    """YAML of damaged values (JSON is YAML), or damaged YAML."""
    values = st.one_of(*(damaged(value) for value in valid))
    return values.map(as_json) | edited(*(yaml.safe_dump(value) for value in valid), LAUGHS)


def settings_of(*texts: str) -> st.SearchStrategy[list[str]]:
    return st.lists(edited(*texts), max_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the module, also of its caches; the current one, so that relative paths stay inside."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "here" / "below").mkdir(parents=True)
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCEVAL_CACHE", str(root / "cache"))
        patch.setenv("HF_DATASETS_CACHE", str(root / "arrow"))
        patch.delenv("LCEVAL_JUDGE", raising=False)
        patch.delenv("LCEVAL_DEBUG", raising=False)
        os.chdir(root / "here" / "below")
        yield root
        os.chdir(before)


@examples(60)
@given(yaml_texts(GRID), settings_of("limit=8", "tasks=[nqopen]", "model_args.diagnose=gold", "models=[a, b]"))
@example(as_json(GRID), [f"limit=0x{'f' * 6000}"])
@example(as_json(GRID), [".".join("a" * 5000) + "=1"])
@example(as_json(GRID), [f"models={DEEP}"])
@example(as_json(GRID), ["limit=2024-99-99"])
@example(as_json(GRID), ["limit=!!timestamp x"])
@example(as_json(GRID), ["gen_kwargs.temperature=.nan"])
@example(as_json(GRID | {"models": [str(n) for n in range(300)], "seeds": list(range(300))}), [])
@example(LAUGHS, [])
@example("\ud83d", [])
def test_a_grid_is_planned_or_rejected(folder: Path, text: str, overrides: list[str]) -> None:
    from lceval.runs.sweep import grid
    from lceval.runs.sweep.plan import plan

    named = outcome(grid.read, put(folder / "grid.yaml", text), None, overrides)
    if named is None:
        return
    assert yaml_config.parse(grid.Grid, named[1].model_dump(), "again") == named[1]
    sweep = outcome(plan, named[1])
    for cell in sweep.cells if sweep else ():
        assert len(os.fsencode(cell.name)) < 255
        assert "/" not in cell.name


@examples(60)
@given(yaml_texts(VALID_RECIPE, RECIPE), settings_of("optim.learning_rate=1e-4", "lora=null", "data.datasets=[nqopen]"))
@example(as_json(VALID_RECIPE), ["optim.warmup=.nan"])
@example(as_json(VALID_RECIPE), ["optim.learning_rate=.inf"])
@example(as_json(VALID_RECIPE), ["model.shape.x=.nan"])
@example(as_json(VALID_RECIPE), ["grpo={top_p: .nan}", "compression_aware=null"])
@example(as_json(VALID_RECIPE), [f"seed=0x{'f' * 6000}"])
@example(as_json(VALID_RECIPE), ["seed=" + "[" * 2000])
@example(LAUGHS, [])
@example("\ud83d", [])
def test_a_training_recipe_is_valid_or_rejected(folder: Path, text: str, overrides: list[str]) -> None:
    from lceval.training import config

    recipe = outcome(config.read, str(put(folder / "recipe.yaml", text)), overrides)
    if recipe is not None:
        assert config.parse(recipe.model_dump(), "again") == recipe


@examples(60)
@given(yaml_texts(SCORER), settings_of("mlp=null", "linear.ridge=1e-2", "target=attention", "texts=null"))
@example(as_json(SCORER), ["floor=.nan"])
@example(as_json(SCORER), ["mlp=null", "linear.ridge=.inf"])
@example(as_json(SCORER), [f"seed=0x{'f' * 6000}"])
@example(LAUGHS, [])
def test_a_recipe_of_a_scorer_is_valid_or_rejected(folder: Path, text: str, overrides: list[str]) -> None:
    from lceval.training.scorers import spec

    recipe = outcome(spec.read, str(put(folder / "scorer.yaml", text)), overrides)
    if recipe is not None:
        assert spec.parse(recipe.model_dump(), "again") == recipe


@examples(60)
@given(JUNK | edited("ao_sft", "kvzip_mlp"))
@example("a" * 300)
def test_the_name_of_a_configuration_exists_or_is_rejected(folder: Path, name: str) -> None:
    from lceval.runs.sweep import grid
    from lceval.training import config
    from lceval.training.scorers import spec

    outcome(config.read, name)
    outcome(spec.read, name)
    outcome(grid.read, None, name)
    outcome(grid.read, Path(name), None)


# Options of `lceval run`

OPTIONS = {
    "--model_args": ["pretrained=no-such-folder,kv=snapkv:0.5", '{"pretrained": "x", "max_length": 64}', "dtype=x"],
    "--gen_kwargs": ["max_gen_toks=8,do_sample=true", '{"until": ["x"]}', "temperature=0.5"],
    "--metadata": ["context=rag,chunk=512", '{"context": "gold"}', "data_seed=7"],
    "--samples": ['{"lc_filings_ao_1k": [0, 2]}'],
    "--limit": ["8", "0.5"],
    "--seed": ["1", "1,2,3,4", "None"],
    "--tasks": ["lc_filings_ao_1k", "a,b"],
    "--batch_size": ["1", "auto"],
    "--num_fewshot": ["2"],
    "--model": ["lcft", "dummy", "hf"],
    "--apply_chat_template": ["false", "x"],
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model": "dummy",
    "model_args": {"pretrained": "no-such-folder", "kv": "full"},
    "tasks": ["lc_filings_ao_1k"],
    "gen_kwargs": {"max_gen_toks": 8},
    "metadata": {"context": "gold"},
    "apply_chat_template": False,
    "samples": {"lc_filings_ao_1k": [0]},
    "seed": [1, 2, 3, 4],
}


def options_of_run() -> st.SearchStrategy[list[str]]:
    option = st.sampled_from(sorted(OPTIONS)).flatmap(
        lambda name: edited(*OPTIONS[name]).map(lambda text: [name, text])
    )
    return st.lists(option, max_size=3).map(lambda pairs: [text for pair in pairs for text in pair])


def run_options(*options: str) -> list[str]:
    required = [
        "--output_path",
        "runs/x",
        "--tasks",
        "lc_filings_ao_1k",
        "--model",
        "dummy",
        "--apply_chat_template",
        "false",
    ]
    return [*required, *options]


@examples(60)
@given(options_of_run(), st.none() | yaml_texts(CONFIG))
@example(["--limit", "x"], None)
@example(["--limit", "nan"], None)
@example(["--limit", "-1"], None)
@example(["--seed", "-1"], None)
@example(["--samples", "no-such-file"], None)
@example(["--samples", "[1]"], None)
@example(["--samples", "a" * 300], None)
@example(["--samples", DEEP], None)
@example(["--model_args", "x={[]: 1}"], None)
@example(["--model_args", f"x={'-' * 50_000}1"], None)
@example([], "seed: [.inf]")
@example([], "tasks: !!int x")
@example([], f"model_args: {DEEP}")
@example(["--model", "lcft", "--apply_chat_template", "x", "--model_args", '{"pretrained": ["\\u0000"]}'], None)
def test_the_options_of_run_are_accepted_or_rejected(folder: Path, options: list[str], config: str | None) -> None:
    from lceval.runs.configuration import configure

    argv = run_options(*options)
    if config is not None:
        argv += ["--config", str(put(folder / "config.yaml", config))]
    configured = outcome(configure, argv)
    if configured is not None:
        assert configured.samples is None or all(isinstance(indices, list) for indices in configured.samples.values())
        assert configured.limit is None or 0 < configured.limit < float("inf")


ARGUMENTS = {"overlong": "error", "attn": "auto", "diagnose": "none", "query_aware": False, "prefill_chunk": 0}
ARGUMENTS |= {"prefix_cache_gib": 1.0, "batch_size": 1}


@examples(200)
@given(st.sampled_from(sorted(ARGUMENTS)), VALUES)
@example("prefix_cache_gib", float("nan"))
@example("prefix_cache_gib", 1.7e299)
@example("batch_size", "x")
@example("batch_size", DIGITS)
@example("batch_size", -1)
@example("overlong", LONG)
def test_a_model_argument_is_usable_or_rejected(name: str, value: Any) -> None:
    from lceval.models.arguments import check_arguments

    arguments = ARGUMENTS | {name: value}
    outcome(check_arguments, arguments)
    try:
        check_arguments(arguments)
    except LcevalError:
        return
    int(arguments["prefix_cache_gib"] * 2**30)  # as LCFT does
    assert int(arguments["batch_size"] or 1) > 0


# Rows of benchmarks and of training


@pytest.fixture(scope="module")
def words(folder: Path) -> str:
    """A tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with_words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    with_words.save_pretrained(folder / "words")
    return str(folder / "words")


def pool_records() -> dict[str, list[dict[str, Any]]]:
    """A pool of 90 invented passages with 24 questions, enough for contexts of 2k words."""
    passages = [
        {
            "pid": f"p{n}",
            "title": f"Town {n}",
            "text": " ".join([f"The mayor of town {n} is person{n}.", *(f"w{n}x{k}" for k in range(22))]),
        }
        for n in range(90)
    ]
    questions = [
        {"question": f"Who is the mayor of town {n}?", "answers": [f"person{n}"], "gold_pids": [f"p{n}"]}
        for n in range(24)
    ]
    return {"nq_open/questions.jsonl": questions, "nq_open/passages.jsonl": passages}


STORY = {
    "metadata": {"passage_id": "s1"},
    "document": "The ship sank. " * 40,
    "questions": [
        {"question_text": "What?", "question_number": 1, "responses": [{"response_text": "it sank"}]} for _ in range(2)
    ],
}
LIST = {"key": "k7", "value": "v7", "ordered_kv_records": [[f"k{n}", f"v{n}"] for n in range(12)]}
SOURCES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "lc_nqopen_ao_2k": pool_records(),
    "lc_kvlookup_ao_4k": {"kv_retrieval/kv_140_keys.jsonl": [LIST, LIST]},
    "lc_squality_sum": {"squality/squality_v1-3_dev.jsonl": [STORY, STORY]},
}
Lines = list[str | bytes]


@st.composite
def sources(draw: st.DrawFn) -> tuple[str, dict[str, Lines]]:
    """A task and its files, with up to two damaged lines."""
    task = draw(st.sampled_from(sorted(SOURCES)))
    files: dict[str, Lines] = {name: [*map(as_json, records)] for name, records in SOURCES[task].items()}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(files)))
        place = draw(st.integers(0, len(files[name]) - 1))
        record = SOURCES[task][name][place]
        files[name][place] = draw(damaged(record).map(as_json) | edited(as_json(record)) | st.binary(max_size=8))
    return task, files


def write_lines(file: Path, lines: Lines) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = [line if isinstance(line, bytes) else line.encode(errors="surrogatepass") for line in lines]
    return put(file, b"\n".join(encoded))


def pool_with(**changes: Any) -> tuple[str, dict[str, Lines]]:
    files = copy.deepcopy(SOURCES["lc_nqopen_ao_2k"])
    files["nq_open/questions.jsonl"][0] |= changes
    return "lc_nqopen_ao_2k", {name: [*map(as_json, records)] for name, records in files.items()}


@examples(25)
@given(sources())
@example(pool_with())
@example(pool_with(question="\ud83d"))
@example(pool_with(extra=LEVELS))
@example(("lc_nqopen_ao_2k", {"nq_open/questions.jsonl": [DEEP], "nq_open/passages.jsonl": [DEEP]}))
def test_benchmark_files_give_rows_or_an_error(folder: Path, words: str, source: tuple[str, dict[str, Lines]]) -> None:
    from lceval.tasks import catalogue
    from lceval.tasks.build import rows_of

    task, files = source
    root = fresh(folder / "data")
    for name, lines in files.items():
        write_lines(root / name, lines)
    shutil.rmtree(folder / "cache" / "rows", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCEVAL_DATA", str(root))
        rows = outcome(rows_of, catalogue.find(task), {"pretrained": words})
    assert rows is None or all(isinstance(row["question"], str) and row["id"] for row in rows)
    if source == pool_with():
        assert rows


@examples(100)
@given(
    damaged({"format": "", "rows": 1, "sha256": "", "inputs": {}}), damaged([{"id": "a", "target": "b"}]), st.booleans()
)
@example(DEEP, [], True)
@example({"format": LEVELS}, [], True)
@example({}, [LEVELS], True)
def test_a_file_of_training_rows_is_read_or_rejected(folder: Path, header: Any, rows: Any, matching: bool) -> None:
    from lceval.training import data

    body = "".join(as_json(row) + "\n" for row in rows) if isinstance(rows, list) else as_json(rows)
    if isinstance(header, dict):
        header = header | {"format": header.get("format") or data.FORMAT}
        if matching:
            header["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    first = header if isinstance(header, str) else as_json(header)
    outcome(data.read, put(folder / "rows.jsonl", f"{first}\n{body}"))


# Run folders

DATE = "2026-01-02T03-04-05"
TASK = "lc_filings_rj_1k"
METRICS = ["subem", "f1", "judge_sum"]
RUN: dict[str, Any] = {
    "status": "finished",
    "model": "lcft",
    "model_args": {"pretrained": "tiny", "kv": "full", "query_aware": True},
    "recipe": "full",
    "tasks": [TASK],
    "apply_chat_template": True,
    "chat_template_sha": "ab" * 32,
    "fingerprint": "cd",
    "identity": {},
    "samples": 6,
}
RESULTS: dict[str, Any] = {
    "configs": {TASK: {"metadata": {"headline": "subem"}, "metric_list": [{"metric": "subem"}]}},
    "versions": {TASK: "1.0"},
    "higher_is_better": {TASK: {"subem": True, "gold_nll": False}},
    "n-samples": {TASK: {"effective": 6}},
    "config": {"model": "lcft", "model_args": "pretrained=tiny,kv=full"},
    "chat_template_sha": "ab" * 32,
}


def sample_line(n: int, score: float) -> dict[str, Any]:
    return {
        "doc_id": n,
        "doc": {
            "id": f"q{n}",
            "cluster": f"c{n // 2}",
            "question": f"What is figure {n}?",
            "answers": [str(n)],
            "docs": [{"pid": "p0", "title": "", "text": f"Figure {n} is {n}."}],
            "gold_pids": ["p0"],
            "context": "x",
            "context_setting": "full",
            "source": "invented",
        },
        "arguments": {"gen_args_0": {"arg_0": "Where?", "arg_1": {"until": ["x"]}}},
        "target": str(n),
        "filtered_resps": [f"Document review: [DOC 0].\nThe answer is: {n}"],
        "filter": "none",
        "metrics": [*METRICS, "gold_nll", "kv"],
        "prompt_hash": f"{n:016x}",
        "subem": score,
        "f1": score / 2,
        "judge_sum": 2.0,
        "gold_nll": 0.5 + n,
        "kv_bytes": 100 + n,
        "kv_bytes_full": 200 + n,
        "kv": {
            "kv_dtype": "torch.float32",
            "prefill_tokens": 90,
            "prefill_s": 0.1,
            "decode_tokens": 4,
            "decode_s": 0.2,
            "kept_tokens": [{"min": 1, "max": 2}],
            "truncated": False,
            "status": "ok",
            "bytes_read_per_step": 9,
        },
        "verdict": {"judge": "rule", "revision": "1", "status": "judged", "grades": {"answer": 1}, "reply": "{}"},
    }


def files_of_run(recipe: str, scores: Sequence[float]) -> dict[str, Any]:
    """The parsed files of one run folder; a list is a JSON Lines file."""
    judged = [
        {"id": f"q{n}", "judge": "rule", "revision": "1", "status": "judged", "judge_sum": 3.0}
        for n in range(len(scores))
    ]
    return {
        "run.json": RUN | {"recipe": recipe},
        f"results_{DATE}.json": RESULTS,
        f"samples_{TASK}_{DATE}.jsonl": [sample_line(n, score) for n, score in enumerate(scores)],
        f"judged_{TASK}.jsonl": judged,
    }


SWEEP = {"full": files_of_run("full", [1, 1, 0, 1, 1, 0]), "snapkv": files_of_run("snapkv:0.5", [1, 0, 0, 1, 0.5, 0])}
Texts = dict[str, str | None]


def text_of(value: Any) -> str:
    return "".join(f"{as_json(line)}\n" for line in value) if isinstance(value, list) else as_json(value)


@st.composite
def damages(draw: st.DrawFn) -> Texts:
    """Up to three files of SWEEP, by path, with what is written instead; None deletes one."""
    texts: Texts = {}
    for _ in range(draw(st.integers(0, 3))):
        run = draw(st.sampled_from(sorted(SWEEP)))
        name = draw(st.sampled_from(sorted(SWEEP[run])))
        value = SWEEP[run][name]
        texts[f"{run}/{name}"] = draw(damaged(value).map(text_of) | edited(text_of(value)) | st.none())
    return texts


def write_sweep(root: Path, texts: Texts) -> Path:
    fresh(root)
    whole = {f"{run}/{name}": text_of(value) for run, files in SWEEP.items() for name, value in files.items()}
    for path, text in (whole | texts).items():
        (root / path).parent.mkdir(exist_ok=True)
        if text is not None:
            put(root / path, text)
    return root


def damage(name: str, line: int | None = None, **changes: Any) -> Texts:
    """A file of run snapkv with other values in it, or in one of its lines; `doc__id` is a member of `doc`."""
    value = copy.deepcopy(SWEEP["snapkv"][name])
    for path, change in changes.items():
        *parents, key = path.split("__")
        inside = value if line is None else value[line]
        for parent in parents:
            inside = inside[parent]
        inside[key] = change
    return {f"snapkv/{name}": text_of(value)}


def sample(**changes: Any) -> Texts:
    return damage(f"samples_{TASK}_{DATE}.jsonl", 0, **changes)


ONCE_FATAL = [
    sample(subem=HUGE),
    sample(subem=1.7e308),
    sample(metrics=3),
    sample(metrics=[["subem"], {}]),
    sample(kv_bytes_full=-1015),  # the sum is 0
    sample(kv__prefill_s=HUGE),
    sample(kv__kept_tokens=[{"min": 1, "max": "x"}]),
    sample(filtered_resps=["\ud83d"]),
    sample(verdict__grades=LEVELS),
    sample(doc=LEVELS),
    damage(f"judged_{TASK}.jsonl", 0, judge_sum=HUGE),
    damage("run.json", tasks=["x_" + DIGITS + "k"], status="running"),
    damage(f"results_{DATE}.json", configs={LONG: {}}),
    damage(f"results_{DATE}.json", configs={TASK: {"metric_list": [{"metric": []}]}}),
    damage(f"results_{DATE}.json", configs={TASK: {"metric_list": 3}}),
    damage("run.json", model="\ud83d\x1b[31m"),
]


def once_fatal(test: T) -> T:
    for texts in ONCE_FATAL:
        test = example(texts)(test)
    return test


@examples(25, 4000)
@given(damages())
@once_fatal
def test_damaged_run_folders_give_a_table_or_an_error(folder: Path, texts: Texts) -> None:
    from lceval.analysis.table import build, main, to_csv, to_html, to_json, to_latex, to_markdown, to_terminal
    from lceval.records.results import read_runs

    root = write_sweep(folder / "runs", texts)
    runs = outcome(read_runs, [root])
    table = None if runs is None else outcome(build, runs)  # which reads the verdicts
    if runs is None or table is None:
        assert outcome(main, [root]) is None
        return
    for render in (to_csv, to_html, to_json, to_latex, to_markdown, to_terminal):
        assert render(table)
    for by in ("suite", "length"):
        assert to_json(build(runs, by))


@examples(25, 4000)
@given(damages())
@once_fatal
def test_damaged_run_folders_are_compared_and_reported_or_rejected(folder: Path, texts: Texts) -> None:
    from lceval.analysis.check import command
    from lceval.analysis.report import page, payload
    from lceval.records.results import read_runs

    root = write_sweep(folder / "runs", texts)
    pair = [root / "full", root / "snapkv"]
    files = {"junit": folder / "junit.xml", "markdown": folder / "check.md"}
    checked = outcome(command.run, pair, gate=0.1, as_json=True, **files)
    assert checked is None or checked[1] in (0, 1, 5)
    outcome(command.run, pair, gate=0.1, metric="gold_nll")
    if outcome(command.run, pair[1:], gate=None, write_baseline=folder / "baseline.json") is not None:
        command.run([folder / "baseline.json", pair[1]], gate=0.1)
    runs = outcome(read_runs, [root])
    content = None if runs is None else outcome(payload.collect, runs)
    if content is not None:
        assert page.render(content)


def baseline() -> dict[str, Any]:
    item = {"id": "a", "cluster": "c", "prompt": "p", "answer": "x", "values": {"subem": 1.0}}
    task = {"task": "t", "version": None, "headline": "subem", "filter": None, "lower_is_better": [], "sources": []}
    tasks = [task | {"samples": [item, item | {"id": "b"}]}]
    run = {"label": "l", "model": "m", "pretrained": None, "peft": None, "recipe": "full", "fingerprint": None}
    return {"format": "lceval-baseline", "format_version": 1, **run, "template": "off", "tasks": tasks}


def baseline_with(**changes: Any) -> Any:
    return baseline() | changes


@examples(100)
@given(damaged(baseline()).map(as_json) | edited(as_json(baseline())))
@example(as_json(baseline_with(tasks=[])))
@example(as_json(baseline_with(tasks=[baseline()["tasks"][0] | {"samples": []}])))
@example(DEEP)
@example('{"format": ' + "[" * 500 + "]" * 500 + "}")
def test_a_damaged_baseline_is_compared_or_rejected(folder: Path, text: str) -> None:
    from lceval.analysis.check import command

    good, bad = put(folder / "good.json", as_json(baseline())), put(folder / "bad.json", text)
    for pair in ([good, bad], [bad, good], [bad, bad]):
        outcome(command.run, pair, gate=0.1)
    outcome(command.run, [bad], gate=0.3, plan=True)


@examples(100)
@given(NUMBERS.map(str).map(lambda text: float(text) if len(text) < 50 else 1e300), st.floats())
@example(1e-20, 0.1)
@example(5e-324, 0.1)
@example(0.5, float("nan"))
def test_a_gate_has_a_plan_or_is_rejected(gate: float, discordance: float) -> None:
    from lceval.analysis.check import sample_size

    planned = outcome(sample_size.plan, gate, discordance)
    assert planned is None or sample_size.render(planned)


@examples(60)
@given(
    edited(as_json({"value": "x", "meta": {}})), st.none() | st.integers(0, 8191), st.binary(min_size=1, max_size=40)
)
@example("x", None, b"-")
@example('{"value": 1}', None, b"-")
@example("{}", 0, b"no database")
@example('{"value": 1}', 3920, b"\x80")
def test_a_damaged_store_of_responses_is_read_or_rejected(
    folder: Path, value: str, at: int | None, bytes_: bytes
) -> None:
    from contextlib import closing

    from lceval.records.responses import Responses

    file = fresh(folder / "store") / "responses.sqlite"
    with closing(Responses(file)):
        pass
    with closing(sqlite3.connect(file)) as database:
        text = value.encode(errors="replace").decode()
        database.execute("INSERT INTO response VALUES ('key', 0, ?)", (text,))
        database.commit()
    if at is not None:
        overwrite(file, at, bytes_)

    def find() -> list[Any]:
        with closing(Responses(file)) as store:
            return store.find("key")

    outcome(find)


def overwrite(file: Path, at: int, bytes_: bytes) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:at] + bytes_ + content[at + len(bytes_) :])


# Judges

REPLIES = (
    '{"reasoning": 1, "grounding": 0, "answer": 1}',
    "reasoning: 1\ngrounding: 1\n**answer**: 0",
    'Thinking <think>{"answer": 1}</think> ```json\n{"verdict": "correct"}\n```',
    '{"letter": "A"} {"relevant": 1}',
    "Explained. Rating: [[85]]",
    "[3] [[.5]]",
)


@examples(200)
@given(edited(*REPLIES) | damaged({"reasoning": 1, "grounding": 0, "answer": 1, "verdict": "correct"}).map(as_json))
@example("[[" + "1" * 100_000)
@example("rating: [" + "1" * 100_000)
@example("<think>" * 14_000)
@example('{"a":' * 20_000 + "}")
def test_a_reply_has_valid_grades_or_none(reply: str) -> None:
    from lceval.judge import rubrics, verdicts

    for name in rubrics.names():
        rubric = rubrics.load(name)
        grades = verdicts.parse(rubric, reply)
        if grades is not None and rubric.reply == "rating":
            assert 1 <= float(grades["rating"]) <= 100
        elif grades is not None:
            assert {*grades} == {*rubric.labels}
            assert all(grades[field] in labels for field, labels in rubric.labels.items())


@examples(40)
@given(st.integers(0, 12_287), st.binary(min_size=1, max_size=40))
@example(0, b"no database")
@example(3900, b"\x80" * 40)
def test_a_damaged_store_of_replies_is_read_or_rejected(folder: Path, at: int, bytes_: bytes) -> None:
    from lceval.judge.replies import Key, Reply, Store

    file, key = fresh(folder / "store") / "replies.sqlite", Key("judge", "", "rj@1", "p", 0)
    with Store(file) as store:
        store.put(key, Reply("a reply"))
    overwrite(file, at, bytes_)

    def reopened() -> Reply | None:
        with Store(file) as store:
            store.put(Key("judge", "", "rj@1", "q", 0), Reply("another"))
            return store.get(key)

    outcome(reopened)


COMPLETION: dict[str, Any] = {
    "id": "x",
    "object": "chat.completion",
    "created": 0,
    "model": "m-1",
    "system_fingerprint": "fp",
    "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": REPLIES[0]}}],
}


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[tuple[Any, Callable[[int, bytes], None]]]:
    """A judge behind a local endpoint, and a function that sets the status and body of its next answers."""
    pytest.importorskip("openai")
    from lceval.judge import backends

    answer = [200, b""]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = answer
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    judge = backends.make(f"openai:m@http://127.0.0.1:{server.server_address[1]}/v1", timeout=10)

    def serve(status: int, body: bytes) -> None:
        answer[:] = [status, body]

    yield judge, serve
    judge.close()
    server.shutdown()
    server.server_close()


def completion_with(content: Any = REPLIES[0], **changes: Any) -> str:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return as_json(COMPLETION | {"choices": [choice], **changes})


@examples(60)
@given(
    st.sampled_from([200, 200, 200, 200, 400, 401, 429, 500, 302]),
    damaged(COMPLETION).map(as_json) | edited(as_json(COMPLETION)),
)
@example(200, completion_with())
@example(200, completion_with("\ud83d"))
@example(200, completion_with([{"type": "text", "text": "x"}]))
@example(200, completion_with(model=3))
@example(200, completion_with(usage={"prompt_tokens": "x", "completion_tokens": 1}))
@example(200, completion_with(usage={"prompt_tokens": HUGE, "completion_tokens": 1}))
def test_a_body_of_an_endpoint_is_a_reply_or_a_failed_call(
    folder: Path, endpoint: tuple[Any, Callable[[int, bytes], None]], status: int, body: str
) -> None:
    from lceval.judge import rubrics, verdicts
    from lceval.judge.protocol import RefusedError, TryAgainError
    from lceval.judge.replies import Key, Store

    judge, serve = endpoint
    serve(status, body.encode(errors="surrogatepass"))
    rubric, case = rubrics.load("rj"), rubrics.Case("What?", ("1",), "1")
    reply, reason = None, ""
    try:
        reply = outcome(judge.ask, rubric, case, rubrics.render(rubric, case))
    except (TryAgainError, RefusedError) as error:
        reason = str(error)
    assert "\n" not in reason
    assert len(reason) < 1000
    if reply is None:
        return
    key = Key("j", "", rubric.key, hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest(), 0)
    with Store(folder / "replies.sqlite") as store:
        store.put(key, reply)
        assert store.get(key) == reply
    verdicts.parse(rubric, reply.text)
    if status == 200 and body == completion_with():
        assert reply.tokens_in == 100


# Adapters

SMALL = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
# Neither of these sizes allocates much memory.
SIZES = st.sampled_from([0, -1, 1, 3, 2**62, HUGE])


@pytest.fixture(scope="module")
def adapter(folder: Path, words: str) -> tuple[str, dict[str, Any], bytes]:
    """A random model, and the configuration and the weights of an adapter for it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, bos_token_id=1, eos_token_id=1, pad_token_id=1))
    base = str(folder / "base")
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(words).save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return base, saved, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


Edit = Callable[[dict[str, Any]], None]


@st.composite
def weight_edits(draw: st.DrawFn) -> tuple[str, int, bytes]:
    """A kind of damage, a place and bytes."""
    kind = draw(st.sampled_from(["none", "cut", "bytes", "shape", "missing", "renamed", "dtype", "empty", "absent"]))
    return kind, draw(st.integers(0, 2000)), draw(st.binary(min_size=1, max_size=8))


def damaged_weights(file: Path, weights: bytes, edit: tuple[str, int, bytes]) -> None:
    import torch
    from safetensors.torch import load, save_file

    kind, at, bytes_ = edit
    tensors = load(weights)
    name = sorted(tensors)[at % len(tensors)]
    match kind:
        case "cut":
            file.write_bytes(weights[:at])
        case "bytes":
            file.write_bytes(weights[:at] + bytes_ + weights[at + len(bytes_) :])
        case "shape":
            save_file(tensors | {name: torch.zeros(at % 5, 3)}, file)
        case "missing":
            del tensors[name]
            save_file(tensors, file)
        case "renamed":
            tensors["x" + name] = tensors.pop(name)
            save_file(tensors, file)
        case "dtype":
            save_file(tensors | {name: tensors[name].to(torch.int64)}, file)
        case "empty":
            save_file({}, file)
        case "absent":
            pass
        case _:
            file.write_bytes(weights)


@examples(10, 500)
@given(st.data(), weight_edits())
def test_a_damaged_adapter_loads_whole_or_is_rejected(
    folder: Path, adapter: tuple[str, dict[str, Any], bytes], data: st.DataObject, edit: tuple[str, int, bytes]
) -> None:
    base, config, weights = adapter
    text = as_json(config)
    if data.draw(st.booleans()):
        values = SIZES | JUNK | st.none() | st.booleans() | st.sampled_from([[], {}, ["x"], LEVELS])
        text = data.draw(damaged(config, values).map(as_json) | edited(text))
    load_adapter(folder, base, text, weights, edit)


def load_adapter(folder: Path, base: str, config: str, weights: bytes, edit: tuple[str, int, bytes]) -> Any:
    from lceval.models.lcft import LCFT

    broken = fresh(folder / "broken")
    put(broken / "adapter_config.json", config)
    damaged_weights(broken / "adapter_model.safetensors", weights, edit)
    return outcome(LCFT, base, peft=str(broken), device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", ["missing", "renamed", "empty", "absent", "cut", "shape"])
def test_an_adapter_without_all_of_its_weights_is_not_the_base_model(
    folder: Path, adapter: tuple[str, dict[str, Any], bytes], kind: str
) -> None:
    base, config, weights = adapter
    assert load_adapter(folder, base, as_json(config), weights, ("none", 0, b"")) is not None
    assert load_adapter(folder, base, as_json(config), weights, (kind, 77, b"")) is None


# Scorers


@pytest.fixture(scope="module")
def scorer_weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """The configuration and the weights of a small scorer."""
    folder = tmp_path_factory.mktemp("scorer")
    random_scorer(8, 2, 3, 4).save(folder)
    return json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()


@examples(40)
@given(st.data(), weight_edits())
def test_a_damaged_scorer_is_loaded_or_rejected(
    folder: Path, scorer_weights: tuple[dict[str, Any], bytes], data: st.DataObject, edit: tuple[str, int, bytes]
) -> None:
    import torch

    from lceval.models import scorer

    (config, weights), broken = scorer_weights, fresh(folder / "scorer")
    text = as_json(config)
    if data.draw(st.booleans()):
        text = data.draw(damaged(config, SIZES | JUNK | st.none() | st.booleans()).map(as_json) | edited(text))
    put(broken / "config.json", text)
    damaged_weights(broken / "model.safetensors", weights, edit)
    loaded = outcome(scorer.load, str(broken))
    if loaded is not None:
        assert loaded.score(2, torch.ones(1, 5, loaded.input_dim)).shape == (1, loaded.output_dim, 5)


# Predictions

PREDICTIONS = [
    {"id": "q0", "prediction": "Answer: 3", "ground_truth": ["3"]},
    {"id": 1, "prediction": "", "ground_truth": "x"},
]
QUERIES = [{"qid": "a", "answers": ["x", "y"]}, {"qid": "b", "answers": [["d1", 1], ["d2", 1]]}]
OUTPUTS = [{"qid": "a", "model_outputs": [["x"]]}, {"qid": "b", "model_outputs": [["d1"]]}]


def jsonl(*records: dict[str, Any]) -> st.SearchStrategy[str]:
    return damaged([*records]).map(text_of) | edited(text_of([*records]))


@examples(100)
@given(jsonl(*PREDICTIONS), st.sampled_from([None, "ground_truth", "rows", "x"]))
@example(DEEP, None)
@example(text_of([{"id": "a", "prediction": "<think>" * 14_000, "ground_truth": "x"}]), "ground_truth")
def test_predictions_are_scored_or_rejected(folder: Path, text: str, by: str | None) -> None:
    from lceval.analysis.predictions import render, score

    file = put(folder / "predictions.jsonl", text)
    report = outcome(score, "lc_filings_ao_1k", file, by=by)
    assert report is None or render(report)


@examples(100)
@given(st.sampled_from(["loft_retrieval", "loft_rag", "loft_rag_multi"]), jsonl(*OUTPUTS), jsonl(*QUERIES))
def test_predictions_of_loft_are_scored_or_rejected(folder: Path, task: str, outputs: str, queries: str) -> None:
    from lceval.analysis.predictions import render, score

    report = outcome(score, task, put(folder / "outputs.jsonl", outputs), gold=put(folder / "queries.jsonl", queries))
    assert report is None or render(report)


# Commands

ARGV = [
    ["table", "../../runs/full", "../../runs/snapkv", "--format", "markdown", "--by", "suite"],
    ["table", "../../runs/full", "--format", "csv", "--reference", "paper-table1"],
    ["table", "../../runs", "--require-kappa", "0.5", "--json"],
    ["check", "../../runs/full", "../../runs/snapkv", "--gate", "0.05", "--metric", "f1", "--junit", "j.xml"],
    ["check", "../../runs/full", "../../runs/snapkv", "--gate", "0.05", "--markdown", "m.md", "--json"],
    ["check", "--plan", "--gate", "0.1", "--discordance", "0.2", "../../runs/full", "--inconclusive", "warn"],
    ["check", "../../runs/full", "--write-baseline", "b.json"],
    ["report", "../../runs", "--output", "r.html", "--json"],
    ["report", "../../runs", "--site", "site"],
    ["score", "lc_filings_ao_1k", "../../predictions.jsonl", "--by", "ground_truth", "--metadata", "data_seed=7"],
    ["score", "loft_rag", "../../outputs.jsonl", "--gold", "../../queries.jsonl", "--json"],
    ["tasks", "lc_nq*", "--json"],
    ["tasks", "--groups", "filings"],
    ["data", "list"],
    ["data", "fetch", "no-such-dataset", "--to", "x"],
    ["methods", "snapkv", "--json"],
    ["model", "smollm2"],
    ["sweep", "../../grid.yaml", "--set", "limit=2", "--output_path", "runs", "--json"],
    ["sweep", "--preset", "mini", "--engine", "local", "--workers", "2", "--address", "x:1"],
    ["judge", "../../runs/full", "--judge", "rule", "--replies", "replies.sqlite", "--calls", "3"],
    ["judge", "../../runs/full", "--judge", "rule", "--replies", "replies.sqlite", "--max-characters", "50"],
    ["judge", "calibrate", "--judge", "rule", "--data", "../../predictions.jsonl", "--limit", "3"],
]  # fmt: skip
# What a shell can pass: no NUL, and of surrogates those of invalid bytes.
PASSABLE = st.one_of(
    st.sampled_from(
        [text for text in NASTY if not {"\0", "\ud83d"} & {*text} and len(text) < 100_000 and ".." not in text]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=8),
    st.just("a" * 300),
)


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command line with up to three arguments deleted, repeated, swapped or replaced."""
    argv = list(draw(st.sampled_from(ARGV)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(1, max(1, len(argv) - 1)))
        other = draw(st.integers(1, max(1, len(argv) - 1)))
        match draw(st.sampled_from(["replace", "replace", "insert", "delete", "repeat", "swap"])):
            case "replace":
                argv[place : place + 1] = [draw(PASSABLE)]
            case "insert":
                argv.insert(place, draw(PASSABLE | st.sampled_from(["--json", "--help", "--by", "--limit", "--gate"])))
            case "delete":
                del argv[place : place + 1]
            case "repeat":
                argv[place:place] = argv[place : place + 2]
            case _ if max(place, other) < len(argv):
                argv[place], argv[other] = argv[other], argv[place]
    # Nothing is downloaded or run.
    if argv[0] == "sweep":
        argv.insert(1, "--dry-run")
    return argv


def run_command(argv: list[str]) -> tuple[int, str, str]:
    """The exit code, and what is printed, by streams with the error handlers of Python's own."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=e) for e in ("strict", "backslashreplace"))
    with redirect_stdout(out), redirect_stderr(err):
        code = invoke(argv)
    for stream in (out, err):
        stream.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()  # type: ignore[attr-defined]


@examples(50, 5000)
@given(command_lines(), damages())
@example(["table", "a" * 300], {})
@example(["check", "a" * 300, "b", "--gate", "0.1"], {})
@example(["check", "--plan", "--gate", "1e-20"], {})
@example(["report", "../../runs", "--output", "a" * 300], {})
@example(["sweep", "--dry-run", "../../grid.yaml", "--output_path", "a" * 300], {})
@example(["table", "../../runs"], damage("run.json", model="\ud83d"))
@example(["score", "lc_filings_ao_1k", "../../predictions.jsonl", "--metadata", f"a={DIGITS}"], {})
@example(["sweep", "--dry-run", "../../grid.yaml", "--set", f"models=[{'m' * 300}]"], {})
@example(["sweep", "--dry-run", "../../grid.yaml", "--set", 'models=["\\uD83D"]'], {})
@example(["judge", "../../runs/full", "--judge", "rule", "--replies", "/dev/null/x"], {})
@example(["judge", "../../runs/full", "--judge", "rule", "--replies", ""], {})
@example(["judge", "../../runs/snapkv", "--judge", "rule", "--replies", "r"], sample(doc__answers=[3]))
@example(["judge", "../../runs/snapkv", "--judge", "rule", "--replies", "r"], sample(doc__docs=3))
@example(["judge", "../../runs/snapkv", "--judge", "rule", "--replies", "r"], sample(subem=HUGE))
@example(["data"], {})
def test_a_command_line_ends_with_a_documented_code_and_one_line(folder: Path, argv: list[str], texts: Texts) -> None:
    write_sweep(folder / "runs", texts)
    put(folder / "predictions.jsonl", text_of(PREDICTIONS))
    put(folder / "outputs.jsonl", text_of(OUTPUTS))
    put(folder / "queries.jsonl", text_of(QUERIES))
    put(folder / "grid.yaml", as_json(GRID))
    fresh(folder / "here" / "below")
    os.chdir(folder / "here" / "below")
    code, _, err = run_command(argv)
    assert code in {0, 1, 2, 3, 4, 5}
    assert "lceval: error: unexpected" not in err
    last = err.rstrip("\n").split("\n")[-1]
    if code in (2, 3, 4):
        assert last.startswith("lceval: error: ")
        assert len(last) < 1100
    # Nothing is written outside the current folder.
    assert {entry.name for entry in (folder / "here").iterdir()} == {"below"}


@examples(40, 2000)
@given(
    st.dictionaries(
        st.sampled_from(["run.json", f"samples_t_{DATE}.jsonl"]),
        edited(text_of([RUN]), as_json({"status": "finished"})),
    )
)
@example({"run.json": "{"})
@example({"run.json": "[]"})
@example(
    {"run.json": '{"status": "finished"}', f"samples_t_{DATE}.jsonl": '{"kv": {"prefill_s": 1, "prefill_tokens": "x"}}'}
)
def test_a_sweep_is_planned_over_damaged_run_folders(folder: Path, files: Texts) -> None:
    from lceval.runs.sweep import command, grid, plan

    file = put(folder / "grid.yaml", as_json({"models": ["smollm2-135m"], "tasks": ["lc_filings_ao_1k"]}))
    (cell,) = plan.plan(grid.read(file, None)[1]).cells
    inside = fresh(folder / "sweep") / cell.name
    inside.mkdir()
    for name, text in files.items():
        put(inside / name, text)
    outcome(command.run, file, None, [], folder / "sweep", dry_run=True, as_json=False)


@examples(40, 2000)
@given(damaged(RUN).map(as_json) | edited(as_json(RUN)))
@example("{")
@example("{}")
@example('{"status": "finished", "identity": {}}')
def test_a_run_is_not_resumed_from_a_damaged_record(folder: Path, text: str) -> None:
    from lceval.runs.folder import opened

    inside = fresh(folder / "resumed")
    put(inside / "run.json", text)

    def start() -> None:
        with opened(["--model", "dummy", "--tasks", "lc_filings_ao_1k", "--output_path", str(inside)]) as open_run:
            assert open_run.finished is None or open_run.finished.samples == 6

    outcome(start)
