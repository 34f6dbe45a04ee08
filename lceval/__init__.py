"""Long-context evaluation over compressed KV caches, as an extension of lm-evaluation-harness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lceval.models.asking import LoadedModel

__version__ = "0.1.0"


def load(pretrained: Any, kv: str = "full", **arguments: Any) -> LoadedModel:
    """Load a model that compresses texts and answers questions about them (docs/python.md).

    Args:
        pretrained: a Hugging Face name, a folder, a loaded model, or the packaged `smollm2-135m`.
        kv: KV recipe, such as `snapkv:0.25`.
        arguments: further model arguments of `lcft`, such as `peft` and `dtype`.

    Raises:
        UserError: a bad argument or recipe, or a model that cannot be loaded.
    """
    from lceval.models.asking import LoadedModel

    return LoadedModel(pretrained, kv, **arguments)
