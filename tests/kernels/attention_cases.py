"""Calls of adaptive_fusion_attention: random inputs and masks, and one whole random call a seed."""

import dataclasses
import random
from itertools import pairwise

import torch

NAMES = ("q", "k", "v", "cross_k", "cross_v", "gate")
# Around multiples of 16 and 32, the tiles of an interpreted kernel, and primes.
LENGTHS = (0, 1, 2, 3, 5, 7, 13, 15, 16, 17, 23, 31, 32, 33, 37, 47, 48, 49, 53, 63, 64, 65, 67)
WIDTHS = (16, 16, 40, 59, 64, 80, 96, 128, 256, 1, 8, 17, 33, 127)
MASKS = ("left", "right", "holes", "random", "tiles", "one_row", "nothing", "everything")
LAYOUTS = ("contiguous", "transposed", "fused", "padded", "strided", "columns", "expanded")
MOST_TILE_PAIRS = 36  # of 16 x 16, over all heads: an interpreter takes milliseconds for each


def random_inputs(batch, heads, kv_heads, queries, keys, cross_keys, width, gate_shape, dtype, gate_dtype):
    """The six tensors of a call, always the same ones."""
    shapes = shapes_of(batch, heads, kv_heads, queries, keys, cross_keys, width)
    return random_tensors(0, shapes, gate_shape, dtype, gate_dtype)


def shapes_of(batch, heads, kv_heads, queries, keys, cross_keys, width):
    """Of q, k, v, cross_k and cross_v."""
    query, key, cross_key = (
        (batch, *rest, width) for rest in ((heads, queries), (kv_heads, keys), (kv_heads, cross_keys))
    )
    return [query, key, key, cross_key, cross_key]


def random_tensors(number, shapes, gate_shape, dtype, gate_dtype):
    generator = torch.Generator().manual_seed(number)
    inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return [*inputs, torch.randn(gate_shape, generator=generator).to(gate_dtype).requires_grad_()]


def gate_shapes(batch, heads, queries):
    return [(1,), (heads,), (batch, 1, queries), (batch, heads, queries)]


def random_mask(shape, number, keep=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(number)) < keep


def mask(pattern, batch, length, number=0):
    """(batch, length) bool, True = attend, by one of the patterns of MASKS; every row another amount."""
    choose = random.Random(number)
    result = torch.ones(batch, length, dtype=torch.bool)
    for row in result:
        amount = choose.randint(0, length)
        if pattern == "left":
            row[:amount] = False
        elif pattern == "right":
            row[length - amount :] = False
        elif pattern == "holes":
            row[amount // 2 :: 3] = False
        elif pattern == "tiles":
            for start in range(0, length, 16):
                row[start : start + 16] = choose.random() < 0.5
    if pattern == "random":
        return random_mask((batch, length), number)
    if pattern == "one_row" and batch:
        result[choose.randrange(batch)] = False
    return result & (pattern != "nothing")


def laid_out(tensors, layout):
    """The six inputs, same values, in other strides."""
    q, k, v, cross_k, cross_v, gate = tensors
    if layout == "transposed":  # (B, S, H, D) as a projection makes it
        return [*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:5]), gate]
    if layout == "fused" and q.shape[2] == k.shape[2]:  # slices of one tensor for q, k and v and one for the cross pair
        return [*_slices_of_one(q, k, v), *_slices_of_one(cross_k, cross_v), gate]
    if layout == "padded":
        return [*(_inside(x, (*x.shape[:2], x.shape[2] + 1, x.shape[3] + 3)) for x in tensors[:5]), gate]
    if layout == "columns":  # the unit stride is that of the positions
        return [*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors[:5]), gate]
    if layout == "strided":  # no unit stride at all
        return [torch.stack([x, torch.full_like(x, 9.0)], dim=-1)[..., 0] for x in tensors]
    if layout == "expanded":  # one cross pair, and one gate, for the whole batch
        shared = [x[:1].expand(x.shape) for x in (cross_k, cross_v)]
        return [q, k, v, *shared, gate[:1].expand(gate.shape)]
    return tensors


