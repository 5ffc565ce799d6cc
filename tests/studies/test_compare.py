"""Comparison of backbones: the numbers agree with those of the single functions."""

import numpy as np
import pytest
from engine import LOADING, splits
from tiny import MODEL, random_variables

from tljax.features.extract import compute_features
from tljax.features.probe import fit_probe, predict_logits
from tljax.pretrained import Card, Pretrained
from tljax.studies.compare import Candidate, measure


@pytest.fixture
def network(tmp_path, monkeypatch):
    monkeypatch.setenv("TLJAX_CACHE", str(tmp_path))
    return Pretrained(MODEL, random_variables(), Card(("a", "b", "c"), "here", "MIT", "0", "timm"))


def test_a_candidate_is_probed_and_timed(network):
    data = splits(24)
    skipped: dict[str, str] = {}
    actual = measure("tiny", network, data, LOADING, skipped=skipped)
    assert set(skipped) == {data.train.names[4], data.val.names[2]}
    train, val = (
        compute_features(MODEL, network.variables, part, LOADING) for part in (data.train, data.val)
    )
    probe = fit_probe(train.values, train.labels, num_classes=3)
    right = np.asarray(predict_logits(probe, val.values)).argmax(1) == val.labels
    top1 = right.mean()
    parameters = sum(  # two convolutions with scale and bias; not the head
        9 * inputs * outputs + 2 * outputs for inputs, outputs in ((3, 8), (8, 12))
    )
    assert actual == Candidate(
        "tiny",
        "tiny",
        "top1",
        pytest.approx(top1),
        actual.interval,
        actual.images_per_second,
        parameters,
        features=12,
        size=16,
    )
    assert actual.interval.low <= top1 <= actual.interval.high
    assert 0 < actual.images_per_second < 1e7
