"""Ways of decoding: what beams and samples share, prompt lookup, compiled steps, and what is refused before any work."""

import os

import pytest
import torch
from packaging.version import Version
from transformers import CompileConfig, GenerationConfig

from layalign import compatibility

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def question(batch):
    """One example; the model fixtures' batch has holes in its masks."""
    return {name: value[1:2] for name, value in batch.items()}


@pytest.fixture
def recorded():
    """model -> [keyword arguments of every forward call], and how often encoder and aligner ran."""

    def start(model):
        calls, counts = [], {"encoder": 0, "aligner": 0}
        model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
        for name in counts:
            getattr(model, name).register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        return calls, counts

    return start


@pytest.mark.parametrize(
    "way", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=["beams", "samples"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_beams_and_samples_share_their_examples_cross_states(way, rows, make_model, batch, recorded, monkeypatch):
    model = make_model()
    encoded = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *args: encoded.append(encode(*args)) or encoded[-1])
    calls, counts = recorded(model)
    model.generate(**{name: value[:rows] for name, value in batch.items()}, **GREEDY | way)
    assert counts == {"encoder": 1, "aligner": 1}
    _, mask, keys, values, padding = encoded[0]
    assert (padding.span is None) == bool(mask.all())
    assert len(calls) == 12
    for call in calls:
        assert call["cross"].span is padding.span
        for name, own in (("keys", keys), ("values", values), ("mask", None if mask.all() else mask)):
            got = getattr(call["cross"], name)
            if own is None:
                assert got is None
                continue
            assert got.shape == (rows, *own.shape[1:]) and got.data_ptr() == own.data_ptr(), name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sharing_changes_no_beam(cache, lively, batch):
    """Beams read the cross states of their own example, of one or of several."""
    model = lively("llama")
    arguments = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": cache}
    together = model.generate(**batch, **arguments)
    for row in range(3):
        alone = model.generate(**{name: value[row : row + 1] for name, value in batch.items()}, **arguments)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.usefixtures("quick_interpreter")
def test_triton_kernels_read_shared_cross_states(lively, question):
    arguments = GREEDY | {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 2}
    ids = [lively("llama", attention_backend=name).generate(**question, **arguments) for name in ("torch", "triton")]
    assert torch.equal(*ids)


def test_samples_of_one_example_are_those_of_its_copies(lively, question):
    model = lively("mistral")
    arguments = GREEDY | {"do_sample": True, "temperature": 3.0}
    torch.manual_seed(1)
    shared = model.generate(**question, **arguments, num_return_sequences=3)
    torch.manual_seed(1)
    copies = {name: value.repeat_interleave(3, 0) for name, value in question.items()}
    assert torch.equal(shared, model.generate(**copies, **arguments))
    assert shared.unique(dim=0).shape[0] == 3


@pytest.mark.skipif(
    not compatibility.can_look_up_prompts(), reason="transformers before 5.18: refused, see the test of that"
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
def test_prompt_lookup_is_greedy_in_fewer_steps(family, make_model, question, recorded):
    """Rejected tokens are cut from the cache, sliding windows (5 of 20 positions) included."""
    model = make_model(family)
    with torch.no_grad():
        model.get_output_embeddings().weight[3:12].mul_(20)  # few tokens to choose from: drafts of wrong tokens occur
    arguments = GREEDY | {"max_new_tokens": 24}
    expected = model.generate(**question, **arguments)
    calls, counts = recorded(model)
    assert torch.equal(model.generate(**question, **arguments, prompt_lookup_num_tokens=4), expected)
    assert len(calls) < 24
    assert counts == {"encoder": 1, "aligner": 1}


@pytest.mark.slow
def test_steps_with_a_static_cache_compile_without_graph_break(lively, batch):
    """As generate compiles them by itself on a GPU; a full and a sliding layer."""
    model = lively("gemma2")
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = model.generate(**batch, **GREEDY)
    ids = model.generate(**batch, **GREEDY, cache_implementation="static", compile_config=compiled)
    assert torch.equal(ids, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


REFUSED = {
    "assistant": (dict(assistant_model=object()), "assistant_model: got object.*use prompt_lookup_num_tokens"),
    "early exit": (dict(assistant_early_exit=1), "assistant_early_exit: got 1"),
    "guidance": (dict(guidance_scale=1.5), r"guidance_scale: got 1\.5"),
    "guidance in a config": (dict(generation_config=GenerationConfig(guidance_scale=1.5)), "guidance_scale"),
    "chunks": (dict(prefill_chunk_size=4), "prefill_chunk_size: got 4"),
    "pages": (dict(cache_implementation="paged"), "cache_implementation: got 'paged', takes 'dynamic' or 'static'"),
    "embeddings": (dict(inputs_embeds=torch.zeros(1, 1, 32)), "inputs_embeds: got Tensor"),
    "lookup in a batch": (dict(prompt_lookup_num_tokens=3), "one example and one sample at a time, got 3 rows"),
    "max_length": (dict(max_length=8, max_new_tokens=None), "max_length: got 8; .* max_new_tokens says how much"),
    "max_length in a config": (
        dict(generation_config=GenerationConfig(max_length=18), max_new_tokens=None),
        "max_length: got 18; .* max_new_tokens says how much",
    ),
    "min_length": (dict(min_length=6), "min_length: got 6, .* min_new_tokens says how much"),
    "packed": (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens: got Tensor, .*give each question a row, padded"),
    "places": (dict(position_ids=torch.zeros(3, 7)), "position_ids: got Tensor, .*leave it out"),
    "no encoder": (dict(encoder_input_ids=None), "encoder_input_ids .*LayAlignPipeline takes texts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_work(case, make_model, batch, monkeypatch):
    arguments, message = REFUSED[case]
    model = make_model()
    monkeypatch.setattr(model, "encode", lambda *_: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match=message):
        model.generate(**batch | GREEDY | arguments)


def test_prompt_lookup_takes_one_sample_and_a_dynamic_cache(make_model, question):
    model = make_model()
    for arguments, message in (
        ({"do_sample": True, "num_return_sequences": 2}, "got 1 rows and num_return_sequences=2"),
        ({"cache_implementation": "static"}, "needs a dynamic cache, got cache_implementation='static'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**question | GREEDY | arguments, prompt_lookup_num_tokens=3)


def test_prompt_lookup_is_refused_where_its_answers_are_wrong(make_model, question, monkeypatch):
    monkeypatch.setattr(compatibility, "VERSION", Version("5.17.0"))
    with pytest.raises(ValueError, match=r"transformers 5\.17\.0 gives other answers .* needs 5\.18"):
        make_model().generate(**question | GREEDY, prompt_lookup_num_tokens=3)


def test_continuous_batching_is_refused(make_model):
    """It would drop the cross states, and generate_batch reports a failing step by an empty answer."""
    with pytest.raises(ValueError, match=r"continuous batching: .*examples/continuous_serving\.py"):
        make_model().generate_batch([[3, 4, 5]], max_new_tokens=2)


def test_a_filled_cache_goes_on_with_what_it_holds(make_model, alone, batch):
    model = make_model()
    first = alone(batch, 1)
    said = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    grown = first | {"input_ids": torch.cat([first["input_ids"], said.sequences, torch.tensor([[7, 8]])], 1)}
    cache = said[compatibility.CACHE]
    assert torch.equal(model.generate(**grown, **GREEDY, past_key_values=cache), model.generate(**grown, **GREEDY))
    with pytest.raises(
        ValueError, match=r"past_key_values: holds \d+ tokens, and the whole input has \d+; a cache goes on"
    ):
        model.generate(**first | {"input_ids": torch.tensor([[7, 8]])}, **GREEDY, past_key_values=cache)


def test_a_step_by_hand_needs_the_cross_states(make_model, alone, batch):
    """Without them it would be a step of the bare LLM."""
    model = make_model()
    first = alone(batch, 1)
    with torch.no_grad():
        out = model(**first, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        with pytest.raises(ValueError, match=r"cross is missing: a step after the first takes what encode"):
            model(input_ids=token, past_key_values=out[compatibility.CACHE])
        cross = model.encode(first["encoder_input_ids"]).cross()
        step = model(input_ids=token, past_key_values=out[compatibility.CACHE], cross=cross)
        whole = model(**first | {"input_ids": torch.cat([first["input_ids"], token], 1)})
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=1e-5, rtol=1e-4)
