"""lm-eval's `hf` model whose loading errors are one line, on whatever device there is."""

from __future__ import annotations

import re
from typing import Any, Self

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT

from lceval.models.arguments import check_flags, unknown_argument
from lceval.models.loading import loading, loading_tokenizer

# The default of lm-eval's `--device`.
DEFAULT_DEVICE = "cuda:0"


class CheckedHFLM(HFLM):  # type: ignore[misc]
    """HFLM; without `device` it runs on CUDA, or on the CPU of a machine without it.

    Raises:
        UserError: an unknown argument, or a model, adapter or tokenizer that cannot be loaded.
        InfrastructureError: a model that does not fit into the memory.
    """

    def __init__(self, pretrained: Any, device: str | None = None, **kwargs: Any) -> None:
        # The parts below name what they load; this is for the rest, such as tying weights.
        with loading(pretrained=pretrained, peft=kwargs.get("peft"), delta=kwargs.get("delta")):
            super().__init__(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **kwargs)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """The model of lm-eval's model arguments and flags; without CUDA the default of `--device` is the CPU."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        check_flags(arg_dict, flags)
        if flags.get("device") == DEFAULT_DEVICE and not torch.cuda.is_available():
            del flags["device"]
        return cls(**arg_dict, **flags)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        with loading(pretrained=pretrained):
            super()._get_config(pretrained, **options)

    def _get_backend(self, config: Any, backend: Any = "default", **options: Any) -> None:
        if config.model_type in IMAGE_TEXT and config.model_type not in CAUSAL:
            # A model of images and text, such as Mistral 3: its text model answers.
            self.AUTO_MODEL_CLASS, backend = AutoModelForImageTextToText, "causal"
        super()._get_backend(config, backend=backend, **options)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        with loading_tokenizer(pretrained, tokenizer):
            super()._create_tokenizer(pretrained, tokenizer, **options)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        with loading(pretrained=pretrained, peft=options.get("peft"), delta=options.get("delta")):
            try:
                super()._create_model(pretrained, **options)
            except TypeError as error:
                if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
                    raise unknown_argument(unknown[1], type(self), HFLM) from None
                raise
