"""Tiny random encoders of every family of the table, and what is found of each."""

import torch
from transformers import MBart50Tokenizer, NllbTokenizer

from layalign import LayAlignForConditionalGeneration
from layalign.source_languages import source_code, takes_source_language
from tests.model import slow_model
from tests.model.llm_cells import NONE, YES, batch_of, build, joined, near, require, row_of

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "pad_token_id": 0,
    "max_position_embeddings": 40,
}
GROUPED = SIZES | {"num_key_value_heads": 3, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 60, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 3}
TRANSLATOR = {
    "vocab_size": 300,  # with tokens for languages
    "d_model": 24,
    "encoder_layers": 3,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
}
# RoBERTa counts positions from behind its padding's.
ROBERTA = SIZES | {"pad_token_id": 1, "max_position_embeddings": 42}
OLD = {"vocab_size": 60, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 40}
ENCODERS = {
    "mt5": ("MT5EncoderModel", "MT5Config", T5),
    "umt5": ("UMT5EncoderModel", "UMT5Config", T5),
    "t5": ("T5EncoderModel", "T5Config", T5),
    "m2m_100": ("M2M100Model", "M2M100Config", TRANSLATOR),
    "mbart": ("MBartModel", "MBartConfig", TRANSLATOR),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", ROBERTA),
    "xlm-roberta-xl": ("XLMRobertaXLModel", "XLMRobertaXLConfig", ROBERTA),
    "bert": ("BertModel", "BertConfig", SIZES),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 60, "dim": 24, "hidden_dim": 32, "n_layers": 3, "n_heads": 3, "max_position_embeddings": 40},
    ),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "rembert": ("RemBertModel", "RemBertConfig", SIZES | {"input_embedding_size": 24}),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        SIZES | {"local_attention": 4, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "eurobert": ("EuroBertModel", "EuroBertConfig", GROUPED),
    "xglm": (
        "XGLMModel",
        "XGLMConfig",
        {"vocab_size": 60, "d_model": 24, "num_layers": 3, "attention_heads": 3, "ffn_dim": 32},
    ),
    "gpt2": ("GPT2Model", "GPT2Config", OLD),
    "qwen2": ("Qwen2Model", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Model", "Qwen3Config", GROUPED),
    "llama": ("LlamaModel", "LlamaConfig", GROUPED),
    "gemma3_text": (
        "Gemma3TextModel",
        "Gemma3TextConfig",
        GROUPED | {"sliding_window": 4, "use_bidirectional_attention": True},
    ),
}
CELLS = {
    "states": "One state more than layers, each what goes into a layer, the last what comes out.",
    "padding": "Padding on the left, on the right and in the middle changes nothing.",
    "packed": "Questions packed in one row are read as each is alone.",
    "cross": "Logits are those of a slow formula over the states.",
    "layers": "Any choice of states is mixed.",
    "length": "The most tokens: any number, or as many as there are learned positions.",
    "language": "Told the language of what it reads.",
}
LETTERS = "abc"


def nllb():
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    merges = [("▁", letter) for letter in LETTERS]
    return NllbTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, merges=merges)


def mbart():
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁{letter}" for letter in LETTERS)]
    return MBart50Tokenizer(vocab=[(word, 0.0) for word in words])


TOKENIZERS = {"m2m_100": nllb, "mbart": mbart}


