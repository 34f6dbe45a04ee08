"""The exceptions that reach the user, each with its exit code."""

_LONGEST = 900
_HEAD, _TAIL = 600, 250


def one_line(text: object) -> str:
    """The text on one printable line; the middle of a longer one than 900 characters is left out."""
    line = " ".join(str(text).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= _LONGEST else f"{line[:_HEAD]} […] {line[-_TAIL:]}"


class LcevalError(Exception):
    """Base of all errors that lceval raises; printed as one line without a traceback.

    A message may quote any input: it is shortened to one printable line here, once for all of them.
    """

    exit_code = 4

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


class UserError(LcevalError):
    """Bad input. The message names the problem, the value, what is allowed and what to do."""

    exit_code = 2


class NotComparableError(LcevalError):
    """Two results that cannot be compared."""

    exit_code = 3


class InfrastructureError(LcevalError):
    """A failure of the machine: a full disk, a result that was not written, a missing device."""

    exit_code = 4
