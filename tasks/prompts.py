"""Prompts as plain text: instruction with the output format, context, question.

The context is verbatim in the prompt and also a field of the row, so that a model can locate where the question begins.
A prompt neither begins nor ends with white space, which a chat template would strip. The instruction depends on the
`layout` of the context (documents, pairs, text, ...) and on the output format of the reply, a template in `modes/`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

ANSWER_PREFIX = "Answer:"
"""Prefix of a short reply; multiple-choice tasks append it to the prompt and score the options after it."""

FINAL_PREFIX = "The answer is:"
"""Prefix of the last line of a longer reply."""

LAYOUTS: dict[str, tuple[str, str]] = {
    # The output format precedes the context: after the question, small models ignore the question.
    "documents": ("Read the numbered documents below and answer the question that follows them.", "documents"),
    "pairs": (
        "Read the list of keys and their values below, one pair a line, and answer the question that follows it.",
        "lines",
    ),
    "text": ("Read the text below and answer the question that follows it.", "text"),
    "facts": ("Read the text below. Facts are scattered in it; answer the question about them that follows.", "text"),
    "report": ("Read the table and the text below and answer the question that follows them.", "text"),
    "examples": (
        "Below are rows of a table, one a line, each with its target. Predict the target of the last row.",
        "lines",
    ),
    "none": ("Answer the question below.", "text"),
}
"""By layout: instruction, and how the texts of the documents are joined."""

_THEN_ANSWER = f'Then give the answer alone, on a line of its own that begins with "{FINAL_PREFIX}".'
OUTPUT_FORMATS: dict[str, str] = {
    "ao": 'Give only the answer, on one line that begins with "Answer:".',
    "pair": 'Give only the value, on one line that begins with "Answer:".',
    "short": 'Give a short answer, a few words or one sentence, on one line that begins with "Answer:".',
    "number": (
        "Give only the number, to five decimals where it has so many and a share as a fraction (0.14123, not 14%), "
        'or yes or no, on one line that begins with "Answer:".'
    ),
    "scaled": (
        "Give only the answer, with its scale (thousand, million, billion or percent) if it has one and with "
        "semicolons between several answers, "
        'on one line that begins with "Answer:".'
    ),
    "list": 'Give all the answers, separated by commas, on one line that begins with "Answer:".',
    "label": 'Give only the target, on one line that begins with "Answer:".',
    "target": 'Give only the target, a number, on one line that begins with "Answer:".',
    "id": (
        "First name the documents that the answer rests on, on one line such as "
        '"Relevant documents: [DOC 2], [DOC 5]", or "[DOC -1]" if there is none. ' + _THEN_ANSWER
    ),
    "docid": (
        "Do not answer it: name the documents that hold the answer, the best one first, on one line such as "
        '"Relevant documents: [DOC 2], [DOC 5]".'
    ),
    "idc": (
        "First copy every document that the answer rests on, each on a line of its own that begins with its tag, "
        'such as "[DOC 2] the whole text", or write "[DOC -1]" if there is none. ' + _THEN_ANSWER
    ),
    "idq": (
        "First quote the words that the answer rests on, at most 30 tokens a quote, each on a line of its own after "
        'the tag of its document, such as [DOC 2] "the words", or write "[DOC -1]" if there is none. ' + _THEN_ANSWER
    ),
    "rj": (
        "Work in four steps, each under its heading. Question analysis: what is asked for. Document review: which "
        "documents bear on it. Reasoning: step by step, with the documents that each step rests on cited as [DOC X]. "
        f'Last, the answer alone, on a line of its own that begins with "{FINAL_PREFIX}".'
    ),
    "infinite_qa": 'Give only the answer, on one line that begins with "Answer:".',
    "judged": "Give a complete answer, and nothing but the answer.",
}
OUTPUT_FORMATS |= {"turns": OUTPUT_FORMATS["ao"], "equality": OUTPUT_FORMATS["judged"]}
"""By output format: its instruction."""

_FOUR = "A question about it follows, with four options of which one is correct."
VERBATIM = {"mrcr", "ruler_niah", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa"}
"""Output formats whose prompts come from the rows."""

_WHAT_FOLLOWS = {
    "options": "A question about it follows.",
    "letter": _FOUR,
    "letter_ll": _FOUR,
    "infinite_letter": _FOUR,
    "sum": "What to write about it follows.",
    "infinite_sum": "What to write about it follows.",
}
"""Instruction of output formats that are specified after the question; without a context, `about it` is removed."""

_LETTER_CLOSINGS = {
    "letter": 'Reply with one line: "The correct answer is (X)".',
    "letter_ll": "Reply with its letter.\n",
    "infinite_letter": "Reply with its letter alone.",  # a letter as the first character decides its score
}
_SUMMARY_WORDS = {"sum": 250, "infinite_sum": 850}  # mean length of the references
LETTERS = "ABCD"


def instruction(layout: str, output_format: str) -> str:
    """The part of the prompt before the context."""
    if output_format in VERBATIM:
        return ""
    if follows := _WHAT_FOLLOWS.get(output_format):
        return follows.replace(" about it", "") if layout == "none" else f"Read the text below. {follows}"
    return f"{LAYOUTS[layout][0]} {OUTPUT_FORMATS[output_format]}"


def ask(output_format: str, question: str, choices: Sequence[str] = ()) -> str:
    """The part of the prompt after the context: question, options and their output format."""
    if output_format == "options":
        options = "\n".join(f"- {choice}" for choice in choices)
        return f"Question: {question}\nOptions:\n{options}\nReply with the text of the correct option.\n"
    if output_format in _LETTER_CLOSINGS:
        options = "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        return f"Question: {question}\n{options}\n{_LETTER_CLOSINGS[output_format]}"
    if output_format in _SUMMARY_WORDS:
        return f"{question}\nReply with a summary of about {_SUMMARY_WORDS[output_format]} words, and nothing else."
    return question if output_format in VERBATIM else f"Question: {question}"


def block(layout: str, texts: Sequence[str]) -> str:
    """Join the texts of the documents into the context, by layout.

    Layout `documents` numbers them from 0: `[DOC i]`, the text, a blank line between.
    """
    joining = LAYOUTS[layout][1]
    if joining == "documents":
        return "\n\n".join(f"[DOC {number}]\n{text}" for number, text in enumerate(texts))
    return ("\n" if joining == "lines" else "\n\n").join(texts)


def render(layout: str, output_format: str, context: str, question: str, choices: Sequence[str] = ()) -> str:
    """Render a complete prompt."""
    return join(instruction(layout, output_format), context, ask(output_format, question, choices))


def join(before: str, context: str, after: str, separator: str = "\n\n") -> str:
    """Join the parts of a prompt, with blank lines by default; empty parts are left out."""
    return separator.join(part for part in (before, context, after) if part)


def prompt(doc: Mapping[str, Any]) -> str:
    """lm-eval's `doc_to_text` of every task; that of a conversation without its roles."""
    if doc.get("messages"):
        return "\n\n".join(message["content"] for message in doc["messages"])
    return join(doc["instruction"], doc["context"], doc["ask"], doc.get("separator", "\n\n"))


def conversation(
    doc: Mapping[str, Any], system: str | None, chat_template: Callable[[list[dict[str, str]]], str] | None
) -> str:
    """The prompt of a row that is a conversation: lm-eval's few-shot context, which has one message, does not fit it.

    Args:
        system: System instruction.
        chat_template: Renders messages; None joins their texts.
    """
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in doc["messages"]]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return chat_template(messages) if chat_template else "\n\n".join(m["content"] for m in messages)


_REPLY_PREFIXES = {
    **dict.fromkeys(("id", "idc", "idq", "rj"), FINAL_PREFIX),
    # The prompt already ends with the prefix; the scored options follow.
    **dict.fromkeys(("options", "letter_ll", *VERBATIM), ""),
    **dict.fromkeys(("sum", "infinite_sum", "infinite_letter", "judged", "equality", "docid"), ""),
    "letter": "The correct answer is",
}


def reply_prefix(output_format: str) -> str:
    """Text of the reply right before the answer."""
    return _REPLY_PREFIXES.get(output_format, ANSWER_PREFIX)
