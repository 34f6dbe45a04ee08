"""The exceptions that reach the user, each with its exit code."""


class LcevalError(Exception):
    """Base of all errors that lceval raises; printed as one line without a traceback."""

    exit_code = 4


class UserError(LcevalError):
    """Bad input. The message names the problem, the value, what is allowed and what to do."""

    exit_code = 2


class NotComparableError(LcevalError):
    """Two results that cannot be compared."""

    exit_code = 3


class InfrastructureError(LcevalError):
    """A failure of the machine: a full disk, a result that was not written, a missing device."""

    exit_code = 4
