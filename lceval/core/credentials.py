"""Secrets come from the environment only: refused in arguments, which are stored, and removed from errors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from lceval.core.errors import UserError

# Secrets: values of environment variables with such names, and texts that look like keys.
_VARIABLE = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_LOOKS = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,})|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)")
# Not the arguments about tokens of a text, such as add_bos_token and prefix_token_id.
_ARGUMENT = re.compile(
    r"(?:.*_)?(?:api_?key|secret|password|passwd|(?:access|api|auth|hf|hub)_token)|key|token", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """A text without values of variables such as HF_TOKEN and without anything that looks like a key."""
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    return _LOOKS.sub("[secret]", text)


def refuse_secrets(option: str, arguments: Mapping[str, Any]) -> None:
    """Check that no argument is a secret, by its name or its value.

    Raises:
        UserError: one is; its value is not in the message.
    """
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            refuse_secrets(option, value)
        elif not isinstance(value, bool | None) and (
            _ARGUMENT.fullmatch(name) or (isinstance(value, str) and without_secrets(value) != value)
        ):
            raise UserError(
                f"--{option} {name}: looks like a secret, which run.json would store: remove it, and set it in the "
                "environment (HF_TOKEN, OPENAI_API_KEY)"
            )
