"""Finds strings that a model does not read as text: chat template tokens, video placeholders, and tags of other formats.

A tokenizer turns "<|im_end|>" inside a caption into the token that ends the caption, and a video placeholder into positions for
features that do not exist. The model's tokenizer defines these strings. Without a tokenizer, the search covers the strings in
the chat templates of the supported families. A tag such as <video> is plain text to most families, but it is no part of a
caption.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from synpo_fast.data.pair import Pair

TAGS = ("<video>", "<image>", "<audio>", "<img>", "</img>")
CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>|<IMG_CONTEXT>")  # of any family: <|im_end|>, <|video_pad|>, ...
QUOTED = 3


def special_tokens(tokenizer: Any, *more: str) -> re.Pattern[str]:
    """A pattern for the tokenizer's special tokens and for `more` strings that the model family reserves."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known |= {*tokenizer.all_special_tokens, *more} - {""}
    return any_of(known)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches the longest word at each position. Without words it matches nothing."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def marked_pairs(pairs: Iterable[Pair], pattern: re.Pattern[str]) -> list[tuple[Pair, str]]:
    """Pairs in which a text matches, each with its first match, such as "'<video>' in chosen"."""
    found = []
    for pair in pairs:
        for field, text in _texts(pair):
            match = pattern.search(text)
            if match is not None:
                found.append((pair, f"{match[0]!r} in {field}"))
                break
    return found


def _texts(pair: Pair) -> Iterator[tuple[str, str]]:
    """The texts of a pair with their names in the manifest."""
    yield "prompt", pair.prompt
    if pair.responses:
        for index, response in enumerate(pair.responses):
            yield f"responses[{index}]", response.text
    else:
        yield "chosen", pair.chosen
        yield "rejected", pair.rejected
    yield "ground_truth", pair.ground_truth or ""


def quoted(found: Sequence[tuple[Pair, str]]) -> str:
    """The first QUOTED pairs and their matches, as part of a message."""
    shown = "; ".join(f"{pair.id!r} has {what}" for pair, what in found[:QUOTED])
    return shown + ("; ..." if len(found) > QUOTED else "")
