"""The goal table: from rows to what is met, what is not, and why there is no figure."""

import json
import sys

import pytest

from bench.cases.aligner import FOLDING, OPERATORS
from bench.cases.attention import CASES as ATTENTION
from bench.cases.attention import DECODING
from bench.cases.model import CASES as MODEL
from bench.first_light.__main__ import compiled
from bench.report import goals
from bench.report.goals import GOALS, goal_table, outcomes, predictions
from bench.report.results import read_results
from bench.test_host_cost import CALLS


@pytest.fixture
def results(crafted, tmp_path):
    """results({name of a test: figures}, {name: why it failed}) -> Results of a GPU."""

    def write(figures, failures=None, small=False):
        path = crafted(tmp_path / "gpu" / "benchmarks.json", gpu=True)
        content = json.loads(path.read_text())
        pattern = content["benchmarks"][0]
        rows = []
        for name, more in figures.items():
            info = (
                {k: v for k, v in pattern["extra_info"].items() if k != "time_over_yardstick"} | more | {"small": small}
            )
            rows.append(pattern | {"fullname": f"bench/{name}", "extra_info": info})
        content["benchmarks"] = rows
        content["failures"] = [{"fullname": f"bench/{name}", "error": why} for name, why in (failures or {}).items()]
        path.write_text(json.dumps(content))
        return read_results(path)

    return write


@pytest.fixture
def predicted(monkeypatch, tmp_path):
    """predicted({title: value}): what the static model says of the present kernels."""

    def write(values):
        path = tmp_path / "predicted.json"
        rows = {title: {"value": value} for title, value in values.items()}
        path.write_text(json.dumps({"before": {"rows": {}}, "after": {"rows": rows}}))
        monkeypatch.setattr(goals, "PREDICTED", path)

    return write


def verdicts(found):
    return {one.goal.what: (one.value, one.met) for one in outcomes(found) if one.value is not None}


def test_formulas(results, predicted):
    predicted({"(b) forward, MHA": 1.234, "mix backward, weights": 0.81})
    ratio = "time_over_yardstick"
    found = results(
        {
            "test_model.py::test_training_step[gpu_llama_2_7b-layalign]": {ratio: 1.09, "peak_over_published": 0.6},
            "test_model.py::test_generation[gpu_llama_2_7b_8-layalign]": {ratio: 1.06},
            "test_model.py::test_generation[gpu_llama_2_7b_8-layalign static]": {ratio: 0.52},
            "test_model.py::test_generation[gpu_llama_2_7b_8-bare static]": {ratio: 0.5},
            "test_attention.py::test_forward[gpu_b_mha-triton]": {"time_over_best_two_calls": 0.9},
            "test_attention.py::test_forward_and_backward[gpu_b_mha-triton]": {"time_over_best_two_calls": 0.91},
            "test_decode.py::test_decode[gpu_c_gqa-triton]": {"time_over_best_two_calls": 0.7, "share_of_floor": 0.79},
            "test_aligner_operators.py::test_layer_mix[gpu-forward-triton]": {ratio: 1 / 0.86},
            "test_aligner_operators.py::test_layer_mix[gpu-backward-triton]": {ratio: 1 / 0.74},
            "test_aligner_operators.py::test_stream_linear[gpu-forward-per_stream-triton]": {ratio: 1.0},
            "test_aligner_operators.py::test_folding[gpu_mha-triton-folded before]": {ratio: 0.35},
            "test_aligner_operators.py::test_folding[gpu_mha-torch-folded before]": {ratio: 0.1},
            "test_host_cost.py::test_host_cost[decode]": {"microseconds_above_least": 9.5},
            "test_host_cost.py::test_host_cost[backward, masks]": {"microseconds_above_least": 31.0},
        }
    )
    approx = pytest.approx
    assert verdicts(found) == {
        "host cost of a call above an empty launch: decode": (9.5, True),
        "host cost of a call above an empty launch: backward, masks": (31.0, False),
        "training step, llama_2_7b / bare LLM": (1.09, True),
        "generation, llama_2_7b_8 / bare LLM": (1.06, False),
        "generation, llama_2_7b_8 / bare LLM, static caches": (approx(1.04), True),
        "attention forward, (b) / best two calls": (0.9, True),
        "attention forward + backward, (b) / best two calls": (0.91, False),
        "decode, (c) GQA / best two calls": (0.7, True),
        "decode, (c) GQA: of copy bandwidth": (0.79, False),
        "layer_mix forward: of copy bandwidth": (approx(0.86), True),
        "layer_mix backward: of copy bandwidth": (approx(0.74), False),
        "stream_linear forward, weights per_stream: of cuBLAS": (1.0, True),
        "aligner folded / unfolded, MHA": (0.35, True),
        "peak memory of a training step, llama_2_7b / published": (0.6, False),
    }
    table = "\n".join(goal_table(found))
    assert (
        "| 3 | attention forward, (b) / best two calls | <= 0.90x | 1.23x | 0.90x | met (without sdpa cudnn, flex) |"
        in table
    )
    assert "| 6 | layer_mix backward: of copy bandwidth | >= 75% | 81% | 74% | **not met** |" in table
    assert "| goal | what | wanted | predicted (H200) | measured |" in table
    assert "launch: backward, masks | <= 30.0 us |  | 31.0 us | **not met** |" in table
    assert "no figure: not measured" in table and "cpu" not in table


