"""The layer mix in Triton: relu(sum_e weight[j, e] h_e + bias[j]) for all streams j in one pass over the E encoder states,
and its gradients.

A state is X = N * De numbers in a row, a stream too. A program works on tiles of BLOCK_N of them: one [BLOCK_E, BLOCK_N]
tile holds all states there, read once, through a vector of their addresses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import architecture, dot_precision, launch, multiprocessors
from ...tiles import ones, vector, zeros
from .launch_table import mix_config

# A program's first tile costs it the addresses (two selects for each state), the weight, and a wait for memory: one wave of
# programs, 4 a multiprocessor as their registers allow, shares out the tiles, up to 64 each.
_PROGRAMS = 4
_TILES_EACH = 64
# Programs of the weight gradients, each with its own sums: few enough that adding those up costs little beside reading
# the gradient, and one whole wave where 132 multiprocessors hold 2 each, with 169 registers, or 192 where the states' gradients are
# computed along (sm_90). As 3 each they would be two waves: 66 % of the bandwidth predicted, not 88.
_RANGES = 264
_SHORTEST_RANGE = 16  # tiles


class Operands(NamedTuple):
    """What is mixed: E states of X numbers each, weight (J, E) with its strides, bias (J,) or None with its."""

    states: tuple[Tensor, ...]
    weight: Tensor
    s_row: int
    s_column: int
    bias: Tensor | None
    s_bias: int


class Constants(NamedTuple):
    """What a kernel is compiled for. ALIGNED: the states' addresses are multiples of 16 bytes, without which the compiler reads one
    number at a time; ONE_STREAM_TILE: a tile holds all streams; STATES: the gradients of weights take those of states along."""

    LAYERS: int
    BLOCK_E: int
    BLOCK_M: int
    BLOCK_N: int
    ALIGNED: bool
    PRECISION: str
    ONE_STREAM_TILE: bool = False
    STATES: bool = False


@triton.jit
def state_pointers(states, LAYERS: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr):
    """The addresses of the states as one vector [BLOCK_E], null past the last."""
    # [BLOCK_E]
    o_state = tl.arange(0, BLOCK_E)
    b_address = tl.zeros([BLOCK_E], dtype=tl.int64)
    for e in tl.static_range(LAYERS):
        b_address = tl.where(o_state == e, states[e].to(tl.int64), b_address)
    p_states = b_address.to(states[0].dtype)
    if ALIGNED:
        p_states = tl.multiple_of(p_states, 16)
    return p_states


@triton.jit
def load_states(p_states, tile, X, C: tl.constexpr):
    """-> the numbers of one tile [BN], and those of all states [BLOCK_E, BN], zero past the last state and past X."""
    # [BN]
    o_x = tl.cast(tile, tl.int64) * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
    m_used = (tl.arange(0, C.BLOCK_E) < C.LAYERS)[:, None] & (o_x < X)[None, :]
    return o_x, tl.load(p_states[:, None] + o_x[None, :], mask=m_used, other=0.0)


@triton.jit
def load_weight(operands, o_stream, J, C: tl.constexpr):
    """-> rows of the weight [BLOCK_M, BLOCK_E] and of the bias [BLOCK_M, 1] in fp32, zero past J and the last state."""
    # [BLOCK_E]
    o_state = tl.arange(0, C.BLOCK_E)
    # In 64 bits: strides are those of any view, and a row of them times a tile of streams may pass 2^31. Once a program.
    p_rows = operands.weight + tl.cast(o_stream, tl.int64)[:, None] * operands.s_row
    p_weight = p_rows + tl.cast(o_state, tl.int64)[None, :] * operands.s_column
    b_weight = tl.load(p_weight, mask=(o_stream < J)[:, None] & (o_state < C.LAYERS)[None, :], other=0.0)
    if operands.bias is not None:
        p_bias = operands.bias + tl.cast(o_stream, tl.int64) * operands.s_bias
        b_bias = tl.load(p_bias, mask=o_stream < J, other=0.0).to(tl.float32)[:, None]
    else:
        b_bias = tl.zeros([o_stream.shape[0], 1], dtype=tl.float32)
    return b_weight, b_bias


@triton.jit
def mix_kernel(operands, out, X, J, tiles, tiles_each, C: tl.constexpr):
    """Tiles of all streams. Grid: (cdiv(tiles, tiles_each),)."""
    p_states = state_pointers(operands.states, C.LAYERS, C.BLOCK_E, C.ALIGNED)
    size = tl.cast(X, tl.int64)
    # [BM]
    o_first = tl.arange(0, C.BLOCK_M)
    if C.ONE_STREAM_TILE:
        b_weight, b_bias = load_weight(operands, o_first, J, C)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, min(first + tiles_each, tiles)):
        o_x, b_states = load_states(p_states, tile, X, C)
        for stream_tile in range(1 if C.ONE_STREAM_TILE else tl.cdiv(J, C.BLOCK_M)):
            o_stream = stream_tile * C.BLOCK_M + o_first
            if not C.ONE_STREAM_TILE:
                b_weight, b_bias = load_weight(operands, o_stream, J, C)
            # [BM, BN]
            b_mixed = tl.dot(b_weight, b_states, input_precision=C.PRECISION) + b_bias
            b_mixed = tl.maximum(b_mixed, 0.0, propagate_nan=tl.PropagateNan.ALL)
            p_out = out + o_stream[:, None] * size + o_x[None, :]
            tl.store(p_out, b_mixed.to(out.dtype.element_ty), mask=(o_stream < J)[:, None] & (o_x < X)[None, :])


@triton.jit
def masked_gradient(grad, s_stream, b_weight, b_bias, b_states, o_stream, o_x, J, X, C: tl.constexpr):
    """The gradient [BLOCK_M, BLOCK_N] of what the relu was given: that of its result where it let numbers pass."""
    m_used = (o_stream < J)[:, None] & (o_x < X)[None, :]
    p_grad = grad + tl.cast(o_stream, tl.int64)[:, None] * s_stream + o_x[None, :]
    b_grad = tl.load(p_grad, mask=m_used, other=0.0)
    b_mixed = tl.dot(b_weight, b_states, input_precision=C.PRECISION)
    # As torch's relu, a NaN lets its gradient pass. Adding the bias instead would cost an instruction for each number.
    return tl.where(b_mixed <= -b_bias, 0.0, b_grad)


@triton.jit
def store_states(grad_states, b_sums, o_x, X, C: tl.constexpr):
    """Gradients [BLOCK_E, BN] of all states at one tile of numbers."""
    o_state = tl.arange(0, C.BLOCK_E)
    m_used = (o_state < C.LAYERS)[:, None] & (o_x < X)[None, :]
    p_states = grad_states + tl.cast(o_state, tl.int64)[:, None] * X + o_x[None, :]
    tl.store(p_states, b_sums.to(grad_states.dtype.element_ty), mask=m_used)


@triton.jit
def mix_weight_gradients_kernel(
    grad, s_stream, operands, partials, grad_states, X, J, tiles, tiles_each, C: tl.constexpr
):
    """partials[range, j] = the sums over one range of tiles for the E weights and, last, the bias of stream j.

    Grid: (cdiv(J, BLOCK_M), ranges). Tiles of streams of one range are neighbours: all but the first find the states in L2.
    STATES, where one tile holds all streams: the tiles of grad_states (E, X) too, from what has been read anyway.
    """
    p_states = state_pointers(operands.states, C.LAYERS, C.BLOCK_E, C.ALIGNED)
    # [BM]
    o_stream = tl.program_id(0) * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    b_weight, b_bias = load_weight(operands, o_stream, J, C)
    # [BM, BLOCK_E]
    b_weight_sums = zeros(C.BLOCK_M, C.BLOCK_E)
    # In half precision tensor cores sum faster: 229 instructions for a 64 x 64 tile on sm_90, 291 with tl.sum.
    SUM_BY_DOT: tl.constexpr = operands.weight.dtype.element_ty != tl.float32
    if SUM_BY_DOT:
        b_bias_sums = zeros(C.BLOCK_M, 16)
        b_ones = ones(C.BLOCK_N, 16, operands.weight.dtype.element_ty)
    else:
        b_bias_sums = vector(C.BLOCK_M, 0.0)
    first = tl.program_id(1) * tiles_each
    for tile in range(first, min(first + tiles_each, tiles)):
        o_x, b_states = load_states(p_states, tile, X, C)
        # [BM, BN]
        b_grad = masked_gradient(grad, s_stream, b_weight, b_bias, b_states, o_stream, o_x, J, X, C)
        b_weight_sums += tl.dot(b_grad, tl.trans(b_states), input_precision=C.PRECISION)
        if SUM_BY_DOT:
            b_bias_sums += tl.dot(b_grad, b_ones)
        else:
            b_bias_sums += tl.sum(b_grad, axis=1)
        if C.STATES:
            b_sums = tl.dot(tl.trans(b_weight), b_grad, input_precision=C.PRECISION)
            store_states(grad_states, b_sums, o_x, X, C)
    o_state = tl.arange(0, C.BLOCK_E)
    partials += (tl.cast(tl.program_id(1), tl.int64) * J + o_stream) * (C.LAYERS + 1)
    m_weight = (o_stream < J)[:, None] & (o_state < C.LAYERS)[None, :]
    tl.store(partials[:, None] + o_state[None, :], b_weight_sums, mask=m_weight)
    if SUM_BY_DOT:
        o_column = tl.arange(0, 16)[None, :]
        m_bias = (o_stream < J)[:, None] & (o_column == 0)
        tl.store(partials[:, None] + C.LAYERS + o_column, b_bias_sums, mask=m_bias)
    else:
        tl.store(partials + C.LAYERS, b_bias_sums, mask=o_stream < J)


@triton.jit
def mix_state_gradients_kernel(grad, s_stream, operands, grad_states, X, J, tiles, tiles_each, C: tl.constexpr):
    """Tiles of grad_states (E, X) = weight^T times the gradient behind the relu. Grid: (cdiv(tiles, tiles_each),)."""
    p_states = state_pointers(operands.states, C.LAYERS, C.BLOCK_E, C.ALIGNED)
    o_first = tl.arange(0, C.BLOCK_M)
    if C.ONE_STREAM_TILE:
        b_weight, b_bias = load_weight(operands, o_first, J, C)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, min(first + tiles_each, tiles)):
        o_x, b_states = load_states(p_states, tile, X, C)
        # [BLOCK_E, BN]
        b_sums = zeros(C.BLOCK_E, C.BLOCK_N)
        for stream_tile in range(1 if C.ONE_STREAM_TILE else tl.cdiv(J, C.BLOCK_M)):
            o_stream = stream_tile * C.BLOCK_M + o_first
            if not C.ONE_STREAM_TILE:
                b_weight, b_bias = load_weight(operands, o_stream, J, C)
            b_grad = masked_gradient(grad, s_stream, b_weight, b_bias, b_states, o_stream, o_x, J, X, C)
            b_sums += tl.dot(tl.trans(b_weight), b_grad, input_precision=C.PRECISION)
        store_states(grad_states, b_sums, o_x, X, C)


def mix(states: list[Tensor], weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The mix of E contiguous tensors (N, De) with weight (J, E) and bias (J,) or None -> (J, N, De), or into `out`."""
    if out is None:
        out = states[0].new_empty(weight.shape[0], *states[0].shape)
    if out.numel() == 0:
        return out
    call = _Call("mix", states, weight, bias)
    grid, tiles = call.tiles()
    launch(mix_kernel, grid, call.config, call.operands, out, *tiles, C=call.constants_of_streams())
    return out


