"""No state is left behind: models that share an LLM, threads that share a model, calls that end in their midst."""

import copy
import gc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch
from transformers import LogitsProcessor, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from layalign import LayAlignForConditionalGeneration, fusion, sharing


@pytest.fixture
def pair(make_model, make_encoder, batch):
    """family -> a model and another on the same LLM, each as it would be alone, and what either answers alone."""

    def build(family="llama", **settings):
        def second(llm):
            model = LayAlignForConditionalGeneration.from_bases(make_encoder(), llm, **settings)
            generator = torch.Generator().manual_seed(99)
            for _, own in model.trained_parameters():
                own.data = torch.randn(own.shape, generator=generator) * max(own.shape[-1], 4) ** -0.5
            return model.eval()

        first = make_model(family, gate="dynamic")
        with torch.no_grad():
            alone = [first(**batch).logits, second(copy.deepcopy(make_model(family).llm))(**batch).logits]
        return first, second(first.llm), alone

    return build


def answers(models, batch):
    with torch.no_grad():
        return [model(**batch).logits for model in models]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_two_models_of_one_llm_answer_as_each_alone(family, pair, batch):
    *models, alone = pair(family, gate="head", llm_layers=[1])
    for found, expected in zip(answers(models, batch), alone, strict=True):
        assert torch.equal(found, expected)
    first, second = (dict(model.llm.named_parameters()) for model in models)
    shared = [name for name in first if "fusion_gate" not in name]
    assert shared == [name for name in second if "fusion_gate" not in name]
    assert all(first[name] is second[name] for name in shared)
    trained = [{id(own) for _, own in model.trained_parameters()} for model in models]
    assert not trained[0] & trained[1]
    assert models[1].trained_state_dict().keys() != models[0].trained_state_dict().keys()


