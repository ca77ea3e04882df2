"""What the layer-wise aligner keeps for its backward pass, and what it takes at most while it runs."""

import gc
import importlib
import json

import pytest
import torch

from layalign.kernels.layerwise_aligner import cross_key_values, layer_mix, stream_linear

SIZES = dict(batch=1, length=17, encoder_layers=3, encoder_width=32, llm_width=16, kv=16)
STREAM = 17 * 32 * 4  # bytes of one mixed stream
FOLDED = {"unfolded": {"folded": False}, "folded": {"folded": True}, "before": {}}
FROZEN, TRAINED = (
    (1, 2, 3, 4),
    (1, 2, 3, 4, 5, 6, 7, 8),
)  # key and value weights; as in training, and their gradients too


@pytest.fixture(autouse=True)
def on_cpu(device):
    if device.type != "cpu":
        pytest.skip("counts what a CPU allocates; test_triton_aligner_gpu.py counts on a GPU")


@pytest.fixture
def collected(monkeypatch):
    """What a launch of the interpreter holds is in cycles: collected after it, or it counts for those that follow."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launch_and_collect(self, *args, **kwargs):
        launch(self, *args, **kwargs)
        gc.collect()

    monkeypatch.setattr(GridExecutor, "__call__", launch_and_collect)
    gc.collect()
    gc.freeze()  # what was there before need not be looked at after every launch
    yield
    gc.unfreeze()


@pytest.fixture
def peak(tmp_path, collected):
    """peak(function): the most bytes that it had allocated at a time, and its results."""

    def measure(function):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = function()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
        most = now = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            now += change
            most = max(most, now)
        return most, results

    return measure


@pytest.fixture
def working_memory(peak, by_backend, aligner_cases):
    """working_memory(llm_layers, wanted, **options): peak of forward and backward beyond the results, the gradients and
    the one gradient that autograd makes of those of keys and values."""

    def measure(llm_layers, wanted, projected=True, **options):
        draw = aligner_cases.Draw(torch.float32)
        inputs = aligner_cases.cross_inputs(draw, **SIZES, llm_layers=llm_layers, projected=projected)
        leaves = aligner_cases.leaves(aligner_cases.wanting(inputs, wanted))
        grad = draw(llm_layers, 1, SIZES["length"], SIZES["kv"]).detach()

        def forward_and_backward():
            results = by_backend(cross_key_values)(*inputs, **options)
            return [*results, *torch.autograd.grad(results, leaves, [grad, grad])]

        most, results = peak(forward_and_backward)
        return most - sum(x.nbytes for x in (*results, *results[:2]))

    return measure


@pytest.mark.parametrize(
    ("folded", "wanted"),
    [("unfolded", TRAINED), ("folded", FROZEN), ("folded", TRAINED), ("before", TRAINED)],
    ids=["unfolded", "folded_frozen", "folded", "before"],
)
def test_memory_does_not_grow_with_the_layers(working_memory, wanted, folded):
    """Four more layers, eight more streams, take less than one stream more. All layers at once take them all."""
    options = FOLDED[folded] | {"projected": folded != "before"}
    few, many = (working_memory(layers, wanted, **options, layers_at_once=1) for layers in (2, 6))
    assert many - few < STREAM
    few, many = (working_memory(layers, wanted, **options, layers_at_once=layers) for layers in (2, 6))
    assert many - few >= 8 * STREAM


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # how many layers are taken is one code for all
def test_memory_stays_within_the_workspace(working_memory, backend, monkeypatch):
    """Without a limit on layers as with one, once their streams outgrow the workspace."""
    few, many = (working_memory(layers, TRAINED) for layers in (4, 16))
    assert many - few >= 24 * STREAM
    algorithm = importlib.import_module("layalign.kernels.layerwise_aligner.key_values")
    monkeypatch.setitem(algorithm.WORKSPACE, "cpu", STREAM)  # less than a layer takes
    few, many = (working_memory(layers, TRAINED) for layers in (4, 16))
    assert many - few < STREAM


@pytest.mark.parametrize("operator", [layer_mix, stream_linear, cross_key_values])
def test_the_backward_keeps_only_arguments(by_backend, backend, aligner_cases, operator):
    if operator is layer_mix and backend == "torch":
        pytest.skip("PyTorch's own operators keep the streams")
    draw = aligner_cases.Draw(torch.float32)
    inputs = aligner_cases.MAKE[operator.__name__](draw)
    given = {x.untyped_storage().data_ptr() for x in aligner_cases.leaves(inputs)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        results = by_backend(operator)(*inputs)
    assert kept and all(x.untyped_storage().data_ptr() in given for x in kept)
    del results


@pytest.mark.parametrize("operator", [layer_mix, stream_linear, cross_key_values])
def test_nothing_is_kept_where_no_gradient_is_wanted(by_backend, aligner_cases, operator):
    inputs = aligner_cases.MAKE[operator.__name__](aligner_cases.Draw(torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        with torch.no_grad():
            by_backend(operator)(*inputs)
        by_backend(operator)(*aligner_cases.wanting(inputs, ()))
    assert not kept
