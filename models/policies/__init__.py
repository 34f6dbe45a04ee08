"""KV cache policies: one method, one frozen dataclass, one file."""

from lceval.models.policies.base import Amount, Evictor, LayerView
from lceval.models.policies.snapkv import SnapKV
from lceval.models.policies.streaming import Streaming

EVICTORS: dict[str, type[Evictor]] = {"snapkv": SnapKV, "streaming": Streaming}

__all__ = ["EVICTORS", "Amount", "Evictor", "LayerView", "SnapKV", "Streaming"]
