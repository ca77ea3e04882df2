"""The layer mix in Triton: relu(sum_e weight[j, e] h_e + bias[j]) for all streams j in one pass over the E encoder states,
and its gradients.

A state is X = N * De numbers in a row, a stream too. A program works on tiles of BLOCK_N of them: one [BLOCK_E, BLOCK_N]
tile holds all states there, read once, through a vector of their addresses.
"""

import torch
import triton
import triton.language as tl

from ..launch import architecture, dot_precision, launch
from .launch_table import mix_config

# A program's first tile costs it the addresses (two selects for each state) and the weight: it does more than one, as many
# as leave enough programs to fill the largest GPUs.
_TILES_EACH = 8
_PROGRAMS = 1024
# Programs of the weight gradients, each with its own sums: few enough that adding those up costs little beside reading
# the gradient, and one whole wave where 132 multiprocessors hold 3 each.
_RANGES = 396
_SHORTEST_RANGE = 16  # tiles


@triton.jit
def state_pointers(states, LAYERS: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr):
    """The addresses of the states as one vector [BLOCK_E], null past the last.

    ALIGNED: all are multiples of 16 bytes, without which the compiler reads one number at a time.
    """
    index = tl.arange(0, BLOCK_E)
    addresses = tl.zeros([BLOCK_E], dtype=tl.int64)
    for e in tl.static_range(LAYERS):
        addresses = tl.where(index == e, states[e].to(tl.int64), addresses)
    pointers = addresses.to(states[0].dtype)
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def load_states(pointers, x, X, LAYERS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Numbers x of all states [BLOCK_E, BLOCK_N], zero past the last state and past X."""
    used = (tl.arange(0, BLOCK_E) < LAYERS)[:, None] & (x < X)[None, :]
    return tl.load(pointers[:, None] + x[None, :], mask=used, other=0.0)


@triton.jit
def load_weight(
    weight, row_stride, column_stride, bias, bias_stride, j, J, LAYERS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Rows j of the weight [BLOCK_M, BLOCK_E] and of the bias [BLOCK_M, 1] in fp32, zero past J and the last state."""
    e = tl.arange(0, BLOCK_E)
    pointers = weight + j[:, None] * row_stride + e[None, :] * column_stride
    tile = tl.load(pointers, mask=(j < J)[:, None] & (e < LAYERS)[None, :], other=0.0)
    if bias is not None:
        shift = tl.load(bias + j * bias_stride, mask=j < J, other=0.0).to(tl.float32)[:, None]
    else:
        shift = tl.zeros([j.shape[0], 1], dtype=tl.float32)
    return tile, shift


@triton.jit
def mix_kernel(
    states,
    weight,
    weight_row,
    weight_column,
    bias,
    bias_stride,
    out,
    X,
    J,
    tiles,
    tiles_each,
    LAYERS: tl.constexpr,
    ONE_STREAM_TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of all streams. Grid: (cdiv(tiles, tiles_each),)."""
    pointers = state_pointers(states, LAYERS, BLOCK_E, ALIGNED)
    size = tl.cast(X, tl.int64)
    j = tl.arange(0, BLOCK_M)
    if ONE_STREAM_TILE:
        tile_weight, shift = load_weight(weight, weight_row, weight_column, bias, bias_stride, j, J, LAYERS, BLOCK_E)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, min(first + tiles_each, tiles)):
        x = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        h = load_states(pointers, x, X, LAYERS, BLOCK_E)
        for j_tile in range(1 if ONE_STREAM_TILE else tl.cdiv(J, BLOCK_M)):
            rows = j_tile * BLOCK_M + j
            if not ONE_STREAM_TILE:
                tile_weight, shift = load_weight(
                    weight, weight_row, weight_column, bias, bias_stride, rows, J, LAYERS, BLOCK_E
                )
            mixed = tl.dot(tile_weight, h, input_precision=PRECISION) + shift
            mixed = tl.maximum(mixed, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(
                out + rows[:, None] * size + x[None, :],
                mixed.to(out.dtype.element_ty),
                mask=(rows < J)[:, None] & (x < X)[None, :],
            )


@triton.jit
def masked_gradient(grad, stream_stride, tile_weight, shift, h, j, x, J, X, PRECISION: tl.constexpr):
    """The gradient [BLOCK_M, BLOCK_N] of what the relu was given: that of its result where it let numbers pass."""
    used = (j < J)[:, None] & (x < X)[None, :]
    tile = tl.load(grad + tl.cast(j, tl.int64)[:, None] * stream_stride + x[None, :], mask=used, other=0.0)
    mixed = tl.dot(tile_weight, h, input_precision=PRECISION)
    # As torch's relu, a NaN lets its gradient pass. Adding the shift instead would cost an instruction for each number.
    return tl.where(mixed <= -shift, 0.0, tile)


@triton.jit
def mix_weight_gradients_kernel(
    grad,
    stream_stride,
    states,
    weight,
    weight_row,
    weight_column,
    bias,
    bias_stride,
    partials,
    X,
    J,
    tiles,
    tiles_each,
    LAYERS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partials[range, j] = the sums over one range of tiles for the E weights and, last, the bias of stream j.

    Grid: (cdiv(J, BLOCK_M), ranges). Tiles of streams of one range are neighbours: all but the first find the states in L2.
    """
    pointers = state_pointers(states, LAYERS, BLOCK_E, ALIGNED)
    j = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_weight, shift = load_weight(weight, weight_row, weight_column, bias, bias_stride, j, J, LAYERS, BLOCK_E)
    weight_sums = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    # In half precision tensor cores sum faster: 229 instructions for a 64 x 64 tile on sm_90, 291 with tl.sum.
    SUM_BY_DOT: tl.constexpr = weight.dtype.element_ty != tl.float32
    if SUM_BY_DOT:
        bias_sums = tl.zeros([BLOCK_M, 16], dtype=tl.float32)
        ones = tl.full([BLOCK_N, 16], 1.0, dtype=weight.dtype.element_ty)
    else:
        bias_sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    first = tl.program_id(1) * tiles_each
    for tile in range(first, min(first + tiles_each, tiles)):
        x = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        h = load_states(pointers, x, X, LAYERS, BLOCK_E)
        tile_grad = masked_gradient(grad, stream_stride, tile_weight, shift, h, j, x, J, X, PRECISION)
        weight_sums += tl.dot(tile_grad, tl.trans(h), input_precision=PRECISION)
        if SUM_BY_DOT:
            bias_sums += tl.dot(tile_grad, ones)
        else:
            bias_sums += tl.sum(tile_grad, axis=1)
    e = tl.arange(0, BLOCK_E)
    partials += (tl.cast(tl.program_id(1), tl.int64) * J + j) * (LAYERS + 1)
    tl.store(partials[:, None] + e[None, :], weight_sums, mask=(j < J)[:, None] & (e < LAYERS)[None, :])
    if SUM_BY_DOT:
        column = tl.arange(0, 16)[None, :]
        tl.store(partials[:, None] + LAYERS + column, bias_sums, mask=(j < J)[:, None] & (column == 0))
    else:
        tl.store(partials + LAYERS, bias_sums, mask=j < J)


@triton.jit
def mix_state_gradients_kernel(
    grad,
    stream_stride,
    states,
    weight,
    weight_row,
    weight_column,
    bias,
    bias_stride,
    grad_states,
    X,
    J,
    tiles,
    tiles_each,
    LAYERS: tl.constexpr,
    ONE_STREAM_TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tiles of grad_states (E, X) = weight^T times the gradient behind the relu. Grid: (cdiv(tiles, tiles_each),)."""
    pointers = state_pointers(states, LAYERS, BLOCK_E, ALIGNED)
    size = tl.cast(X, tl.int64)
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_M)
    if ONE_STREAM_TILE:
        tile_weight, shift = load_weight(weight, weight_row, weight_column, bias, bias_stride, j, J, LAYERS, BLOCK_E)
    first = tl.program_id(0) * tiles_each
    for tile in range(first, min(first + tiles_each, tiles)):
        x = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        h = load_states(pointers, x, X, LAYERS, BLOCK_E)
        sums = tl.zeros([BLOCK_E, BLOCK_N], dtype=tl.float32)
        for j_tile in range(1 if ONE_STREAM_TILE else tl.cdiv(J, BLOCK_M)):
            rows = j_tile * BLOCK_M + j
            if not ONE_STREAM_TILE:
                tile_weight, shift = load_weight(
                    weight, weight_row, weight_column, bias, bias_stride, rows, J, LAYERS, BLOCK_E
                )
            tile_grad = masked_gradient(grad, stream_stride, tile_weight, shift, h, rows, x, J, X, PRECISION)
            sums += tl.dot(tl.trans(tile_weight), tile_grad, input_precision=PRECISION)
        used = (e < LAYERS)[:, None] & (x < X)[None, :]
        tl.store(grad_states + e[:, None] * size + x[None, :], sums, mask=used)


def mix(states, weight, bias, out=None):
    """The mix of E contiguous tensors (N, De) with weight (J, E) and bias (J,) or None -> (J, N, De), or into `out`."""
    if out is None:
        out = states[0].new_empty(weight.shape[0], *states[0].shape)
    if out.numel() == 0:
        return out
    call = _Call("mix", states, weight, bias)
    grid, tiles = call.tiles()
    launch(
        mix_kernel,
        grid,
        call.config,
        *call.operands,
        out,
        *tiles,
        ONE_STREAM_TILE=call.stream_tiles == 1,
        **call.constants,
    )
    return out


def mix_gradients(grad, states, weight, bias, wants_states, wants_weight, wants_bias):
    """Gradients of `mix` from grad (J, N, De), whose streams are contiguous, in fp32; None for those not wanted.

    -> grad_states (E, N, De), grad_weight (J, E), grad_bias (J,). What the relu let pass is computed again.
    """
    grad_states = grad_weight = grad_bias = None
    if wants_states:
        grad_states = _state_gradients(grad, states, weight, bias)
    if wants_weight or wants_bias:
        sums = _weight_gradients(grad, states, weight, bias)
        grad_weight = sums[:, :-1] if wants_weight else None
        grad_bias = sums[:, -1] if wants_bias else None
    return grad_states, grad_weight, grad_bias


def _state_gradients(grad, states, weight, bias):
    shape = (len(states), *states[0].shape)
    if grad.numel() == 0:
        return grad.new_zeros(shape, dtype=torch.float32)
    grad_states = grad.new_empty(shape, dtype=torch.float32)
    call = _Call("mix_state_gradients", states, weight, bias)
    grid, tiles = call.tiles()
    arguments = (grad, grad.stride(0), *call.operands, grad_states, *tiles)
    launch(
        mix_state_gradients_kernel,
        grid,
        call.config,
        *arguments,
        ONE_STREAM_TILE=call.stream_tiles == 1,
        **call.constants,
    )
    return grad_states


def _weight_gradients(grad, states, weight, bias):
    """-> (J, E + 1), the bias's last."""
    streams, layers = weight.shape
    if grad.numel() == 0:
        return grad.new_zeros(streams, layers + 1, dtype=torch.float32)
    call = _Call("mix_weight_gradients", states, weight, bias)
    (ranges,), tiles = call.tiles(max(1, _RANGES // call.stream_tiles), _SHORTEST_RANGE)
    partials = grad.new_empty(ranges, streams, layers + 1, dtype=torch.float32)
    arguments = (grad, grad.stride(0), *call.operands, partials, *tiles)
    launch(mix_weight_gradients_kernel, (call.stream_tiles, ranges), call.config, *arguments, **call.constants)
    return partials.sum(0)


class _Call:
    """What the three launches share: configuration, operands, constants, and how the numbers are shared out."""

    def __init__(self, kernel, states, weight, bias):
        streams, layers = weight.shape
        name, dtype = architecture(weight.device), weight.dtype
        self.config = mix_config(kernel, architecture=name, dtype=dtype, layers=layers, streams=streams)
        self.stream_tiles = triton.cdiv(streams, self.config.block_m)
        self.size, self.streams = states[0].numel(), streams
        self.operands = (tuple(states), weight, *weight.stride(), bias, 0 if bias is None else bias.stride(0))
        self.constants = dict(
            LAYERS=layers,
            BLOCK_E=max(16, triton.next_power_of_2(layers)),
            BLOCK_M=self.config.block_m,
            BLOCK_N=self.config.block_n,
            ALIGNED=all(state.data_ptr() % 16 == 0 for state in states),
            PRECISION=dot_precision(dtype, name),
        )

    def tiles(self, programs=None, fewest=1):
        """-> grid, (X, J, tiles, tiles for each program)."""
        tiles = triton.cdiv(self.size, self.config.block_n)
        if programs is None:
            each = min(_TILES_EACH, max(1, tiles // _PROGRAMS))
        else:
            each = max(fewest, triton.cdiv(tiles, programs))
        return (triton.cdiv(tiles, each),), (self.size, self.streams, tiles, each)
