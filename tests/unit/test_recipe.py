"""The recipe grammar: canonical form, round trip, and error messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lceval.core.errors import UserError
from lceval.models.policies import Amount, SnapKV, Streaming
from lceval.models.recipe import Recipe, parse

amounts = st.one_of(
    st.floats(min_value=0, max_value=1.0, exclude_min=True).map(Amount),
    st.integers(min_value=1, max_value=10**6).map(Amount),
)
evictors = st.one_of(
    st.builds(SnapKV, amount=amounts, window=st.integers(1, 512), pool=st.integers(0, 20).map(lambda n: 2 * n + 1)),
    st.builds(Streaming, amount=amounts, sinks=st.integers(0, 64)),
)


@given(st.one_of(st.none(), evictors))
def test_canonical_form_parses_back_to_the_same_recipe(evictor: SnapKV | Streaming | None) -> None:
    recipe = Recipe(evictor)
    assert parse(str(recipe)) == recipe
    assert str(parse(str(recipe))) == str(recipe)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full", "full"),
        ("snapkv:.25", "snapkv:0.25"),
        ("snapkv:0.250:window=64:pool=5", "snapkv:0.25"),
        ("snapkv:0.25:window=32", "snapkv:0.25:window=32"),
        ("streaming:4096", "streaming:4096"),
        ("full+streaming:1.0:sinks=8", "streaming:1.0:sinks=8"),
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
        "evict": {"name": "snapkv", "amount": 0.25, "window": 64, "pool": 5},
        "store": {"name": "kv8v4", "k_bits": 8, "v_bits": 4, "residual": 128},
        "read": None,
    }
    assert parse("full").expanded() == {"evict": None, "store": None, "read": None}
