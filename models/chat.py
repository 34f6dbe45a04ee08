"""The tokens that a tokenizer's chat template puts around the first message of a user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

# Two texts that share neither their first nor their last token.
ONE, OTHER = "Monday is first", "early at 7"


@dataclass(frozen=True)
class ChatTokens:
    """What a chat template puts before and after a user's first message; all empty without a template.

    Attributes:
        opening: tokens before the message: the template's own system prompt, if it has one, and the user header.
        system: tokens before a system message, which replaces that prompt; empty if the template allows none.
        user: tokens between a system message and the user's message.
        answer: tokens from the end of the message to the answer: end of turn and assistant header.
    """

    opening: tuple[int, ...] = ()
    system: tuple[int, ...] = ()
    user: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, encode: Callable[[str], Sequence[int]]) -> ChatTokens:
        """Those of a tokenizer: what two conversations with different messages have in common.

        Args:
            encode: tokens of a text, without special tokens around it.
        """

        def render(content: str, system: str | None = None) -> tuple[int, ...]:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": content})
            return tuple(
                encode(
                    tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
                    )
                )
            )

        if not getattr(tokenizer, "chat_template", None):
            return cls()
        one, other = render(ONE), render(OTHER)
        opening, answer = _shared(one, other), _shared(one[::-1], other[::-1])[::-1]
        try:
            one, other = render(ONE, system=ONE), render(ONE, system=OTHER)
        except TemplateError:
            return cls(opening, answer=answer)
        # Both end in the user's message, which the two conversations share too.
        message = len(render(ONE)) - len(opening)
        return cls(opening, _shared(one, other), _shared(one[::-1], other[::-1])[message:][::-1], answer)

    def prefix_tokens(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt precede the user's first message; 0 if it does not begin like the template.

        Where a template writes a system message into the user's turn, only the user header is found.
        """
        ids = tuple(ids)
        system = _begins(ids, self.system) and not (
            _begins(ids, self.opening) and len(self.opening) >= len(self.system)
        )
        if not system:
            return len(self.opening) if _begins(ids, self.opening) else 0
        length = len(self.user)
        ends = range(len(self.system) + length, len(ids) + 1)
        return next((end for end in ends if length and ids[end - length : end] == self.user), 0)


def _begins(ids: tuple[int, ...], start: tuple[int, ...]) -> bool:
    return bool(start) and ids[: len(start)] == start


def _shared(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """The tokens with which both begin."""
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
