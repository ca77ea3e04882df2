"""Plans of adaptive_fusion_attention in Triton's interpreter: the same bits as the long way, and no call takes another's plan."""

import dataclasses
import gc
import weakref

import pytest
import torch

from layalign.kernels import autotuning, plans

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
FP32 = {"dtype": torch.float32, "gate_dtype": torch.float32}
SHAPE = (2, 4, 2, 18, 21, 17, 16, (4,))


@pytest.fixture(autouse=True)
def table(backend, monkeypatch):
    """The operator's plans."""
    monkeypatch.setattr(plans, "enabled", True)
    return pytest.importorskip("layalign.kernels.adaptive_fusion_attention.gpu.operator").PLANS


@pytest.fixture
def runs(monkeypatch):
    """A list that gets an entry for every plan that is run."""
    found, run = [], plans.Plan.run

    def count(self, described):
        found.append(self)
        return run(self, described)

    monkeypatch.setattr(plans.Plan, "run", count)
    return found


def results(attend, inputs, keywords):
    """The outputs of a call and the gradients that its inputs ask for."""
    leaves = [x for x in inputs if x.requires_grad]
    outputs = attend(*inputs, **keywords)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if leaves and outputs[0].numel():
        generator = torch.Generator().manual_seed(5)
        gradient = torch.randn(outputs[0].shape, generator=generator).to(outputs[0])
        outputs += torch.autograd.grad(outputs[0], leaves, gradient)
    return [x.detach() for x in outputs]


def assert_equal(got, want):
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype and mine.stride() == theirs.stride()


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(12, 24))]
)
def test_the_same_bits_with_and_without(attend, dtypes, cases, runs, monkeypatch, seed):
    """Of three calls that differ in values alone the second and the third run the first one's plans."""
    case = cases.draw(seed, dtypes)
    calls = [dataclasses.replace(case, seed=seed + 1000 * number) for number in range(3)]
    calls = [(call.inputs(), call.keywords()) for call in calls]
    got = [results(attend, *call) for call in calls]
    planned = len(runs)
    monkeypatch.setattr(plans, "enabled", False)
    for mine, call in zip(got, calls, strict=True):
        assert_equal(mine, results(attend, *call))
    assert len(runs) == planned
    start = case.options.get("query_start")
    copied = isinstance(start, torch.Tensor) and start.dim() == 0  # to every row of the batch
    if case.layout == "contiguous" and case.sharing == 1 and case.queries and not copied:
        assert planned >= 2 * (1 + bool(case.wanted))


def shifted(x, elements):
    """The same values so many elements past a multiple of 64 bytes."""
    memory = torch.zeros(x.numel() + elements, dtype=x.dtype)
    return memory[elements:].view(x.shape).copy_(x)


def transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


MASK = torch.arange(21) % 5 != torch.tensor([[2], [3]])
SPAN = torch.tensor([[1, 19], [0, 21]], dtype=torch.int32)
OPTIONS = {
    "causal": {"causal": False},
    "scale": {"scale": 0.5},
    "minus": {"scale": -0.3},
    "window": {"window": 4},
    "wider": {"window": 5},
    "softcap": {"softcap": 3.0},
    "start": {"query_start": 2},
    "later": {"query_start": 3},
    "start of all": {"query_start": torch.tensor(2)},
    "start of each": {"query_start": torch.tensor([2, 3])},
    "int32 start": {"query_start": torch.tensor([2, 3], dtype=torch.int32)},
    "key mask": {"key_mask": MASK},
    "cross mask": {"cross_mask": MASK[:, :17]},
    "key span": {"key_span": SPAN},
    "cross span": {"cross_span": SPAN.clamp(max=17)},
    "log-sum-exps": {"return_lse": True},
}
CHANGES = {
    "strides": lambda x: [transposed(x[0]), *x[1:]],
    "strides of v": lambda x: [*x[:2], transposed(x[2]), *x[3:]],
    "alignment": lambda x: [*x[:4], shifted(x[4], 1), x[5]],
    "dtype": lambda x: [t.half() for t in x],
    "dtype of the gate": lambda x: [*(t.half() for t in x[:5]), x[5]],
    "gate": lambda x: [*x[:5], x[5][:1].clone()],
    "gate of each query": lambda x: [*x[:5], x[5].view(1, 4, 1).expand(2, 4, 18).contiguous()],
    "fewer keys": lambda x: [x[0], x[1][:, :, :20].clone(), x[2][:, :, :20].clone(), *x[3:]],
    "no cross keys": lambda x: [*x[:3], x[3][:, :, :0], x[4][:, :, :0], x[5]],
    "shared cross keys": lambda x: [*x[:3], x[3][:1], x[4][:1], x[5]],
    "one batch row": lambda x: [*(t[:1].clone() for t in x[:5]), x[5]],
}


