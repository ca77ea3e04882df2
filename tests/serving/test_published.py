"""Published checkpoints and the pair that is shown by `layalign demo --real`, in vLLM: greedy answers are those of `model.generate`."""

import shutil

import pytest

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from tests.model.conftest import golden_folder
from tests.model.test_published_experiment import run, tokenizer_of, words_of
from tests.serving.conftest import QUESTIONS, engine, generated, served

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")
__all__ = ["golden_folder"]


@pytest.mark.parametrize("case", ["llama_mha", "llama_mha_nopad"])
def test_golden_cases(case, golden_folder, tmp_path):
    import torch

    source = golden_folder(case)
    for name, letter, other in (("mt", "e", "p"), ("llm", "p", "e")):
        shutil.copytree(source / name, tmp_path / name, copy_function=shutil.copyfile)
        tokenizer_of(letter, other).save_pretrained(tmp_path / name)
    widened(tmp_path / "llm", tmp_path / "wide")
    checkpoint, own, wide = source / "pytorch_model.bin", tmp_path / "own", tmp_path / "with wide"
    bases = {"encoder": tmp_path / "mt", "llm": tmp_path / "llm"}
    options = [word for name, place in bases.items() for word in (f"--{name}", place)]
    run("convert", checkpoint, own, *options, "--compatible", "--prompt", "{text}")
    # The checkpoint holds its LLM too, which is another one now.
    bases |= {"llm": tmp_path / "wide", "compatible": True, "check_bases": False}
    LayAlignForConditionalGeneration.from_published(checkpoint, **bases).save_pretrained(wide)
    LayAlignProcessor.from_pretrained(own).save_pretrained(wide)
    recorded = torch.load(source / "golden.pt", weights_only=True)
    encoder = zip(recorded["input_ids_mt"], recorded["attention_mask_mt"], strict=True)
    prompts = zip(recorded["input_ids_prompt"], recorded["mask_prompt"], strict=True)
    texts = [f"{words_of('e', *e)} {words_of('p', *p)}" for e, p in zip(encoder, prompts, strict=True)]
    length = recorded["generated_task"].shape[1]
    found = served(engine(str(wide), max_model_len=256), texts, length, least=0)
    assert found == generated(own, texts, length)
    if case == "llama_mha_nopad":  # what the published code wrote; where it pads, its rows hang on each other
        for own, ids in zip(found, recorded["generated_task"].tolist(), strict=True):
            assert own == [token for token in ids if token != 1][: len(own)]


def widened(folder, target):
    """The same LLM with heads of 32 in place of 16, which vLLM has no kernel for on CPUs: half of each is 0, and not turned by RoPE."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(folder)
    heads, width = llm.config.num_attention_heads, llm.config.hidden_size // llm.config.num_attention_heads
    for layer in llm.model.layers:
        attention = layer.self_attn
        # Scores are divided by the square root of the new width.
        for name, factor in (("q_proj", 2**0.5), ("k_proj", 1), ("v_proj", 1)):
            weight = getattr(attention, name).weight.data.view(heads, width, -1) * factor
            getattr(attention, name).weight.data = torch.cat([weight, weight * 0], 1).flatten(0, 1)
        weight = attention.o_proj.weight.data.view(-1, heads, width)
        attention.o_proj.weight.data = torch.cat([weight, weight * 0], 2).flatten(1)
    llm.config.head_dim = 2 * width
    llm.config.rope_parameters |= {"partial_rotary_factor": 0.5}
    llm.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)


def test_the_shipped_pair(tmp_path):
    """Where its bases have been fetched (`layalign demo --real`)."""
    from layalign.kernels.files import cache_folder
    from layalign.train.demo.real.shipped import SHIPPED

    bases = [cache_folder() / name for name in ("multilingual-e5-small", "SmolLM2-135M-Instruct")]
    if not all(base.is_dir() for base in bases):
        pytest.skip("the bases of the shipped pair are not in the cache (layalign demo --real fetches them)")
    encoder, llm = map(str, bases)
    LayAlignForConditionalGeneration.from_pretrained(SHIPPED, encoder=encoder, llm=llm).save_pretrained(tmp_path)
    LayAlignProcessor.from_bases(encoder, llm).save_pretrained(tmp_path)
    questions = [f"{text} {number}?" for number in range(4) for text in QUESTIONS]
    found = served(engine(str(tmp_path), max_model_len=256), questions, 16)
    assert found == generated(tmp_path, questions, 16, least=16)
