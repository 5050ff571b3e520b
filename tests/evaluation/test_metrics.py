"""Scores against sums written out in NumPy."""

import json

import numpy as np
import pytest

from lowbit.errors import LowbitError
from lowbit.evaluation.metrics import cross_entropy, scores


@pytest.fixture(scope="module")
def example():
    """300 images, 5 classes; class 3 has no image, class 4 is never predicted."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 4], 300)
    logits = rng.normal(size=(300, 5)).astype(np.float32)
    logits[np.arange(300), labels] += 1
    logits[:, 4] = -50
    return logits, labels, ["a", "b", "c", "d", "e"]


def test_cross_entropy_is_minus_the_mean_log_probability(example):
    logits, labels, _ = example
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    expected = -np.mean([np.log(p[label]) for p, label in zip(probabilities, labels, strict=True)])
    assert cross_entropy(logits, labels) == pytest.approx(expected, rel=1e-9)
    assert cross_entropy(np.log(probabilities), labels) == pytest.approx(expected, rel=1e-9)


def test_cross_entropy_takes_large_logits():
    logits = np.array([[3e4, -3e4]], np.float32)
    assert cross_entropy(logits, np.array([1])) == pytest.approx(6e4)


def test_scores_equal_the_definitions(example):
    logits, labels, classes = example
    record = scores(logits, labels, classes)
    predictions = logits.argmax(axis=1)
    matrix = np.array([[np.sum((labels == i) & (predictions == j)) for j in range(5)] for i in range(5)])
    assert record["confusion_matrix"] == matrix.tolist()
    assert record["predictions"] == predictions.tolist()
    assert record["labels"] == labels.tolist()
    assert record["total"] == 300
    assert record["correct"] == np.trace(matrix)
    assert record["accuracy"] == np.trace(matrix) / 300
    for i, (row, entry) in enumerate(zip(record["normalised"], record["per_class"], strict=True)):
        support, predicted, hits = matrix[i].sum(), matrix[:, i].sum(), matrix[i, i]
        precision = hits / predicted if predicted else 0
        recall = hits / support if support else 0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        assert entry == {
            "class": classes[i],
            "precision": pytest.approx(precision),
            "recall": pytest.approx(recall),
            "f1": pytest.approx(f1),
            "support": support,
        }
        assert row == pytest.approx((matrix[i] / max(support, 1)).tolist())
    for key in ("precision", "recall", "f1"):
        values = np.array([entry[key] for entry in record["per_class"]])
        assert record["averages"]["macro"][key] == pytest.approx(values.mean())
        assert record["averages"]["weighted"][key] == pytest.approx(np.average(values, weights=matrix.sum(axis=1)))


def test_the_record_is_plain_json(example):
    assert json.loads(json.dumps(scores(*example), allow_nan=False))["total"] == 300


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "no test images"),
        (np.zeros((3, 4)), np.zeros(3, int), "shape \\(3, 4\\) for 3 images of 2 classes"),
        (np.zeros((3, 2)), np.array([0, 1, 2]), "labels must lie in 0..1"),
        (np.array([[0, 1], [np.nan, 0]]), np.array([0, 1]), "test image 1 are not finite"),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels, message):
    with pytest.raises(LowbitError, match=message):
        scores(logits, labels, ["a", "b"])
