"""Rows with several responses: which of them are compared, whatever their order, and what a row may hold."""

import json
from itertools import combinations, permutations

import pytest

from synpo_fast.config.options import PAIRS_FROM as OPTION_WORDS
from synpo_fast.data import Pair, Response, read_manifest, write_manifest
from synpo_fast.data.comparisons import PAIRS_FROM, compare_responses, filter_by_score_gap
from synpo_fast.data.data_key import data_key
from synpo_fast.data.hold_out import hold_out
from synpo_fast.data.text_markers import TAGS, any_of, marked_pairs

SCORES = {"best": 13.5, "good": 9.6, "also good": 9.6, "poor": 9.5, "worst": 1.1 + 1 + 3}


def row(scores=SCORES, **more):
    return Pair("q", id="r", responses=tuple(Response(*each) for each in scores.items()), **more)


def texts(pair):
    """The comparisons as texts."""
    return [(pair.responses[better].text, pair.responses[worse].text) for better, worse in pair.comparisons]


def expected(pairs_from, gap):
    """By the definitions: every two, the best and the worst, or the best and another one; apart, and by at least the gap."""
    every = {
        (a, b)
        for a, b in permutations(SCORES, 2)
        if SCORES[a] - SCORES[b] > 1e-6 and SCORES[a] - SCORES[b] >= gap - 1e-6
    }
    wanted = {
        "all": every,
        "best_worst": every & {("best", "worst")},
        "best_rest": {both for both in every if both[0] == "best"},
    }
    return wanted[pairs_from]


@pytest.mark.parametrize("gap", [0.0, 4.0, 4.4, 8.4, 8.5])
@pytest.mark.parametrize("pairs_from", PAIRS_FROM)
def test_the_comparisons_are_those_of_the_definition_in_any_order(pairs_from, gap):
    wanted, found = expected(pairs_from, gap), set()
    for order in list(permutations(SCORES))[::7]:
        pair = compare_responses(row({name: SCORES[name] for name in order}), pairs_from, gap)
        if pair is None:
            found.add(None)
            continue
        assert set(texts(pair)) == wanted and len(pair.comparisons) == len(wanted)
        found.add((pair.responses, pair.comparisons))
        assert {text for both in wanted for text in both} == {response.text for response in pair.responses}
    assert len(found) == 1 and (None in found) == (not wanted)


def test_equal_scores_are_never_compared():
    assert compare_responses(row({"a": 1.1 + 2.2, "b": 3.3}), "all") is None, "they differ by a rounding error"
    tied = {"a": 5.0, "b": 5.0, "c": 2.0, "d": 2.0}
    assert set(texts(compare_responses(row(tied), "all"))) == {(x, y) for x in "ab" for y in "cd"}
    for pairs_from in ("best_worst", "best_rest"):
        found = {tuple(texts(compare_responses(row(dict(order)), pairs_from))) for order in permutations(tied.items())}
        assert len(found) == 1, "which of two equal ones is taken does not depend on their order"


def test_the_option_takes_the_same_words():
    assert tuple(PAIRS_FROM) == OPTION_WORDS
    with pytest.raises(ValueError, match="pairs_from must be one of all, best_worst, best_rest, got 'best'"):
        compare_responses(row(), "best")


def test_rows_without_a_comparison_are_dropped_and_counted():
    narrow, wide, even = row({"a": 2.0, "b": 1.0}), row(), row({"a": 2.0, "b": 2.0})
    pair, close = (Pair("q", "a", "b", chosen_score=score, rejected_score=1.0) for score in (9.0, 2.0))
    result = filter_by_score_gap([narrow, wide, even, pair, close], 4, pairs_from="best_rest")
    assert [len(kept.comparisons) for kept in result.kept] == [2, 0] and result.kept[1] is pair
    assert (result.below, result.without_scores) == (3, 0)
    result = filter_by_score_gap([narrow, wide, even, Pair("q", "a", "b")], None, pairs_from="all")
    assert [len(kept.comparisons) for kept in result.kept] == [1, 9, 0] and result.below == 1
    assert filter_by_score_gap([narrow, wide], 4).kept == [wide], "without pairs_from a row stays whole"


def test_best_and_worst_stand_for_the_row_where_a_pair_is_shown():
    pair = row()
    assert (pair.chosen, pair.rejected, pair.chosen_score, pair.rejected_score) == ("best", "worst", 13.5, 1.1 + 4)
    assert set(texts(pair)) == expected("all", 0)


