"""A judge behind an OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp and others.

The key comes from LCEVAL_JUDGE_KEY or OPENAI_API_KEY. It is sent to the endpoint only, and removed from replies and
errors before they are stored or raised, since some servers echo keys in their errors.
"""

from __future__ import annotations

import os
import re
import threading
from typing import Any

from lceval.core.errors import UserError
from lceval.judge.protocol import JudgeName, RefusedError, TryAgainError
from lceval.judge.replies import Reply
from lceval.judge.rubrics import Case, Prompt, Rubric

KEYS = ("LCEVAL_JUDGE_KEY", "OPENAI_API_KEY")
_NO_KEY = "none"  # required by the client, ignored by local servers
_LONGEST_REASON = 160
# Arguments that a server may not support, in the order of removal after a 400.
_OPTIONAL = ("response_format", "max_tokens", "temperature")


class EndpointJudge:
    """Judge behind an OpenAI-compatible endpoint."""

    parallel = True
    priced = True

    def __init__(self, spec: JudgeName, *, timeout: float, max_tokens: int | None = None) -> None:
        try:
            import openai
        except ModuleNotFoundError:
            raise UserError("an endpoint judge requires the openai package: pip install 'lceval[judge]'") from None
        self.name, self.revision = str(spec), spec.revision
        self._errors, self._model, self._max_tokens = openai, spec.model, max_tokens
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), "")
        self._client = openai.OpenAI(
            api_key=self._key or _NO_KEY, base_url=spec.url, timeout=timeout, max_retries=0, default_headers={}
        )
        self._dropped: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        return self._model

    def close(self) -> None:
        self._client.close()

    def ask(self, rubric: Rubric, case: Case, prompt: Prompt) -> Reply:
        """One chat completion at temperature 0; a 400 is retried with one optional argument less each time."""
        dropped = self._dropped
        while True:
            try:
                reply = self._complete(rubric, prompt, dropped)
            except self._errors.BadRequestError as error:
                sent = _OPTIONAL if rubric.schema_of_reply is not None else _OPTIONAL[1:]
                optional = [name for name in sent if name not in dropped]
                if not optional:
                    raise RefusedError(f"400: {self._reason(error)}") from None
                mentioned = [name for name in optional if name in str(error)]
                dropped = (*dropped, (mentioned or optional)[0])
            else:
                with self._lock:  # later calls start with these arguments
                    self._dropped = max(self._dropped, dropped, key=len)
                return reply

    def _complete(self, rubric: Rubric, prompt: Prompt, dropped: tuple[str, ...]) -> Reply:
        tokens = self._max_tokens or rubric.max_tokens
        schema = rubric.schema_of_reply
        arguments: dict[str, Any] = {"model": self._model, "messages": prompt.messages}
        if "temperature" not in dropped:
            arguments["temperature"] = 0
        # Newer OpenAI models support only max_completion_tokens, most other servers only max_tokens.
        arguments["max_completion_tokens" if "max_tokens" in dropped else "max_tokens"] = tokens
        if schema is not None and "response_format" not in dropped:
            output_format = {"name": rubric.rubric, "strict": True, "schema": schema}
            arguments["response_format"] = {"type": "json_schema", "json_schema": output_format}
        errors = self._errors
        try:
            completion = self._client.chat.completions.create(**arguments)
            choice, usage = completion.choices[0], completion.usage
            text = _text(choice.message.content)
            served = " ".join(
                filter(None, map(_text, (completion.model, getattr(completion, "system_fingerprint", None))))
            )
            counted = (_count(usage.prompt_tokens), _count(usage.completion_tokens)) if usage else (0, 0)
            cut = choice.finish_reason == "length"
        except errors.BadRequestError:
            raise
        except (errors.AuthenticationError, errors.PermissionDeniedError, errors.NotFoundError) as error:
            raise UserError(
                f"the judge {self.name} returns {error.status_code} ({self._reason(error)}): check the model's name, "
                f"the address and {' or '.join(KEYS)}"
            ) from None
        except errors.APITimeoutError:
            raise TryAgainError("timeout") from None
        except errors.APIStatusError as error:
            if error.status_code in (408, 409, 425, 429) or error.status_code >= 500:
                raise TryAgainError(str(error.status_code), _seconds(error.response.headers)) from None
            raise RefusedError(f"{error.status_code}: {self._reason(error)}") from None
        except errors.APIConnectionError:
            raise TryAgainError("no connection") from None
        except Exception as error:  # a truncated body, invalid JSON, or a different schema
            raise TryAgainError(f"not a chat completion ({type(error).__name__})") from None
        return Reply(self._clean(text), *counted, served=self._clean(served), cut=cut)

    def _reason(self, error: Exception) -> str:
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        return self._clean(" ".join(str(message or error).split()))[:_LONGEST_REASON]

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _text(value: object) -> str:
    """A text of a completion, which the client does not validate; half of a surrogate pair becomes "?".

    Raises:
        TypeError: neither a text nor null.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} instead of a text")
    return (value or "").encode(errors="replace").decode()


def _count(value: object) -> int:
    """A number of tokens; 0 if it is unknown."""
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0


def _seconds(headers: Any) -> float | None:
    """`Retry-After` in seconds; None if it is missing or a date."""
    value = str(headers.get("retry-after", ""))
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None
