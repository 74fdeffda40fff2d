"""Finds texts that the model's tokenizer would not read as plain text, before the model is loaded."""

from __future__ import annotations

import logging
from dataclasses import replace

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.data_key import data_key
from synpo_fast.data.text_markers import CONTROL, TAGS, any_of, marked_pairs, quoted, special_tokens
from synpo_fast.errors import UserError
from synpo_fast.models.loading import load_tokenizer
from synpo_fast.training.run_data import RunData

logger = logging.getLogger(__name__)


def check_texts(config: TrainConfig, data: RunData) -> RunData:
    """Checks the texts of all pairs and returns the data. Pairs that hold special tokens are left out if allow_bad_rows is set;
    otherwise they raise a UserError that names the first of them.

    Tags of other formats and tokens of other families are plain text to this tokenizer, so they only cause a warning.
    """
    tokenizer, family = load_tokenizer(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    if not family.placeholder_token and all(pair.video is not None or pair.clips for pair in data.train):
        raise UserError(
            f"{config.model_name_or_path} is a text-only model, and all {len(data.train)} pairs of {config.train_file} have a "
            "video: choose a model that sees videos"
        )
    special = special_tokens(tokenizer, family.placeholder_token, *family.video_markers)
    pairs = [*data.train, *data.evaluation]
    found = marked_pairs(pairs, special)
    if found:
        what = f"{len(found)} of {len(pairs)} pairs hold special tokens of the model's tokenizer: {quoted(found)}"
        if not config.allow_bad_rows:
            raise UserError(
                f"{what}. They would not be read as text: take them out, or leave these pairs out with --allow_bad_rows"
            )
        logger.warning("left out: %s", what)
        data = _without(data, {id(pair) for pair, _ in found})
    left_over = marked_pairs([*data.train, *data.evaluation], any_of(TAGS))
    left_over += marked_pairs([*data.train, *data.evaluation], CONTROL)
    if left_over:
        logger.warning(
            "%d of %d pairs hold tags that are plain text to this model, left over from another format? %s",
            len({id(pair) for pair, _ in left_over}), len(pairs), quoted(left_over),
        )  # fmt: skip
    return data


def _without(data: RunData, left_out: set[int]) -> RunData:
    train = [pair for pair in data.train if id(pair) not in left_out]
    if not train:
        raise UserError("no pair is left to train on: all of them hold special tokens of the model's tokenizer")
    evaluation = [pair for pair in data.evaluation if id(pair) not in left_out]
    return replace(data, train=train, evaluation=evaluation, key=data_key(train))
