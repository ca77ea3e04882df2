"""torch.compile of the whole model: one graph, the same answers, and no graph more after the second step."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from layalign.sequence import Lengths
from tests.model import conftest
from tests.model.packed_rows import packed

FAMILIES = ("llama", "qwen3", "mistral", "gemma2")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small(monkeypatch):
    """One layer in every LLM, and one in the encoder: the layers of one kind are traced alike."""
    monkeypatch.setitem(conftest.ENCODERS["mt5"][2], "num_layers", 1)
    for family in FAMILIES:
        monkeypatch.setitem(conftest.LLMS[family][2], "num_hidden_layers", 1)


def graphs():
    """How many graphs there are by now; a recompilation is one more."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def sized(rows, question, text, labels=False):
    """A batch of other sizes whose first row is padded, on the right for the encoder and on the left for the LLM."""
    generator = torch.Generator().manual_seed(rows + question + text)
    batch = {
        "encoder_input_ids": torch.randint(3, 50, (rows, question), generator=generator),
        "encoder_attention_mask": torch.ones(rows, question, dtype=torch.long),
        "input_ids": torch.randint(3, 60, (rows, text), generator=generator),
        "attention_mask": torch.ones(rows, text, dtype=torch.long),
    }
    batch["encoder_attention_mask"][0, -2:] = 0
    batch["attention_mask"][0, :2] = 0
    if labels:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :3] = -100
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_is_one_graph_with_the_logits_of_eager(family, small, make_model, batch):
    """Padding that the masks have in any column stays in the row, on its left."""
    model = make_model(family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = [compiled(**batch) for _ in range(3)][-1]
        assert graphs() == 1
        expected = model(**batch)
    cut = found.logits.shape[1] - expected.logits.shape[1]
    assert cut == 2
    assert not found.attention_mask[:, :cut].any()
    assert torch.equal(found.attention_mask[:, cut:], expected.attention_mask)
    real = expected.attention_mask
    torch.testing.assert_close(found.logits[:, cut:][real], expected.logits[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_training_is_one_graph_with_the_gradients_of_eager(family, small, make_model):
    model = make_model(family).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if family == "llama" else "eager")
    batch = sized(3, 6, 7, labels=True)
    made = []
    for call in (compiled, compiled, model):
        model.zero_grad()
        loss = call(**batch).loss
        loss.backward()
        made.append([loss.detach(), *(parameter.grad for _, parameter in model.trained_parameters())])
    assert graphs() == 1
    for found, expected in zip(made[1], made[2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_batches_of_any_size_share_the_second_graph(small, make_model):
    """Sizes on both sides of where folding the aligner pays, which is a plan of its own for the operator."""
    model = make_model().train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for number, sizes in enumerate([(3, 6, 7), (4, 9, 11), (2, 5, 8), (5, 12, 6), (8, 40, 30)]):
        batch = sized(*sizes, labels=True)
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
        assert graphs() == min(number + 1, 2)


@pytest.mark.parametrize("settings", [{"gate": "dynamic"}, {"adapter": None}, {"aligner": "mlp"}])
def test_other_trained_parts_are_one_graph(settings, small, make_model, batch):
    model = make_model("llama", **settings)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(**batch)
        expected = model(**batch)
    assert graphs() == 1
    real = expected.attention_mask
    cut = found.logits.shape[1] - real.shape[1]
    torch.testing.assert_close(found.logits[:, cut:][real], expected.logits[real], rtol=1e-5, atol=1e-6)


def test_lengths_of_the_caller_squeeze_as_in_eager(small, make_model):
    """Logits of labels are in the columns of these."""
    model = make_model()
    batch = sized(3, 6, 7, labels=True)
    lengths = Lengths(*(batch[name].sum(1).tolist() for name in ("encoder_attention_mask", "attention_mask")))
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(**batch, lengths=lengths)
        expected = model(**batch)
    assert graphs() == 1
    assert torch.equal(found.labels, expected.labels)
    assert found.attention_mask.shape == expected.attention_mask.shape
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_a_static_cache_are_one_graph_after_the_second(family, small, lively, batch):
    """As generate compiles them by itself on a GPU. Sliding windows count their steps in Python, which is the second graph."""
    model = lively(family)
    expected = model.generate(**batch, **GREEDY)
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    for _ in range(2):
        ids = model.generate(**batch, **GREEDY, cache_implementation="static", compile_config=compiled)
        assert torch.equal(ids, expected)
    assert graphs() == (2 if family in ("mistral", "gemma2") else 1)


def test_a_compiled_forward_generates(small, lively, batch):
    """The way of CPUs: prefill is a graph, the steps are one."""
    model = lively("llama")
    expected = model.generate(**batch, **GREEDY)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), expected)
        assert graphs() == 2


def test_packed_rows_are_read_outside_of_the_graph(small, make_model, uneven):
    model = make_model()
    rows = packed(uneven)
    expected = model(**rows).loss
    torch.testing.assert_close(torch.compile(model, backend="eager")(**rows).loss, expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"packed rows .*: compile without fullgraph=True"):
        torch.compile(model, fullgraph=True, backend="eager")(**rows)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.thorough) for family in FAMILIES[1:])]
)
def test_inductor_gives_the_same_tokens(family, small, lively, batch):
    model = lively(family)
    question = {name: value[1:2] for name, value in batch.items()}
    expected = model.generate(**question, **GREEDY)
    compiled = CompileConfig(fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    ids = model.generate(**question, **GREEDY, cache_implementation="static", compile_config=compiled)
    assert torch.equal(ids, expected)
    assert graphs() <= 2