def test_one_is_trained_saved_and_gone_while_the_other_answers(pair, batch, make_llm, make_encoder, tmp_path):
    first, second, alone = pair(lora={"rank": 2})
    make_llm().save_pretrained(tmp_path / "llm")
    make_encoder().save_pretrained(tmp_path / "encoder")
    second.train_only().train().gradient_checkpointing_enable()
    assert not first.llm.training and not first.llm.is_gradient_checkpointing
    optimizer = torch.optim.SGD([own for _, own in second.trained_parameters()], lr=0.1)
    second(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
    optimizer.step()
    assert all(own.grad is None for own in first.parameters())
    changed = answers([second.eval()], batch)[0]
    assert torch.equal(answers([first], batch)[0], alone[0]) and not torch.equal(changed, alone[1])
    second.save_pretrained(tmp_path / "second")
    loaded = LayAlignForConditionalGeneration.from_pretrained(
        tmp_path / "second", encoder=tmp_path / "encoder", llm=tmp_path / "llm"
    )
    with_firsts = LayAlignForConditionalGeneration.from_pretrained(
        tmp_path / "second", encoder=first.encoder, llm=first.llm
    )
    for found in answers([loaded, with_firsts], batch):
        assert torch.equal(found, changed)
    with pytest.raises(ValueError, match="train_llm: another LayAlign model answers with this LLM"):
        first.train_only(["llm"])
    with pytest.raises(ValueError, match="merge_lora: another LayAlign model answers with this LLM"):
        second.merge_lora()
    with pytest.raises(ValueError, match=r"another LayAlign model's and has adapters already \(layalign\)"):
        LayAlignForConditionalGeneration.from_bases(first.encoder, second.llm)
    with pytest.raises(ValueError, match="another LayAlign model answers with this LLM"):
        LayAlignForConditionalGeneration.from_bases(first.encoder, first.llm, train_llm=True)
    del second, with_firsts, optimizer
    gc.collect()
    assert not sharing.is_shared(first.llm)
    first.train_only(["llm"])
    with pytest.raises(ValueError, match="another LayAlign model's, which trains it"):
        LayAlignForConditionalGeneration.from_bases(first.encoder, first.llm)


WAYS = [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": False, "num_return_sequences": 1}]
THREADS = 8


class Heard(BaseStreamer):
    """What a streamer is given."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


class Drawn(LogitsProcessor):
    """Makes the largest score a sample of the softmax, by a generator of the call's own: those of do_sample are drawn from torch's one
    generator, in whatever order threads come."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, input_ids, scores):
        return scores - torch.empty_like(scores).exponential_(generator=self.generator).log()


@pytest.fixture
def generate(words):
    """(model, row, mode) -> all that a call of `generate` gives: tokens, and what a streamer or iterator of texts has got."""
    tokenizer = words([f"w{number}" for number in range(56)])

    def run(call):
        model, row, mode = call
        mode = {name: make() if callable(make) else make for name, make in mode.items()}
        if "processor" in mode:
            mode["logits_processor"] = [mode.pop("processor")]
        texts = mode.pop("texts", False)
        if texts:
            mode["streamer"] = TextIteratorStreamer(tokenizer)
        made = []
        work = Thread(
            target=lambda: made.append(model.generate(**row, **mode, max_new_tokens=6, min_new_tokens=6).tolist())
        )
        work.start()
        heard = list(mode["streamer"]) if texts else None  # while it is made
        work.join()
        return made, mode["streamer"].tokens if isinstance(mode.get("streamer"), Heard) else heard

    return run


MODES = [*WAYS[:3], {"do_sample": True, "top_k": 1}, {"processor": Drawn}, {"streamer": Heard}, {"texts": True}]


def at_once(work, shares):
    """What a thread each makes of its share of the calls, all of them started together."""
    barrier = Barrier(len(shares))

    def run(calls):
        barrier.wait()
        return [work(call) for call in calls]

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(run, shares))


def test_threads_that_generate_on_one_llm_answer_as_one_after_the_other(pair, batch, generate):
    """Two models of it."""
    models = pair("gemma2", gate="head")[:2]
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    calls = [
        (model, row, mode)
        for mode in MODES
        for model in models
        for row in (rows if "streamer" in mode or "texts" in mode else [*rows, batch])
    ]
    expected = [generate(call) for call in calls]
    assert all(len(row) == 6 for (ids,), _ in expected for row in ids)
    for model in models:
        model.aligner._kept = None  # the threads fold too
    found = at_once(generate, [calls[start::THREADS] for start in range(THREADS)])
    assert found == [expected[start::THREADS] for start in range(THREADS)]


def test_trained_and_asked_in_turn(make_model, batch):
    """As one that is trained alone, and what it answers between is what its weights say."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    models = [make_model("llama", gate="dynamic", lora={"rank": 2, "dropout": 0.0}) for _ in range(2)]
    optimizers = [torch.optim.AdamW([own for _, own in model.trained_parameters()], lr=0.1) for model in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
        asked = models[0].eval()
        for way in WAYS:
            asked.generate(**batch, **way, max_new_tokens=3)
    for (name, own), (_, other) in zip(*(model.trained_parameters() for model in models), strict=True):
        assert torch.equal(own, other), name
    for found, expected in zip(answers([models[0]], batch), answers([models[1].eval()], batch), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_copy_is_a_model_of_its_own(family, make_model, batch):
    model = make_model(family, gate="dynamic")
    model.generate(**batch, max_new_tokens=3, cache_implementation="static")
    twin = copy.deepcopy(model)
    (expected,) = answers([model], batch)
    assert torch.equal(answers([twin], batch)[0], expected)
    assert not {id(own) for own in model.parameters()} & {id(own) for own in twin.parameters()}
    with torch.no_grad():
        for own in twin.parameters():
            own.mul_(1.5)
    assert not torch.equal(answers([twin], batch)[0], expected) and torch.equal(answers([model], batch)[0], expected)


class Stop(LogitsProcessor):
    """Ends generation at its third token."""

    def __init__(self, kind):
        self.kind, self.left = kind, 3

    def __call__(self, input_ids, scores):
        self.left -= 1
        if not self.left:
            raise self.kind("stop")
        return scores


CALLS = (fusion.CrossStates, fusion.CrossInputs, fusion.FusionMask, fusion.Packing)


def state(model):
    """Everything that a call could leave on a model (attributes and hooks of all modules, the modes, what its aligner has folded), or
    elsewhere of its own."""
    gc.collect()
    modules = {
        name: (
            module.training,
            sorted(vars(module)),
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }
    kept = model.aligner._kept
    folded = None if kept is None else [part.tolist() for part in kept.weights if part is not None]
    left = Counter(map(type, gc.get_objects()))
    return modules, folded, [left[kind] for kind in CALLS]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("training", [False, True])
def test_a_call_that_ends_in_its_midst_leaves_nothing(kind, training, make_model, batch):
    model = make_model("llama", gate="dynamic").train(training)
    labelled = batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    packed = {"encoder_input_ids": torch.tensor([[5, 6, 7]]), "encoder_cu_seqlens": torch.tensor([0, 1, 3])}
    packed |= {"input_ids": torch.tensor([[8, 9, 5, 4]]), "cu_seqlens": torch.tensor([0, 3, 4])}
    packed["labels"] = packed["input_ids"]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    for call in (labelled, packed, batch):  # what the first call of all leaves: transformers makes some hooks then
        model(**call)
    for way in WAYS:
        model.generate(**batch, **way, **settings)
    before = state(model)

    def interrupt(module, inputs):
        raise kind("stop")

    for place in (model.llm.model.layers[1].mlp, model.llm.lm_head):
        hook = place.register_forward_pre_hook(interrupt)
        for call in (labelled, packed, batch):
            with pytest.raises(kind):
                model(**call)
        hook.remove()
    for way in WAYS:
        with pytest.raises(kind):
            model.generate(**batch, **way, **settings, logits_processor=[Stop(kind)])
    assert state(model) == before
    fresh = make_model("llama", gate="dynamic").train(training)
    for call in (labelled, packed):
        loss, expected = model(**call).loss, fresh(**call).loss
        loss.backward(), expected.backward()
        assert loss.item() == expected.item()
    for (name, own), (_, other) in zip(model.trained_parameters(), fresh.trained_parameters(), strict=True):
        assert torch.equal(own.grad, other.grad), name
    for way in WAYS:
        assert torch.equal(model.generate(**batch, **way, **settings), fresh.generate(**batch, **way, **settings))


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_calls_that_end_in_their_midst_beside_others(kind, lively, batch, generate):
    """Half of the threads' calls are stopped at their third token; the others answer as alone, and so does the model afterwards."""
    model = lively("llama", gate="dynamic")
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    calls = [(model, row, mode) for mode in (*MODES[:3], {"processor": Drawn}, {"texts": True}) for row in rows]
    expected = [generate(call) for call in calls]
    before = state(model)

    def stopped(call):
        _, row, mode = call
        if "processor" in mode or "texts" in mode:
            mode = {}
        try:
            model.generate(**row, **mode, max_new_tokens=6, min_new_tokens=6, logits_processor=[Stop(kind)])
        except kind:
            return "stopped"

    half = THREADS // 2
    shares = [[(generate, call) for call in calls[start::half]] for start in range(half)]
    shares += [[(stopped, call) for call in calls[start::half]] for start in range(half)]
    found = at_once(lambda given: given[0](given[1]), shares)
    assert found[:half] == [expected[start::half] for start in range(half)]
    assert {word for words in found[half:] for word in words} == {"stopped"}
    assert state(model) == before
    assert [generate(call) for call in calls] == expected
