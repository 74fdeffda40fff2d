"""The training data: preference pairs and the videos that they describe."""

from synpo_fast.data.manifest import ManifestError, read_manifest, read_manifest_rows, write_manifest
from synpo_fast.data.pair import Clip, Pair, Response
from synpo_fast.data.video.decode import decode_frames

__all__ = [
    "Clip",
    "ManifestError",
    "Pair",
    "Response",
    "decode_frames",
    "read_manifest",
    "read_manifest_rows",
    "write_manifest",
]
