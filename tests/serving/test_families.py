"""Each family of LLMs, and each setting of LayAlign, in vLLM's classes: greedy answers are those of `model.generate`."""

import gc

import pytest
import torch
import transformers

from layalign import LayAlignConfig
from layalign.loading import load_model
from layalign.serving.settings import check_served
from tests.serving.conftest import QUESTIONS, engine, generated, save_model, served

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")

SIZES = {
    "vocab_size": 138,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Windows are shorter than prompts; every second layer of Gemma's has one.
WINDOW = {"sliding_window": 16}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2} | WINDOW
GEMMA_2 = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 24} | ALTERNATING
# (classes of the configuration and the LLM, its settings, LayAlign's settings)
CASES = {
    "mistral": ("Mistral", WINDOW, {"gate": "head", "adapter_width": 48, "aligner_width": 40}),
    "qwen2": ("Qwen2", {}, {"aligner": "mlp"}),
    "qwen3": ("Qwen3", {}, {"llm_layers": [0, 2]}),
    "gemma": ("Gemma", {"tie_word_embeddings": True}, {"encoder_states": "last"}),
    "gemma2": ("Gemma2", GEMMA_2, {"gate": "head"}),
    "gemma3": ("Gemma3", ALTERNATING, {"encoder_states": "mean"}),
    "qwen3, no beginning of sequence": ("Qwen3", {"bos_token_id": None}, {}),
    "llama, trained": ("Llama", {"attention_bias": True}, {"train_llm": True}),
    "llama, no cross-attention": ("Llama", {}, {"aligner": None, "adapter": "linear"}),
}


def save_llm(family, settings, folder):
    torch.manual_seed(1)
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    sizes = SIZES | settings
    if family == "Qwen2":
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}  # its heads are hidden size by heads wide
    llm = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, name)(**sizes))
    with torch.no_grad():
        for parameter in llm.parameters():
            # Norms and biases, too: nothing is to be 0 or 1 by chance.
            parameter.normal_(0.2 if parameter.dim() == 1 else 0.0, 0.25)
    llm.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_generate(case, tmp_path):
    family, of_llm, settings = CASES[case]
    folder = save_model(tmp_path / "model", save_llm(family, of_llm, tmp_path / "llm"), **settings)
    if family.startswith("Qwen"):
        # As theirs: their tokenizers have none, whatever the LLM's settings say.
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.bos_token = None
        tokenizer.save_pretrained(folder)
    llm = engine(folder, max_model_len=256, max_num_seqs=8)
    from vllm import SamplingParams

    first = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    (found,) = zip(*(out.outputs[0].logprobs for out in llm.generate(QUESTIONS, first, use_tqdm=False)), strict=True)
    expected = logits_of_first_tokens(folder)
    for own, theirs in zip(found, expected, strict=True):
        for token, given in own.items():
            assert given.logprob == pytest.approx(theirs[token].item(), abs=1e-4)
    # They hang on the question: else this would say nothing.
    assert torch.stack(expected).std(0).max() > 0.05
    assert served(llm, QUESTIONS, 16) == generated(folder, QUESTIONS, 16, least=16)
    del llm
    gc.collect()


def logits_of_first_tokens(folder):
    """Log probabilities (V,) of the first token that answers each of QUESTIONS, by transformers' classes."""
    model, processor = load_model(folder, device="cpu")
    with torch.no_grad():
        return [model(**processor(text), logits_to_keep=1).logits[0, -1].log_softmax(-1) for text in QUESTIONS]


REFUSED = {
    "dynamic": ({"gate": "dynamic"}, "dynamic gates"),
    "no gate": ({"gate": None}, "without a gate"),
    "trained encoder": ({"train_encoder": True}, "trained with it"),
    "no adapter": ({"adapter": None}, "no adapter"),
    "lora": ({"lora": {"rank": 2}}, "merge_lora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_settings(case):
    settings, said = REFUSED[case]
    llama = transformers.LlamaConfig(**SIZES)
    with pytest.raises(ValueError, match=said):
        check_served(LayAlignConfig(llm_config=llama, **settings))
    with pytest.raises(ValueError, match="of the family 'gpt2'"):
        check_served(LayAlignConfig(llm_config=transformers.GPT2Config()))
