"""Captions and their errors: each error is found again by comparing texts, and costs what it weighs."""

from random import Random

import pytest

from synpo_fast.demo.captions import (
    HABITS,
    WEIGHTS,
    caption_text,
    caption_with_slips,
    careful_caption,
    careless_caption,
    vocabulary,
)
from synpo_fast.demo.world import WORDS, Event, random_scene

SCENE = (
    Event("two", "large", "red", "ring", "left"),
    Event("one", "small", "blue", "cross", "up"),
    Event("three", "large", "white", "bar", "right"),
)
TRUTH = "First two large red rings move left. Then one small blue cross moves up. Finally three large white bars move right."


def test_text():
    assert caption_text(SCENE) == TRUTH
    assert caption_text(SCENE[:2]) == TRUTH.split(" Finally")[0]
    assert caption_text(SCENE[1:2]) == "First one small blue cross moves up."
    assert "crosses move" in caption_text([Event("two", "small", "blue", "cross", "up")])


def test_the_vocabulary_has_every_word():
    known = set(vocabulary())
    for seed in range(100):
        caption = careless_caption(random_scene(Random(seed)), Random(seed), num_slips=3)
        assert set(caption.text.replace(".", " .").split()) <= known


@pytest.mark.parametrize("name", WORDS)
def test_a_wrong_attribute_changes_one_word_of_the_events(name):
    for seed in range(10):
        caption = caption_with_slips(SCENE, Random(seed), slips=[name])
        changed = [
            (event, told, key)
            for event, told in zip(SCENE, caption.events, strict=True)
            for key in WORDS
            if getattr(event, key) != getattr(told, key)
        ]
        assert [key for *_, key in changed] == [name]
        assert caption.errors == (name,) and caption.score == 10 - WEIGHTS[name] == 9


def test_errors_in_what_is_told_when():
    texts = TRUTH.replace("First ", "").replace("Then ", "").replace("Finally ", "").removesuffix(".").split(". ")

    def told(kind, seed):
        caption = caption_with_slips(SCENE, Random(seed), slips=[kind])
        assert caption.errors == (kind,) and caption.score == 10 - WEIGHTS[kind]
        return [sentence.split(" ", 1)[1] for sentence in caption.text.removesuffix(".").split(". ")]

    for seed in range(10):
        omitted, swapped, repeated, invented = (
            told(kind, seed) for kind in ("omission", "order", "repetition", "invented")
        )
        assert len(omitted) == 2 and set(omitted) < set(texts)
        assert swapped != texts and sorted(swapped) == sorted(texts)
        assert len(repeated) == 4 and list(dict.fromkeys(repeated)) == texts
        assert len(invented) == 4 and len([text for text in invented if text not in texts]) == 1


def test_a_slip_that_cannot_be_made_is_no_error():
    one = SCENE[:1]
    assert caption_with_slips(one, Random(0), slips=["omission", "order"]).errors == ()
    assert caption_with_slips(one, Random(0), slips=["omission", "order"]).score == 10


def test_the_careful_captioner_slips_now_and_then_and_never_twice():
    captions = [careful_caption(SCENE, Random(seed)) for seed in range(500)]
    assert {len(caption.errors) for caption in captions} == {0, 1}
    assert 0.14 < sum(len(caption.errors) for caption in captions) / 500 < 0.26


def test_habits_are_systematic():
    captions = [careless_caption(SCENE, Random(seed)) for seed in range(500)]
    for name, word, at in (("shape", "cross", 1), ("size", "small", 1), ("motion", "up", 1), ("count", "three", 2)):
        told = [getattr(caption.events[at], name) for caption in captions]
        assert set(told) == {word, HABITS[word]}
        assert 0.53 < told.count(HABITS[word]) / 500 < 0.67  # the likeliest word, so what a greedy model says
    assert all(caption.events[0] == SCENE[0] for caption in captions)  # no habit shows in it


def test_no_slip_undoes_another():
    for seed in range(300):
        scene = random_scene(Random(seed))
        caption = careless_caption(scene, Random(seed), num_slips=3)
        assert (caption.text == caption_text(scene)) == (caption.errors == ())
        wrong = [error for error in caption.errors if error in WORDS]
        if not {"omission", "order", "repetition", "invented"} & set(caption.errors):
            differences = sum(
                getattr(a, name) != getattr(b, name)
                for a, b in zip(scene, caption.events, strict=True)
                for name in WORDS
            )
            assert differences == len(wrong)
