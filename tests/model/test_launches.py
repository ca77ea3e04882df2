"""What the model launches, recorded on tensors without memory: these hold no values, so that asking for one is an error, as waiting for
a GPU is while a graph is captured.
"""

from collections import Counter

import pytest
import torch
import transformers.utils.import_utils

from layalign.kernels.launch import compiled_for, recording
from layalign.sequence import Lengths

pytest.importorskip("triton")

LENGTHS = Lengths([7, 4], [5, 2])
FULL = Lengths([7, 7], [5, 5])
LAYERS = 2


@pytest.fixture
def model(make_model, monkeypatch):
    """Of a width that tensor descriptors take, in memory that is not there."""
    # transformers looks whether an encoder's mask is full, but not while a graph is captured.
    monkeypatch.setattr(transformers.utils.import_utils, "is_cuda_stream_capturing", lambda: True)
    return make_model("qwen3", attention_backend="triton").half().to("meta")


@pytest.fixture
def launches():
    """[(kernel, what it is compiled for, its tuples of arguments)] meanwhile."""
    recorded = []

    def record(kernel, grid, args, constants, options):
        recorded.append((kernel.__name__, compiled_for(constants), args))

    with recording("sm_90", record):
        yield recorded


def batch():
    def ids(length):
        return torch.zeros(2, length, dtype=torch.long, device="meta")

    return {
        "encoder_input_ids": ids(7),
        "encoder_attention_mask": ids(7),
        "input_ids": ids(5),
        "attention_mask": ids(5),
    }


def masks_of(args):
    return next(x for x in args if hasattr(x, "spans") and hasattr(x, "_fields"))


@pytest.mark.parametrize("lengths, spanned", [(LENGTHS, True), (FULL, False)], ids=["padded", "full"])
def test_training_step(model, launches, lengths, spanned):
    loss = model(**batch(), labels=batch()["input_ids"], lengths=lengths).loss
    forward = [launch for launch in launches if launch[0] == "forward_kernel"]
    launches.clear()
    loss.backward()
    counts = Counter(name for name, *_ in launches)
    kernels = ("row_sums_kernel", "key_value_gradients_kernel", "query_gradients_kernel")
    assert len(forward) == LAYERS and [counts[name] for name in kernels] == [LAYERS] * 3
    assert not counts["list_used_tiles_kernel"]
    for _, constants, args in [*forward, *(launch for launch in launches if launch[0] == "query_gradients_kernel")]:
        masks = masks_of(args)
        assert masks.tiles is None and masks.cross_tiles is None
        assert (masks.spans is not None) == (masks.cross_spans is not None) == spanned
        assert constants["CROSS"]
    for name, _, args in launches:
        if name == "key_value_gradients_kernel":
            terms = [x for x in args if hasattr(x, "grad_k")]
            assert [(term.mask, term.spans is not None) for term in terms] == [(None, spanned)] * 2


@pytest.mark.parametrize("lengths, spanned", [(LENGTHS, True), (FULL, False)], ids=["padded", "full"])
def test_prefill_and_decoding(model, launches, lengths, spanned):
    """As `generate` calls the model: 32 more cross positions would prefill by the forward kernel, so few go by the decode kernel."""
    with torch.no_grad():
        encoded = model.encode(batch()["encoder_input_ids"], batch()["encoder_attention_mask"], lengths.encoder)
        given = batch()
        of_text = (given["input_ids"], given["attention_mask"])
        embeddings, mask, _, padding = model.assemble(encoded.soft, encoded.mask, *of_text, lengths=lengths)
        cross = encoded.cross(padding)
        launches.clear()
        out = model(inputs_embeds=embeddings, attention_mask=mask, cross=cross, use_cache=True)
        step = torch.zeros(2, 1, dtype=torch.long, device="meta")
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        positions = torch.full((2, 1), 9, device="meta")
        model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=out.past_key_values,
            cross=cross,
            use_cache=True,
        )
    assert [name for name, *_ in launches] == ["decode_kernel"] * 2 * LAYERS
    for _, constants, args in launches:
        masks = masks_of(args)
        assert masks.self_mask is None and masks.cross_mask is None and constants["CROSS"]
        assert (masks.spans is not None) == (masks.cross_spans is not None) == spanned


def test_spans_serve_descriptors(model, launches):
    """Long enough for the lines of the launch table that read by descriptors, which masks rule out."""
    long = {name: torch.zeros(2, 200, dtype=torch.long, device="meta") for name in batch()}
    model(**long, lengths=Lengths([200, 120], [200, 150]))
    forward = [constants for name, constants, _ in launches if name == "forward_kernel"]
    assert len(forward) == LAYERS and all(constants["DESCRIPTORS"] for constants in forward)
    launches.clear()
    with pytest.raises(RuntimeError, match="meta"):  # without lengths it asks, once
        model(**long)
