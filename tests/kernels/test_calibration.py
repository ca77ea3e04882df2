"""The static model of time against public figures of an H100: computed anew from what is kept of the compiled loops."""

import json
from pathlib import Path

import pytest

from bench import calibration
from layalign.kernels.ahead_of_time import predict, timing
from layalign.kernels.ahead_of_time.gpus import H100
from layalign.kernels.ahead_of_time.timing import loop_time, reduced, straight_time

MATMUL = (Path(__file__).parent / "matmul_loop.sass").read_text()

FIGURES = [
    (name, sizes, figure) for name, (_, found) in calibration.PUBLISHED.items() for sizes, figure in found.items()
]


@pytest.fixture(scope="module")
def predictions():
    return calibration.predictions()


@pytest.mark.parametrize("name, sizes, published", FIGURES)
def test_predictions_are_near_public_figures(name, sizes, published, predictions):
    assert predictions[name, sizes] == pytest.approx(published, rel=calibration.TOLERANCE)


def test_there_are_enough_figures_with_their_sources():
    assert len(FIGURES) >= 6 and all(source.startswith("github.com/") for source, _ in calibration.PUBLISHED.values())


def test_predictions_are_the_models(monkeypatch):
    kept = json.loads(calibration.KEPT.read_text())["kernels"]["attention, descriptors"]
    code = calibration.decoded(kept)
    turn = loop_time(code.hot[0].short, H100, warps=8, distance=kept["ahead"], bulk_bytes=kept["bulk_bytes"])
    monkeypatch.setattr(timing, "_QUEUED", 1)
    slower = loop_time(code.hot[0].short, H100, warps=8, distance=kept["ahead"], bulk_bytes=kept["bulk_bytes"])
    products = 2 * 2 * 8 * 64  # of two warp groups, two products of 8 instructions that take N / 2 cycles
    assert products <= turn.busy["tensor"] < 1.1 * products and slower.cycles > turn.cycles


def test_what_is_kept_of_a_loop_takes_as_long_as_the_loop():
    code = predict.code_of(MATMUL, "")
    kept = json.loads(json.dumps(calibration.encoded(code, {"warps": 8})))
    again = calibration.decoded(kept)
    options = dict(warps=8, distance=3, bulk_bytes=[16384, 32768])
    assert loop_time(again.hot[0].short, H100, **options) == loop_time(code.hot[0].short, H100, **options)
    assert straight_time(again.rest, H100, warps=8) == straight_time(code.rest, H100, warps=8)
    assert again.hot[0].short == [reduced(x) for x in code.hot[0].short]
    assert not any("R1" in name for name in kept["names"])  # none of its registers


def test_the_table_has_both_figures_of_each():
    lines = calibration.table().splitlines()
    assert len(lines) == 2 + len(FIGURES) and "predicted" in lines[0] and "published" in lines[0]
