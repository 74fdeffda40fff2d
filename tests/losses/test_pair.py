"""PairLogprobs: its three constructors and what it refuses."""

import pytest
import torch

from synpo_fast.losses import PairLogprobs, nll, synpo

from . import truth

THREE = torch.tensor([-1.0, -2.0, -3.0])
ONE_PAIR = torch.tensor([0, 3])


def test_from_pairs_lays_responses_end_to_end():
    policy = PairLogprobs.from_pairs(
        [(THREE, THREE[:1]), (THREE[:2], THREE)], ground_truth=[THREE[:1], THREE[:2]], preference=[True, False]
    )
    assert policy.num_pairs == 2
    assert policy.chosen.tolist() == [-1, -2, -3, -1, -2]
    assert policy.chosen_offsets.tolist() == [0, 3, 5]
    assert policy.rejected_offsets.tolist() == [0, 1, 4]
    assert policy.ground_truth_offsets.tolist() == [0, 1, 3]
    assert policy.preference.tolist() == [True, False]


def test_from_padded_keeps_the_real_tokens_in_order():
    logps = torch.tensor([[-1.0, -2.0, 9.0], [9.0, -3.0, 9.0], [-4.0, 9.0, 9.0], [9.0, -5.0, -6.0]])
    policy = PairLogprobs.from_padded(logps, logps < 0)
    assert policy.chosen.tolist() == [-1, -2, -3]
    assert policy.chosen_offsets.tolist() == [0, 2, 3]
    assert policy.rejected.tolist() == [-4, -5, -6]
    assert policy.rejected_offsets.tolist() == [0, 1, 3]


def test_from_padded_where_the_host_cannot_look(blind_host):
    # As on a GPU: the flat tensors keep their full size, and the padding behind the offsets counts nowhere.
    logps = torch.tensor([[-1.0, -2.0, 9.0], [9.0, -3.0, 9.0], [-4.0, 9.0, 9.0], [9.0, -5.0, -6.0]])
    policy = PairLogprobs.from_padded(logps, logps < 0)
    assert policy.chosen.shape == (6,)
    output = synpo(policy)
    expected = synpo(truth.as_logprobs([([-1.0, -2.0], [-4.0]), ([-3.0], [-5.0, -6.0])], torch.float32))
    assert output.losses.equal(expected.losses)
    assert output.metrics == expected.metrics
    assert nll(policy, reduce="batch_token_mean").mean().item() == pytest.approx(2.0)  # (1 + 2 + 3) / 3


def test_int32_offsets_give_the_same():
    # What varlen attention calls cu_seqlens is int32.
    policy = truth.as_logprobs(truth.ragged_pairs([(3, 5), (1, 2)]))
    narrow = PairLogprobs(policy.chosen, policy.rejected, policy.chosen_offsets.int(), policy.rejected_offsets.int())
    assert synpo(narrow).losses.equal(synpo(policy).losses)
    assert nll(narrow, reduce="batch_token_mean").equal(nll(policy, reduce="batch_token_mean"))


def test_from_sums_is_one_value_per_response():
    reference = PairLogprobs.from_sums(torch.tensor([-5.0, -6.0]), torch.tensor([-7.0, -8.0]))
    assert reference.chosen_offsets.tolist() == reference.rejected_offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": THREE.reshape(1, 3)}, r"chosen is torch.float32 of shape \(1, 3\)"),
        ({"chosen": torch.tensor([1, 2, 3])}, "chosen is torch.int64"),
        ({"chosen_offsets": ONE_PAIR.float()}, "chosen_offsets is torch.float32"),
        ({"chosen_offsets": torch.tensor([0])}, r"chosen_offsets is torch.int64 of shape \(1,\)"),
        ({"chosen_offsets": torch.tensor([0, 2])}, r"chosen_offsets is \[0, 2\], expected to rise from 0 to 3"),
        ({"chosen_offsets": torch.tensor([1, 3])}, r"chosen_offsets is \[1, 3\]"),
        ({"rejected_offsets": torch.tensor([0, 2, 1, 3])}, r"rejected_offsets is \[0, 2, 1, 3\]"),
        ({"rejected_offsets": torch.tensor([0, 1, 3])}, r"rejected_offsets is \(3,\).*chosen_offsets \(2,\)"),
        ({"ground_truth": THREE}, "must be given together"),
        ({"preference": torch.tensor([1])}, "preference is torch.int64"),
        ({"preference": torch.tensor([True, True])}, r"shape \(2,\)"),
        ({"chosen": THREE.to("meta")}, "chosen is on meta, chosen_offsets on cpu"),
        ({"chosen": THREE.to("meta"), "chosen_offsets": ONE_PAIR.to("meta")}, "rejected_offsets is .* on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    fields = {"chosen": THREE, "rejected": THREE, "chosen_offsets": ONE_PAIR, "rejected_offsets": ONE_PAIR}
    with pytest.raises(ValueError, match=message):
        PairLogprobs(**{**fields, **changes})


def test_an_empty_response_is_refused_by_its_pair():
    empty = THREE[:0]
    with pytest.raises(ValueError, match="chosen response of pair 1 is empty"):
        PairLogprobs.from_pairs([(THREE, THREE), (empty, THREE)])
    with pytest.raises(ValueError, match="rejected response of pair 2 is empty"):
        PairLogprobs.from_pairs([(THREE, THREE), (THREE, empty), (THREE, empty)], preference=[True, False, True])
    PairLogprobs.from_pairs([(THREE, THREE), (THREE, empty)], preference=[True, False])


def test_constructors_name_bad_shapes():
    with pytest.raises(ValueError, match="pairs is empty"):
        PairLogprobs.from_pairs([])
    with pytest.raises(ValueError, match=r"rejected log-probs of pair 0 have shape \(1, 3\)"):
        PairLogprobs.from_pairs([(THREE, THREE.reshape(1, 3))])
    with pytest.raises(ValueError, match=r"logps is \(3, 2\)"):
        PairLogprobs.from_padded(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))
