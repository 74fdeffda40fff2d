"""Makes untrusted text (captions, paths, error reasons) safe to print: characters that control the terminal are escaped.

An escape sequence in a caption could clear the screen or set the title, a carriage return overwrites the line, and marks for
right-to-left text reorder the words around them. Text in files is not changed.
"""

import logging
import re

# C0 and C1 control characters and DEL, except tab and line feed; direction marks, line separators, byte-order mark;
# lone surrogates, which no terminal's encoding can hold.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: object) -> str:
    r"""Returns the text with control characters escaped, such as \x1b or \u202e; tabs and line feeds stay."""
    return _CONTROL.sub(lambda found: _escaped(found[0]), str(text))


def printable_line(text: object) -> str:
    r"""Returns the text on one line, with control characters escaped, and line feeds and tabs as \n and \t."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Returns a number with its noun: 1 round, 2 rounds. plural: if it is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def _escaped(character: str) -> str:
    code = ord(character)
    return {13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


class PrintableFormatter(logging.Formatter):
    """A formatter that makes log lines safe to print."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
