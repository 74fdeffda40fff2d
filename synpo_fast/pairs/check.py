"""Checks a manifest before training: finds its problems and reports statistics of its texts and scores.

Problems spoil training or stop a run: bad rows, unusable videos, clips past the end, the same pair twice, a text that is chosen
in one pair and rejected in another of the same video and prompt, responses that differ only in case and spaces, a rejected
response with a higher score than the chosen one, and a row whose responses all have the same score. Of a row with several
responses the best counts as chosen and the worst as rejected. Notes are allowed but worth checking: one chosen text in several
pairs, the same texts with different videos, all rows with one video and prompt. Length bias (chosen is mostly longer than
rejected) is reported because a loss over whole responses learns it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from synpo_fast.data.manifest import ManifestError, read_manifest_rows
from synpo_fast.data.pair import LABELS, Pair
from synpo_fast.data.text_markers import CONTROL, TAGS, any_of, marked_pairs, special_tokens
from synpo_fast.terminal.printable import counted

QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}
CLIP_SLACK_S = 0.1  # a clip may end this long after its video: times in a manifest are often rounded
MAX_BINS = 20
ONE_CONTEXT = "rows of one video and prompt alone: loss_type=kto needs several of them"


@dataclass(frozen=True)
class Finding:
    """One kind of problem or note. examples holds all places where it was found."""

    what: str
    examples: list[str]
    is_problem: bool = True

    @property
    def count(self) -> int:
        return len(self.examples)


@dataclass
class CheckReport:
    """The result of check_manifest. num_videos counts distinct files. videos_checked is False if no video root was given."""

    file: str
    num_rows: int = 0
    num_pairs: int = 0
    num_sft: int = 0
    num_desirable: int = 0  # rows of one response with a label
    num_undesirable: int = 0
    num_with_responses: int = 0  # rows with several responses
    num_responses: int = 0  # in these rows
    num_text_pairs: int = 0
    num_videos: int = 0
    videos_checked: bool = False
    words: dict[str, dict[str, int]] = field(default_factory=dict)
    score_gaps: list[float] = field(default_factory=list)
    chosen_longer: float | None = None  # share of preference pairs
    findings: list[Finding] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not any(finding.is_problem for finding in self.findings)


def check_manifest(
    path: str | Path,
    *,
    video_root: str | Path | None = None,
    decode: bool = False,
    num_workers: int = 1,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks the manifest and, if video_root is given, probes every distinct video once, in worker processes.

    decode: also decode the first and the last frame. A truncated file is a problem in any case. model: its tokenizer defines
    the special tokens to search for; without it, those of all supported families are searched. progress(done, total) is called
    after every video.
    """
    report = CheckReport(str(path))
    try:
        pairs, bad_rows = read_manifest_rows(path)
    except ManifestError as error:
        report.findings = [Finding("the file is not a manifest", [str(error)])]
        return report
    report.num_rows, report.num_pairs = len(pairs) + len(bad_rows), len(pairs)
    kinds = Counter(pair.loss for pair in pairs)
    report.num_sft, report.num_desirable, report.num_undesirable = (kinds[k] for k in ("sft", *LABELS.values()))
    report.num_with_responses = sum(bool(pair.responses) for pair in pairs)
    report.num_responses = sum(len(pair.responses) for pair in pairs)
    report.num_text_pairs = sum(pair.video is None and not pair.clips for pair in pairs)
    users = _users_of_videos(pairs)
    report.num_videos = len(users)
    _measure_texts(report, pairs)
    findings = [Finding("bad rows", [str(row) for row in bad_rows]), *_compare_pairs(pairs), *_markers(pairs, model)]
    if video_root is not None:
        report.videos_checked = True
        durations, unusable = _probe_videos(list(users), Path(video_root), decode, num_workers, progress)
        reasons = [f"{name}: {reason} ({counted(len(users[name]), 'pair')})" for name, reason in unusable.items()]
        findings += [Finding("videos that cannot be used", reasons), _clips_past_the_end(pairs, durations)]
    report.findings = [finding for finding in findings if finding.count]
    return report


