"""Calls of the layer-wise aligner's operators: random arguments, other strides for them, and one whole random call a seed."""

import dataclasses
import random

import torch

from layalign.kernels.layerwise_aligner import (
    cross_key_values,
    cross_key_values_reference,
    layer_mix,
    layer_mix_reference,
    stream_linear,
    stream_linear_reference,
)

NAMES = {
    "layer_mix": ("hidden_states", "weight", "bias"),
    "stream_linear": ("streams", "weight", "bias"),
    "cross_key_values": (
        "hidden_states",
        "mix_weight",
        "mix_bias",
        "proj_weight",
        "proj_bias",
        "key_weights",
        "value_weights",
        "key_biases",
        "value_biases",
    ),
}
OPERATORS = {
    "layer_mix": (layer_mix, layer_mix_reference),
    "stream_linear": (stream_linear, stream_linear_reference),
    "cross_key_values": (cross_key_values, cross_key_values_reference),
}
# Around multiples of 16 and 32, the tiles of an interpreted kernel, and primes.
LENGTHS = (0, 1, 2, 3, 7, 13, 15, 16, 17, 23, 31, 32, 33, 37)
WIDTHS = (1, 3, 8, 15, 16, 17, 24, 32, 33, 40, 59)
LAYOUTS = ("contiguous", "contiguous", "columns", "padded", "strided", "expanded")
# In half precision, eager's error of a gradient that is a few numbers may be small by luck: the oracle takes more of them.
FEWEST = 16
MOST_TILES = 40  # products of tiles in a forward call: an interpreter takes milliseconds for each


class Draw:
    """Random leaves of one dtype and call."""

    def __init__(self, dtype=torch.float64, number=0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(number)

    def __call__(self, *shape, scale=1.0):
        return (scale * torch.randn(shape, generator=self.generator)).to(self.dtype).requires_grad_()

    def layers(self, count, *shape, stacked, scale=1.0):
        if stacked:
            return self(count, *shape, scale=scale)
        return [self(*shape, scale=scale) for _ in range(count)]


def mix_inputs(draw, encoder_layers=3, streams=4, batch=2, length=5, width=8, bias=True, stacked=False):
    """The arguments of layer_mix."""
    states = draw.layers(encoder_layers, batch, length, width, stacked=stacked)
    return [states, draw(streams, encoder_layers, scale=encoder_layers**-0.5), draw(streams) if bias else None]


def linear_inputs(draw, streams=4, batch=2, length=5, width=8, out_width=6, bias=True, shared=False):
    """The arguments of stream_linear."""
    leading = () if shared else (streams,)
    weight = draw(*leading, out_width, width, scale=width**-0.5)
    return [draw(streams, batch, length, width), weight, draw(*leading, out_width) if bias else None]


CROSS_SIZES = dict(batch=2, length=5, encoder_layers=3, encoder_width=8, llm_layers=2, llm_width=6, kv=4)


def cross_inputs(draw, bias=True, stacked=False, projected=True, **sizes):
    """The nine tensor arguments of cross_key_values. bias: True, False or the names of those there are; sizes: of CROSS_SIZES."""
    batch, length, encoder_layers, encoder_width, llm_layers, llm_width, kv = (CROSS_SIZES | sizes).values()
    names = {True: NAMES["cross_key_values"], False: ()}.get(bias, bias)
    streams, width = 2 * llm_layers, llm_width if projected else encoder_width
    projections = [draw.layers(llm_layers, kv, width, stacked=stacked, scale=width**-0.5) for _ in range(2)]
    biases = [
        draw.layers(llm_layers, kv, stacked=stacked) if name in names else None
        for name in ("key_biases", "value_biases")
    ]
    return [
        draw.layers(encoder_layers, batch, length, encoder_width, stacked=stacked),
        draw(streams, encoder_layers, scale=encoder_layers**-0.5),
        draw(streams) if "mix_bias" in names else None,
        draw(llm_width, encoder_width, scale=encoder_width**-0.5) if projected else None,
        draw(llm_width) if projected and "proj_bias" in names else None,
        *projections,
        *biases,
    ]


def items(argument):
    return argument if isinstance(argument, (list, tuple)) else [argument]


def leaves(arguments):
    return [x for argument in arguments for x in items(argument) if x is not None and x.requires_grad]


def wanting(arguments, wanted):
    """The same arguments, asking for the gradients of those at the indices `wanted` only."""
    for index, argument in enumerate(arguments):
        for tensor in items(argument):
            if tensor is not None:
                tensor.requires_grad_(index in wanted)
    return arguments


def laid_out(arguments, layout):
    """The same values in other strides, as leaves."""

    def move(x):
        return x if x is None else _moved(x.detach(), layout).requires_grad_(x.requires_grad)

    return [[move(x) for x in argument] if isinstance(argument, list) else move(argument) for argument in arguments]


def _moved(x, layout):
    if layout == "columns" and x.dim() > 1:  # a transposed weight
        return x.mT.contiguous().mT
    if layout == "padded":  # a part of a larger tensor, at an odd address
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), 9.0)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "strided":  # no unit stride at all
        return torch.stack([x, torch.full_like(x, 9.0)], dim=-1)[..., 0]
    if layout == "expanded" and x.dim() > 2 and x.numel():  # one row of the batch, or one layer's weight, for all
        return (x[:, :1] if x.dim() == 4 else x[:1]).expand(x.shape)
    return x


