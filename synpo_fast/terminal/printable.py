"""Text of others (captions, paths, reasons) as it may be written to a terminal: what would steer the terminal is spelt out.

An escape sequence in a caption could clear the screen or set the title, a carriage return writes over the line, and marks for
right-to-left text turn the words around it. Files keep the text as it is.
"""

import logging
import re

# C0 and C1 control characters and DEL, but for tab and line feed; marks of direction, separators of lines, byte-order mark;
# halves of surrogate pairs, which no terminal's encoding can hold.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: object) -> str:
    r"""The text with control characters as \x1b or \u202e; tabs and line feeds stay."""
    return _STEERING.sub(lambda found: _spelt(found[0]), str(text))


def printable_line(text: object) -> str:
    r"""The same on one line: line feeds and tabs are \n and \t, too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _spelt(character: str) -> str:
    code = ord(character)
    return {13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


class PrintableFormatter(logging.Formatter):
    """A formatter of log lines that end in a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
