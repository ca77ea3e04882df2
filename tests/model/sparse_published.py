"""A published checkpoint and its bases as sparse files, of any size and without a byte of weights on the disk, and the conversion of such
a one in a process of its own, which tells its peak memory.

    python -m tests.model.sparse_published FOLDER 28     # gigabytes
"""

import json
import struct
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

from layalign.published import BOUNDARY


def write(folder, gigabytes):
    """Write folder/pytorch_model.bin, folder/encoder and folder/llm, all zeros in fp32, with about so many gigabytes in the checkpoint."""
    folder = Path(folder)
    encoder_config = MT5Config(vocab_size=32000, d_model=1024, d_kv=64, d_ff=2816, num_layers=2, num_heads=16)
    layer, table = 4 * (4 * 4096**2 + 3 * 4096 * 11008), 4 * 3 * 32000 * 4096
    layers = max(1, round((gigabytes * 1e9 - table) / layer))
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers, "num_attention_heads": 32}
    llm_config = LlamaConfig(vocab_size=32000, **sizes)
    state = {}
    with torch.device("meta"):
        for role, kind, config in (("encoder", MT5EncoderModel, encoder_config), ("llm", LlamaForCausalLM, llm_config)):
            model = kind(config)
            config.architectures, config.dtype = [kind.__name__], "float32"
            config.save_pretrained(folder / role)
            # T5 ties its two tables of embeddings.
            own = {name: value for name, value in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
            _sparse_safetensors(folder / role, own)
            part = model.encoder if role == "encoder" else model
            for name, value in part.state_dict().items():
                theirs = name if role == "encoder" else name.replace(".self_attn.", ".self_attn.model.")
                state[{"encoder": "encoder_mt.", "llm": "model_llm.model."}[role] + theirs] = value.shape
    for index in range(layers):
        state[f"model_llm.model.model.layers.{index}.self_attn.adaption_gate"] = (1,)
    linear = {"mapping.mlp.linear1": (2048, 1024), "mapping.mlp.linear2": (4096, 2048)}
    linear |= {"encoder_aligner.projector.fc1": (2 * layers, 2), "encoder_aligner.projector.fc2": (4096, 1024)}
    for name, shape in linear.items():
        state |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state |= {BOUNDARY: (1, 1, 4096), "llm_embedding_layer.weight": (32000, 4096)}
    with torch.serialization.skip_data():  # nothing touches the memory that torch.empty asks for
        torch.save({name: torch.empty(shape) for name, shape in state.items()}, folder / "pytorch_model.bin")


def _sparse_safetensors(folder, tensors):
    """In files of up to about 5 GB, as such models are published."""
    files, size = [{}], 0
    for name, value in tensors.items():
        if size + 4 * value.numel() > 5e9:
            files.append({})
            size = 0
        files[-1][name], size = value, size + 4 * value.numel()
    places = {}
    for index, own in enumerate(files):
        path = folder / f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        header, end = {}, 0
        for name, value in own.items():
            header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [end, end + 4 * value.numel()]}
            end += 4 * value.numel()
            places[name] = path.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def convert(folder):
    """Convert folder/pytorch_model.bin to folder/ours. -> peak memory of this process, bytes, pages of mapped files included."""
    from layalign import LayAlignForConditionalGeneration

    bases = {role: str(folder / role) for role in ("encoder", "llm")}
    LayAlignForConditionalGeneration.from_published(folder / "pytorch_model.bin", **bases).save_pretrained(
        folder / "ours"
    )
    # Not getrusage's: that begins with what the process had that started this one.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write(sys.argv[1], float(sys.argv[2]))
    print(convert(Path(sys.argv[1])))