MAKE = {"layer_mix": mix_inputs, "stream_linear": linear_inputs, "cross_key_values": cross_inputs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call."""

    seed: int
    operator: str
    dtype: torch.dtype
    sizes: dict
    layout: str
    wanted: tuple
    options: dict

    def inputs(self):
        arguments = MAKE[self.operator](Draw(self.dtype, self.seed), **self.sizes)
        arguments = wanting(laid_out(arguments, self.layout), self.wanted)
        for x in leaves(arguments):
            x.requires_grad_(self.dtype == torch.float32 or x.numel() >= FEWEST)
        return arguments

    def functions(self):
        """-> the operator, its reference"""
        return OPERATORS[self.operator]

    def tiles(self):
        """Products of tiles, 16 x 16 by 16 x 32, of a forward call."""
        sizes, tokens = self.sizes, self.sizes["batch"] * self.sizes["length"]

        def count(rows, inner, columns):
            return -(-rows // 16) * -(-inner // 16) * -(-columns // 32)

        if self.operator == "layer_mix":
            return count(sizes["streams"], sizes["encoder_layers"], tokens * sizes["width"])
        if self.operator == "stream_linear":
            return sizes["streams"] * count(tokens, sizes["width"], sizes["out_width"])
        streams, width, llm_width, kv = (
            2 * sizes["llm_layers"],
            *(sizes[x] for x in ("encoder_width", "llm_width", "kv")),
        )
        mixed = count(streams, sizes["encoder_layers"], tokens * width)
        projected = count(max(tokens, kv), width, llm_width) + count(max(tokens, kv), llm_width, max(kv, width))
        return mixed + streams * projected

    def far_from_the_kink(self):
        """Whether no sum before the ReLU is so near 0 that rounding decides the gradient."""
        if self.operator == "stream_linear":
            return True
        states, weight, bias = (
            x if x is None else torch.stack(x) if isinstance(x, list) else x for x in self.inputs()[:3]
        )
        states, weight = states.detach().double(), weight.detach().double()
        sums = torch.einsum("je,ebtd->jbtd", weight, states)
        terms = torch.einsum("je,ebtd->jbtd", weight.abs(), states.abs())
        if bias is not None:
            shift = bias.detach().double()[:, None, None, None]
            sums, terms = sums + shift, terms + shift.abs()
        return not (sums.abs() < 8 * torch.finfo(torch.float32).eps * terms).any()


def draw(seed, dtypes, accept=lambda case: True):
    """The random call of a seed: the first of its stream that is small enough, and that `accept` takes."""
    choose = random.Random(seed)
    while True:
        case = _draw(seed, choose, dtypes)
        if case.tiles() <= MOST_TILES and accept(case) and case.far_from_the_kink():
            return case


def _draw(seed, choose, dtypes):
    operator = choose.choice(("layer_mix", "stream_linear", "cross_key_values", "cross_key_values"))

    def flip():
        return choose.random() < 0.5

    sizes = {"batch": choose.choice((1, 1, 2, 3)), "length": choose.choice(LENGTHS), "bias": flip()}
    options = {}
    if operator == "stream_linear":
        sizes |= {"streams": choose.choice((1, 2, 3, 5, 8)), "shared": flip()}
        sizes |= {"width": choose.choice(WIDTHS), "out_width": choose.choice(WIDTHS)}
    else:
        sizes |= {"encoder_layers": choose.choice((1, 2, 3, 5, 7, 12, 16, 17, 24, 33, 64)), "stacked": flip()}
    if operator == "layer_mix":
        sizes |= {"streams": choose.choice((1, 2, 4, 15, 16, 17, 33, 48, 64, 160)), "width": choose.choice(WIDTHS)}
    if operator == "cross_key_values":
        sizes |= {"llm_layers": choose.choice((1, 1, 2, 3, 5)), "encoder_width": choose.choice(WIDTHS)}
        sizes |= {"llm_width": choose.choice(WIDTHS), "kv": choose.choice(WIDTHS), "projected": choose.random() < 0.8}
        options = {"folded": choose.choice((None, True, False)), "layers_at_once": choose.choice((None, 1, 2, 3))}
        biases = ("mix_bias", "proj_bias", "key_biases", "value_biases")
        sizes["bias"] = choose.choice((True, False, tuple(name for name in biases if flip())))
    names = range(len(NAMES[operator]))
    return Case(
        seed=seed,
        operator=operator,
        dtype=dtypes[choose.randrange(6) % len(dtypes)],
        sizes=sizes,
        layout=choose.choice(LAYOUTS),
        wanted=choose.choice((tuple(names), tuple(names), tuple(i for i in names if flip()))),
        options=options,
    )
