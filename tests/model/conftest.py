"""Tiny random bases for the model tests."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from layalign import LayAlignForConditionalGeneration
from tests.model.packed_rows import LENGTHS

GOLDEN = Path(__file__).parents[3] / "shared" / "official" / "golden"
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
}
OLD = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
LLMS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES | {"head_dim": 16, "sliding_window": 5}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZES | {"head_dim": 16, "sliding_window": 5}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES),
    "granite": ("GraniteForCausalLM", "GraniteConfig", SIZES | {"attention_multiplier": 0.3}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", OLD | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        OLD | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}
ENCODERS = {
    "mt5": (
        "MT5EncoderModel",
        "MT5Config",
        {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 3},
    ),
    "bert": (
        "BertModel",
        "BertConfig",
        {
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
        },
    ),
    "xlmr": (
        "XLMRobertaModel",
        "XLMRobertaConfig",
        {
            "vocab_size": 50,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "pad_token_id": 1,
        },
    ),
    "m2m100": (
        "M2M100Model",
        "M2M100Config",
        {
            "vocab_size": 50,
            "d_model": 24,
            "encoder_layers": 3,
            "decoder_layers": 1,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_layerdrop": 0.0,
        },
    ),
    "qwen2": ("Qwen2Model", "Qwen2Config", SIZES | {"vocab_size": 50, "num_hidden_layers": 3}),
    "xglm": (
        "XGLMModel",
        "XGLMConfig",
        {"vocab_size": 50, "d_model": 24, "num_layers": 3, "attention_heads": 3, "ffn_dim": 32},
    ),
}


def builder(table, default, seed):
    """name -> tiny random model of that family, the same weights every time."""

    def build(name=default):
        torch.manual_seed(seed)
        model, config, settings = table[name]
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()

    return build


@pytest.fixture
def make_llm():
    return builder(LLMS, "llama", seed=11)


@pytest.fixture
def make_encoder():
    return builder(ENCODERS, "mt5", seed=12)


@pytest.fixture
def make_model(make_llm, make_encoder):
    """A model with an active, random trained part (gates away from 0)."""

    def build(llm="llama", encoder="mt5", **settings):
        model = LayAlignForConditionalGeneration.from_bases(make_encoder(encoder), make_llm(llm), **settings)
        generator = torch.Generator().manual_seed(13)
        with torch.no_grad():
            for name, parameter in model.trained_parameters():
                if "fusion_gate" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) + 0.7)
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return model.eval()

    return build


@pytest.fixture
def lively(make_model):
    """family -> a model whose next token depends on all it reads: as initialised, a random LLM repeats one token for ever."""

    def build(family, **settings):
        model = make_model(family, **settings)
        generator = torch.Generator().manual_seed(15)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # not the input embedding
        with torch.no_grad():
            for name, weight in [*model.encoder.named_parameters(), *model.llm.named_parameters()]:
                if weight.dim() == 2 and "fusion_gate" not in name:
                    scale = 0.1 if "emb" in name or "wte" in name else 2 * weight.shape[-1] ** -0.5
                    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        return model

    return build


@pytest.fixture
def batch():
    """Three examples whose masks have padding on the left, on the right and in the middle."""
    generator = torch.Generator().manual_seed(14)
    encoder_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1]])
    return {
        "encoder_input_ids": torch.randint(3, 50, (3, 6), generator=generator),
        "encoder_attention_mask": encoder_mask,
        "input_ids": torch.randint(3, 60, (3, 7), generator=generator),
        "attention_mask": mask,
    }


@pytest.fixture
def alone():
    """(batch, row) -> the row as a batch of its own, without any padding."""

    def cut(batch, row):
        encoder_mask, mask = batch["encoder_attention_mask"][row].bool(), batch["attention_mask"][row].bool()
        out = {"encoder_input_ids": batch["encoder_input_ids"][row, encoder_mask][None]}
        out |= {key: batch[key][row, mask][None] for key in ("input_ids", "labels") if key in batch}
        return out

    return cut


@pytest.fixture
def words():
    """names -> word-level tokenizer with <pad> 0, <s> 1, </s> 2, <unk> 3; `eos` appends </s>, as encoders' tokenizers do."""

    def build(vocabulary, eos=False):
        tokens = ["<pad>", "<s>", "</s>", "<unk>", *vocabulary]
        tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if eos:
            tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return build


@pytest.fixture(scope="session")
def golden_folder():
    """case -> the folder of what the published code gave for it."""

    def find(case):
        if not (GOLDEN / case).is_dir():
            pytest.skip("the published outputs (shared/official/golden) are not beside this checkout")
        return GOLDEN / case

    return find


@pytest.fixture
def load_golden(golden_folder):
    """case -> the published checkpoint of that case as a model in compatibility mode, and what their code gave for it."""

    def build(case, **settings):
        folder = golden_folder(case)
        model = LayAlignForConditionalGeneration.from_published(
            folder / "pytorch_model.bin", encoder=folder / "mt", llm=folder / "llm", compatible=True, **settings
        )
        assert model.config.mixed_states == json.loads((folder / "aligner.json").read_text())["encoder_layers"]
        return model, torch.load(folder / "golden.pt", weights_only=True)

    return build


@pytest.fixture
def row_batch():
    """A published case -> our batch: prompt and target in one row, labels -100 outside the target."""

    def build(case):
        labels = case["labels"].masked_fill(case["mask_label"] == 0, -100)
        return {
            "encoder_input_ids": case["input_ids_mt"],
            "encoder_attention_mask": case["attention_mask_mt"],
            "input_ids": torch.cat([case["input_ids_prompt"], case["labels"]], 1),
            "attention_mask": torch.cat([case["mask_prompt"], case["mask_label"]], 1),
            "labels": torch.cat([torch.full_like(case["input_ids_prompt"], -100), labels], 1),
        }

    return build


@pytest.fixture
def uneven():
    """Five examples of different lengths with labels, padded on the right."""
    generator = torch.Generator().manual_seed(31)
    rows, widths = len(LENGTHS), (max(q for q, _, _ in LENGTHS), max(t for _, t, _ in LENGTHS))
    batch = {
        "encoder_input_ids": torch.randint(3, 50, (rows, widths[0]), generator=generator),
        "encoder_attention_mask": torch.zeros(rows, widths[0], dtype=torch.long),
        "input_ids": torch.randint(3, 60, (rows, widths[1]), generator=generator),
        "attention_mask": torch.zeros(rows, widths[1], dtype=torch.long),
    }
    batch["labels"] = batch["input_ids"].clone()
    for row, (question, text, prompt) in enumerate(LENGTHS):
        batch["encoder_attention_mask"][row, :question] = 1
        batch["attention_mask"][row, :text] = 1
        batch["labels"][row, :prompt] = -100
        batch["labels"][row, text:] = -100
    return batch


@pytest.fixture
def pair(bases):
    """Both bases, as arguments of `from_bases`."""
    return {"encoder": str(bases / "encoder"), "llm": str(bases / "llm")}


@pytest.fixture
def ids(loaded):
    """Two questions, as the processor makes them."""
    _, processor = loaded
    return processor(["what is 3 plus 4", "how many apples and apples"])


@pytest.fixture
def logits(loaded, ids):
    """What the saved model gives for them."""
    with torch.no_grad():
        return loaded[0](**ids).logits
