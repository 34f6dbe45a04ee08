"""`lceval train scorer`: contexts and targets, ridge and MLP, runs that resume, on a tiny random model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_model

from lceval.cli import invoke
from lceval.core.errors import UserError
from lceval.models import scorer
from lceval.models.lcft import LCFT
from lceval.models.policies import StatsSpec
from lceval.models.scorer import Scorer
from lceval.training import data
from lceval.training.packing import QAPair
from lceval.training.scorers import learn, scored_contexts, spec, two_layers
from lceval.training.scorers.agreement import Agreement
from lceval.training.scorers.ridge import RidgeFit
from lceval.training.scorers.scored_contexts import ScoredContext, ScoredSlots, observe
from lceval.training.scorers.spec import AdaptedModel, Linear, Mlp, ScorerRecipe

LAYERS, WIDTH, KV_HEADS = 4, 96, 2  # tiny_models.SHAPE
TOKENS = 64
KINDS: dict[str, Any] = {"linear": {"ridge": 1e-3}, "mlp": {"hidden": 8, "tokens": 100, "epochs": 2, "batch": 16}}
FILES = ["README.md", "config.json", "model.safetensors", "train.json"]
ChangedRecipe = Callable[..., ScorerRecipe]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path)
    words = random.Random(3).choices([f"w{n}" for n in range(2, 99)], k=6 * TOKENS)
    (path / "text.txt").write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def lm(folder: Path) -> LCFT:
    return LCFT(str(folder), dtype="float32")


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> ChangedRecipe:
    """A recipe of six contexts of plain text, two of them held out, with changes."""

    def build(kind: str = "linear", **changes: Any) -> ScorerRecipe:
        values = {
            "output": str(tmp_path / "scorer"),
            "model": {"pretrained": str(folder), "dtype": "float32"},
            "texts": {"files": [str(folder / "text.txt")], "tokens": TOKENS},
            "held_out": 2,
            kind: KINDS[kind],
            "save_contexts": 2,
        }
        return spec.parse(values | changes, "test")

    return build


def slots(*shapes: int, seed: int = 0, layers: int = LAYERS) -> list[ScoredSlots]:
    """A context of random numbers for each number of tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [
        ScoredSlots(
            [torch.randn(n, WIDTH, generator=draw) + 3 for _ in range(layers)],
            [torch.randn(n, KV_HEADS, generator=draw) - 5 for _ in range(layers)],
        )
        for n in shapes
    ]


# Contexts and targets -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["kvzip", "kvzip+"])
@pytest.mark.parametrize("chunk", [0, 13])
def test_inputs_are_the_normed_hidden_states_and_targets_the_logarithm_of_kvzips_score(
    folder: Path, recipe: ChangedRecipe, chunk: int, target: str
) -> None:
    model = LCFT(str(folder), dtype="float32", prefill_chunk=chunk)
    ids, first = tuple(range(2, 52)), 7
    states = model.base(torch.tensor([ids]), output_hidden_states=True).hidden_states
    prefill = model.engine.prefill(ids, StatsSpec(reconstruction=True, reconstruction_plus=True))
    scores = prefill.reconstruction_attention if target == "kvzip" else prefill.reconstruction_plus
    assert scores is not None
    floor = float(torch.stack(scores).median())
    observed = observe(model, ScoredContext(ids, first), recipe(floor=floor, target=target))
    for place, layer in enumerate(model.base.model.layers):
        torch.testing.assert_close(observed.inputs[place], layer.input_layernorm(states[place])[0, first:])
        targets = np.log(np.maximum(scores[place][0, :, first:].numpy(), floor)).T
        np.testing.assert_allclose(observed.targets[place].numpy(), targets, rtol=1e-5)