def test_why_there_is_no_figure(results):
    name = "test_attention.py::test_forward[gpu_b_mha-triton]"
    folded = "test_aligner_operators.py::test_folding[gpu_mha-triton-folded before]"
    found = results({folded: {}}, {name: "triton hangs: no answer in 90 s"})
    why = {one.goal.what: one.verdict for one in outcomes(found)}
    assert why["attention forward, (b) / best two calls"] == "no figure: triton hangs: no answer in 90 s"
    assert why["aligner folded / unfolded, MHA"] == "no figure: what it is compared with has none"
    assert all(one.met is None for one in outcomes(found))


def test_a_rehearsal_meets_nothing(results):
    found = results(
        {"test_attention.py::test_forward[gpu_b_mha-triton]": {"time_over_best_two_calls": 0.1}}, small=True
    )
    (one,) = [one for one in outcomes(found) if one.value is not None]
    assert one.verdict == "rehearsed: says nothing"


def test_no_goal_is_of_a_case_that_is_gone():
    cases = {"forward": ATTENTION, "forward_and_backward": ATTENTION, "decode": DECODING, "folding": FOLDING}
    cases |= {"layer_mix": OPERATORS, "stream_linear": OPERATORS, **MODEL}
    assert {goal.number for goal in GOALS} == set(range(1, 11))
    for goal in GOALS:
        assert not goal.case or goal.case.split()[0] in cases[goal.test], goal.what
    assert {goal.implementation for goal in GOALS if goal.test == "host_cost"} < set(CALLS)


def test_what_is_predicted_is_found():
    """By the titles that the kept predictions have."""
    assert {goal.predicted for goal in GOALS} - {None} < set(predictions())


def kernel(spilled, failures=(), **more):
    line = {"kernel": "k", "variant": "plain", "spill_bytes": spilled, "failures": list(failures), **more}
    return json.dumps(line) + "\n"


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        ("done", kernel(0) + kernel(0), "met"),
        ("failed", kernel(0) + kernel(8, ["8 bytes of registers spilled"]), "**not met**"),
        ("cut", kernel(0) + kernel(0)[:20], "met (without those that were not reached)"),
        ("failed", kernel(0), "met (without those that were not reached)"),
        ("failed", kernel(0) + kernel(None, ["no"]), "met (without 1 that did not compile)"),
        ("failed", "", "no figure: 0 kernels, 0 that fail a gate"),
    ],
)
def test_spills_are_those_that_compiling_told(results, status, output, verdict):
    found = results({"test_attention.py::test_forward[gpu_b_mha-triton]": {}})
    note, figures = compiled(output)
    step = {"status": status, "note": note, "figures": figures}
    (found.path.parents[1] / "first_light.json").write_text(json.dumps({"gpu": "CPU test", "steps": {"compile": step}}))
    (one,) = [one for one in outcomes(found) if one.goal.number == 9]
    assert one.verdict == verdict
    other = json.dumps({"gpu": "another", "steps": {"compile": step}})
    (found.path.parents[1] / "first_light.json").write_text(other)
    (one,) = [one for one in outcomes(found) if one.goal.number == 9]
    assert one.verdict == "no figure: not compiled"


def test_the_report_has_the_table(results, run_command, tmp_path):
    found = results(
        {"test_attention.py::test_forward[gpu_b_mha-triton]": {"time_over_best_two_calls": 0.5}}, {"x": "why not"}
    )
    done = run_command([sys.executable, "-m", "bench", "report", str(found.path), "--output", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "cpu-test" / "results.md").read_text()
    assert "| 0.50x | met (without" in text and "- bench/x: why not" in text
