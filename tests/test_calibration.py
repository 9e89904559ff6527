"""A calibration is monotone, bound to what it was fitted for, and read with suspicion."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_rerank import Calibration
from qwen_rerank.calibration import sigmoid
from qwen_rerank.checks import check_weights, is_finite
from qwen_rerank.documents.training import example_from_row
from qwen_rerank.errors import CalibrationError, CalibrationMismatchError, InvalidInputError

KEY = {"scorer": "abc", "instruction": None, "long_documents": "truncate"}
LOG_ODDS = st.lists(st.floats(allow_nan=False, width=32), min_size=2, max_size=20)


def platt(a=1.5, b=-0.5, **key):
    return Calibration(kind="platt", fitted_for=KEY | key, a=a, b=b)


def isotonic(x=(-2.0, 0.0, 3.0), y=(0.1, 0.1, 0.8)):
    return Calibration(kind="isotonic", fitted_for=KEY, x=x, y=y)


@given(LOG_ODDS)
def test_probabilities_rise_with_the_log_odds_and_stay_in_range(values):
    ordered = np.sort(np.array(values, dtype=np.float32))

    for calibration in (platt(), isotonic()):
        probabilities = calibration.probability(ordered)
        assert ((probabilities >= 0) & (probabilities <= 1)).all()
        assert (np.diff(probabilities) >= 0).all()


def test_platt_is_a_sigmoid_of_a_line():
    assert platt(a=2.0, b=1.0).probability(np.array([0.5]))[0] == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_isotonic_runs_straight_between_its_knots_and_flat_outside():
    probabilities = isotonic().probability(np.array([-9.0, -1.0, 1.5, 3.0, 9.0]))

    np.testing.assert_allclose(probabilities, [0.1, 0.1, 0.45, 0.8, 0.8])


def test_the_sigmoid_neither_overflows_nor_warns():
    with np.errstate(all="raise", under="ignore"):
        values = sigmoid(np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0, np.nan]))

    np.testing.assert_allclose(values, [0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1, np.nan])


@pytest.mark.parametrize("calibration", [platt(), isotonic()], ids=["platt", "isotonic"])
def test_a_saved_calibration_comes_back_equal(tmp_path, calibration):
    calibration.save(tmp_path / "calibration.json")

    assert Calibration.load(tmp_path / "calibration.json") == calibration


def test_every_difference_is_named():
    with pytest.raises(CalibrationMismatchError) as raised:
        platt().check({"scorer": "xyz", "instruction": "find", "long_documents": "truncate"})

    assert "instruction was None and is now 'find'; scorer was 'abc' and is now 'xyz'" in str(raised.value)
    assert "long_documents" not in str(raised.value)
    assert "give the same dtype= and quantize=" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "spline"}, "kind must be 'platt' or 'isotonic'"),
        ({"kind": "platt", "a": -1.0}, "a must be above 0, not -1.0: a calibration never reverses an order"),
        ({"kind": "platt", "b": math.nan}, "a and b must be finite"),
        ({"kind": "platt", "a": "1"}, "a and b must be finite"),
        ({"kind": "isotonic"}, "at least one"),
        ({"kind": "isotonic", "x": (0.0, 1.0), "y": (0.5,)}, "equally many knots"),
        ({"kind": "isotonic", "x": (0.0, 0.0), "y": (0.1, 0.2)}, "x must rise strictly"),
        ({"kind": "isotonic", "x": (0.0, 1.0), "y": (0.2, 0.1)}, "y must not fall"),
        ({"kind": "isotonic", "x": (0.0, 1.0), "y": (0.2, 1.1)}, "y must lie between 0 and 1"),
        ({"kind": "isotonic", "x": (0.0, math.inf), "y": (0.2, 0.3)}, "x and y must be finite"),
        ({"kind": "platt", "fitted_for": {}}, "take Reranker.calibration_key"),
        ({"kind": "platt", "fitted_for": {"scorer": ["abc"]}}, r"fitted_for\['scorer'\] must be a string"),
    ],
)
def test_what_is_no_calibration_is_refused(arguments, message):
    with pytest.raises(CalibrationError, match=message):
        Calibration(**({"fitted_for": KEY} | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "the file is no calibration"),
        ({"version": 2}, "version 2 is not 1"),
        ({"kind": "isotonic"}, "the fields must be"),
        ({"kind": ["platt"]}, "kind must be"),
        ({"surplus": 1}, "the fields must be"),
        ({"a": "1.5"}, "a and b must be finite"),
        ({"a": True}, "a and b must be finite"),
        ({"fitted_for": "abc"}, "fitted_for must say"),
    ],
)
def test_a_file_that_was_changed_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "calibration.json"
    platt().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(CalibrationError, match=message) as raised:
        Calibration.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'{"a": 1' + b"0" * 5000 + b"}"])
def test_a_file_that_cannot_be_read_is_a_calibration_error(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)

    with pytest.raises(CalibrationError, match="calibration"):
        Calibration.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CalibrationError, match=r"none\.json cannot be read"):
        Calibration.load(tmp_path / "none.json")


@pytest.mark.parametrize("refused", [10**400, -(10**400), math.inf, math.nan, True, "1", None])
def test_a_number_that_no_float_can_hold_is_not_finite(refused):
    assert not is_finite(refused)
    with pytest.raises(CalibrationError, match="finite"):
        Calibration(kind="platt", fitted_for={"scorer": "x"}, b=refused)
    with pytest.raises(InvalidInputError, match="scores must be finite"):
        example_from_row({"query": "q", "documents": ["a"], "scores": [refused]})
    with pytest.raises(InvalidInputError, match="2 numbers"):
        check_weights("weights", [1, refused], count=2)
