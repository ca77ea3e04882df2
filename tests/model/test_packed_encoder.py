"""Adapter and aligner on packed encoder tokens: the same answers and gradients, computed for real tokens only."""

import pytest
import torch

from layalign import sequence

LENGTHS = [6, 2, 0, 3]


@pytest.fixture
def padded():
    """Rows of 6, 2, no and 3 tokens for the encoder, some with holes."""
    generator = torch.Generator().manual_seed(21)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0, 0], [0] * 7, [1, 1, 1, 0, 0, 0, 0]])
    ids = torch.randint(3, 60, (4, 5), generator=generator)
    return {
        "encoder_input_ids": torch.randint(3, 50, (4, 7), generator=generator),
        "encoder_attention_mask": mask,
        "input_ids": ids,
        "labels": ids,
    }


@pytest.fixture
def unpacked(monkeypatch):
    """Call it to switch packing off."""
    return lambda: monkeypatch.setattr(sequence, "PACKED_FROM", 1)


def seen(model):
    """Shapes of what adapter and aligner get from now on."""
    shapes = []
    if model.adapter is not None:
        model.adapter.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    if model.aligner is not None:
        model.aligner.register_forward_pre_hook(
            lambda module, inputs: shapes.extend(tuple(state.shape) for state in inputs[0])
        )
    return shapes


def encoded(model, padded):
    return model.encode(padded["encoder_input_ids"], padded["encoder_attention_mask"])


SETTINGS = [
    ("llama", {}),
    ("qwen3", {}),
    ("gpt2", {"aligner": "mlp"}),
    ("olmo2", {"encoder_states": "mean"}),
    ("llama", {"adapter": None}),
    ("llama", {"aligner": None}),
]


@pytest.mark.parametrize("llm, settings", SETTINGS, ids=str)
def test_encode_equals_the_unpacked_way(llm, settings, make_model, padded, unpacked):
    model = make_model(llm, **settings)
    shapes = seen(model)
    soft, mask, *cross, _ = encoded(model, padded)
    assert set(shapes) == {(1, sum(LENGTHS), 24)}
    shapes.clear()
    unpacked()
    plain_soft, plain_mask, *plain_cross, _ = encoded(model, padded)
    assert set(shapes) == {(4, 6, 24)}
    assert torch.equal(mask, plain_mask) and mask.sum(1).tolist() == LENGTHS
    for part, plain, moved in [(soft, plain_soft, 1)] + [(p, q, 3) for p, q in zip(cross, plain_cross, strict=True)]:
        if plain is None:
            assert part is None
            continue
        assert part.shape == plain.shape
        part, plain = part.movedim(moved, 1), plain.movedim(moved, 1)
        torch.testing.assert_close(part[mask], plain[mask], atol=1e-6, rtol=1e-5)
        assert part[~mask].abs().max() == 0


@pytest.mark.parametrize("llm", ["llama", "qwen3"])
def test_loss_and_gradients_equal_the_unpacked_way(llm, make_model, padded, unpacked):
    model = make_model(llm).train()
    results = []
    for _ in range(2):
        loss = model(**padded).loss
        names, parameters = zip(*model.trained_parameters(), strict=True)
        results.append((loss, torch.autograd.grad(loss, parameters)))
        unpacked()
    (loss, gradients), (plain_loss, plain_gradients) = results
    torch.testing.assert_close(loss, plain_loss)
    for name, gradient, plain in zip(names, gradients, plain_gradients, strict=True):
        assert plain.abs().max() > 0, name
        torch.testing.assert_close(gradient, plain, atol=1e-6, rtol=1e-4, msg=name)


def test_all_rows_padding(make_model, padded, unpacked):
    """Not one token for the aligner; the LLM answers from the prompt alone, and training has finite gradients."""
    padded["encoder_attention_mask"].zero_()
    model = make_model()
    shapes = seen(model)
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = model(**padded).loss
        loss.backward()
        results.append((loss, [parameter.grad.clone() for _, parameter in model.trained_parameters()]))
        unpacked()
    assert shapes[0] == (1, 0, 24) and shapes[-1] == (4, 1, 24)
    (loss, gradients), (plain_loss, plain_gradients) = results
    torch.testing.assert_close(loss, plain_loss)
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(gradient, plain, atol=1e-6, rtol=1e-4)


def test_little_padding_and_compatibility_stay_unpacked(make_model, padded):
    rows = {name: value.repeat(5, 1) for name, value in padded.items()}
    rows["encoder_attention_mask"] = torch.ones(20, 7).long()
    rows["encoder_attention_mask"][3, :2] = 0  # 2 of 140
    model = make_model()
    shapes = seen(model)
    encoded(model, rows)
    assert set(shapes) == {(20, 7, 24)}
    compatible = make_model(mask_cross_padding=False)
    shapes = seen(compatible)
    encoded(compatible, padded)
    assert set(shapes) == {(4, 7, 24)}


def test_places():
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    places = sequence.real_tokens(mask, 3)
    assert places.tolist() == [0, 1, 4]
    values = torch.arange(12.0).view(3, 4, 1)
    packed = sequence.pack(values, places)
    assert packed.flatten().tolist() == [0, 1, 4]
    assert torch.equal(sequence.unpack(packed, places, mask), values * mask[..., None])
    share = int(sequence.PACKED_FROM * 100)
    mask = torch.ones(10, 10).bool()
    assert sequence.real_tokens(mask, 100 - share) is None
    assert sequence.real_tokens(mask, 99 - share) is not None
    assert sequence.real_tokens(torch.ones(0, 0).bool(), 0) is None
    compiled = torch.compile(lambda mask: sequence.real_tokens(mask, 3) is None, fullgraph=True, backend="eager")
    assert compiled(mask)
