"""The documentation against the code: the example of a new policy is run, and tables match the methods."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import llama
from torch import Tensor

from lceval.core.errors import UserError
from lceval.models import attention, policies, recipe
from lceval.models.compressed import CompressedContext
from lceval.models.engine import Engine
from lceval.models.lcft import LCFT
from lceval.models.policies import EVICTORS, QUANTIZERS, SPARSE_ATTENTION, LayerView, Quantizer, StatsSpec
from lceval.models.policies.quantizer import BITS, NAMES
from lceval.models.reconstruction import Repetition
from lceval.runs.sweep.grid import read as read_grid

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
STUDIES = ROOT / "studies"
METHODS, ADDING, REFERENCE = (DOCS / f"{name}.md" for name in ("methods", "adding-a-policy", "reference"))
LAYERS, HEADS, KV_HEADS, TOKENS = 3, 6, 2, 101


def table(text: str) -> dict[str, str]:
    """Rows of all tables by their first cell without backticks; a cell of several names is listed under each."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            first = line.split(" | ")[0]
            rows |= dict.fromkeys(re.findall(r"`(\w+)`", first), line)
    return rows


def keys(cls: Any) -> dict[str, Any]:
    """The keys of a recipe with their defaults."""
    fields = [
        f for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING and f.metadata.get("key", True)
    ]
    defaults = {f.name: f.default for f in fields}
    return defaults | ({"of": recipe.DEFAULT_OF} if issubclass(cls, policies.Wrapper) else {})


def wrong(text: str) -> list[str]:
    """The differences between the tables of methods.md and the methods."""
    rows, differences = table(text), []
    methods: dict[str, Any] = {**EVICTORS, **SPARSE_ATTENTION, "fp8": QUANTIZERS["fp8"]}
    for name, bits in NAMES.items():
        methods[f"int{bits[0]}" if bits[0] == bits[1] else "kvAvB"] = Quantizer
        if not all(re.search(rf"\b{b}\b", rows.get("kvAvB", "")) for b in bits):
            differences.append(f"{name}: its bits")
    for name, cls in methods.items():
        if name not in rows:
            differences.append(f"{name}: missing")
            continue
        documented = dict(re.findall(r"`(\w+)` \(([^)]*)\)", rows[name].split(" | ")[1]))
        # A default that depends on the rest of the recipe is described in words.
        defaults = {k: documented.get(k) if v is None else recipe.spelled(v) for k, v in keys(cls).items()}
        differences += [f"{name}: {key}" for key, _ in documented.items() ^ defaults.items()]
    return differences + [f"{name}: no such method" for name in rows if name not in methods]


def test_every_method_and_every_key_with_its_default_is_in_the_tables() -> None:
    assert wrong(METHODS.read_text()) == []


@pytest.mark.parametrize(
    ("before", "after", "differences"),
    [
        ("| `tova` |", "| `tovo` |", ["tova: missing", "tovo: no such method"]),
        ("`pool` (5)", "`pool` (7)", ["snapkv: pool", "pyramidkv: pool"]),
        ("`floor` (0.2), ", "", ["adakv: floor"]),
        ("`of` (snapkv)", "`of` (knorm)", ["adakv: of"]),
        ("`residual` (128)", "`residual` (64)", ["int8: residual", "kvAvB: residual"]),
        ("16, 8, 4 or 2", "16, 8 or 4", ["kv8v2: its bits"]),
        ("`int2`, ", "", ["int2: missing"]),
        ("| `knorm` | |", "| `knorm` | `window` (64) |", ["knorm: window"]),
    ],
)
def test_a_wrong_table_is_detected(before: str, after: str, differences: list[str]) -> None:
    text = METHODS.read_text()
    assert before in text
    assert {*differences} <= {*wrong(text.replace(before, after))}


