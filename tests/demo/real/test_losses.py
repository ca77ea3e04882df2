import pytest
import torch
from torch.nn import functional as F

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from layalign.train.demo.real.evaluation import loss_against_shuffled
from layalign.train.demo.real.fitting import fit_adapter

PAIRS = [("ha b", "one"), ("two a", "number two"), ("b b b", "3"), ("\u0915 x", "four four"), ("x", "5")]


@pytest.fixture
def joined(bases):
    torch.manual_seed(0)
    model = LayAlignForConditionalGeneration.from_bases(*map(str, bases)).eval()
    return model, LayAlignProcessor.from_bases(*map(str, bases))


def summed_loss(model, processor, source, target):
    """(summed loss, tokens) of one pair alone, from the logits."""
    batch = processor([source], prompt=None, target=[target])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    written = labels[0][labels[0] != -100]
    return F.cross_entropy(logits[0, -len(written) - 1 : -1], written, reduction="sum").item(), len(written)


@pytest.mark.parametrize("batch_size", [8, 2])
def test_losses_are_those_of_the_pairs_one_by_one(joined, batch_size):
    model, processor = joined
    true, shuffled = loss_against_shuffled(model, processor, PAIRS, batch_size=batch_size)
    found = [summed_loss(model, processor, *pair) for pair in PAIRS]
    assert true == pytest.approx(sum(loss for loss, _ in found) / sum(count for _, count in found), rel=1e-5)
    if batch_size == 8:
        swapped = [(PAIRS[place - 1][0], target) for place, (_, target) in enumerate(PAIRS)]
        found = [summed_loss(model, processor, *pair) for pair in swapped]
        assert shuffled == pytest.approx(sum(loss for loss, _ in found) / sum(count for _, count in found), rel=1e-5)
    assert abs(true - shuffled) > 1e-4


def test_fitted_adapter_speaks_at_the_scale_of_embeddings(joined):
    model, processor = joined
    batch = processor(["ha b two", "x", "\u0915 a b b"], prompt=None)
    fit_adapter(model, batch["encoder_input_ids"], batch["encoder_attention_mask"])
    soft, mask, *_ = model.encode(batch["encoder_input_ids"], batch["encoder_attention_mask"])
    soft = soft[mask].detach()
    assert soft.mean(0).abs().max() < 1e-5
    assert soft.std(0).mean() == pytest.approx(model.llm.get_input_embeddings().weight.std().item(), rel=1e-4)
