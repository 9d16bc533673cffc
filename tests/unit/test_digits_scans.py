"""The digits: what scikit-learn ships, split once into two halves that share nothing."""

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from steerfm import digits
from steerfm.errors import DataError


def rows(scans: digits.Scans) -> set[bytes]:
    return {scan.numpy().tobytes() for scan in scans.x0}


def test_all_scans_are_scikit_learns_in_model_space():
    scans = digits.load("all")
    source: Any = load_digits()
    assert scans.x0.shape == (1797, 1, 8, 8)
    assert scans.x0.dtype == torch.float32
    assert scans.labels.dtype == torch.long
    assert (scans.x0.min(), scans.x0.max()) == (-1, 1)
    assert torch.equal(scans.x0[:, 0], torch.from_numpy(source.images).float() / 8 - 1)
    assert scans.labels.tolist() == source.target.tolist()
    assert [digits.CAPTIONS[label] for label in scans.labels] == scans.captions


def test_the_halves_share_no_scan_and_leave_none_out():
    everything, reward, judge = (digits.load(split) for split in digits.SPLITS)
    assert len(reward) + len(judge) == len(everything) == 1797
    assert rows(reward).isdisjoint(rows(judge))
    assert rows(reward) | rows(judge) == rows(everything)


def test_the_halves_are_stratified():
    reward, judge = (torch.bincount(digits.load(split).labels) for split in ("reward", "judge"))
    assert set((judge - reward).tolist()) <= {0, 1}


def test_the_split_never_moves():
    """Runs of different versions compare only if the judge's scans stay the same."""
    assert digits.load("reward").labels[:20].tolist() == [0, 1, 4, 5, 6, 9, 0, 1, 2, 4, 5, 6, 7, 9, 0, 1, 3, 4, 5, 6]
    assert float(digits.load("reward").x0.double().sum()) == -22440.25


def test_an_unknown_split_is_named():
    with pytest.raises(DataError, match="no split 'jugde'; did you mean 'judge'"):
        digits.load("jugde")


def test_captions_name_their_digit():
    assert digits.CAPTIONS[0] == "a handwritten zero"
    assert digits.CAPTIONS[7] == "a handwritten seven"
    assert digits.CAPTIONS[9] == "a handwritten nine"


def test_variants_start_with_the_caption_and_never_mean_another_digit():
    variants = [digits.caption_variants(label) for label in range(10)]
    assert [ways[0] for ways in variants] == digits.CAPTIONS
    flat = [text for ways in variants for text in ways]
    assert len(set(flat)) == len(flat)


def test_paraphrases_leave_other_texts_alone():
    assert digits.paraphrases("a handwritten seven") == digits.caption_variants(7)
    assert digits.paraphrases("a cat") == ["a cat"]
