"""Recurrent and convolution states of a sequence: of fixed size, and continued by every question from a copy.

Layers of linear attention, Mamba or convolution have them instead of keys and values; some layers have both.
transformers computes them, in layers of its own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, LinearAttentionLayer

from lceval.models import latent


@dataclass(frozen=True)
class State:
    """The states of a layer after some tokens, by their number in the layer: [B, ...] each; None: there is none."""

    convolutions: tuple[Tensor | None, ...] = ()
    recurrent: tuple[Tensor | None, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in (*self.convolutions, *self.recurrent) if x is not None)


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of a layer for a batch of rows. transformers writes into its tensors."""

    @classmethod
    def continuing(cls, states: Sequence[State]) -> StateLayer:
        """Rows that continue from copies of these states of a layer."""
        layer = cls(len(states[0].recurrent))
        for number in range(layer.number_of_states):
            _fill(layer, "conv", number, [state.convolutions[number] for state in states])
            _fill(layer, "recurrent", number, [state.recurrent[number] for state in states])
        return layer

    def copy_to(self, other: LinearAttentionLayer) -> None:
        """Copy the states to a layer of one of transformers' caches."""
        for number in range(self.number_of_states):
            _fill(other, "conv", number, [self.conv_states[number]])
            _fill(other, "recurrent", number, [self.recurrent_states[number]])

    @property
    def state(self) -> State:
        """A copy of the states."""
        return State(*(tuple(None if x is None else x.clone() for x in own.values()) for own in self._both))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be repeated."""
        for own in self._both:
            for number, value in own.items():
                if value is not None:
                    own[number] = torch.stack([value[row] for row in rows])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for own in self._both for x in own.values() if x is not None)

    @property
    def _both(self) -> tuple[dict[int, Tensor | None], dict[int, Tensor | None]]:
        return self.conv_states, self.recurrent_states


def _fill(layer: LinearAttentionLayer, kind: str, number: int, rows: Sequence[Tensor | None]) -> None:
    """Set a state of a layer to copies of rows, if there are any."""
    known = [row for row in rows if row is not None]
    if not known:
        return
    assert len(known) == len(rows), "a row without a context in a batch with one"
    value = torch.cat(known)
    getattr(layer, f"{kind}_states")[number] = value
    getattr(layer, f"is_{kind}_states_initialized")[number] = True
    layer.has_previous_state[number] = True
    layer.dtype, layer.device = value.dtype, value.device
    if kind == "conv":
        layer.conv_kernel_size[number] = value.shape[-1]


def continuing(rows: Sequence[tuple[State, ...]]) -> dict[int, StateLayer]:
    """The layers with states, by index in the model, of rows that continue from copies of these states by layer."""
    return {
        index: StateLayer.continuing(of_layer)
        for index, of_layer in enumerate(zip(*rows, strict=True))
        if of_layer[0].recurrent
    }


class NoKVLayer(DummyLayer):  # type: ignore[misc]
    """A layer without keys and values in one of our caches, to which nothing happens."""

    attends = is_full = is_sliding = False
    length = kv_bytes = buffer_bytes = own_bytes = 0

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = False

    def fork(self) -> NoKVLayer:
        return self

    def select(self, rows: Sequence[int], selected: Any) -> None:
        pass


class StatefulCache(Cache):  # type: ignore[misc]
    """A cache whose layers may have states beside, or instead of, keys and values.

    Args:
        layers: one for each layer of the model; a NoKVLayer where it has no keys and values.
        states: the layers with states, by index in the model.
        is_latent: whether the model caches latents.

    Attributes:
        state_layers: `states`.
        first_index: index of the first layer with keys and values, from which the length of the sequence is known.
    """

    def __init__(self, layers: Sequence[Any], states: dict[int, StateLayer], *, is_latent: bool = False) -> None:
        super().__init__(layers=list(layers))
        self.is_latent = is_latent
        self.state_layers = states
        self.first_index = next(index for index, layer in enumerate(layers) if layer.attends)

    @property
    def first(self) -> Any:
        """The first layer with keys and values."""
        return self.layers[self.first_index]

    @property
    def states(self) -> tuple[State, ...]:
        """Copies of all states, by layer; empty of a model without any."""
        known = self.state_layers
        return tuple(known[i].state if i in known else State() for i in range(len(self.layers))) if known else ()

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_latent:
            return super().update(k, v, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]
        # What comes back is expanded and not used: of the new tokens alone.
        latent.WAITING[layer_idx] = self.layers[layer_idx]
        self.layers[layer_idx].update(*latent.joined(k, v))
        return k, v

    # transformers asks the cache, not the layer.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.state_layers[layer_idx]
        return layer.conv_states[state_idx] if layer.has_previous_state[state_idx] else None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self.state_layers[layer_idx].update_conv_state(conv_states, state_idx, **kwargs)  # type: ignore[no-any-return]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.state_layers[layer_idx]
        return layer.recurrent_states[state_idx] if layer.has_previous_state[state_idx] else None

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self.state_layers[layer_idx].update_recurrent_state(recurrent_states, state_idx, **kwargs)  # type: ignore[no-any-return]

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        layer = self.state_layers[max(self.state_layers) if layer_idx is None else layer_idx]
        known = layer.has_previous_state
        return all(known.values()) if state_idx is None else bool(known[state_idx])

    def is_recording_past(self, layer_idx: int) -> bool:
        return False
