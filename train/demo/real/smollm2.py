"""Converter of a llama-architecture GGUF file (SmolLM2-135M-Instruct, Q4_1) to a transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from layalign.train.demo.real.conversion import published_value, renamed, write_folder

CONVERTER_VERSION = 1
_CONTROL = 3
_CONFIG = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: str | Path, folder: str | Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (fp32) and the tokenizer's files into `folder`.

    Raises:
        ValueError: naming the file, which is no GGUF file, cut short, or of another kind of model.
    """
    try:
        reader = gguf.GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(fields)
        state = _state_dict(reader.tensors, config)
        tokenizer = _tokenizer(fields)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{source}: not a whole GGUF file of a SmolLM2 model ({error})") from error
    write_folder(folder, config, state, tokenizer)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _config(fields: dict[str, Any]) -> LlamaConfig:
    if fields["general.architecture"] != "llama":
        raise ValueError(f"architecture {fields['general.architecture']!r}, this converter reads 'llama'")
    return LlamaConfig(
        **renamed(_CONFIG, fields),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        rms_norm_eps=published_value(fields["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _state_dict(tensors: list[gguf.ReaderTensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    state = {}
    for tensor in tensors:
        short = tensor.name.removesuffix(".weight")
        weight = numpy.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
        if short.startswith("blk."):
            _, layer, short = short.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[short]}.weight"
            if heads := {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short):
                weight = _split_halves(weight, heads)
        else:
            name = f"{_NAMES[short]}.weight"
        state[name] = torch.tensor(weight)
    config.tie_word_embeddings = "lm_head.weight" not in state
    expected = 2 + len(_LAYER_NAMES) * config.num_hidden_layers + ("lm_head.weight" in state)
    if len(state) != expected:
        raise ValueError(f"{len(state)} tensors, expected {expected}")
    return state


def _split_halves(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows of each head from GGUF's interleaved rotary pairs (0, h, 1, h + 1, ...) to transformers' two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    if (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer {fields['tokenizer.ggml.model']}/{fields['tokenizer.ggml.pre']}, not gpt2/smollm")
    pieces = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    controls = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in controls])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=pieces[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=pieces[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=pieces[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=pieces[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