@pytest.mark.parametrize("document", [METHODS, ADDING, REFERENCE], ids=lambda d: d.name)
def test_every_recipe_of_the_page_is_in_canonical_form(document: Path, added: Added) -> None:
    part = r"\w+(:([\d.]+|\w+=[\w.-]+))*"
    spans = re.findall(r"`([^`\s]+)`", document.read_text())
    recipes = [text for text in spans if re.search("[:+]", text) and re.fullmatch(rf"{part}(\+{part})*", text)]
    assert recipes
    for text in recipes:
        assert str(added.recipe.parse(text)) == text


def test_the_settings_of_published_results_can_be_pasted() -> None:
    text = METHODS.read_text()
    section = text[text.index("### Settings of published results") :].partition("\n### ")[0]
    recipes = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert {"snapkv", "pyramidkv", "adakv", "lacache"} <= {text.partition(":")[0] for text in recipes}
    for text in recipes:
        assert str(recipe.parse(text)) == text


def test_the_reference_names_every_method() -> None:
    text = REFERENCE.read_text()
    for name in (*EVICTORS, *SPARSE_ATTENTION, *(f"int{b}" for b in BITS if b != 16), "kvAvB", "fp8"):
        assert f"`{name}`" in text, name


def test_every_model_argument_is_in_the_reference_with_its_default_and_its_choices() -> None:
    rows, refused = table(REFERENCE.read_text()), set()
    for name, argument in inspect.signature(LCFT.__init__).parameters.items():
        if name in ("self", "kwargs"):
            continue
        assert name in rows, name
        default = "" if argument.default is inspect.Parameter.empty else f"`{argument.default}`"
        assert rows[name].split("|")[2].strip() == default, name
        if isinstance(argument.default, str) and name not in ("kv", "context_from", "prefill_chunk"):
            # Refused before anything is loaded, and the refusal says what is allowed.
            with pytest.raises(UserError, match=f"bad model argument {name}=.*one of") as refusal:
                LCFT("no-such-model", **{name: "no-such-choice"})  # type: ignore[arg-type]
            choices = str(refusal.value).split("one of ")[1].split(", ")
            assert len(choices) > 1
            assert all(f"`{choice}`" in rows[name] for choice in choices), name
            refused.add(name)
    assert refused == {"overlong", "attn", "diagnose", "budget"}


def test_the_page_names_all_inputs_of_a_policy() -> None:
    text = ADDING.read_text()
    for field in dataclasses.fields(LayerView):
        assert f"`{field.name}`" in text, field.name
    for field in dataclasses.fields(StatsSpec):
        assert f"`{field.name}=" in text, field.name


# The example of docs/adding-a-policy.md ---------------------------------------------------------------------------


@dataclasses.dataclass
class Added:
    """The page's policy: its name, its class, and `models/recipe.py` with the name registered."""

    name: str
    cls: type[policies.Evictor]
    recipe: Any


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Added:
    """Follow the page: one file in models/policies, one line in EVICTORS; undone after the test."""
    text = ADDING.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (file,) = re.findall(r"`models/policies/(\w+)\.py`:\n\n```python", text)
    (line,) = re.findall(r"```\n +\"(\w+)\": (\w+),\n```", text)
    module = ModuleType(f"lceval.models.policies.{file}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, f"{file}.py", "exec"), module.__dict__)
    name, cls = line[0], getattr(module, line[1])
    assert name not in EVICTORS
    monkeypatch.setitem(EVICTORS, name, cls)
    # A second copy of the module, which reads its names from EVICTORS on import; the first stays unchanged.
    spec = importlib.util.spec_from_file_location("recipe_with_the_new_policy", recipe.__file__)
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copied)
    spec.loader.exec_module(copied)
    return Added(name, cls, copied)


