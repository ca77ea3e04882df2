"""adaptive_fusion_attention by every backend against the oracle: outputs and all gradients, over shapes, masks, dtypes."""

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SHAPES = {
    "mha": (2, 4, 4, 17, 17, 11, 64),
    "gqa_9_3": (2, 9, 3, 37, 37, 13, 64),
    "mqa": (2, 5, 1, 31, 31, 7, 40),
    "prefill_chunk": (2, 4, 2, 13, 41, 16, 59),
    "decode": (3, 6, 2, 1, 53, 19, 128),
    "single_key": (1, 2, 1, 1, 1, 1, 16),
    "no_cross": (2, 4, 2, 9, 9, 0, 32),
    "no_queries": (2, 4, 2, 0, 5, 3, 32),
    "long": (1, 2, 1, 150, 150, 70, 64),
    "wide": (1, 2, 2, 33, 33, 65, 256),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(check_attention, random_inputs, shape, dtype):
    inputs = random_inputs(*shape, gate_shape=(1,), dtype=dtype, gate_dtype=torch.float32)
    check_attention(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding(check_attention, random_inputs, side, dtype):
    shape = (2, 6, 2, 29, 29, 12, 48)
    key_mask, cross_mask = torch.ones(2, 29, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)
    place = {"left": slice(None, 5), "right": slice(-5, None), "holes": slice(2, 9, 3)}[side]
    key_mask[1, place] = cross_mask[0, place] = False
    inputs = random_inputs(*shape, gate_shape=(6,), dtype=dtype, gate_dtype=dtype)
    options = {"key_mask": key_mask, "cross_mask": cross_mask}
    check_attention(inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_any_strides(check_attention, random_mask, dtype):
    batch, heads, kv_heads, length, cross, width = 2, 6, 2, 21, 10, 32
    generator = torch.Generator().manual_seed(3)

    def projected(
        heads, length
    ):  # as a model hands them over: (B, S, H, D) seen as (B, H, S, D), cut from a wider tensor
        wide = torch.randn(batch, length, heads, width + 8, generator=generator).to(dtype)
        return wide.transpose(1, 2)[..., :width].requires_grad_()

    inputs = [projected(heads, length), *[projected(kv_heads, length) for _ in range(2)]]
    one_cross = torch.randn(1, kv_heads, cross, width, generator=generator).to(dtype)
    inputs += [projected(kv_heads, cross), one_cross.expand(batch, -1, -1, -1).requires_grad_()]
    inputs += [torch.randn(heads, batch, length, generator=generator).transpose(0, 1).requires_grad_()]
    assert not any(x.is_contiguous() for x in inputs)
    options = {"cross_mask": random_mask((batch, cross), 5)}
    check_attention(inputs, **options)


@pytest.mark.parametrize("wanted", range(6), ids=["q", "k", "v", "cross_k", "cross_v", "gate"])
@pytest.mark.parametrize("cross_keys", [0, 4])
def test_gradients_only_where_asked(check_attention, attend, random_inputs, wanted, cross_keys):
    inputs = random_inputs(2, 4, 2, 5, 8, cross_keys, 16, (2, 1, 5), torch.float32, torch.float32)
    inputs = [x.detach().requires_grad_(index == wanted) for index, x in enumerate(inputs)]
    check_attention(inputs)
    if cross_keys == 0 and wanted > 2:
        out = attend(*inputs)
        assert torch.equal(torch.autograd.grad(out.sum(), inputs[wanted])[0], torch.zeros_like(inputs[wanted]))


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [(0, 7, 7, 20, 20), (0, 20), (0, 1, 2, 20), (0, 0, 20)], ids=str)
def test_packed_sequences(check_attention, attend, random_inputs, random_mask, cuts, dtype, with_masks):
    cross_cuts = [min(4 * index, 11) for index in range(len(cuts))]
    cross_cuts[-1] = 11
    inputs = random_inputs(1, 2, 1, 20, 20, 11, 24, (1, 2, 20), dtype, torch.float32)
    options = {"cu_seqlens": torch.tensor(cuts), "cross_cu_seqlens": torch.tensor(cross_cuts)}
    options = {name: bounds.int() for name, bounds in options.items()}
    if with_masks:
        options |= {"key_mask": random_mask((1, 20), 1), "cross_mask": random_mask((1, 11), 2), "window": 4}
    check_attention(inputs, **options)
    alone = torch.cat(
        [
            attend(
                *(x[:, :, start:end] for x in inputs[:3]),
                *(x[:, :, cross_start:cross_end] for x in inputs[3:5]),
                inputs[5][:, :, start:end],
                key_mask=options["key_mask"][:, start:end] if with_masks else None,
                cross_mask=options["cross_mask"][:, cross_start:cross_end] if with_masks else None,
                window=options.get("window"),
            )
            for start, end, cross_start, cross_end in zip(cuts, cuts[1:], cross_cuts, cross_cuts[1:], strict=False)
        ],
        dim=2,
    )
    assert torch.equal(attend(*inputs, **options), alone)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"], indirect=True)
def test_no_packed_sequence_at_all(attend, random_inputs):
    inputs = random_inputs(1, 4, 2, 0, 0, 0, 16, (1,), torch.float32, torch.float32)
    none = torch.zeros(1, dtype=torch.int32)
    assert attend(*inputs, cu_seqlens=none, cross_cu_seqlens=none).shape == (1, 4, 0, 16)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"], indirect=True)
def test_no_batch_row_at_all(attend, random_inputs, return_lse):
    inputs = random_inputs(0, 4, 2, 3, 5, 7, 16, (1,), torch.float32, torch.float32)
    results = attend(*inputs, return_lse=return_lse)
    out = results[0] if return_lse else results
    assert out.shape == (0, 4, 3, 16)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(gradient, torch.zeros_like(x)) for gradient, x in zip(gradients, inputs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 23])
def test_a_row_does_not_depend_on_its_neighbours(attend, random_inputs, random_mask, dtype, queries):
    inputs = [x.detach() for x in random_inputs(4, 4, 2, queries, 23, 9, 64, (4, 4, queries), dtype, torch.float32)]
    masks = {"key_mask": random_mask((4, 23), 1), "cross_mask": random_mask((4, 9), 2)}
    together = attend(*inputs, **masks)
    for row in range(4):
        one = slice(row, row + 1)
        alone = attend(*(x[one] for x in inputs), **{name: x[one] for name, x in masks.items()})
        assert torch.equal(together[one], alone)


def test_the_same_bits_every_run(attend, backend, random_inputs):
    inputs = random_inputs(2, 3, 1, 33, 33, 9, 64, (1,), torch.float32, torch.float32)
    runs = []
    for _ in range(3 if backend == "triton" else 20):  # interpreted, a run takes a second
        out = attend(*inputs)
        runs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(first, other) for run in runs[1:] for first, other in zip(runs[0], run, strict=True))