def test_nothing_takes_the_plan_of_another_call(attend, cases, runs, monkeypatch, pytestconfig):
    """Options and changes of the inputs one after another, without and with gradients, on one table of plans. With gradients every second
    of them, unless with --thorough: a call's place in the table is found by the same key."""
    inputs = [x.detach() for x in cases.random_inputs(*SHAPE, **FP32)]
    options = {"plain": {}, **OPTIONS}
    some = (("plain", name) for name in CHANGES)
    calls = [*((name, None) for name in options), *some, ("window", "strides"), ("softcap", "dtype")]
    for training in (False, True):
        step = 2 if training and not pytestconfig.getoption("thorough") else 1
        for option, change in calls[::step]:
            given = CHANGES[change](inputs) if change else inputs
            given = [x.detach().requires_grad_(training) for x in given]
            monkeypatch.setattr(plans, "enabled", True)
            before = len(runs)
            first = results(attend, given, options[option])
            # A call for gradients keeps log-sum-exps anyway, and repeats the cross keys that rows share.
            shared = training and (option == "log-sum-exps" or change == "shared cross keys")
            assert shared or len(runs) == before, (option, change)
            before = len(runs)
            again = results(attend, given, options[option])
            if option != "start of all":  # which is spread over the batch in memory of its own
                assert len(runs) == before + 1 + training, (option, change)
            monkeypatch.setattr(plans, "enabled", False)
            want = results(attend, given, options[option])
            assert_equal(first, want)
            assert_equal(again, want)


def test_which_gradients_are_wanted_is_part_of_a_plan(attend, cases, monkeypatch):
    for wanted in (range(6), (0,), (2,), (1, 5), (3, 4), (5,)):
        inputs = [x.detach() for x in cases.random_inputs(*SHAPE, **FP32)]
        inputs = [x.requires_grad_(number in wanted) for number, x in enumerate(inputs)]
        got = [results(attend, inputs, {}) for _ in range(2)]
        monkeypatch.setattr(plans, "enabled", False)
        want = results(attend, inputs, {})
        monkeypatch.setattr(plans, "enabled", True)
        for mine in got:
            assert_equal(mine, want)


def test_saved_tensors_that_come_back_otherwise(attend, cases):
    """What a hook hands to the backward may lie elsewhere, in other strides."""
    inputs = [transposed(x.detach()) if x.dim() > 1 else x.detach() for x in cases.random_inputs(*SHAPE, **FP32)]
    inputs = [x.requires_grad_() for x in inputs]
    want, _ = (results(attend, inputs, {}) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.contiguous().clone()):
        for _ in range(2):
            for mine, theirs in zip(results(attend, inputs, {}), want, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["float32 products", "autotuning"])
def test_global_settings_are_part_of_a_plan(attend, cases, runs, monkeypatch, name):
    inputs = [x.detach() for x in cases.random_inputs(*SHAPE, **FP32)]
    for _ in range(2):
        attend(*inputs)
    assert len(runs) == 1
    if name == "autotuning":
        monkeypatch.setenv("LAYALIGN_AUTOTUNE", "1")
        assert autotuning.enabled()
    else:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    attend(*inputs)
    assert len(runs) == 1
    attend(*inputs)
    assert len(runs) == 2


