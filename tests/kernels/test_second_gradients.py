"""Second gradients are right or refused by name, never left out."""

import pytest
import torch

from layalign import adaptive_fusion_attention, cross_key_values, layer_mix, stream_linear


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# Operator of a list of tensors, their shapes, and whether PyTorch has the second gradients of its backend "torch".
CASES = {
    "attention": (
        lambda x, **options: adaptive_fusion_attention(*x, **options),
        [(1, 2, 4, 16), *[(1, 1, 4, 16)] * 2, *[(1, 1, 3, 16)] * 2, (1,)],
        False,
    ),
    "layer_mix": (lambda x, **options: layer_mix(x[:2], *x[2:], **options), [*[(1, 3, 8)] * 2, (4, 2), (4,)], True),
    "stream_linear": (lambda x, **options: stream_linear(*x, **options), [(2, 1, 3, 8), (6, 8), (6,)], True),
    "cross_key_values": (
        lambda x, **options: cross_key_values(x[:2], *x[2:6], x[6:8], x[8:], **options),
        [*[(1, 3, 8)] * 2, (4, 2), (4,), (6, 8), (6,), *[(4, 6)] * 4],
        False,
    ),
}


def penalised(operator, inputs, **options):
    """Gradients of a loss and a penalty on its gradient of the first input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = operator(inputs, **options)
    loss = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    return torch.autograd.grad(loss + grad.square().sum(), inputs)


@pytest.mark.parametrize("case", CASES)
def test_second_gradients_are_right_or_refused(case, backend, device):
    operator, shapes, by_torch = CASES[case]
    inputs = [draw(*shape) for shape in shapes]
    expected = penalised(operator, inputs, backend="reference")
    inputs = [x.to(device) for x in inputs]
    if backend == "torch" and by_torch:
        for found, want in zip(penalised(operator, inputs, backend=backend), expected, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(RuntimeError, match=r"second gradients|derivative for .* is not implemented"):
        penalised(operator, inputs, backend=backend)