def test_log_sum_exp_leaves_the_output_alone(attend, random_inputs, random_mask):
    inputs = random_inputs(2, 6, 2, 9, 14, 9, 64, (1,), torch.float32, torch.float32)
    masks = {"key_mask": random_mask((2, 14), 1), "cross_mask": random_mask((2, 9), 2)}
    out, self_lse, cross_lse = attend(*inputs, **masks, return_lse=True)
    torch.testing.assert_close(out, attend(*inputs, **masks))
    assert not self_lse.requires_grad and not cross_lse.requires_grad
    assert self_lse.dtype == cross_lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_casts_all_but_the_gate(attend, random_inputs, dtype):
    inputs = random_inputs(2, 4, 2, 9, 9, 5, 16, (1,), torch.float32, torch.float32)
    inputs[2] = inputs[2].detach().to(dtype).requires_grad_()  # a model under autocast mixes dtypes
    with torch.autocast("cpu", dtype=dtype), torch.autocast("cuda", dtype=dtype, enabled=torch.cuda.is_available()):
        out = attend(*inputs)
    cast = [*(x.to(dtype) for x in inputs[:5]), inputs[5]]
    assert out.dtype == dtype
    assert torch.equal(out, attend(*cast))
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert [grad.dtype for grad in grads] == [x.dtype for x in inputs]