def test_the_target_attention_is_the_most_that_questions_and_answers_pay(lm: LCFT, recipe: ChangedRecipe) -> None:
    ids = tuple(range(2, 52))
    pairs = (QAPair((60, 61, 62), (70, 71, 1)), QAPair((63,), (72, 1)))
    spec_values = recipe().model_dump(mode="json") | {"texts": None, "data": {"datasets": ["squad"]}}
    observed = observe(lm, ScoredContext(ids, 4, pairs), spec.parse(spec_values | {"target": "attention"}, "test"))
    whole = LCFT(lm.base.name_or_path, dtype="float32").base
    whole.set_attn_implementation("eager")
    paid = []
    for pair in pairs:
        continued = torch.tensor([[*ids, *pair.question, *pair.answer[:-1]]])
        weights = torch.cat(whole(continued, output_attentions=True).attentions)[..., len(ids) :, 4 : len(ids)]
        paid.append(weights.unflatten(1, (KV_HEADS, -1)).amax((2, 3)))
    expected = torch.stack(paid).amax(0).clamp_min(1e-6).log().transpose(1, 2)
    torch.testing.assert_close(torch.stack(observed.targets), expected.detach(), rtol=1e-4, atol=1e-4)


def test_the_template_before_the_message_and_the_sinks_do_not_count(lm: LCFT, recipe: ChangedRecipe) -> None:
    contexts = scored_contexts.build(recipe(), lm)
    assert {context.first for context in contexts.fitted} == {4}
    template = "{% for m in messages %}w2 w3 w4 w5 w6 {{ m.content }} w7{% endfor %}"
    lm.tokenizer.chat_template = template
    try:
        (first, *_) = scored_contexts.build(recipe(), lm).fitted
    finally:
        lm.tokenizer.chat_template = None
    assert (first.first, first.ids[:5], len(first.ids)) == (5, (2, 3, 4, 5, 6), 5 + TOKENS)


def test_rows_of_a_pool_are_of_its_training_side_and_share_no_document_with_those_held_out(
    data_folder: Path, lm: LCFT, recipe: ChangedRecipe
) -> None:
    rows = {"datasets": ["nqopen"], "tokenizer": lm.base.name_or_path, "promote": None}
    values = recipe().model_dump(mode="json") | {"texts": None, "held_out": 8}
    contexts = scored_contexts.build(spec.parse(values | {"data": rows}, "test"), lm)
    documents = [frozenset().union(*(c.documents for c in part)) for part in (contexts.fitted, contexts.held_out)]
    assert len(contexts.held_out) == 8
    assert len(contexts.fitted) > 8
    assert not documents[0] & documents[1]
    test_side = data.rows(data.spec(**{**rows, "split": "test"}))[0]
    assert not {("nqopen", doc["pid"]) for row in test_side for doc in row["docs"]} & (documents[0] | documents[1])
    with pytest.raises(UserError, match=r"data\.split=all: nqopen has a side for evaluation: use split=train"):
        scored_contexts.build(spec.parse(values | {"data": {**rows, "split": "all"}}, "test"), lm)


# Fits -----------------------------------------------------------------------------------------------


def test_ridge_is_the_closed_form_of_all_tokens_however_they_arrive(tmp_path: Path) -> None:
    several = slots(50, 1, 149)
    fit = RidgeFit(Linear(ridge=0.1), Scorer(WIDTH, KV_HEADS, LAYERS), tmp_path)
    for one in several[:2]:
        fit.add(one)
    fit.save()
    resumed = RidgeFit(Linear(ridge=0.1), Scorer(WIDTH, KV_HEADS, LAYERS), tmp_path)
    assert resumed.contexts == 2
    resumed.add(several[2])
    trained = resumed.finish()
    for place, layer in enumerate(trained.layers):
        x = np.concatenate([one.inputs[place].double().numpy() for one in several])
        y = np.concatenate([one.targets[place].double().numpy() for one in several])
        centred, penalty = x - x.mean(0), 0.1 * x.var(0).mean() * len(x)
        weight = np.linalg.inv(centred.T @ centred + penalty * np.eye(WIDTH)) @ centred.T @ (y - y.mean(0))
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight.T, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.bias.detach().numpy(), y.mean(0) - x.mean(0) @ weight, rtol=1e-5)


