"""The model on the Triton kernels of attention and aligner, interpreted, against the torch backend."""

import os
from collections import Counter

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("quick_interpreter"),
]


def loss_and_gradients(model, batch):
    loss = model(**batch).loss
    names, parameters = zip(*model.trained_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@pytest.fixture
def launches(monkeypatch):
    """Launches so far by kernel, "attention" for forward and decoding: equal results alone could come from the torch backend twice.
    Without plans, which launch anew what an earlier layer did."""
    from layalign.kernels import plans
    from layalign.kernels.adaptive_fusion_attention.gpu import operator
    from layalign.kernels.layerwise_aligner.gpu import matmul, mix

    monkeypatch.setattr(plans, "enabled", False)
    counts = Counter()
    for run in (operator.forward, operator.decode):

        def counted(*arguments, run=run):
            counts["attention"] += 1
            return run(*arguments)

        monkeypatch.setattr(operator, run.__name__, counted)
    for module in (matmul, mix):

        def counting(kernel, *arguments, launch=module.launch, **constants):
            counts[kernel.__name__] += 1
            return launch(kernel, *arguments, **constants)

        monkeypatch.setattr(module, "launch", counting)
    return counts


def worst(results, exact):
    """The largest relative error in norm, over all tensors: a gate's gradient is one number, which either may get right by luck."""
    return max(((results[name] - value).norm() / value.norm()).item() for name, value in exact.items())


FORWARD = {"attention", "mix_kernel", "matmul_kernel"}
CASES = [
    ("llama", {"gate": "dynamic"}),
    ("mistral", {"gate": "scalar"}),
    ("gemma2", {"gate": "head"}),
    ("qwen3", {"encoder_states": "mean"}),
    ("gpt2", {"encoder_states": "last"}),
    ("qwen2", {"aligner": "mlp"}),
]


@pytest.mark.parametrize("llm, settings", CASES, ids=str)
def test_training_step(make_model, batch, launches, llm, settings):
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    exact = loss_and_gradients(make_model(llm, **settings, attention_backend="reference").double(), batch)
    plain = loss_and_gradients(make_model(llm, **settings, attention_backend="torch"), batch)
    assert not launches
    actual = loss_and_gradients(make_model(llm, **settings, attention_backend="triton"), batch)
    assert launches["attention"] == 2  # layers
    assert {*FORWARD, "mix_weight_gradients_kernel", "summed_matmul_kernel"} <= launches.keys()
    assert worst(actual, exact) <= 2 * worst(plain, exact)


WAYS = {
    "llama": {},
    "llama, static cache": {"cache_implementation": "static"},
    "llama, beams": {"num_beams": 2},
    "mistral, whose cache slides": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_generation(lively, batch, launches, way):
    """Padding goes to the kernels as spans: one for the beams of an example, moved with a cache that drops its first keys."""
    options = {"max_new_tokens": 4, "do_sample": False, **WAYS[way]}
    models = [lively(way.split(",")[0], attention_backend=backend) for backend in ("torch", "triton")]
    ids = [model.generate(**batch, **options) for model in models]
    assert torch.equal(*ids)
    assert launches["attention"] == 2 * 4
    assert launches.keys() == FORWARD


@pytest.mark.slow
def test_published_outputs(load_golden, row_batch, launches):
    """Loss and gradients of the published code and the first ids it generates, on all kernels and folded weights."""
    model, case = load_golden("llama_mha", attention_backend="triton")
    actual = loss_and_gradients(model, row_batch(case))
    assert actual["loss"].item() == pytest.approx(case["loss"].item(), rel=1e-5)
    for theirs, ours in {"fc1.weight": "aligner.mix.weight", "fc2.weight": "aligner.project.weight"}.items():
        expected = case["grads"][f"encoder_aligner.projector.{theirs}"]
        assert (actual[ours] - expected).norm() <= 1e-4 * expected.norm(), ours
    encoder = {"encoder_input_ids": case["input_ids_mt"], "encoder_attention_mask": case["attention_mask_mt"]}
    prompt = {"input_ids": case["input_ids_prompt"], "attention_mask": case["mask_prompt"]}
    task = model.generate(**encoder, **prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(task, case["generated_task"][:, :3])
    assert model.aligner._kept is not None
    assert launches.keys() >= FORWARD
