"""Tiny random bases with word-level tokenizers, for tests that need a model and no knowledge in it."""

from pathlib import Path

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]  # ids 0 to 3

# A device map of the LLM: its second layer on the disk.
MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
MAP |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")


def word_tokenizer(words, *, end_after_text, apart_from_signs=False):
    """A WordLevel tokenizer over SPECIAL and `words`, with </s> after each text if asked; texts are split at spaces, and
    words from signs where asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace() if apart_from_signs else pre_tokenizers.WhitespaceSplit()
    if end_after_text:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_bases(folder, encoder_tokenizer, tokenizer, *, encoder_heads=2, initializer_range=0.3):
    """Write an mT5 to folder/encoder and a Llama to folder/llm, with their tokenizers; weights are those of seed 0.

    -> {"encoder": path, "llm": path}, as arguments of `from_bases`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

    folder = Path(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 32 // encoder_heads, "d_ff": 64, "num_layers": 2, "num_heads": encoder_heads}
    MT5EncoderModel(MT5Config(vocab_size=len(encoder_tokenizer), **sizes)).save_pretrained(folder / "encoder")
    encoder_tokenizer.save_pretrained(folder / "encoder")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        initializer_range=initializer_range,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
    )
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return {"encoder": str(folder / "encoder"), "llm": str(folder / "llm")}
