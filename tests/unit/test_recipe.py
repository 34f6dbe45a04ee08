"""The recipe grammar: canonical form, round trip, and error messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.core.errors import UserError
from lceval.models import recipe
from lceval.models.policies import Amount, Evictor, Threshold
from lceval.models.policies.adakv import AdaKV
from lceval.models.policies.chunkkv import ChunkKV
from lceval.models.policies.criticalkv import CriticalKV
from lceval.models.policies.h2o import H2O
from lceval.models.policies.knorm import KNorm
from lceval.models.policies.kvzap import SCOPES, KVzap
from lceval.models.policies.snapkv import SnapKV
from lceval.models.policies.streaming import Streaming
from lceval.models.recipe import Recipe, parse

amounts = st.one_of(
    st.builds(Amount, st.floats(min_value=0, max_value=1.0, exclude_min=True), st.booleans()),
    st.integers(min_value=1, max_value=10**6).map(Amount),
)
thresholds = st.floats(allow_nan=False, allow_infinity=False).map(Threshold)
shares = st.floats(min_value=0, max_value=1)


def with_inner(inner: Evictor) -> st.SearchStrategy[Evictor]:
    both = {"amount": st.just(inner.amount), "inner": st.just(inner)}
    return st.one_of(
        st.builds(AdaKV, **both, floor=shares),
        st.builds(CriticalKV, **both, first=shares),
        st.builds(ChunkKV, **both, length=st.integers(1, 100)),
    )


even = st.one_of(
    st.builds(SnapKV, amount=amounts, window=st.integers(1, 512), pool=st.integers(0, 20).map(lambda n: 2 * n + 1)),
    st.builds(Streaming, amount=amounts, sinks=st.integers(0, 64)),
    st.builds(H2O, amount=amounts, recent=shares),
)
evictors = st.one_of(
    even,
    even.flatmap(with_inner),
    st.builds(H2O, amount=amounts, recent=shares, when=st.just("always")),
    st.builds(KNorm, amount=thresholds),
    st.builds(KVzap, amount=amounts, scope=st.sampled_from(SCOPES), recent=st.none() | st.integers(0, 200)),
    st.builds(KVzap, amount=thresholds, recent=st.none() | st.integers(0, 200)),
)


@given(st.one_of(st.none(), evictors))
def test_canonical_form_parses_back_to_the_same_recipe(evictor: Evictor | None) -> None:
    recipe = Recipe(evictor)
    text = str(recipe)
    assert parse(text) == recipe
    assert str(parse(text)) == text
    assert not re.search(r"\de|None|True|False", text)


@given(evictors, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter_and_the_canonical_order_is_fixed(evictor: Evictor, rng: Random) -> None:
    text = str(Recipe(evictor))
    name, *rest = text.split(":")
    amount = rest[:1] if rest and "=" not in rest[0] else []
    keys = rest[len(amount) :]
    order = [key.partition("=")[0] for key in keys]
    first = ["threshold", "round", "when"]
    ranks = [first.index(key) if key in first else len(first) for key in order]
    assert ranks == sorted(ranks)
    inner = order.index("of") + 1 if "of" in order else len(order)
    assert not {"floor", "threshold", "round"} & {*order[inner:]}
    rng.shuffle(keys)
    assert str(parse(":".join([name, *amount, *keys]))) == text


@dataclass(frozen=True, kw_only=True)
class Switched(Evictor):
    """A test policy with a key of each type."""

    plus: bool = False
    share: float = 0.5
    count: int = 3
    word: str = "a"


def test_booleans_are_true_or_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe.EVICTORS, "switched", Switched)
    monkeypatch.setattr(recipe, "NAMES", [*recipe.NAMES, "switched"])
    assert parse("switched:0.5:plus=false") == parse("switched:0.5") == Recipe(Switched(amount=Amount(0.5)))
    assert str(parse("switched:0.5:word=b:share=1e-7:plus=true")) == "switched:0.5:plus=true:share=0.0000001:word=b"
    for value in ("True", "1", "yes", ""):
        with pytest.raises(UserError, match=f"plus={value!r} is not true or false"):
            parse(f"switched:0.5:plus={value}")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full", "full"),
        ("snapkv:.25", "snapkv:0.25"),
        ("snapkv:0.250:window=64:pool=5", "snapkv:0.25"),
        ("snapkv:0.25:window=32", "snapkv:0.25:window=32"),
        ("streaming:4096", "streaming:4096"),
        ("full+streaming:1.0:sinks=8", "streaming:1.0:sinks=8"),
        ("kvzap:threshold=-4.0", "kvzap:threshold=-4"),
        ("kvzap:recent=64:threshold=-45e-1", "kvzap:threshold=-4.5:recent=64"),
        ("kvzap:1.0:scope=model", "kvzap:1.0"),
        ("h2o:0.5:recent=1.0:when=always", "h2o:0.5:when=always:recent=1"),
        ("snapkv:0.25:round=nearest", "snapkv:0.25"),
        ("snapkv:0.25:window=32:round=down", "snapkv:0.25:round=down:window=32"),
        ("h2o:0.5:when=always:round=down", "h2o:0.5:round=down:when=always"),
        (
            "adakv:0.25:eps=1e-2:of=expected_attention:round=down",
            "adakv:0.25:round=down:of=expected_attention:eps=0.01",
        ),
        ("adakv:0.5:sinks=8:of=streaming:floor=0.0", "adakv:0.5:floor=0:of=streaming:sinks=8"),
    ],
)
def test_defaults_are_left_out_of_the_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapvk:0.25", "did you mean 'snapkv'"),
        ("snapkv:0.25:windw=3", "did you mean 'window'"),
        ("snapkv", "requires an amount, as in snapkv:0.25"),
        ("snapkv:0", "the amount '0' is neither"),
        ("snapkv:1.5", "the amount '1.5' is neither"),
        ("snapkv:many", "the amount 'many' is neither"),
        ("snapkv:0.5:window=a", "window='a' is not of type int"),
        ("snapkv:0.5:pool=4", "pool an odd number"),
        ("snapkv:0.5:64", "'64' is not key=value"),
        ("snapkv:0.5:window=1_0", "window='1_0' is not of type int"),
        ("snapkv:threshold=-4", "snapkv requires an amount"),
        ("snapkv:0.5:threshold=-4", "snapkv has no threshold, since its scores have no scale of their own"),
        ("adakv:0.5:of=knorm:threshold=-4", "adakv has no threshold"),
        ("kvzap", "or a threshold, as in kvzap:threshold=-4"),
        ("kvzap:0.5:threshold=-4", "kvzap takes an amount or a threshold, not both"),
        ("kvzap:threshold=low", "threshold='low' is not of type float"),
        ("kvzap:threshold=inf", "threshold='inf' is not of type float"),
        ("kvzap:threshold=1e999", "threshold must be a finite number"),
        ("kvzap:threshold=-4:scope=head", "leave scope out"),
        ("kvzap:threshold=-4:round=down", "a threshold is not rounded: leave round out"),
        ("snapkv:0.5:round=up", "round must be nearest or down"),
        ("snapkv:512:round=down", "round=down rounds a share"),
        ("quest:0.5:round=down", "unknown key of quest 'round'"),
        ("kvzap:0.5:scope=row", "scope must be one of model, layer, head"),
        ("kvzap:0.5:scorer=abc", "unknown key of kvzap 'scorer'"),
        ("adakv:0.5:of=criticalkv", "unknown evictor of adakv 'criticalkv'"),
        ("criticalkv:0.5:of=kvzip", "unknown evictor of criticalkv 'kvzip'"),
        ("criticalkv:0.5:first=2", "first must be a share of the budget"),
        ("chunkkv:0.5:length=0", "length must be at least 1"),
        ("chunkkv:0.5:of=keydiff:block=9", "its inner evictor cannot select block by block"),
        ("keydiff:threshold=0:block=9", "a block is reduced to a budget"),
        ("compactor:0.5:sketch=0", "sketch between 1 and 65536"),
        ("lagkv:0.5:lag=1", "lag must be at least 2"),
        ("duo:0.5:sinks=-1", "sinks and recent must be at least 0"),
        ("duo:0.5:pattern=a", "unknown key of duo 'pattern'"),
        ("int4:rotate=random", "rotate must be none or hadamard"),
        (
            "h2o:0.5:when=chunk",
            "when of h2o must be prefill or always; when=chunk has streaming, lacache, tova, snapkv",
        ),
        ("pyramidkv:0.5:when=chunk", "when of pyramidkv must be prefill; when=chunk has"),
        ("adakv:0.5:when=chunk", "when of adakv must be prefill"),
        ("knorm:0.5:when=never", "when of knorm must be prefill or chunk"),
        ("knorm:0.5:when=chunk:chunk=0", "chunk must be at least 1"),
        ("knorm:0.5:chunk=7", "unknown key of knorm 'chunk'"),
        ("keydiff:0.5:when=chunk:block=7", "leave block out"),
        ("quest:0.5:when=chunk", "unknown key of quest 'when'"),
        ("knorm:0.5:when=decode", "requires a number of tokens, since a share of what is written grows"),
        ("h2o:5:when=decode", "when of h2o must be prefill or always; when=decode has streaming"),
        ("adakv:5:when=decode:of=lagkv", "lagkv cannot evict while an answer is written"),
        ("kvzap:5:when=decode:prompt=evict", "use prompt=keep"),
        ("knorm:5:when=decode:prompt=all", "prompt must be keep or evict"),
        ("knorm:5:when=decode:every=0", "every must be at least 1"),
        ("knorm:5:every=3", "unknown key of knorm 'every'"),
        ("knorm:5:when=decode+quest:0.1", "leave one of them out"),
        ("knorm:5:when=decode+snapkv:0.5", "at most one evictor, got knorm and snapkv"),
        ("snapkv:0.5+streaming:0.5", "at most one evictor"),
        ("full:0.5", "full takes no argument"),
        ("", "unknown KV method ''"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse(text)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@given(amounts, st.integers(0, 10**6))
def test_a_budget_is_at_most_the_context_and_at_least_one_token(amount: Amount, length: int) -> None:
    budget = amount.tokens(length)
    assert min(1, length) <= budget <= length
    if isinstance(amount.value, float) and length:
        assert abs(budget - amount.value * length) <= 1


def test_the_expansion_has_every_parameter() -> None:
    assert parse("snapkv:0.25+kv8v4").expanded() == {
        "evict": {"name": "snapkv", "amount": 0.25, "window": 64, "pool": 5, "pooling": "average"},
        "store": {"name": "kv8v4", "k_bits": 8, "v_bits": 4, "residual": 128, "rotate": "none"},
        "read": None,
    }
    assert parse("full").expanded() == {"evict": None, "store": None, "read": None}
