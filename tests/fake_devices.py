"""Accelerators that are only pretended: tensors compute on the CPU, each with the device that it would be on.

`FakeDevices` is a mode. In it a tensor's `device` is `xpu:0` or `xpu:1` where the code asked for that, an operation on
tensors of different devices is an error as it would be on accelerators, and `traffic` lists what makes the host and a
device wait for each other: copies between devices, and values or sizes that Python reads. Values are real, so that code
which depends on them runs: PyTorch's own FakeTensorMode stops at the first such value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("xpu:0"), torch.device("xpu:1")

# What Python reads of a tensor, its values or a size that depends on them.
READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose", "isin"}
READS |= {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "__contains__"}
COPIES = {"copy_", "__setitem__"}


class DeviceError(AssertionError):
    """An operation on tensors of different devices."""


class FakeDevices(TorchFunctionMode):
    """Tracks the device of every tensor.

    Attributes:
        traffic: names of the operations for which host and device wait for each other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return place(args[0])
        name = getattr(func, "__name__", "")
        if name == "__iter__":
            return iter(marked(args[0].unbind(0), place(args[0])))
        if name in ("to", "cpu"):
            return self._to(name, func, args, kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, CausalBias)]
        where = self._where(func, name, args, inputs)
        requested = kwargs.get("device")
        if requested is not None:
            requested = torch.device(requested)
            if requested != CPU and (name in ("tensor", "as_tensor") or where not in (None, requested)):
                self.traffic.append(f"{name} on {requested}")
            kwargs["device"] = CPU
        if where not in (None, CPU):
            if name in READS or (name == "repeat_interleave" and len(inputs) > 1):
                self.traffic.append(name)
            self._index_traffic(name, args)
        out = func(*args, **kwargs)
        return marked(out, requested or where or CPU)

    def _to(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`Tensor.to` in all its forms, and `Tensor.cpu`."""
        source = place(args[0])
        targets = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor | torch.device | str)]
        target = CPU if name == "cpu" else source
        for x in targets:
            target = place(x) if isinstance(x, Tensor) else torch.device(x)

        def local(x: Any) -> Any:
            return CPU if isinstance(x, torch.device | str) else x

        out = func(*map(local, args), **{key: local(x) for key, x in kwargs.items()})
        if target == source:
            return marked(out, source)
        self.traffic.append(f"{name}: {source} -> {target}")
        return marked(out.clone() if out is args[0] else out, target)

    def _where(self, func: Any, name: str, args: tuple[Any, ...], inputs: list[Tensor]) -> torch.device | None:
        """The device of an operation's results; None if no argument is a tensor."""
        if name in ("__getitem__", "__setitem__", "copy_", "set_"):
            return self._where_indexed(name, args)
        # A number on the host joins tensors on any device.
        devices = {place(x) for x in inputs if x.dim() or place(x) != CPU}
        if len(devices) > 1:
            shapes = ", ".join(f"{tuple(x.shape)} on {place(x)}" for x in inputs)
            raise DeviceError(f"{resolve_name(func) or name} of {shapes}")
        return devices.pop() if devices else (CPU if inputs else None)

    def _where_indexed(self, name: str, args: tuple[Any, ...]) -> torch.device:
        """An index may be on the host; assignment copies from any device."""
        own = place(args[0])
        if name in ("__getitem__", "__setitem__"):
            for index in tree_leaves(args[1]):
                if isinstance(index, Tensor) and place(index) not in (own, CPU):
                    raise DeviceError(f"{name} of a tensor on {own} by an index on {place(index)}")
        if name in COPIES and isinstance(args[-1], Tensor) and place(args[-1]) != own and args[-1].dim():
            self.traffic.append(f"{name}: {place(args[-1])} -> {own}")
        return own

    def _index_traffic(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in ("__getitem__", "__setitem__"):
            return
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        for index in parts:
            if isinstance(index, list | range) or (isinstance(index, Tensor) and place(index) == CPU):
                self.traffic.append(f"{name} by an index on the host")
            elif isinstance(index, Tensor) and index.dtype == torch.bool:
                self.traffic.append(f"{name} by a mask")


def place(x: Tensor) -> torch.device:
    """The device that a tensor pretends to be on."""
    device: torch.device = getattr(x, "_fake_device", CPU)
    return device


def marked(out: Any, device: torch.device) -> Any:
    """The result of an operation, its tensors on a device."""

    def mark(x: Any) -> Any:
        if isinstance(x, Tensor):
            x._fake_device = device  # type: ignore[attr-defined]
        return x

    return tree_map(mark, out)


def spread(model: Any, devices: tuple[torch.device, ...]) -> Any:
    """Put a causal LM's decoder layers on devices, as `parallelize=True` does: the first on the first, and so on.

    The embeddings come first, norm, RoPE and head last. Inputs of a module move to its device (accelerate's own
    function moves them), and those of the whole model's result back.
    """
    decoder = model.get_decoder()
    layers = decoder.layers
    last = [decoder.norm, decoder.rotary_emb, model.get_output_embeddings()]
    places = [(decoder.embed_tokens, devices[0]), *((module, devices[-1]) for module in last)]
    places += [(layer, devices[i * len(devices) // len(layers)]) for i, layer in enumerate(layers)]
    for module, device in places:
        for x in (*module.parameters(), *module.buffers()):
            x._fake_device = device
        module.register_forward_pre_hook(_moving(device), with_kwargs=True)

    def back(_module: Any, _args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        out.logits = out.logits.to(kwargs["input_ids"].device)
        return out

    model.register_forward_hook(back, with_kwargs=True)
    return model


def _moving(device: torch.device) -> Callable[..., Any]:
    def move(_module: Any, args: Any, kwargs: Any) -> Any:
        return send_to_device(args, device), send_to_device(kwargs, device, skip_keys=["cache"])

    return move
