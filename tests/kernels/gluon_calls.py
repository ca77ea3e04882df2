"""Random calls for the Gluon kernels on a CPU."""

import random

import torch

LENGTHS = (1, 2, 63, 64, 65, 100, 127, 128, 129, 191, 200, 256, 257, 300, 384, 389)


def inside(span, length):
    """(B, length) bool: what a span leaves."""
    o_key = torch.arange(length)
    return (o_key >= span[:, :1]) & (o_key < span[:, 1:])


def drawn(seed, cases):
    """-> inputs, options of `check` of the random call of a seed; keys that no query sees hold NaN."""
    choose = random.Random(seed)
    batch, kv_heads, group = choose.choice((1, 1, 2)), choose.choice((1, 1, 2)), choose.choice((1, 1, 2, 3))
    queries, cross_keys = choose.choice(LENGTHS), choose.choice((0, *LENGTHS))
    keys = queries if choose.random() < 0.5 else queries + choose.choice(LENGTHS)
    sharing = choose.choice((1, batch))
    gate_shape = choose.choice(cases.gate_shapes(batch, kv_heads * group, queries))
    shapes = cases.shapes_of(batch, kv_heads * group, kv_heads, queries, keys, cross_keys, choose.choice((64, 128)))
    dtype = choose.choice((torch.float16, torch.bfloat16))
    inputs = [x.detach() for x in cases.random_tensors(seed, shapes, gate_shape, dtype, torch.float32)]
    inputs[3:5] = (x[::sharing].contiguous() for x in inputs[3:5])
    if choose.random() < 0.5:  # as a model's projections lie
        inputs[:5] = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:5])
    options = {"causal": choose.random() < 0.75, "seed": seed}
    if options["causal"] and choose.random() < 0.4:
        options["window"] = choose.choice((1, 2, 64, 100, 128, 150, 1000))
    if choose.random() < 0.3:
        options["softcap"] = choose.choice((0.5, 4.0, 50.0))
    if choose.random() < 0.4:
        starts = [choose.randint(-queries - 3, keys + 3) for _ in range(batch)]
        options["query_start"] = choose.choice((max(starts[0], 0), torch.tensor(starts)))
    if choose.random() < 0.2:
        options["scale"] = choose.choice((0.03, 0.5))
    for name, rows, length in (("key_span", batch, keys), ("cross_span", batch // sharing, cross_keys)):
        if choose.random() < 0.5:
            ends = [sorted((choose.randint(-2, length + 2), choose.randint(-2, length + 2))) for _ in range(rows)]
            options[name] = torch.tensor([choose.choice((pair, [0, length])) for pair in ends], dtype=torch.int32)
    _fill_unseen(inputs, options)
    return inputs, options


def _fill_unseen(inputs, options):
    q, k, v, cross_k, cross_v, _ = inputs
    start = torch.as_tensor(options.get("query_start", k.shape[2] - q.shape[2])).reshape(-1, 1, 1)
    query, key = start + torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = torch.ones(1, 1, k.shape[2], dtype=torch.bool)
    if options["causal"]:
        seen = (key <= query) & (query - key < options.get("window", 2**30))
    seen = seen.any(1).expand(q.shape[0], -1)
    if "key_span" in options:
        seen = seen & inside(options["key_span"], k.shape[2])
    for x in (k, v):
        x.masked_fill_(~seen[:, None, :, None], torch.nan)
    if "cross_span" in options:
        for x in (cross_k, cross_v):
            x.masked_fill_(~inside(options["cross_span"], x.shape[2])[:, None, :, None], torch.nan)


def inputs_of(cases, *sizes, gate=(1,), dtype=torch.float16):
    return [x.detach() for x in cases.random_inputs(*sizes, gate, dtype, torch.float32)]