def test_the_new_name_is_part_of_the_grammar(added: Added) -> None:
    parse, name = added.recipe.parse, added.name
    for text in (f"{name}:0.25", f"{name}:2048:sinks=8", f"adakv:0.25:of={name}:sinks=8+int4", f"{name}:0.5+fier:0.1"):
        assert str(parse(text)) == text
        assert parse(str(parse(text))) == parse(text)
    assert str(parse(f"{name}:0.250:sinks=4")) == f"{name}:0.25"
    assert parse(f"{name}:0.25").expanded()["evict"] == {"name": name, "amount": 0.25, "sinks": 4}
    assert len({parse(f"{name}:0.25"), parse(f"{name}:0.25:sinks=4"), parse(f"{name}:0.5")}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vapt:0.25", "did you mean 'vatp'"),
        ("vatp:0.25:sink=2", "did you mean 'sinks'"),
        ("vatp:0.25:sinks=-1", "bad KV recipe 'vatp:0.25:sinks=-1': sinks must be at least 0"),
        ("vatp:0.25:sinks=few", "sinks='few' is not of type int"),
    ],
)
def test_the_new_policy_refuses_bad_recipes_in_one_line(added: Added, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        added.recipe.parse(text)


def test_the_new_name_is_removed_after_the_test() -> None:
    assert "vatp" not in EVICTORS
    assert "vatp" not in recipe.NAMES


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llama(num_hidden_layers=LAYERS)


def definition(model: Any, ids: Tensor, layer: int) -> list[list[float]]:
    """The docstring's score of every token, per KV head, from transformers' own attention weights and values."""
    values = {}
    hook = model.model.layers[layer].self_attn.v_proj.register_forward_hook(lambda _m, _i, out: values.update(v=out))
    model.set_attn_implementation("eager")
    try:
        weights = model(ids, use_cache=False, output_attentions=True).attentions[layer]
    finally:
        hook.remove()
    v = values["v"].view(ids.shape[1], KV_HEADS, -1)
    group = HEADS // KV_HEADS
    return [
        [
            float(weights[0, head * group : (head + 1) * group, :, i].sum()) / group * float(v[i, head].abs().sum())
            for i in range(ids.shape[1])
        ]
        for head in range(KV_HEADS)
    ]


def compressed(model: Any, ids: Tensor, kv: Any, chunk: int = 0) -> CompressedContext:
    model.set_attn_implementation(attention.register())
    engine = Engine(model, model, chunk=chunk, kernels=False, autocast=nullcontext, repetition=Repetition((5,), (7,)))
    return engine.prefill(ids[0].tolist(), kv.stats_spec).compress(kv, consume=True)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [0, 17])