def test_an_mlp_learns_what_a_linear_map_cannot(tmp_path: Path) -> None:
    (one, other) = slots(8000, 500, layers=1)
    for context in (one, other):
        context.targets[0] = (context.inputs[0][:, :KV_HEADS] - 3).abs() - 5
    settings, shape = Mlp(hidden=16, tokens=8000, epochs=10, learning_rate=1e-2, batch=128), (WIDTH, KV_HEADS, 1)
    mlp = two_layers.MlpFit(settings, Scorer(*shape, 16).requires_grad_(False), tmp_path, 0, [8000])
    ridge = RidgeFit(Linear(), Scorer(*shape).requires_grad_(False), tmp_path)
    correlations = []
    for fit in (mlp, ridge):
        fit.add(one)
        agreement = Agreement(fit.finish())
        agreement.add(other)
        correlations.append(agreement.figures["correlation"])
    assert correlations[0] > 0.9
    assert abs(correlations[1]) < 0.3


def test_a_sample_has_at_most_its_tokens_the_same_of_each_context() -> None:
    assert two_layers.sampled(100, [64, 20, 64]) == [33, 20, 33]
    assert two_layers.sampled(2, [64, 20, 64]) == [1, 1, 1]


def test_agreement_is_whole_with_the_target_itself_and_nothing_with_a_constant() -> None:
    linear = Scorer(KV_HEADS, KV_HEADS, LAYERS).requires_grad_(False)
    values = [part[:, :KV_HEADS] for part in slots(200)[0].inputs]
    for layer in linear.layers:
        layer.weight.copy_(torch.eye(KV_HEADS))
        layer.bias.zero_()
    same, reverse, constant = (Agreement(linear) for _ in range(3))
    same.add(ScoredSlots(values, values))
    reverse.add(ScoredSlots(values, [-part for part in values]))
    constant.add(ScoredSlots(values, [torch.full_like(part, -13.8) for part in values]))
    assert same.figures == {"correlation": pytest.approx(1), "overlap": {"0.5": 1, "0.25": 1, "0.1": 1}}
    assert reverse.figures == {"correlation": pytest.approx(-1), "overlap": {"0.5": 0, "0.25": 0, "0.1": 0}}
    assert constant.figures["correlation"] == 0


# Runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_run_that_is_interrupted_resumes_with_the_same_scorer(
    recipe: ChangedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole = learn.learn(recipe(kind))
    assert whole["data"] | {"digest": ""} == {
        "digest": "", "contexts": 4, "held_out": 2, "questions": 0, "tokens_a_context": TOKENS,
        "tokens_used": 4 * (60 if kind == "linear" else 25),
    }  # fmt: skip
    assert sorted(file.name for file in (tmp_path / "scorer").iterdir()) == FILES
    assert scorer.load(str(tmp_path / "scorer")).digest == whole["scorer"]["digest"]

    interrupted = recipe(kind, output=str(tmp_path / "interrupted"))
    observed: list[ScoredContext] = []

    def three_contexts(*args: Any) -> ScoredSlots:
        if len(observed) == 3:
            raise KeyboardInterrupt
        observed.append(args[1])
        return observe(*args)

    monkeypatch.setattr(learn, "observe", three_contexts)
    with pytest.raises(KeyboardInterrupt):
        learn.learn(interrupted)
    assert json.loads((interrupted.output / "train.json").read_text())["status"] == "running"
    observed.clear()
    monkeypatch.setattr(learn, "observe", lambda *args: (observed.append(args[1]), observe(*args))[1])
    layers: list[int] = []
    train_layer = two_layers.train_layer

    def two_of_them(*args: Any) -> None:
        if len(layers) == 2:
            raise KeyboardInterrupt
        layers.append(len(layers))
        train_layer(*args)

    if kind == "mlp":
        monkeypatch.setattr(two_layers, "train_layer", two_of_them)
        with pytest.raises(KeyboardInterrupt):
            learn.learn(interrupted)
        assert len(observed) == 2  # of four; two were in the checkpoint
        layers.clear()
    resumed = learn.learn(interrupted)
    assert len(observed) == 4  # two of four to train on, and two held out
    assert layers == ([0, 1] if kind == "mlp" else [])
    assert (resumed["scorer"], resumed["held_out"]) == (whole["scorer"], whole["held_out"])
    assert learn.learn(interrupted) == resumed
    assert len(observed) == 4
    with pytest.raises(UserError, match=r"interrupted contains a run with different seed: choose another folder"):
        learn.learn(interrupted.model_copy(update={"seed": 1}))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_rounding_of_inputs_changes_scores_by_less_than_a_hundredth(
    recipe: ChangedRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Another machine or number of threads rounds the model's activations otherwise, by about 1e-6 of them."""
    draw = torch.Generator().manual_seed(5)

    def rounded(*args: Any) -> ScoredSlots:
        exact = observe(*args)
        return ScoredSlots([x * (1 + 1e-6 * torch.randn(x.shape, generator=draw)) for x in exact.inputs], exact.targets)

    inputs, scores = slots(50)[0].inputs[0] - 3, []
    for name, observed in (("exact", observe), ("rounded", rounded)):
        monkeypatch.setattr(learn, "observe", observed)
        learn.learn(recipe(kind, output=str(tmp_path / name)))
        scores.append(scorer.load(str(tmp_path / name)).float().score(0, inputs[None]))
    assert float((scores[0] - scores[1]).abs().max()) < 0.01


def test_the_command_estimates_trains_and_reports(
    recipe: ChangedRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "mine.yaml", tmp_path / "scorer"
    file.write_text(json.dumps(recipe().model_dump(mode="json", exclude_none=True)))
    command = ["train", "scorer", str(file), "--output", str(output)]
    assert invoke([*command, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    parameters = LAYERS * (WIDTH + 1) * KV_HEADS
    assert (report["scorer"]["parameters"], report["scorer"]["bytes"]) == (parameters, 2 * parameters)
    assert not output.exists()
    assert invoke(command) == 0
    printed = capsys.readouterr().out
    record = json.loads((output / "train.json").read_text())
    assert record["data"]["digest"] == report["digest"]
    card = (output / "README.md").read_text()
    for text in (printed, card):
        assert f"{record['held_out']['correlation']:.3f}" in text
        assert f"{record['held_out']['overlap']['0.1']:.3f} at 0.1" in text
    assert f"pretrained={record['recipe']['model']['pretrained']},kv=kvzap:0.25,scorer={output}" in card
    assert (output / "model.safetensors").stat().st_size < 2 * parameters + 2000
    assert invoke(["train", "eval", str(output)]) == 2
    assert f"{output} is a scorer, not an adapter" in capsys.readouterr().err


@pytest.mark.parametrize("name", spec.shipped())
def test_a_shipped_recipe_is_valid_and_of_the_training_side(name: str) -> None:
    recipe = spec.read(name)
    assert recipe.output == Path("runs") / name
    assert recipe.data is not None
    assert recipe.data.split == "train"


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = text.partition("## Training a scorer\n")[2].partition("\n## ")[0]
    for model in (ScorerRecipe, AdaptedModel, Linear, Mlp):
        assert [key for key in model.model_fields if f"`{key}`" not in section] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mlp.hidden=64"], "kvzip_linear: expected exactly one of linear and mlp"),
        (["linear=null"], "kvzip_linear: expected exactly one of linear and mlp"),
        (["data=null"], "no contexts: set data.datasets, or texts.files and texts.tokens"),
        (["data.split=test"], "data.split=test is for evaluation: a scorer is trained on split=train"),
        (["texts={files: [a.txt], tokens: 64}", "target=attention"], "target=attention requires questions"),
        (["target=kvzap"], "--set target: input should be 'kvzip', 'kvzip+' or 'attention'"),
        (["linear.lambda=1"], "--set linear.lambda: unknown key; one of ridge"),
        (["linear.ridge=0"], "--set linear.ridge: input should be greater than 0"),
        (["floor=0"], "--set floor: input should be greater than 0"),
        (["model.shape.x=1"], "model.shape: unknown key; one of pretrained"),
    ],
)
def test_an_invalid_recipe_is_an_error_of_one_line(changes: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        spec.read("kvzip_linear", changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 6}, "6 contexts, of which none is left to train on"),
        ({"texts": {"files": ["nowhere.txt"], "tokens": 64}}, "texts.files: cannot read nowhere.txt"),
        ({"model": {"pretrained": "/nope"}}, "pretrained=/nope: no such folder"),
    ],
)
def test_what_cannot_be_trained_is_an_error_of_one_line(
    recipe: ChangedRecipe, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        learn.learn(recipe(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
