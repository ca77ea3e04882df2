"""`adaptive_fusion_attention` by the Triton kernels: plans, autograd, and opaque operators for torch.compile.

Eagerly, a call that agrees with an earlier one repeats its plan before anything is checked: see `plans`. Under torch.compile it is
one of three operators that the compiler does not look into.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import autotuning, plans
from ...dispatch import covered, first_gradients_only
from ...launch import float32_precision, stands_in
from ..call import (
    FLAT_NUMBERS,
    FLAT_TENSORS,
    FLOATS,
    SCHEMA,
    Call,
    check_bounds,
    flatten,
    unflatten,
    with_rows_repeated,
)
from ..paged import PAGED_SCHEMA, PagedCall, asks_for_gradients, check_pages
from .arguments import empty_like, unit_stride
from .backward import gate_gradient, gradients, sink_gradient
from .decode import MOST_QUERIES, Decoded, decode, decodes
from .forward import ForwardResults, Kept, forward, gluon_asked
from .packing import raise_faults
from .paged import decode_pages

PLANS = plans.Plans()
RESULTS = len(ForwardResults._fields) - 1  # that are saved, out apart
_OUTPUT, _LSE = Kept(False, False, False), Kept(False, False, True)  # without gradients
_WITHOUT_SCORES, _WITH_SCORES = Kept(False, True, True), Kept(True, True, True)


def attend_again(call: Call, return_lse: bool) -> Tensor | tuple[Tensor, ...] | None:
    """The results of a call that agrees with one that was checked and planned; None for any other, well-formed or not."""
    if not isinstance(return_lse, bool):
        return None
    try:
        kept = _kept(call, return_lse)
        described = _described_call(call, kept)
    except AttributeError:  # what was given for a tensor is none
        return None
    if described is None or described.plan is None:
        return None
    return _attend(call, return_lse, kept, described)


def decode_pages_again(call: PagedCall, return_lse: bool) -> Tensor | tuple[Tensor, ...] | None:
    """`attend_again` of a call over pages."""
    try:
        described = _described(call, return_lse, tuned=False)
    except AttributeError:
        return None
    if described is None or described.plan is None or asks_for_gradients(call):
        return None
    check_pages(call)
    return _of_pages(call, described.plan.run(described), return_lse)


def decode_pages_planned(call: PagedCall, return_lse: bool) -> Tensor | tuple[Tensor, ...]:
    """The results of `adaptive_fusion_decode_paged` for a checked PagedCall."""
    described = None if torch.compiler.is_compiling() else _described(call, return_lse, tuned=False)
    if call.scale is None:
        call = call._replace(scale=call.q.shape[-1] ** -0.5)
    if not torch.compiler.is_compiling():
        return _of_pages(call, _decode_pages(call, return_lse, described), return_lse)
    tensors, out, numbers = call[:11], call.out, call[12:]
    results = Decoded(*torch.ops.layalign.adaptive_fusion_decode_paged(*tensors, *numbers, return_lse))
    if out is not None:
        out.copy_(results.out)
    return _of_pages(call, results, return_lse)


def _decode_pages(call, return_lse, described=None):
    with torch.cuda.device_of(call.q):
        return PLANS.make(described, decode_pages, call, return_lse)


def _of_pages(call, results, return_lse):
    out = results.out if call.out is None else call.out
    return (out, results.self_lse, results.cross_lse) if return_lse else out


def fused_attention(call: Call, return_lse: bool) -> Tensor | tuple[Tensor, ...]:
    """The results of `adaptive_fusion_attention` for a checked Call."""
    kept = _kept(call, return_lse)
    if kept.terms:  # the gradients of shared rows are sums, which this makes
        call = with_rows_repeated(call)
    planned = not torch.compiler.is_compiling() and (call.q.device.type != "cuda" or covered(call.q.device))
    return _attend(call, return_lse, kept, _described_call(call, kept) if planned else None)


def _attend(call, return_lse, kept, described):
    if call.cu_seqlens is not None and described is not None and described.plan is not None:
        check_bounds(call)
        raise_faults(call.q.device)
    if kept.terms and torch.compiler.is_compiling():
        out, lse = _CompiledAttention.apply(*flatten(call), list(kept))
    elif kept.terms:
        out, lse = _FusedAttention.apply(*call[:FLOATS], flatten(call), kept, described, return_lse)
    else:
        results = _without_gradients(call, kept, described)
        if isinstance(results, Decoded):
            return tuple(results) if return_lse else results.out
        out, lse = results.out, results.lse
    if not return_lse:
        return out
    self_lse, *cross_lse = (lse * math.log(2)).unbind()
    return out, self_lse, *(cross_lse or [torch.full_like(self_lse, -torch.inf)])


def _kept(call, return_lse):
    """The Kept of a call, with terms wherever gradients are wanted."""
    q, k, v, cross_k, cross_v, gate, sink = call[:FLOATS]
    if torch.is_grad_enabled():
        scores = q.requires_grad or k.requires_grad or (sink is not None and sink.requires_grad)
        if scores or v.requires_grad or cross_k.requires_grad or cross_v.requires_grad or gate.requires_grad:
            return _WITH_SCORES if scores else _WITHOUT_SCORES
    return _LSE if return_lse else _OUTPUT


def _described(arguments, state, tuned):
    """The Described of arguments whose first is a tensor. tuned: whether autotuning, or LAYALIGN_GLUON=1, may choose their launches."""
    precision = float32_precision() if arguments[0].dtype == torch.float32 else None
    chosen = tuned and (autotuning.enabled(), gluon_asked())
    return PLANS.describe(arguments, (state, precision, stands_in(), chosen))


def _described_call(call, kept):
    return _described(call, kept, tuned=kept.terms or call.q.shape[2] > MOST_QUERIES)


def _without_gradients(call, kept, described):
    if described is not None and described.plan is not None:
        return described.plan.run(described)
    decoding = call.cu_seqlens is None and decodes(call.q)
    if not torch.compiler.is_compiling():
        return _decode(call, kept, described) if decoding else _forward(call, kept, described)
    if decoding:
        return Decoded(*torch.ops.layalign.adaptive_fusion_attention_decode(*flatten(call), kept.lse))
    return ForwardResults(*torch.ops.layalign.adaptive_fusion_attention(*flatten(call), list(kept)))


class _FusedAttention(torch.autograd.Function):
    """Saves its inputs, both terms of the output before they were added, both log-sum-exps, and lists of used tiles. `flat` holds
    all arguments, also the seven that autograd follows: of more, and of more results, each costs a microsecond."""

    @staticmethod
    def forward(ctx, q, k, v, cross_k, cross_v, gate, sink, flat, kept, described, return_lse):
        planned = described is not None and described.plan is not None
        results = described.plan.run(described) if planned else _forward(unflatten(flat), kept, described)
        _save(ctx, results, flat)
        if not return_lse:
            return results.out, None
        ctx.set_materialize_grads(False)  # of log-sum-exps there is none
        ctx.mark_non_differentiable(results.lse)
        return results.out, results.lse

    @staticmethod
    @first_gradients_only
    def backward(ctx, grad_out, grad_lse):
        nothing = (None,) * 4
        if grad_out is None:
            return *(None,) * FLOATS, *nothing
        return *_backward(grad_out, (*ctx.saved_tensors, *ctx.numbers), ctx.needs_input_grad[:FLOATS]), *nothing


class _CompiledAttention(torch.autograd.Function):
    """The same by operators that torch.compile does not look into, of all arguments one by one."""

    @staticmethod
    def forward(ctx, *arguments):
        results = ForwardResults(*torch.ops.layalign.adaptive_fusion_attention(*arguments))
        _save(ctx, results, arguments[:-1])
        ctx.mark_non_differentiable(results.lse)
        return results.out, results.lse

    @staticmethod
    @first_gradients_only
    def backward(ctx, grad_out, grad_lse):
        wanted = list(ctx.needs_input_grad[:FLOATS])
        *terms, _, _ = ctx.saved_tensors[:RESULTS]
        run = torch.ops.layalign.adaptive_fusion_attention_backward
        grads = run(grad_out, *terms, *ctx.saved_tensors[RESULTS:], *ctx.numbers, wanted)
        grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *grads, *(None,) * (FLAT_TENSORS + FLAT_NUMBERS + 1 - len(wanted))


def _save(ctx, results, flat):
    out, self_out, cross_out, lse, *lists = results
    if flat[3].shape[2] == 0:  # no cross keys: out is the self term
        self_out = out
    ctx.save_for_backward(self_out, cross_out, lse, *lists, *flat[:FLAT_TENSORS])
    ctx.numbers = flat[FLAT_TENSORS:]


def _forward(call, kept, described=None):
    with torch.cuda.device_of(call.q):  # kernels start on the current device
        return PLANS.make(described, forward, _settled(call), kept)


def _decode(call, kept, described=None):
    with torch.cuda.device_of(call.q):
        return PLANS.make(described, decode, _settled(call), kept.lse)


def _backward(grad_out, saved, wanted):
    """Seven gradients. saved: a ForwardResults without out, then the flat form of a call."""
    grad_out = unit_stride(grad_out)
    described = None
    if not torch.compiler.is_compiling():
        described = _described((grad_out, *saved), wanted, tuned=True)
    if described is not None and described.plan is not None:
        grads = described.plan.run(described)
    else:
        results, call = ForwardResults(None, *saved[:RESULTS]), unflatten(saved[RESULTS:])
        with torch.cuda.device_of(call.q):
            grads = PLANS.make(described, gradients, grad_out, results, call, wanted)
    gate, sink = saved[RESULTS + 5], saved[RESULTS + 6]
    return (
        *grads[:5],
        gate_gradient(grads.gate, gate) if wanted[5] else None,
        sink_gradient(grads.sink, saved[2][0], sink) if any(wanted[6:]) else None,
    )


def _settled(call):
    """The call with a scale."""
    return unflatten(flatten(call))


def _present(results, like):
    """Of an opaque operator, which cannot return None."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


