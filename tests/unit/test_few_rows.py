"""Products of a few rows in blocks of output channels are those of linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lceval.models import few_rows
from lceval.models.few_rows import FewRows


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def products(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The inputs of all batched products, on two threads."""
    calls: list[Any] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *x: calls.append(x) or bmm(*x))
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (8,), (2, 2, 2)])
def test_a_product_in_blocks_is_that_of_the_layer(products: list[Any], shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(len(shape))
    layer, x = nn.Linear(256, 512, bias=bias), torch.randn(*shape, 256)
    few = FewRows(layer)
    with torch.inference_mode():
        expected = layer(x)
        assert not products
        with few.active():
            in_blocks = layer(x)
    assert len(products) == 1
    assert in_blocks.shape == expected.shape
    torch.testing.assert_close(in_blocks, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (nn.Linear(256, 512), few_rows.MOST_ROWS + 1),
        (nn.Linear(256, 510), 1),  # two threads have four blocks
        (nn.Linear(128, 256), 1),  # small
        (nn.Linear(256, 512, dtype=torch.bfloat16), 1),
    ],
)
def test_other_layers_multiply_as_they_are(products: list[Any], layer: nn.Linear, rows: int) -> None:
    x = torch.randn(rows, layer.in_features, dtype=layer.weight.dtype)
    expected = layer(x)
    with FewRows(layer).active(), torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert not products


def test_one_thread_multiplies_as_it_did(products: list[Any], threads: Callable[[int], None]) -> None:
    threads(1)
    layer = nn.Linear(256, 512)
    with FewRows(layer).active():
        layer(torch.randn(1, 256))
    assert not products


def test_layers_of_other_classes_are_left_alone_and_a_copy_has_its_own_weights(products: list[Any]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(256, 512), Doubled(512, 512))
    few, x = FewRows(model), torch.randn(1, 256)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(x)
        other[0].weight.zero_()
        other[0].bias.zero_()
        with few.active():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert len(products) == 1
        assert torch.equal(other(x), 2 * other[1].bias[None])


def test_gradients_pass_where_it_is_not_active() -> None:
    layer = nn.Linear(256, 512)
    FewRows(layer)
    layer(torch.randn(1, 256)).sum().backward()
    assert layer.weight.grad is not None
