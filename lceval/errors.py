"""The exceptions that reach a user, and the exit code each one ends the process with."""


class LcevalError(Exception):
    """Base of every error this package raises on purpose; printed as one line, without a traceback."""

    exit_code = 4


class UserError(LcevalError):
    """Bad input: says what was wrong, the value, what is allowed and what to do."""

    exit_code = 2


class NotComparableError(LcevalError):
    """Two results that may not be set side by side."""

    exit_code = 3


class InfrastructureError(LcevalError):
    """The machine failed, not the user: a full disk, a result that was not written, a missing device."""

    exit_code = 4