@torch.library.custom_op(
    "layalign::adaptive_fusion_attention",
    mutates_args=(),
    schema=f"({SCHEMA}, bool[] kept) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward_operator(*arguments):
    *flat, kept = arguments
    results = _forward(unflatten(flat), Kept(*kept))
    return _present(results[:4], flat[0])  # without lists of tiles, of which no fake could tell the lengths


@_forward_operator.register_fake
def _(*arguments):
    *flat, kept = arguments
    q, crossing, kept = flat[0], flat[3].shape[2] > 0, Kept(*kept)
    made = (True, crossing and kept.self_term, crossing and kept.terms)
    terms = [empty_like(q) if x else q.new_empty(0) for x in made]
    lse = (1 + crossing, *q.shape[:3])
    return *terms, q.new_empty(lse, dtype=torch.float32) if kept.lse else q.new_empty(0)


@torch.library.custom_op(
    "layalign::adaptive_fusion_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor self_out, Tensor cross_out, Tensor lse, {SCHEMA}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_operator(*arguments):
    grad_out, self_out, cross_out, lse, *flat, wanted = arguments
    return _present(_backward(grad_out, (self_out, cross_out, lse, None, None, *flat), tuple(wanted)), grad_out)


@_backward_operator.register_fake
def _(*arguments):
    grad_out, _, _, _, *flat, wanted = arguments
    *tensors, gate, sink = unflatten(flat)[:FLOATS]
    grads = [
        *map(empty_like, tensors),
        gate.new_empty(gate.shape),
        None if sink is None else sink.new_empty(sink.shape),
    ]
    return tuple(grad if want else grad_out.new_empty(0) for grad, want in zip(grads, wanted, strict=True))


@torch.library.custom_op(
    "layalign::adaptive_fusion_attention_decode",
    mutates_args=(),
    schema=f"({SCHEMA}, bool return_lse) -> (Tensor, Tensor, Tensor)",
)
def _decode_operator(*arguments):
    *flat, return_lse = arguments
    return _present(_decode(unflatten(flat), Kept(False, False, return_lse)), flat[0])


def _decoded_like(*arguments):
    q, return_lse = arguments[0], arguments[-1]
    lse = [q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else q.new_empty(0) for _ in range(2)]
    return empty_like(q), *lse


_decode_operator.register_fake(_decoded_like)


@torch.library.custom_op("layalign::adaptive_fusion_decode_paged", mutates_args=(), schema=PAGED_SCHEMA)
def _paged_operator(*arguments):
    *flat, return_lse = arguments
    results = _decode_pages(PagedCall(*flat[:11], None, *flat[11:]), return_lse)
    return _present(results, flat[0])


_paged_operator.register_fake(_decoded_like)
