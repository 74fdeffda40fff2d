"""A digest of the rows of a run, by which a resumed run and a precomputed reference recognise their data."""

import hashlib
import json
from collections.abc import Sequence

from synpo_fast.data.pair import Pair


def data_key(pairs: Sequence[Pair]) -> str:
    """The digest of these pairs, in their order. Clips, responses and everything else that a run trains on belong to it."""
    facts = [
        (pair.id, str(pair.video), [(clip.path, clip.start, clip.end) for clip in pair.clips], pair.prompt, pair.chosen,
         pair.rejected, pair.ground_truth, pair.loss,
         *([[response.text for response in pair.responses], pair.comparisons] if pair.responses else []),
         *([pair.mismatched] if pair.mismatched is not None else []))
        for pair in pairs
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