def mix_gradients(
    grad: Tensor,
    states: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    wants_states: bool,
    wants_weight: bool,
    wants_bias: bool,
    state_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `mix` from grad (J, N, De), whose streams are contiguous, in fp32; None for those not wanted.

    -> grad_states (E, N, De) in state_dtype, grad_weight (J, E), grad_bias (J,). What the relu let pass is computed again.
    """
    streams, layers = weight.shape
    wants_sums = wants_weight or wants_bias
    grad_states = grad.new_empty(layers, *states[0].shape, dtype=state_dtype) if wants_states else None
    sums = None
    if grad.numel() == 0:
        sums = grad.new_zeros(streams, layers + 1, dtype=torch.float32)
        grad_states = None if grad_states is None else grad_states.zero_()
    elif not wants_sums:
        _state_gradients(grad, states, weight, bias, grad_states)
    elif grad_states is None or (call := _Call("mix_gradients", states, weight, bias)).config is None:
        sums = _sums(_Call("mix_weight_gradients", states, weight, bias), grad, None)
        if grad_states is not None:
            _state_gradients(grad, states, weight, bias, grad_states)
    else:
        sums = _sums(call, grad, grad_states)
    return grad_states, sums[:, :-1] if wants_weight else None, sums[:, -1] if wants_bias else None


def _state_gradients(grad, states, weight, bias, grad_states):
    call = _Call("mix_state_gradients", states, weight, bias)
    grid, tiles = call.tiles()
    arguments = (grad, grad.stride(0), call.operands, grad_states, *tiles)
    launch(mix_state_gradients_kernel, grid, call.config, *arguments, C=call.constants_of_streams())


def _sums(call, grad, grad_states):
    """-> gradients of weight and bias (J, E + 1), the bias's last; those of the states into grad_states, where there is one."""
    (ranges,), tiles = call.tiles(max(1, _RANGES // call.stream_tiles), _SHORTEST_RANGE)
    partials = grad.new_empty(ranges, call.streams, call.constants.LAYERS + 1, dtype=torch.float32)
    arguments = (grad, grad.stride(0), call.operands, partials, grad_states, *tiles)
    constants = call.constants._replace(STATES=grad_states is not None)
    launch(mix_weight_gradients_kernel, (call.stream_tiles, ranges), call.config, *arguments, C=constants)
    return partials.sum(0)


class _Tiles(NamedTuple):
    """How a launch shares out numbers: of a state, streams, tiles, tiles for each program."""

    size: int
    streams: int
    tiles: int
    each: int


class _Call:
    """What the launches share: configuration (None: there is none, nor anything else), operands, constants, and how the numbers are
    shared out."""

    def __init__(self, kernel, states, weight, bias):
        streams, layers = weight.shape
        name, dtype = architecture(weight.device), weight.dtype
        self.size, self.streams = states[0].numel(), streams
        aligned = all(state.data_ptr() % 16 == 0 for state in states)
        # Streams of another size start anywhere, so that gradients are read one number at a time.
        whole = aligned and self.size % 16 == 0
        self.config = mix_config(kernel, architecture=name, dtype=dtype, layers=layers, streams=streams, aligned=whole)
        if self.config is None:
            return
        self.stream_tiles = triton.cdiv(streams, self.config.block_m)
        self.operands = Operands(tuple(states), weight, *weight.stride(), bias, 0 if bias is None else bias.stride(0))
        self.constants = Constants(
            LAYERS=layers,
            BLOCK_E=max(16, triton.next_power_of_2(layers)),
            BLOCK_M=self.config.block_m,
            BLOCK_N=self.config.block_n,
            ALIGNED=aligned,
            PRECISION=dot_precision(dtype, name),
        )

    def constants_of_streams(self):
        """Those of kernels whose programs work on all streams."""
        return self.constants._replace(ONE_STREAM_TILE=self.stream_tiles == 1)

    def tiles(self, programs=None, fewest=1):
        """-> grid, _Tiles."""
        tiles = triton.cdiv(self.size, self.config.block_n)
        if programs is None:
            each = min(_TILES_EACH, triton.cdiv(tiles, _PROGRAMS * multiprocessors(self.operands.weight.device)))
        else:
            each = max(fewest, triton.cdiv(tiles, programs))
        return (triton.cdiv(tiles, each),), _Tiles(self.size, self.streams, tiles, each)
