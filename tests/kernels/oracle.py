"""The oracle of every operator's tests: errors against fp64, bounded by what eager PyTorch of the same dtype makes."""

import torch


def check(operator, reference, inputs, summed=None, ulps=20, same=None, **options):
    """Check the outputs and all gradients of `operator`.

    `inputs` are tensors, None or lists of tensors; the floating ones with requires_grad get gradients.
    `summed` = (input index, function, reference): see `_error_of_sums`.
    `same`: the reference by other formulas that are as good, whose errors are eager ones too.

    For every output and gradient: error against fp64 <= 2 x the error of the eager reference in the same dtype + a
    rounding slack, the largest among the call's tensors (a gradient that cancels to 0 keeps the rounding of its terms).
    In fp32 one tensor's eager error is a few roundings, down to none by luck, and PyTorch's own fused attention takes
    an exp of 20 ulp (single tensors were measured at up to 4.2 x, medians 1.0 to 1.6): there the bound is 2 x the
    largest eager error in the call + `ulps` ulp of the call's largest value.
    """
    actual = _run(operator, inputs, options)
    eager = _run(reference, inputs, dict(options, upcast=False))
    exact = _run(reference, _map(_to_double, inputs), dict(options, upcast=False))
    assert actual.keys() == eager.keys() == exact.keys()
    filled = [name for name, value in exact.items() if value.isfinite().any()]
    eager_errors = {name: _error(eager[name], exact[name]) for name in filled}
    if same is not None:
        others = _run(same, inputs, dict(options, upcast=False))
        eager_errors = {name: max(error, _error(others[name], exact[name])) for name, error in eager_errors.items()}
    if summed is not None:
        eager_errors.update(_error_of_sums(inputs, *summed, options))
    for name, error in eager_errors.items():  # of a few sums, lower by luck than rounding the exact ones once
        eager_errors[name] = max(error, _error(exact[name].to(eager[name].dtype), exact[name]))
    slack = max((_rounding(exact[name], actual[name].dtype) for name in filled), default=0.0)
    largest = max((exact[name][exact[name].isfinite()].abs().max().item() for name in filled), default=0.0)
    ulp = torch.finfo(torch.float32).eps * largest
    for name, value in actual.items():
        assert value.shape == eager[name].shape and value.dtype == eager[name].dtype, name
        finite = exact[name].isfinite()  # a log-sum-exp is -inf where nothing is attended to
        assert torch.equal(value[~finite].double(), exact[name][~finite].double()), f"{name}: other infinities"
        if name in filled:
            error = _error(value, exact[name])
            allowed = slack + 2 * eager_errors[name]
            if value.dtype == torch.float32:
                allowed = slack + 2 * max(eager_errors.values()) + ulps * ulp
            assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def _error(value, exact):
    finite = exact.isfinite()
    return (value.double() - exact.double())[finite].abs().max().item()


def _error_of_sums(inputs, index, spread, reference, options):
    """Each gradient of input `index` is the sum over what `spread` makes of it for the call that `reference` then is, so
    its own eager error may be small by luck. -> the largest of what the sums of the eager errors typically come to."""
    if not inputs[index].requires_grad or inputs[index].numel() == 0:
        return {}
    name = f"gradient of input {index}.0"
    wide = [*inputs[:index], spread(inputs[index].detach()).requires_grad_(), *inputs[index + 1 :]]
    eager = _run(reference, wide, dict(options, upcast=False))[name]
    exact = _run(reference, _map(_to_double, wide), dict(options, upcast=False))[name]
    leaf = inputs[index].detach().double().requires_grad_()
    squares = torch.autograd.grad((spread(leaf) * (eager.double() - exact) ** 2).sum(), leaf)[0]
    return {name: squares.sqrt().max().item()}


def _rounding(exact, dtype):
    """Two roundings as an addition makes them, of the largest by luck none: at least half a unit of its last place, within which
    the sum that it is rounded from may lie as well on the other side of a boundary (93.105 in fp16, off by 0.0115)."""
    rounded = exact[exact.isfinite()].to(dtype)
    _, exponent = torch.frexp(rounded.abs().max().double())
    half_unit = torch.finfo(dtype).eps * 2.0 ** (exponent.item() - 2)
    return max(half_unit, 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item())


def _run(function, inputs, options):
    """Outputs by index and gradients by input path, from fresh leaves and the same output gradients every time."""
    inputs = _map(_leaf, inputs)
    outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(7)
    total = 0
    for output in outputs:
        # In bf16's few digits, so that every dtype gets exactly the same.
        weight = torch.randn(output.shape, generator=generator).bfloat16().to(output)
        if output.requires_grad:
            total = total + (output * weight).sum()
    leaves = {}
    for index, item in enumerate(inputs):
        for place, tensor in enumerate(item if isinstance(item, list) else [item]):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                leaves[f"gradient of input {index}.{place}"] = tensor
    if leaves:
        results.update(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    return results


def _map(function, inputs):
    return [[function(x) for x in item] if isinstance(item, list) else function(item) for item in inputs]


def _leaf(tensor):
    if not isinstance(tensor, torch.Tensor):
        return tensor
    # detach() keeps the strides: a test of non-contiguous inputs must hand over just these.
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _to_double(tensor):
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
