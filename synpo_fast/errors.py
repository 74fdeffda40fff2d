"""Errors that a user can fix. Command lines print them as one line; any other error shows its traceback."""


class UserError(ValueError):
    """A mistake in options, data or files. The message is one line: the problem, with the value, and the way out.

    It is a ValueError, so that callers of the library need not know it. If only this package's own code can pass a wrong
    value, raise a plain ValueError or use an assertion: there the traceback helps.
    """


class MissingPackage(ImportError):
    """An optional package that an option needs is not installed. The message says how to install it."""