@pytest.mark.parametrize(
    ("rest", "budget", "sinks"), [("0.25", 25, 4), ("33", 33, 4), ("3", 3, 4), ("33:sinks=30", 33, 30)]
)
def test_the_new_policy_keeps_the_tokens_of_its_definition(
    tiny: Any, added: Added, rest: str, budget: int, sinks: int, chunk: int
) -> None:
    ids = torch.randint(0, 99, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    context = compressed(tiny, ids, added.recipe.parse(f"{added.name}:{rest}"), chunk)
    for layer in range(LAYERS):
        for head, scores in enumerate(definition(tiny, ids, layer)):
            best = sorted(range(sinks, TOKENS), key=lambda i: -scores[i])
            expected = sorted([*range(sinks), *best][:budget])
            assert context.layers[layer].kept_positions(0, head).tolist() == expected
    assert context.kept_bytes == LAYERS * KV_HEADS * budget * (2 * 16 * 4 + 4)


@torch.inference_mode()
def test_the_new_policy_combines_with_the_other_axes_and_adakv(tiny: Any, added: Added) -> None:
    ids = torch.randint(0, 99, (1, 200), generator=torch.Generator().manual_seed(2))
    for text in (f"{added.name}:150+int4:residual=16+fier:0.2", f"adakv:150:of={added.name}", f"{added.name}:1.0"):
        context = compressed(tiny, ids, added.recipe.parse(text))
        slots = 200 if text.endswith("1.0") else 150
        assert [sum(layer.counts) for layer in context.layers] == [KV_HEADS * slots] * LAYERS
        logits = tiny(torch.randint(0, 99, (1, 5)), cache=context.fork(5)).logits
        assert logits.isfinite().all()


def test_the_tables_on_contexts_are_computed_from_their_samples(study_of: Callable[[str], ModuleType]) -> None:
    study = study_of("contexts")
    page = (DOCS / "studies" / "contexts-tables.md").read_text()
    assert page.endswith(study.MARK + study.tables())
    for name, (task, contexts, settings, _) in study.STUDIES.items():
        assert f"## {task}\n\n{study.table(name)}" in page
        for context in settings:
            rows = study.samples(name, context).values()
            assert len(rows) >= 40
            assert len({row["cluster"] for row in rows}) == contexts


def test_the_tables_on_methods_are_computed_from_their_samples(study_of: Callable[[str], ModuleType]) -> None:
    study = study_of("methods")
    page = (DOCS / "studies" / "methods-tables.md").read_text()
    assert page.endswith(study.MARK + study.tables())
    for part, (recipes, _, contexts) in study.PARTS.items():
        for name, count in contexts.items():
            by_recipe = study.samples(name, part)
            assert {*by_recipe} == {str(recipe.parse(text)) for text in ("full", *recipes)}
            for rows in by_recipe.values():
                assert len({row["cluster"] for row in rows.values()}) == count
            # Both tasks have 40 questions: four on each of 10 contexts, or one on each of 40.
            assert {len(rows) for rows in by_recipe.values()} == {count * (4 if name == "nqopen" else 1)}
    intervals = re.findall(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]", (DOCS / "studies" / "methods.md").read_text())
    assert len(intervals) >= 70
    assert all(interval in page for interval in intervals)


@pytest.mark.parametrize("name", ["mini", "tuned"])
def test_the_tables_of_sweeps_are_computed_from_their_rows(name: str, study_of: Callable[[str], ModuleType]) -> None:
    study = study_of("sweeps")
    page = (DOCS / "studies" / f"{name}-tables.md").read_text()
    assert name in study.NAMES
    assert page.endswith(study.mark(name) + study.table(name) + "\n")
    rows = json.loads((STUDIES / f"{name}.json").read_text())["rows"]
    own = STUDIES / f"{name}.yaml"
    _, grid = read_grid(own, None) if own.exists() else read_grid(None, name)
    ran = [(row["peft"], row["recipe"], row["task"], row["context"]) for row in rows]
    assert (
        len({*ran})
        == len(ran)
        == math.prod(len(part) for part in (grid.adapters, grid.recipes, grid.tasks, grid.contexts))
    )
    assert {row["n"] for row in rows} == {grid.limit}


def test_the_differences_between_adapters_are_computed_from_their_scores(study_of: Callable[[str], ModuleType]) -> None:
    study = study_of("tuned")
    page, committed = (DOCS / "studies" / "tuned-tables.md").read_text(), json.loads(study.SAMPLES.read_text())
    assert study.MARK + study.tables() + study.SWEEP_MARK in page
    assert study.table() in page
    assert study.split() in page
    for metric in study.METRICS:
        for recipes in committed[metric].values():
            for scores in recipes.values():
                assert all(values.keys() == committed["clusters"].keys() for values in scores.values())


def cells(page: Path) -> set[str]:
    """Numeric cells of all tables of a page."""
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    return {cell.strip() for row in rows for cell in row if re.match(r" [-+]?\d", cell)}


@pytest.mark.parametrize("name", ["contexts", "grpo", "methods", "modes", "training"])
def test_the_figures_in_a_studys_summary_table_are_those_of_its_tables(name: str) -> None:
    summary = cells(DOCS / "studies" / f"{name}.md")
    assert summary
    assert summary <= cells(DOCS / "studies" / f"{name}-tables.md")