class EncoderCells:
    """What is found of one family; each method of a cell's name passes, raises, or returns what there is."""

    def __init__(self, name, llm):
        self.name, self.llm = name, llm
        self.encoder = build(ENCODERS[name], seed=12)
        self.model = joined(self.encoder, llm)
        self.batch = batch_of()

    @torch.no_grad()
    def states(self):
        encoder, seen = self.model.encoder, []
        layers = [
            module for module in encoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 3
        ]
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            for layer in layers[0]
        ]
        out = self.model.encoder_states(self.batch["encoder_input_ids"], None)
        for handle in handles:
            handle.remove()
        require(len(out.hidden_states) == 4 and len(seen) == 3, "number")
        for state, into in zip(out.hidden_states, [*seen, out.last_hidden_state], strict=True):
            require(torch.equal(state, into), "state")

    @torch.no_grad()
    def padding(self):
        together = self.model.encode(self.batch["encoder_input_ids"], self.batch["encoder_attention_mask"])
        for index in range(3):
            alone = self.model.encode(row_of(self.batch, index)["encoder_input_ids"])
            count = alone.mask.sum()
            require(near(together.soft[index, :count], alone.soft[0]), "soft prompts")
            require(near(together.keys[index, :, :, :count], alone.keys[0]), "keys")
            require(near(together.values[index, :, :, :count], alone.values[0]), "values")

    @torch.no_grad()
    def packed(self):
        rows = [row_of(self.batch, index)["encoder_input_ids"] for index in range(3)]
        found = self.model.encode_packed(torch.cat(rows, 1), [row.shape[1] for row in rows])
        begin = 0
        for row in rows:
            alone, end = self.model.encode(row), begin + row.shape[1]
            require(near(found.soft[:, begin:end], alone.soft), "soft prompts")
            require(near(found.keys[:, :, :, begin:end], alone.keys), "keys")
            begin = end

    @torch.no_grad()
    def cross(self):
        out = self.model(**self.batch)
        expected = slow_model.slow_logits(self.model, self.batch)
        require(near(out.logits[out.attention_mask], expected[out.attention_mask]), "formula")
        bare = slow_model.bare_logits(self.model, self.batch, slow_model.NAME)
        require((expected - bare)[out.attention_mask].abs().max() > 0.05, "the cross term does nothing")

    @torch.no_grad()
    def layers(self):
        """Each choice by the slow formula. The gates of these models take the place of the first one's on the LLM."""
        for settings in (
            {"encoder_states": "last"},
            {"encoder_states": [3, 1]},
            {"encoder_states": "mean"},
            {"encoder_layers": [0, 2]},
        ):
            model = LayAlignForConditionalGeneration.from_bases(self.encoder, self.llm, **settings).eval()
            generator = torch.Generator().manual_seed(3)
            for own in model.aligner.parameters():
                own.copy_(torch.randn(own.shape, generator=generator))
            made, mask = slow_model.cross_states(model, self.batch)
            encoded = model.encode(self.batch["encoder_input_ids"], self.batch["encoder_attention_mask"])
            for layer, (keys, values) in enumerate(made):
                require(near(encoded.keys[:, layer].transpose(1, 2)[mask], keys[mask]), f"keys of {settings}")
                require(near(encoded.values[:, layer].transpose(1, 2)[mask], values[mask]), f"values of {settings}")

    @torch.no_grad()
    def length(self):
        limit = self.model.encoder_limit
        self.model.encode(torch.full((1, limit or 50), 5))
        if limit is None:
            return "any"
        require(limit == 40, "not as configured")
        try:
            self.model.encode(torch.full((1, limit + 1), 5))
        except ValueError:
            return "learned"
        raise AssertionError("one more than the limit")

    @torch.no_grad()
    def language(self):
        if self.name not in TOKENIZERS:
            return NONE
        tokenizer = TOKENIZERS[self.name]()
        require(takes_source_language(tokenizer), "not told")
        read = []
        for lang in ("sw", "th"):
            tokenizer.src_lang = source_code(tokenizer, lang)
            ids = tokenizer("a b", return_tensors="pt")["input_ids"]
            require(tokenizer.convert_tokens_to_ids(tokenizer.src_lang) in ids, "no token of it")
            read.append(self.model.encode(ids).soft)
        require((read[0] - read[1]).abs().max() > 1e-3, "it changes nothing")
        return YES


def encoder_row(name, llm):
    """{cell: what was found}; None where this transformers lacks the family."""
    if build(ENCODERS[name], seed=12) is None:
        return None
    cells = EncoderCells(name, llm)
    return {cell: getattr(cells, cell)() or YES for cell in CELLS}
