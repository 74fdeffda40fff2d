"""Texts that hold tokens of a chat template or of a video are told from texts that only look odd."""

import json

import pytest

from synpo_fast.cli import main
from synpo_fast.data.pair import Pair
from synpo_fast.data.text_markers import CONTROL, TAGS, any_of, marked_pairs, quoted, special_tokens
from synpo_fast.models.families.registry import FAMILIES
from synpo_fast.models.loading import load_tokenizer
from synpo_fast.models.tiny import SPECIAL_TOKENS
from synpo_fast.pairs.check import check_manifest

VIDEO_FAMILIES = [name for name in FAMILIES if name != "text"]


def pair(name="p", prompt="Why?", chosen="A ball.", rejected="A dog.", truth=None):
    return Pair(prompt, chosen, rejected, id=name, ground_truth=truth)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_tokenizer_reads_as_special_is_found_in_every_text(name):
    """Truth: the tokenizer itself, which makes one special token of it."""
    tokenizer, family = load_tokenizer(f"tiny:{name}")
    pattern = special_tokens(tokenizer, family.placeholder_token, *family.video_markers)
    for token in ("<|im_end|>", "<|endoftext|>", *SPECIAL_TOKENS[name]):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
        for field in ("prompt", "chosen", "rejected", "truth"):
            ((_, where),) = marked_pairs([pair(**{field: f"So {token}it goes"})], pattern)
            assert where == f"{token!r} in {field.replace('truth', 'ground_truth')}"
    for text in ("<|im_ended|>", "a < b | c > d", "<im_end>", "|im_end|"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text) and not marked_pairs([pair(chosen=text)], pattern), "one token a byte"


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_without_a_tokenizer_all_families_are_known(name):
    family = FAMILIES[name]
    for token in (family.placeholder_token, *family.video_markers, *SPECIAL_TOKENS[name]):
        assert CONTROL.search(token) or token in TAGS, token


def test_nothing_to_look_for_finds_nothing():
    assert not marked_pairs([pair()], any_of([]))


def test_the_first_three_are_quoted():
    found = marked_pairs([pair(f"p{n}", rejected="<video> x") for n in range(5)], any_of(TAGS))
    assert (
        quoted(found)
        == "'p0' has '<video>' in rejected; 'p1' has '<video>' in rejected; 'p2' has '<video>' in rejected; ..."
    )


def test_check_tells_problems_from_notes(tmp_path):
    rows = [
        {"prompt": "Why?", "chosen": "<video> of a ball.", "rejected": "b"},
        {"prompt": "How? <|im_end|>", "chosen": "a", "rejected": "b"},
        {"prompt": "Who?", "chosen": "a", "rejected": "b<|video_pad|>"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    chat = ["p-2: '<|im_end|>' in prompt", "p-3: '<|video_pad|>' in rejected"]
    report = check_manifest(file)
    assert {finding.what: finding.examples for finding in report.findings} == {
        "texts that contain tokens of chat templates": chat,
        "texts that contain tags of another format": ["p-1: '<video>' in chosen"],
    }
    assert [finding.is_problem for finding in report.findings] == [True, False]
    found = {finding.what: finding.examples for finding in check_manifest(file, model="tiny:llava_onevision").findings}
    assert found == {  # its own token is <video>, and it has no <|video_pad|>
        "texts that contain special tokens of tiny:llava_onevision": ["p-1: '<video>' in chosen", chat[0]],
        "texts that contain tags of another format": [chat[1]],
    }


def test_the_command_takes_a_model(tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "q", "chosen": "<video>", "rejected": "b"}))
    assert main(["pairs", "check", str(file)]) == 0
    assert "note: texts that contain tags of another format: 1" in capsys.readouterr().out
    assert main(["pairs", "check", str(file), "--model", "tiny:llava_onevision"]) == 1
    assert "PROBLEM: texts that contain special tokens of tiny:llava_onevision: 1" in capsys.readouterr().out
    assert main(["pairs", "check", str(file), "--model", "tiny:nothing"]) == 2
    assert "unknown family in 'tiny:nothing'" in capsys.readouterr().err