def _measure_texts(report: CheckReport, pairs: list[Pair]) -> None:
    preferences = [pair for pair in pairs if pair.loss == "preference"]
    texts = {
        "prompt": [pair.prompt for pair in pairs],
        "chosen": [pair.chosen for pair in pairs if pair.chosen],
        "rejected": [pair.rejected for pair in pairs if pair.rejected and pair.loss != "sft"],
        "responses": [response.text for pair in pairs for response in pair.responses],
    }
    report.words = {name: _quantiles([len(text.split()) for text in part]) for name, part in texts.items() if part}
    longer = [len(pair.chosen.split()) > len(pair.rejected.split()) for pair in preferences]
    report.chosen_longer = sum(longer) / len(longer) if longer else None
    report.score_gaps = [
        pair.chosen_score - pair.rejected_score
        for pair in preferences
        if pair.chosen_score is not None and pair.rejected_score is not None
    ]


def _quantiles(values: list[int]) -> dict[str, int]:
    values = sorted(values)
    return {name: values[round(share * (len(values) - 1))] for name, share in QUANTILES.items()}


def histogram(values: list[float]) -> list[tuple[float, float, int]]:
    """Bins (from, to, count). Their width is 1, 2, 5, 10, 20, ...; there are at most MAX_BINS."""
    steps = (float(digit * 10**power) for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if max(values) // step - min(values) // step < MAX_BINS)
    counts = Counter(int(value // step) for value in values)
    return [(place * step, (place + 1) * step, counts[place]) for place in range(min(counts), max(counts) + 1)]


def _compare_pairs(pairs: list[Pair]) -> Iterable[Finding]:
    preferences = [pair for pair in pairs if pair.loss == "preference"]
    same_pair = _groups(pairs, lambda pair: (_shown(pair), pair.prompt, pair.chosen, frozenset(_worse(pair))))
    yield Finding("pairs given more than once", [_ids(group) for group in same_pair])
    judged = [pair for pair in pairs if pair.loss != "sft"]
    chosen = {(_shown(pair), pair.prompt, pair.chosen): pair for pair in judged if pair.chosen}
    against = [
        f"{chosen[key].id} chooses what {pair.id} rejects"
        for pair in judged
        if (key := (_shown(pair), pair.prompt, pair.rejected)) in chosen
    ]
    yield Finding("texts both chosen and rejected, for one video and prompt", against)
    equal = [pair.id for pair in preferences if not pair.responses and _plain(pair.chosen) == _plain(pair.rejected)]
    yield Finding("chosen and rejected differ only in case and spaces", equal)
    alike = [pair.id for pair in pairs if len({_plain(each.text) for each in pair.responses}) < len(pair.responses)]
    yield Finding("responses of a row differ only in case and spaces", alike)
    same_score = [pair.id for pair in pairs if pair.responses and not pair.comparisons]
    yield Finding("all responses of a row have the same score", same_score)
    reversed_scores = [
        f"{pair.id}: chosen {pair.chosen_score:g}, rejected {pair.rejected_score:g}"
        for pair in preferences
        if pair.chosen_score is not None and pair.rejected_score is not None and pair.chosen_score < pair.rejected_score
    ]
    yield Finding("rejected has the higher score", reversed_scores)
    same_chosen = _groups(preferences, lambda pair: (_shown(pair), pair.prompt, pair.chosen))
    several = [_ids(group) for group in same_chosen if len({frozenset(_worse(pair)) for pair in group}) > 1]
    yield Finding("one chosen text against several rejected ones", several, is_problem=False)
    same_texts = _groups(preferences, lambda pair: (pair.prompt, pair.chosen, pair.rejected))
    elsewhere = [_ids(group) for group in same_texts if len({_shown(pair) for pair in group}) > 1]
    yield Finding("the same texts for different videos", elsewhere, is_problem=False)
    one_context = len(pairs) > 1 and len({(_shown(pair), pair.prompt) for pair in pairs}) == 1
    yield Finding(ONE_CONTEXT, [f"all {len(pairs)} rows"] if one_context else [], is_problem=False)


def _markers(pairs: list[Pair], model: str | None) -> Iterable[Finding]:
    special, what = CONTROL, "texts that contain tokens of chat templates"
    if model is not None:
        from synpo_fast.models.loading import load_tokenizer

        tokenizer, family = load_tokenizer(model)
        special = special_tokens(tokenizer, family.placeholder_token, *family.video_markers)
        what = f"texts that contain special tokens of {model}"
    found = marked_pairs(pairs, special)
    yield Finding(what, [f"{pair.id}: {where}" for pair, where in found])
    known = {id(pair) for pair, _ in found}
    left_over = [*marked_pairs(pairs, any_of(TAGS)), *marked_pairs(pairs, CONTROL)]
    tags = [f"{pair.id}: {where}" for pair, where in left_over if id(pair) not in known]
    yield Finding("texts that contain tags of another format", tags, is_problem=False)


def _groups(pairs: list[Pair], key: Callable[[Pair], Hashable]) -> list[list[Pair]]:
    """Groups of at least two pairs with the same key."""
    groups: dict[Hashable, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[key(pair)].append(pair)
    return [group for group in groups.values() if len(group) > 1]


def _shown(pair: Pair) -> Hashable:
    return pair.clips or (str(pair.video) if pair.video is not None else None)


def _worse(pair: Pair) -> list[str]:
    """The texts of a pair beside its best one."""
    return [each.text for each in pair.responses if each.text != pair.chosen] or [pair.rejected]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _ids(group: list[Pair]) -> str:
    return ", ".join(pair.id for pair in group)


def _users_of_videos(pairs: list[Pair]) -> dict[str, list[str]]:
    """Ids of the pairs that show each video, by its path."""
    users: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        for name in {clip.path for clip in pair.clips} or ({str(pair.video)} if pair.video is not None else set()):
            users[name].append(pair.id)
    return users


def _probe_videos(
    names: list[str], root: Path, decode: bool, num_workers: int, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns (duration by path, reason by path for the unusable videos)."""
    from synpo_fast.data.video.decode import DEADLINE_S
    from synpo_fast.data.workers.worker_pool import WorkerLost, WorkerPool

    durations: dict[str, float] = {}
    unusable: dict[str, str] = {}
    if not names:
        return durations, unusable
    work = partial(probe_one, root=str(root), decode=decode)
    with WorkerPool(work, num_workers=min(num_workers, len(names)), deadline_s=4 * DEADLINE_S) as pool:
        futures = [pool.submit(name) for name in names]
        for done, (name, future) in enumerate(zip(names, futures, strict=True), 1):
            try:
                outcome = future.result()
            except WorkerLost as error:
                outcome = str(error)
            if isinstance(outcome, str):
                unusable[name] = outcome
            else:
                durations[name] = outcome
            if progress is not None:
                progress(done, len(names))
    return durations, unusable


def probe_one(name: str, *, root: str, decode: bool) -> float | str:
    """Runs in a worker: returns the duration of a video in seconds, or the reason why it cannot be used."""
    from synpo_fast.data.video.decode import open_video_file
    from synpo_fast.data.video.video_info import VideoError

    try:
        with open_video_file(name, root=root) as video:
            if decode:
                video.frames([0, video.info.num_frames - 1])
            return video.info.cut_off or video.info.duration
    except VideoError as error:
        return error.reason


def _clips_past_the_end(pairs: list[Pair], durations: dict[str, float]) -> Finding:
    late = [
        f"{pair.id}: {clip.path} from {clip.start or 0:g} to {'its end' if clip.end is None else f'{clip.end:g}'} s of "
        f"{durations[clip.path]:.3f}"
        for pair in pairs
        for clip in pair.clips
        if clip.path in durations and max(clip.start or 0.0, (clip.end or 0.0) - CLIP_SLACK_S) > durations[clip.path]
    ]
    return Finding("clips past the end of their video", late)
