"""Lengths in the model's tokens: the tokenizer of model_args, with its chat template.

Special tokens are counted as lm-eval's `hf` model adds them: as the tokenizer does, unless the text already begins with
the beginning-of-sequence token.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from jinja2 import TemplateError

from lceval.core.errors import UserError

ALIASES: dict[str, Callable[[], str]] = {}
"""Short model name -> function that returns a folder or hub name; filled where models are registered."""

_OPTIONS = {
    "revision": "revision",
    "subfolder": "subfolder",
    "trust_remote_code": "trust_remote_code",
    "use_fast_tokenizer": "use_fast",
    "add_bos_token": "add_bos_token",
}
"""Model argument -> keyword of `from_pretrained`, for arguments that change the tokenizer."""


class TokenMeter:
    """Counts tokens of prompts as the model receives them."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        add_bos: bool | None = None,
        template_args: Mapping[str, Any] | None = None,
        system: str = "",
    ) -> None:
        """
        Args:
            tokenizer: A transformers tokenizer.
            add_bos: lm-eval's `add_bos_token`; None for the tokenizer's default.
            template_args: Further arguments of the chat template (`enable_thinking`, ...).
            system: System instruction of every prompt.
        """
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self._template_args = dict(template_args or {})
        self._system = system

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a default chat template."""
        template = getattr(self._tokenizer, "chat_template", None)
        return "default" in template if isinstance(template, dict) else bool(template)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that affects token counts."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else sorted(self._tokenizer.get_vocab().items())
        parts = [
            type(self._tokenizer).__name__,
            state,
            self._tokenizer.chat_template if self.has_template else None,
            self._tokenizer.bos_token,
            self._add_bos,
            self._template_args,
            self._system,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def template_tokens(self) -> int:
        """Tokens that the chat template adds to a prompt; 0 without a template."""
        (rendered,) = self.prompts(["question"])
        (plain,) = self._counts([self._system + "question"], add_special_tokens=self._add_bos is not False)
        return rendered - plain

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special tokens."""
        return self._counts(texts, add_special_tokens=False)

    def prompts(self, prompts: Sequence[str | Sequence[Mapping[str, str]]], reply_prefix: str = "") -> list[int]:
        """Tokens of each prompt, with the chat template if the tokenizer has one.

        Args:
            prompts: User messages, or conversations that end with one.
            reply_prefix: Beginning of the reply (lm-eval's `gen_prefix`), counted with the prompt.
        """
        rendered = [self._render(prompt, reply_prefix) for prompt in prompts]
        bos = self._tokenizer.bos_token
        if bos and all(text.startswith(bos) for text in rendered):
            return self._counts(rendered, add_special_tokens=False)
        return self._counts(rendered, add_special_tokens=self._add_bos is not False)

    def _render(self, prompt: str | Sequence[Mapping[str, str]], reply_prefix: str) -> str:
        if not self.has_template:
            text = prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
            return self._system + text + reply_prefix
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if reply_prefix:
            messages.append({"role": "assistant", "content": reply_prefix})
        if self._system:
            try:
                return self._apply_template([{"role": "system", "content": self._system}, *messages])
            except TemplateError:
                # No system turn in this template: lm-eval then drops the instruction, but only with the template.
                messages[0]["content"] = self._system + messages[0]["content"]
        return self._apply_template(messages)

    def _apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        continued = messages[-1]["role"] == "assistant"
        rendered: str = self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **self._template_args,
        )
        return rendered

    def _counts(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        if not texts:
            return []
        # verbose=False: texts longer than the model's context are expected here
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [len(ids) for ids in encoded["input_ids"]]


def names_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether model_args include a tokenizer."""
    return bool(metadata.get("tokenizer") or metadata.get("pretrained"))


def meter_for(task: str, metadata: Mapping[str, Any]) -> TokenMeter:
    """Token meter of a run: `tokenizer` of model_args, else `pretrained`, with the run's `system_instruction`.

    Raises:
        UserError: Neither is set, or the tokenizer cannot be loaded.
    """
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not name:
        raise UserError(
            f"{task} measures its length in the model's tokens: pass pretrained=... or tokenizer=... in --model_args."
        )
    if not isinstance(name, str):
        raise UserError(
            f"{task} measures its length in the model's tokens and got a {type(name).__name__} as tokenizer: "
            "pass its name or folder as tokenizer=... in --model_args."
        )
    options = {key: metadata[argument] for argument, key in _OPTIONS.items() if metadata.get(argument) is not None}
    if not metadata.get("tokenizer") and metadata.get("gguf_file"):
        options["gguf_file"] = metadata["gguf_file"]
    template_args = dict(metadata.get("chat_template_args") or {})
    if metadata.get("enable_thinking") is not None:
        template_args["enable_thinking"] = metadata["enable_thinking"]
    return _meter(
        name,
        json.dumps(options, sort_keys=True),
        json.dumps(template_args, sort_keys=True),
        str(metadata.get("system_instruction") or ""),
    )


@lru_cache(maxsize=4)  # the tasks of a group share one tokenizer
def _meter(name: str, options_json: str, template_json: str, system: str) -> TokenMeter:
    from transformers import AutoTokenizer  # heavy, and only needed where lengths are measured

    options = {"trust_remote_code": False, **json.loads(options_json)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(ALIASES[name]() if name in ALIASES else name, **options)
    except Exception as error:  # a damaged tokenizer.json has no exception class of its own
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"cannot load the tokenizer {name!r} ({reason}): pass a folder, a hub name"
            f"{''.join(f' or {alias}' for alias in sorted(ALIASES))} as tokenizer=... in --model_args."
        ) from error
    return TokenMeter(
        tokenizer, add_bos=options.get("add_bos_token"), template_args=json.loads(template_json), system=system
    )
