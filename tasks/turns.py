"""Questions on one context as the turns of one conversation."""

from collections.abc import Iterator, Sequence

from lceval.tasks import prompts
from lceval.tasks.rows import Row, by_context


def as_turns(rows: Sequence[Row]) -> Iterator[Row]:
    """Each question after those before it on the same context, with their gold answers.

    As in SCBench (Li et al. 2024, arXiv 2412.10319): gold answers, so that an error does not spread to later turns. The
    context is in the first turn.
    """
    for on_context in by_context(rows).values():
        before: list[dict[str, str]] = []
        for row in on_context:
            question = row["ask"] if before else prompts.prompt(row)
            messages = [*before, {"role": "user", "content": question}]
            yield {**row, "messages": messages, "length_tokens": None}
            answer = f"{row['reply_prefix']} {row['answers'][0]}".lstrip()
            before = [*messages, {"role": "assistant", "content": answer}]
