"""Models over the bases that ship with layalign, and engines that serve them in this process. Needs vLLM: `make vllm`."""

import os
import tempfile

import pytest

# What vLLM compiles is compiled anew: a cache of an earlier version of this package would answer for it.
CACHE = tempfile.TemporaryDirectory(prefix="layalign-vllm-")
# Before vLLM is first asked: half a GiB for caches, the engine in this process, so that tests can look at its scheduler.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CACHE_ROOT": CACHE.name,
}

TEMPLATE = "{text}\nAnswer:"
NEW = 40
QUESTIONS = [
    "Asha ana matufaha 3 na Juma ana 4. Wana mangapi?",
    "2 + 5?",
    "Anna hat 3 Bücher und kauft 6. Wie viele hat sie?",
    "8 na 8?",
    "Nina 9, nimekula 1. Zimebaki ngapi?",
    "12 Eier, 4 zerbrechen. Wie viele bleiben?",
    "7",
    "Anna hat 12 Bücher, verkauft 4, kauft 3 und findet dann noch 2 auf dem Tisch. Wie viele Bücher hat sie nun in allem?",
]


def save_model(folder, llm="layalign:tiny_llm", template=TEMPLATE, **settings):
    """A model with open gates, so that its answers hang on the encoder; its trained part is random."""
    import torch

    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

    torch.manual_seed(0)
    model = LayAlignForConditionalGeneration.from_bases("layalign:tiny_encoder", llm, **settings)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            if "fusion_gate" in name:
                parameter.normal_(0.5, 0.3)
            elif parameter.dim() > 1:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    tokenizer = "layalign:tiny_llm"
    LayAlignProcessor.from_bases("layalign:tiny_encoder", tokenizer, template).save_pretrained(folder)
    return str(folder)


def generated(folder, questions, new=NEW, least=0, **given):
    """What `model.generate` writes of each question alone, at least so many token ids."""
    from layalign.loading import load_model

    model, processor = load_model(folder, device="cpu")
    limits = {"max_new_tokens": new, "min_new_tokens": least, "do_sample": False}
    return [model.generate(**processor(text, **given), **limits)[0].tolist() for text in questions]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def questions():
    """64 of mixed lengths, each another."""
    return [f"{text} {number}?" for number in range(8) for text in QUESTIONS]


@pytest.fixture(scope="session")
def answers(model_folder, questions):
    """What `model.generate` writes of these, NEW tokens each: what is wrong has time to show."""
    return generated(model_folder, questions, least=NEW)


def engine(folder, **settings):
    """A vLLM engine in this process, in fp32."""
    from vllm import LLM

    return LLM(model=folder, **({"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64} | settings))


def greedy(new=NEW, least=NEW):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, min_tokens=min(new, least))


def served(llm, prompts, new=NEW, least=NEW):
    """Token ids of each greedy answer."""
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy(new, least), use_tqdm=False)]
