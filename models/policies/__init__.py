"""KV methods: each is one frozen dataclass in one file; this module maps recipe names to them."""

from lceval.models.policies.adakv import AdaKV
from lceval.models.policies.base import (
    Amount,
    Evictor,
    LayerView,
    SparseAttention,
    StatsSpec,
    StepEvictor,
    StepView,
    Threshold,
)
from lceval.models.policies.chunkkv import ChunkKV
from lceval.models.policies.compactor import Compactor
from lceval.models.policies.criticalkv import CriticalKV
from lceval.models.policies.duo import Duo
from lceval.models.policies.expected_attention import ExpectedAttention
from lceval.models.policies.fier import Fier
from lceval.models.policies.finch import Finch
from lceval.models.policies.float8 import Float8
from lceval.models.policies.h2o import H2O
from lceval.models.policies.keydiff import KeyDiff
from lceval.models.policies.knorm import KNorm
from lceval.models.policies.kvzap import KVzap
from lceval.models.policies.kvzip import KVzip
from lceval.models.policies.lacache import LaCache
from lceval.models.policies.lagkv import LagKV
from lceval.models.policies.pyramidkv import PyramidKV
from lceval.models.policies.quantizer import NAMES, Quantizer
from lceval.models.policies.quest import Quest
from lceval.models.policies.random_control import Random
from lceval.models.policies.retrieval import Retrieval
from lceval.models.policies.rkv import RKV
from lceval.models.policies.snapkv import SnapKV
from lceval.models.policies.streaming import Streaming
from lceval.models.policies.tova import TOVA
from lceval.models.policies.wrapper import Wrapper

EVICTORS: dict[str, type[Evictor]] = {
    "streaming": Streaming,
    "lacache": LaCache,
    "h2o": H2O,
    "tova": TOVA,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "criticalkv": CriticalKV,
    "chunkkv": ChunkKV,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "lagkv": LagKV,
    "expected_attention": ExpectedAttention,
    "compactor": Compactor,
    "finch": Finch,
    "duo": Duo,
    "rkv": RKV,
    "kvzip": KVzip,
    "kvzap": KVzap,
    "random": Random,
}
QUANTIZERS: dict[str, type[Quantizer | Float8]] = {"fp8": Float8, **dict.fromkeys(NAMES, Quantizer)}
SPARSE_ATTENTION: dict[str, type[SparseAttention]] = {"fier": Fier, "quest": Quest, "retrieval": Retrieval}

__all__ = [
    "EVICTORS",
    "QUANTIZERS",
    "SPARSE_ATTENTION",
    "Amount",
    "Evictor",
    "Float8",
    "LayerView",
    "Quantizer",
    "SparseAttention",
    "StatsSpec",
    "StepEvictor",
    "StepView",
    "Threshold",
    "Wrapper",
]
