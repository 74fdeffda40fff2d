"""Texts that hold what is no text to a model: tokens of a chat template or of a video, and tags left over from another format.

A tokenizer turns "<|im_end|>" inside a caption into the token that ends it, and a placeholder of a video into room for
features that are not there. Which strings those are, the tokenizer of the model knows. Without one, what the chat templates of
the served families use is looked for. A tag such as <video> is plain text to most families, but nobody wrote it for a reader.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from synpo_fast.data.pair import Pair

TAGS = ("<video>", "<image>", "<audio>", "<img>", "</img>")
CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>|<IMG_CONTEXT>")  # of any family: <|im_end|>, <|video_pad|>, ...
QUOTED = 3
FIELDS = ("prompt", "chosen", "rejected", "ground_truth")


def special_tokens(tokenizer: Any, *more: str) -> re.Pattern[str]:
    """Strings that the tokenizer reads as special tokens, and more that a model's family reserves."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known |= {*tokenizer.all_special_tokens, *more} - {""}
    return any_of(known)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of the words that stands at a place; nothing where there are none."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def marked_pairs(pairs: Iterable[Pair], pattern: re.Pattern[str]) -> list[tuple[Pair, str]]:
    """Pairs with a text that holds a match, and "'<video>' in chosen" of the first one of each."""
    found = []
    for pair in pairs:
        for field in FIELDS:
            match = pattern.search(getattr(pair, field) or "")
            if match is not None:
                found.append((pair, f"{match[0]!r} in {field}"))
                break
    return found


def quoted(found: Sequence[tuple[Pair, str]]) -> str:
    """The first ones by id, as part of a message."""
    shown = "; ".join(f"{pair.id!r} has {what}" for pair, what in found[:QUOTED])
    return shown + ("; ..." if len(found) > QUOTED else "")
