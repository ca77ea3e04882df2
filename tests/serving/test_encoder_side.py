"""How the questions of a step are read: never more tokens at once, padding among them, than vLLM measured memory for."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from layalign import LayAlignConfig
from layalign.serving.encoder_side import EncoderSide, of_similar_lengths
from tests.serving.conftest import save_model

AT_ONCE = 256
# One long question among short ones, which padded together are 50 * 200 tokens; one that is longer than what is read at once.
LENGTHS = [7, 200, *[3 + place % 9 for place in range(46)], 41, 300]


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    """-> the encoder side of one model in a dtype."""
    folder = save_model(tmp_path_factory.mktemp("side"))
    config = LayAlignConfig.from_pretrained(folder)
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    heads, width = text.num_key_value_heads, text.head_dim
    rows = (text.num_attention_heads + 2 * heads) * width
    weights = torch.randn(len(config.fused_layers), rows, text.hidden_size, generator=generator) / 10

    def made(dtype):
        found = EncoderSide(config, folder, dtype, AT_ONCE)
        generator.manual_seed(1)
        own = {n: p for n, p in found.named_parameters() if not n.startswith("encoder.")}
        found.load_trained({n: torch.randn(p.shape, generator=generator) / 10 for n, p in own.items()})
        found.to(dtype)
        attentions = []
        for weight in weights:
            sizes = {"q_size": text.num_attention_heads * width, "kv_size": heads * width, "num_kv_heads": heads}
            attentions.append(SimpleNamespace(qkv_proj=SimpleNamespace(weight=weight.to(dtype), bias=None), **sizes))
        found.take_projections(attentions)
        if dtype == torch.float64:
            found.aligner.forward = partial(found.aligner.forward, backend="reference")
        return found

    return made


def test_a_long_question_among_short_ones(side):
    """Each gets what it gets alone, up to rounding, in the order in which they came."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(2, 1500, (length,), generator=generator) for length in LENGTHS]
    own, exact, sizes = side(torch.float32), side(torch.float64), []
    exactly = [exact([row])[0] for row in rows]
    alone = [own([row])[0] for row in rows]
    own.encoder.register_forward_pre_hook(
        lambda _, args, given: sizes.append(given["input_ids"].shape), with_kwargs=True
    )
    found = own(rows)
    assert [len(one) for one in found] == LENGTHS
    assert sum(count for count, _ in sizes) == len(rows)
    assert all(count == 1 or count * longest <= AT_ONCE for count, longest in sizes), sizes
    assert len(sizes) < 8
    errors = [max((a - b).abs().max() for a, b in zip(some, exactly, strict=True)) for some in (found, alone)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * max(one.abs().max() for one in exactly)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5], [[0]]),
        ([4, 4, 4], [[0, 1], [2]]),
        ([8, 1, 9, 2], [[1, 3], [0], [2]]),  # the last is longer than what is read at once
        ([1] * 8, [[*range(8)]]),
    ],
)
def test_groups(lengths, expected):
    assert [*of_similar_lengths(lengths, 8)] == expected