@pytest.mark.parametrize(
    ("scores", "more", "message"),
    [
        ({"a": 1.0}, {}, "pair 'r': responses must have at least two entries, got 1"),
        ({"a": 1.0, " ": 2.0}, {}, r"responses\[1\] is empty"),
        ({"a": 1.0, "b": float("nan")}, {}, r"the score of responses\[1\] must be finite"),
        ({"a": 1.0, "b": "2"}, {}, r"the score of responses\[1\] must be a number, got '2'"),
        ({"a": 1.0, "b": 2.0}, {"chosen": "c"}, "give responses, or chosen and rejected with their scores, not both"),
        ({"a": 1.0, "b": 2.0}, {"chosen_score": 3.0}, "give responses, or chosen and rejected with their scores"),
        ({"a": 1.0, "b": 2.0}, {"loss": "sft"}, "trains on chosen alone"),
        ({"a": 1.0, "b": 2.0}, {"comparisons": ((0, 1),)}, r"must be \(better, worse\) indices"),
        ({"a": 1.0, "b": 2.0}, {"comparisons": ((2, 0),)}, r"must be \(better, worse\) indices"),
        ({}, {"comparisons": ((1, 0),)}, "at least two entries, got 0"),
    ],
)
def test_what_a_row_may_not_hold(scores, more, message):
    with pytest.raises(ValueError, match=message):
        row(scores, **more)


def test_equal_texts_are_refused():
    with pytest.raises(ValueError, match=r"responses\[0\] and responses\[2\] are the same text"):
        Pair("q", responses=(Response("a", 1.0), Response("b", 2.0), Response("a", 3.0)))


GOOD = [{"text": "a", "score": 2}, {"text": "b", "score": 1.5}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"responses": GOOD, "chosen": "a"}, "a row with responses has no chosen: leave out one of the two"),
        ({"responses": GOOD, "rejected_score": 1}, "a row with responses has no rejected_score"),
        ({"responses": GOOD[:1]}, "responses must be a list of at least two responses"),
        ({"responses": "a"}, "responses must be a list of at least two responses, got 'a'"),
        ({"responses": [*GOOD, "c"]}, "responses[2] must be an object with text and score and nothing else, got 'c'"),
        ({"responses": [*GOOD, {"text": "c"}]}, "responses[2] must be an object with text and score"),
        ({"responses": [*GOOD, {"text": "c", "score": None}]}, "responses[2] must be an object with text and score"),
        (
            {"responses": [*GOOD, {"text": "c", "score": 1, "x": 1}]},
            "responses[2] must be an object with text and score",
        ),
        ({"responses": [*GOOD, {"text": 3, "score": 1}]}, "responses[2].text must be text, got 3"),
        ({"responses": [*GOOD, {"text": "c", "score": True}]}, "responses[2].score must be a number, got True"),
        ({"responses": [*GOOD, {"text": "a", "score": 9}]}, "responses[0] and responses[2] are the same text"),
        ({"responses": [*GOOD, {"text": " ", "score": 9}]}, "responses[2] is empty"),
        ({"responses": GOOD, "loss": "sft"}, "a row with loss 'sft' trains on chosen alone"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, content, reason):
    file = tmp_path / "p.jsonl"
    file.write_text(
        json.dumps({"prompt": "q", "responses": GOOD}) + "\n" + json.dumps({"prompt": "p", **content}) + "\n"
    )
    with pytest.raises(ValueError) as error:
        read_manifest(file)
    assert f"{file}:2: " in str(error.value) and reason in str(error.value)


def test_the_digest_of_the_data_follows_comparisons_and_not_the_order():
    keys = set()
    for order in combinations(SCORES, 5), [reversed(SCORES)]:
        for names in order:
            pair = row({name: SCORES[name] for name in names})
            keys.add(tuple(data_key([compare_responses(pair, pairs_from)]) for pairs_from in PAIRS_FROM))
    assert len(keys) == 1 and len(set(*keys)) == 3


def test_other_parts_read_every_response(tmp_path):
    marked = row({"a": 1.0, "b <video>": 2.0, "c": 3.0})
    ((_, where),) = marked_pairs([row(), marked], any_of(TAGS))
    assert where == "'<video>' in responses[1]"
    rows = [Pair("q", id=f"{n}", video=f"v{n % 3}.mp4", responses=row().responses) for n in range(9)]
    write_manifest(tmp_path / "p.jsonl", rows)
    train, held_out = hold_out(read_manifest(tmp_path / "p.jsonl"), 0.3, seed=0, root=tmp_path)
    assert (len(train), len(held_out)) == (6, 3) and len({pair.video for pair in held_out}) == 1
