"""Triton starts kernels on the current device, wherever their tensors are: every entry makes its tensors' device the current one
first. Kernels and public functions are found, not listed, so that new ones are held to it too."""

import inspect
import sys

import pytest
import torch

import layalign.kernels.adaptive_fusion_attention as attention
import layalign.kernels.layerwise_aligner as aligner
from layalign.kernels.launch import recording

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture
def launched(backend, monkeypatch):
    """{kernel: whether all its launches so far were within a device guard}; nothing is computed."""
    guards, seen = [], {}
    enter, leave = torch.cuda.device.__enter__, torch.cuda.device.__exit__

    def guarded_enter(self):
        guards.append(self)
        return enter(self)

    def guarded_exit(self, *exception):
        guards.pop()
        return leave(self, *exception)

    monkeypatch.setattr(torch.cuda.device, "__enter__", guarded_enter)  # and so of device_of
    monkeypatch.setattr(torch.cuda.device, "__exit__", guarded_exit)

    def record(kernel, grid, args, constants, options):
        name = kernel.fn.__name__
        assert name.endswith("_kernel")  # what `kernels_of` looks for
        seen[name] = seen.get(name, True) and bool(guards)

    with recording("sm_90", record):
        yield seen


def kernels_of(operator):
    """Names of the kernels in all modules that the operator has imported."""
    within = [
        module for name, module in list(sys.modules.items()) if module and name.startswith(operator.__name__ + ".")
    ]
    return {
        value.fn.__name__
        for module in within
        for value in vars(module).values()
        if hasattr(value, "fn") and getattr(value.fn, "__name__", "").endswith("_kernel")
    }


def entries_of(operator):
    """Public functions that have a choice of backend."""
    functions = (getattr(operator, name) for name in operator.__all__)
    return {function for function in functions if "backend" in inspect.signature(function).parameters}


def differentiate(results):
    results = results if isinstance(results, tuple) else (results,)
    sum(x.sum() for x in results if x.requires_grad).backward()


def test_of_the_attention(backend, launched, device, monkeypatch):
    def leaf(*shape):
        return torch.randn(*shape, device=device).requires_grad_()

    def attend(*inputs, **options):
        called.add(attention.adaptive_fusion_attention)
        return attention.adaptive_fusion_attention(*inputs, **options, backend=backend)

    called = set()
    mask = torch.ones(1, 200, dtype=torch.bool, device=device)
    bounds = torch.tensor([0, 90, 200], dtype=torch.int32, device=device)
    inputs = [leaf(1, heads, 200, 16) for heads in (4, 2, 2, 2, 2)]
    for gate, options in (
        (leaf(1), {}),
        (leaf(1, 1, 200), {"key_mask": mask, "cross_mask": mask}),
        (leaf(1, 4, 200), {"cu_seqlens": bounds, "cross_cu_seqlens": bounds}),
    ):
        differentiate(attend(*inputs, gate, **options))
        with torch.no_grad():
            attend(*inputs, gate, **options)
    with torch.no_grad():
        for keys in (200, 4000):  # whole, and in splits that are merged
            q, k = torch.randn(1, 2, 1, 16, device=device), torch.randn(1, 1, keys, 16, device=device)
            attend(q, k, k, k, k, leaf(1))
        pages = torch.randn(2, 16, 1, 16, device=device)
        table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
        own = (pages, pages, table, torch.tensor([20], dtype=torch.int32, device=device))
        attention.adaptive_fusion_decode_paged(q, *own, *own, leaf(1), backend=backend)
        called.add(attention.adaptive_fusion_decode_paged)
    monkeypatch.setenv("LAYALIGN_GLUON", "1")
    q, k = (torch.randn(1, heads, 80, 64, device=device, dtype=torch.float16) for heads in (2, 1))
    q, k = q.requires_grad_(), k.requires_grad_()
    differentiate(attend(q, k, k, k, k, leaf(1)) * q.detach())
    assert called == entries_of(attention)
    assert launched == dict.fromkeys(kernels_of(attention), True)


def test_of_the_aligner(backend, launched, device, aligner_cases):
    def call(operator, arguments, **options):
        called.add(operator)
        arguments = [[x.to(device) for x in y] if isinstance(y, list) else y.to(device) for y in arguments]
        return operator(*arguments, **options, backend=backend)

    called, draw = set(), aligner_cases.Draw(torch.float32)
    call(aligner.fold_key_values, aligner_cases.cross_inputs(draw)[3:])
    assert launched == {"matmul_kernel": True}
    for streams in (4, 96):  # both gradients in one launch, and more streams than a tile holds
        differentiate(call(aligner.layer_mix, aligner_cases.mix_inputs(draw, streams=streams)))
    for shared in (True, False):
        differentiate(call(aligner.stream_linear, aligner_cases.linear_inputs(draw, shared=shared)))
    for folded in (True, False):
        differentiate(call(aligner.cross_key_values, aligner_cases.cross_inputs(draw), folded=folded))
    assert called == entries_of(aligner)
    assert launched == dict.fromkeys(kernels_of(aligner), True)