WRONG = {
    "causal": {"causal": 1},
    "window": {"window": True},
    "query_start": {"query_start": True},
    "scale": {"scale": True},
    "softcap": {"softcap": [1.0]},
    "return_lse": {"return_lse": 1},
    "key_mask": {"key_mask": torch.ones(2, 21)},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_lets_nothing_wrong_pass(attend, cases, name):
    """To a dictionary True is 1."""
    inputs = [x.detach() for x in cases.random_inputs(*SHAPE, **FP32)]
    right = {"window": {"window": 1}, "query_start": {"query_start": 1}, "scale": {"scale": 1}}.get(name, {})
    right = {"return_lse": {"return_lse": True}}.get(name, right)
    for _ in range(2):
        attend(*inputs, **right)
    with pytest.raises(ValueError, match=name):
        attend(*inputs, **WRONG[name])


def test_wrong_tensors_are_refused_after_right_ones(attend, cases):
    inputs = [x.detach() for x in cases.random_inputs(*SHAPE, **FP32)]
    for _ in range(2):
        attend(*inputs)
    for wrong in (None, 3.0, inputs[1].double(), inputs[1][..., :8], inputs[1].numpy()):
        with pytest.raises(ValueError, match="k: got"):
            attend(inputs[0], wrong, *inputs[2:])


def test_bounds_are_looked_at_in_every_call(attend, cases):
    inputs = [x.detach() for x in cases.random_inputs(1, 2, 1, 9, 9, 5, 16, (1,), **FP32)]
    right, cross = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 2, 5], dtype=torch.int32)
    for _ in range(2):
        attend(*inputs, cu_seqlens=right, cross_cu_seqlens=cross)
    with pytest.raises(ValueError, match="cu_seqlens"):
        attend(*inputs, cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32), cross_cu_seqlens=cross)


def test_a_tensor_given_twice(attend, cases, monkeypatch):
    """Its place in one call says nothing about another's."""
    q, k, v, cross_k, cross_v, gate = (x.detach() for x in cases.random_inputs(*SHAPE, **FP32))
    for _ in range(3):
        attend(q, k, k, cross_k, cross_k, gate)
    got = [attend(q, k, v, cross_k, cross_v, gate) for _ in range(2)] + [attend(q, k, k, cross_k, cross_k, gate)]
    monkeypatch.setattr(plans, "enabled", False)
    want = [attend(q, k, v, cross_k, cross_v, gate)] * 2 + [attend(q, k, k, cross_k, cross_k, gate)]
    assert_equal(got, want)


def test_slices_of_one_memory(attend, cases, monkeypatch):
    """Tensors that share memory in the first call, and none in the next."""
    inputs = [x.detach() for x in cases.random_inputs(2, 4, 2, 18, 18, 17, 16, (4,), **FP32)]
    fused = cases.laid_out(inputs, "fused")
    apart = [torch.empty(2, 18, 8, 16).transpose(1, 2)[:, : x.shape[1]].copy_(x) for x in inputs[:3]]
    apart = [*apart, *fused[3:]]
    assert [x.stride() for x in apart] == [x.stride() for x in fused]
    got = [attend(*x) for x in (fused, apart, fused)]
    monkeypatch.setattr(plans, "enabled", False)
    assert_equal(got, [attend(*fused)] * 3)


def test_plans_are_few_and_hold_no_tensor(attend, cases, table, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    references = []
    for keys in range(18, 23):
        inputs = cases.random_inputs(1, 2, 1, 18, keys, 17, 16, (2,), **FP32)
        options = {"key_mask": torch.ones(1, keys, dtype=torch.bool)}
        for _ in range(2):
            found = results(attend, inputs, options)
        references += [weakref.ref(x) for x in (*inputs, *options.values(), *found)]
        assert len(table) <= 3
        del inputs, options, found
    gc.collect()
    assert not any(reference() is not None for reference in references)
