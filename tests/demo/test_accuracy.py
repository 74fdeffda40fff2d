"""Exact-attribute accuracy, on captions whose share of right words is counted by hand."""

import pytest

from synpo_fast.demo.accuracy import Accuracy, parse_events
from synpo_fast.demo.captions import caption_text
from synpo_fast.demo.world import Event

SCENE = (Event("two", "large", "red", "ring", "left"), Event("one", "small", "blue", "cross", "up"))
TRUTH = "First two large red rings move left. Then one small blue cross moves up."


def accuracy(text, scene=SCENE):
    found = Accuracy()
    found.add(scene, text)
    return found


@pytest.mark.parametrize(
    ("text", "share", "order"),
    [
        (TRUTH, 1, 1),
        (TRUTH.replace("rings", "squares").replace("up", "down"), 9 / 11, 1),
        ("First one small blue cross moves up. Then two large red rings move left.", 10 / 11, 0),
        ("First two large red rings move left.", 5 / 11, 0),  # left out
        (TRUTH + " Finally one small white bar moves up.", 11 / 16, 1),  # invented
        (TRUTH + " Finally one small blue cross moves up.", 11 / 16, 1),  # told twice
        ("First one small white bar moves up. " + TRUTH, 11 / 16, 1),
        ("", 0, 0),
        (". . .", 0, 0),
        ("move move up the up.", 1 / 11, 0),
        # Nothing known again, so nothing to say about order, though motions are right.
        ("First two large green bars move left. Then one small white square moves up.", 6 / 11, 0),
    ],
)
def test_shares(text, share, order):
    found = accuracy(text)
    assert found.overall == pytest.approx(share)
    assert found.per_attribute()["order"] == order


def test_one_event_has_no_order():
    found = accuracy("First one small blue cross moves up.", SCENE[1:])
    assert found.overall == 1 and found.total["order"] == 0


def test_attributes_are_counted_apart_and_over_videos():
    found = accuracy(TRUTH)
    found.add(SCENE, TRUTH.replace("red", "blue").replace("two", "three").replace("rings", "ring"))
    assert found.per_attribute() == {"count": 0.75, "size": 1, "colour": 0.75, "shape": 1, "motion": 1, "order": 1}
    assert found.overall == pytest.approx(20 / 22)


def test_of_a_caption_that_goes_on_and_on_only_the_beginning_is_read():
    assert accuracy(TRUTH + " Then one small white bar moves up." * 200).overall == pytest.approx(11 / 1011)
    late = "Then three large green square move down. " * 5 + TRUTH  # the first true event is the sixth told
    assert accuracy(late).per_attribute()["colour"] == 0.5


def test_parse_events_of_odd_text():
    (told,) = parse_events("red blue <|unknown|> squares Two")
    assert told == {"count": None, "size": None, "colour": "red", "shape": "square", "motion": None}
    assert [event["motion"] for event in parse_events(caption_text(SCENE))] == ["left", "up"]
