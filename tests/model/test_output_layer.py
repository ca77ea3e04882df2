"""The frozen output layer is multiplied as it lies: torch copies it for each text where the states are a slice of longer rows."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from layalign.generation.texts import LLMAnswerer
from layalign.sequence import kept_columns, last_column

VOCABULARY = 60


class Products:
    """How often matrices of which one is as wide as the vocabulary were multiplied, and those that were a copy for each row."""

    def __init__(self, vocabulary=VOCABULARY):
        self.vocabulary, self.count, self.copies = vocabulary, 0, []

    def __enter__(self):
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        for event in self._profile.events():
            if event.name in ("aten::bmm", "aten::mm", "aten::addmm"):
                wide = [shape for shape in event.input_shapes if self.vocabulary in shape]
                self.count += bool(wide)
                self.copies += [shape for shape in wide if len(shape) == 3]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("llm", ["llama", "gpt_neox"])
def test_no_copies_of_the_output_layer(llm, rows, make_model, uneven):
    """In a training step, a scored batch, the first step of `generate` and the later ones."""
    model = make_model(llm)
    batch = {name: value[:rows] for name, value in uneven.items()}
    asked = {name: value for name, value in batch.items() if name != "labels"}
    with Products() as seen:
        model.train()(**batch).loss.backward()
        model.eval()(**batch)
        with torch.no_grad():
            model(**asked, logits_to_keep=1)
            model(**asked, logits_to_keep=2)
            model.generate(**asked, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen.count > 7 and not seen.copies


def test_the_kept_columns_are_the_last_ones():
    states = torch.zeros(2, 5)
    assert kept_columns(2, states).tolist() == [3, 4] and kept_columns(1, states[..., None]).tolist() == [4]
    columns = torch.tensor([1])
    assert kept_columns(columns, states) is columns
    assert [kept_columns(number, states) for number in (0, 5, 9)] == [0, 5, 9]


def test_an_llm_alone_makes_no_copies_either(loaded):
    """Its answers, samples of them, and the likelihoods of given ones."""
    model, processor = loaded
    with Products(model.llm.config.vocab_size) as seen:
        llm = LLMAnswerer(model.llm, processor.tokenizer, max_new_tokens=3, num_return_sequences=2, do_sample=True)
        llm.loglikelihoods(["what is 3", "so"], [["7"], ["12 13 na", "so"]])
        assert [len(drawn) for drawn in llm.sequences(["what is 3 plus 4", "how many"])] == [2, 2]
    assert seen.count >= 4 and not seen.copies


def test_an_llm_that_makes_all_logits_is_told_nothing(loaded):
    class All(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    assert last_column(All()) == {}
    assert last_column(loaded[0].llm)["logits_to_keep"].tolist() == [-1]
