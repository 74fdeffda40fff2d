"""Mistakes that a user can mend: command lines show them as one line, where any other error shows its traceback."""


class UserError(ValueError):
    """A mistake in options, data or files. The message is one line: what is wrong, with the value, and the way out.

    A ValueError so that callers of the library need not know it. Where only code of this package can pass a wrong value, a
    plain ValueError or an assertion is right: a traceback is what helps there.
    """


class MissingPackage(ImportError):
    """An optional package that an option needs is not installed. The message says how to install it."""