def _slices_of_one(*tensors):
    wide = torch.cat([x.transpose(1, 2).flatten(2) for x in tensors], dim=2)  # (B, S, all heads * D)
    parts = wide.split([x.shape[1] * x.shape[3] for x in tensors], dim=2)
    return [part.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2) for part, x in zip(parts, tensors, strict=True)]


def _inside(x, shape):
    wide = torch.full(shape, 9.0, dtype=x.dtype)
    wide[..., : x.shape[2], : x.shape[3]] = x
    return wide[..., : x.shape[2], : x.shape[3]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call; its masks by pattern, the bounds of its packed sequences by value."""

    seed: int
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    cross_keys: int
    width: int
    dtype: torch.dtype
    gate_shape: tuple
    gate_dtype: torch.dtype
    gate_zero: bool
    layout: str
    wanted: tuple
    options: dict
    key_mask: str | None
    cross_mask: str | None
    key_span: (
        tuple | None
    )  # (begin, end) of every batch row; of the cross keys those of rows that share count for nothing
    cross_span: tuple | None
    cuts: tuple | None
    cross_cuts: tuple | None
    sharing: int  # batch rows that read one row of the cross keys

    def inputs(self):
        sizes = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.cross_keys, self.width)
        tensors = random_tensors(self.seed, shapes_of(*sizes), self.gate_shape, self.dtype, self.gate_dtype)
        tensors = [x.detach() for x in tensors]
        tensors[3:5] = (x[:: self.sharing].contiguous() for x in tensors[3:5])
        if self.gate_zero:
            tensors[5].zero_()
        tensors = [x.detach() for x in laid_out(tensors, self.layout)]
        return [x.requires_grad_(name in self.wanted) for name, x in zip(NAMES, tensors, strict=True)]

    def keywords(self):
        """The keyword arguments of the call, tensors among them."""
        result = dict(self.options)
        if self.key_mask:
            result["key_mask"] = mask(self.key_mask, self.batch, self.keys, self.seed)
        if self.cross_mask:
            result["cross_mask"] = mask(self.cross_mask, self.batch // self.sharing, self.cross_keys, self.seed + 1)
        if self.key_span:
            result["key_span"] = torch.tensor(self.key_span, dtype=torch.int32)
        if self.cross_span:
            result["cross_span"] = torch.tensor(self.cross_span[:: self.sharing], dtype=torch.int32)
        if self.cuts:
            result["cu_seqlens"] = torch.tensor(self.cuts, dtype=torch.int32)
            result["cross_cu_seqlens"] = torch.tensor(self.cross_cuts, dtype=torch.int32)
        return result

    def unseen(self):
        """Keys that no query attends to: (B, N) of the keys, (B / sharing, T) of the cross keys."""
        keywords = self.keywords()
        key_mask = keywords.get("key_mask", torch.ones(self.batch, self.keys, dtype=torch.bool))
        cross_mask = keywords.get(
            "cross_mask", torch.ones(self.batch // self.sharing, self.cross_keys, dtype=torch.bool)
        )
        for seen, name in ((key_mask, "key_span"), (cross_mask, "cross_span")):
            for row, span in zip(seen, keywords.get(name, ()), strict=name in keywords):
                row &= inside(span, len(row))
        if self.cuts:
            for own, cross in zip(pairwise(self.cuts), pairwise(self.cross_cuts), strict=True):
                cross_mask[:, slice(*cross)] &= own[0] < own[1]
            return ~key_mask, ~cross_mask
        start = torch.as_tensor(keywords.get("query_start", self.keys - self.queries)).reshape(-1, 1, 1)
        query, key = start + torch.arange(self.queries)[:, None], torch.arange(self.keys)
        visible = torch.ones(1, self.queries, self.keys, dtype=torch.bool)
        if self.options["causal"]:
            visible = key <= query
            if "window" in self.options:
                visible &= query - key < self.options["window"]
        return ~(key_mask & visible.any(dim=1)), ~(cross_mask & (self.queries > 0))

    def tile_pairs(self):
        rows, columns = -(-self.queries // 16), -(-self.keys // 16) + -(-self.cross_keys // 16)
        return self.batch * self.heads * rows * columns


def draw(seed, dtypes, accept=lambda case: True):
    """The random call of a seed: the first of its stream that is small enough, and that `accept` takes."""
    choose = random.Random(seed)
    while True:
        case = _draw(seed, choose, dtypes)
        if case.tile_pairs() <= MOST_TILE_PAIRS and accept(case):
            return case


def inside(span, length):
    """Which of `length` keys lie in a span: (length,) bool."""
    key = torch.arange(length)
    return (key >= span[0]) & (key < span[1])


def random_spans(choose, rows, length):
    """(begin, end) of every row: mostly of padding on one side, some past the end, some of nothing."""
    spans = []
    for _ in range(rows):
        begin, end = sorted((choose.randint(0, length), choose.randint(0, length)))
        forms = (
            (begin, length),
            (begin, 2**30),
            (0, end),
            (begin, end),
            (0, length),
            (begin, begin),
            (-3, end),
            (end, begin),
        )
        spans.append(choose.choice(forms))
    return tuple(spans)


def _draw(seed, choose, dtypes):
    packed = choose.random() < 0.25
    batch = 1 if packed else choose.choice((1, 1, 2, 3))
    kv_heads = choose.choice((1, 1, 2, 3))
    heads = kv_heads * choose.choice((1, 1, 2, 3, 4))
    queries, cross_keys = choose.choice(LENGTHS), choose.choice(LENGTHS)
    keys = queries if packed or choose.random() < 0.5 else queries + choose.choice(LENGTHS)
    dtype = dtypes[choose.randrange(6) % len(dtypes)]
    options = {"causal": choose.random() < 0.75, "return_lse": choose.random() < 0.4}
    if options["causal"] and choose.random() < 0.35:
        options["window"] = choose.choice((1, 2, 3, 15, 16, 17, 24, 33, 40, 50, 200))
    if not packed and choose.random() < 0.4:
        starts, kind = [choose.randint(0, keys + 3) for _ in range(batch)], choose.choice((torch.int32, torch.int64))
        forms = (starts[0], torch.tensor(starts[0], dtype=kind), torch.tensor(starts, dtype=kind))
        options["query_start"] = choose.choice(forms)
    if choose.random() < 0.25:
        options["softcap"] = choose.choice((0.5, 4.0, 50.0))
    if choose.random() < 0.3:
        options["scale"] = choose.choice((0.0, -0.3, 0.03, 0.5, 2.0))
    count = choose.randint(1, 5)
    wanted = choose.choice((NAMES, NAMES, NAMES, tuple(name for name in NAMES if choose.random() < 0.5)))
    case = Case(
        seed=seed,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        cross_keys=cross_keys,
        width=choose.choice(WIDTHS),
        dtype=dtype,
        gate_shape=choose.choice(gate_shapes(batch, heads, queries)),
        gate_dtype=choose.choice((torch.float32, dtype)),
        gate_zero=choose.random() < 0.15,
        layout=choose.choice(LAYOUTS),
        wanted=wanted,
        options=options,
        key_mask=choose.choice((None, None, None, None, None, None, *MASKS)),
        cross_mask=choose.choice((None, None, None, None, None, None, *MASKS)),
        key_span=None,
        cross_span=None,
        cuts=_cuts(choose, queries, count) if packed else None,
        cross_cuts=_cuts(choose, cross_keys, count) if packed else None,
        sharing=choose.choice([count for count in (1, 1, 2, 3) if batch % count == 0]),
    )
    return case if packed else _with_spans(case)


def _with_spans(case):
    choose = random.Random(f"spans {case.seed}")  # apart: a seed's call stays what it was before there were spans
    chosen = {}
    for name, length in (("key_span", case.keys), ("cross_span", case.cross_keys)):
        if choose.random() < 0.25:
            chosen[name] = random_spans(choose, case.batch, length)
    return dataclasses.replace(case, **chosen)


def _cuts(choose, total, count):
    """Bounds of `count` packed sequences, empty ones among them."""
    return (0, *sorted(choose.choice((0, total, choose.randint(0, total))) for _ in range(count - 1)), total)
