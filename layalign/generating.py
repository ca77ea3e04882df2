"""Answering many texts: batched, in order, and from files that an interrupted job continues."""

import hashlib
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from layalign.answering import DEFAULT, Answerer, LLMAnswerer
from layalign.evaluation.journal import Journal

__all__ = ["Answerer", "LLMAnswerer", "generate_texts", "load_model"]

BATCHES_PER_WRITE = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(model_path, dtype=None, device=None):
    """(model, processor) of a folder or hub name, on `device` (default: CUDA where there is one), in evaluation mode.

    dtype: None or "auto" as stored, "float32", "bfloat16" or "float16". Raises ValueError where there is no model.
    """
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

    check_model_path(model_path)
    if dtype not in (None, "auto", *DTYPES):
        raise ValueError(f"dtype: got {dtype!r}, takes {', '.join(DTYPES)} or auto")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, takes cpu, cuda or cuda:N ({str(error).splitlines()[0]})") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {str(device)!r}, but torch finds no CUDA device")
    model = LayAlignForConditionalGeneration.from_pretrained(model_path, dtype=DTYPES.get(dtype))
    return model.to(device).eval(), LayAlignProcessor.from_pretrained(model_path)


def check_model_path(model_path):
    """Raise ValueError where `model_path` is a folder without a model, or a path to nothing; a hub name passes."""
    path = Path(model_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: the folder {path} holds no model (no config.json)")
    elif path.exists():
        raise ValueError(f"model: {path} is a file, takes the folder of a trained model")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model_path)) or path.parent.is_dir():
        raise ValueError(f"model: no such folder: {path}")


def fingerprint(model_path):
    """A SHA-256 over the trained part and the settings in a model's folder, or a hub name as it is."""
    folder = Path(model_path)
    if not folder.is_dir():
        return str(model_path)
    names = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json")
    digest = hashlib.sha256()
    for path in sorted([*(folder / name for name in names), *folder.glob("*.safetensors")]):
        if path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def generate_texts(
    model_path,
    texts=(),
    *,
    file=None,
    output=None,
    batch_size=8,
    max_new_tokens=256,
    stream=True,
    prompt=DEFAULT,
    dtype=None,
    device=None,
    write=None,
    **generate_kwargs,
):
    """Answer texts given as arguments, the lines of a file, or those of standard input.

    model_path: a folder or hub name.
    texts: list of str; file: a path, "-" for standard input. With neither, standard input is read unless it is a
        terminal. Lines of white space alone are passed over.
    output: a JSON-lines file that gets {"line": 1-based, "text", "answer"}, in order, as it goes. The same call after
        an interruption continues it; another job's file is refused. None: answers go to `write` (standard output).
    stream: show a single text's answer while it is written.
    The others are as in `load_model` and `Answerer`.

    Returns the records as a list of dicts; the throughput goes to standard error.

    Raises ValueError for no text, one that is too long for the encoder, a missing file or model, and an output of another job.
    """
    lines = _read_texts(texts, file)
    check_model_path(model_path)
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "prompt": prompt, **generate_kwargs}
    write = write or _print
    if output is None:
        return _show(_answerer(model_path, dtype, device, settings, lines), lines, stream, write)
    job = {
        "kind": "generate",
        "model": fingerprint(model_path),
        "texts": hashlib.sha256("\0".join(text for _, text in lines).encode("utf-8", "surrogatepass")).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "prompt": "the processor's" if prompt is DEFAULT else prompt,
        "dtype": dtype or "auto",
        "generate": {name: repr(value) for name, value in sorted(generate_kwargs.items())},
    }
    with Journal(output, job) as journal:
        remaining = lines[len(journal.records) :]
        if remaining:
            _write(_answerer(model_path, dtype, device, settings, remaining), remaining, journal, len(lines))
        return journal.records


def _answerer(model_path, dtype, device, settings, lines):
    """Raises ValueError for a line that cannot be answered, before any is."""
    answerer = Answerer(*load_model(model_path, dtype, device), **settings)
    answerer.check([text for _, text in lines], lambda place: f"line {lines[place][0]}")
    return answerer


def _read_texts(texts, file):
    """(1-based line, text) of every text there is."""
    if isinstance(texts, str):
        texts = [texts]
    if texts and file is not None:
        raise ValueError("texts: give either texts or a file, not both")
    if texts:
        lines = list(texts)
    elif file is not None and str(file) != "-":
        lines = _file_lines(Path(file))
    elif file is not None or not sys.stdin.isatty():
        file = "standard input"
        lines = sys.stdin.read().split("\n")
    else:
        raise ValueError("texts: nothing to answer; give a text, a file, or text on standard input")
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"texts: {file or 'the text given'} is empty")
    return found


def _file_lines(path):
    if not path.is_file():
        raise ValueError(f"file: no such file: {path}")
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"file: {path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _show(answerer, lines, stream, write):
    started = time.perf_counter()
    records = []
    streamer = None
    if stream and len(lines) == 1:
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text, stream_end=False):
                write(text + ("\n" if stream_end else ""))

        streamer = Streamer(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for start in range(0, len(lines), answerer.batch_size):
        part = lines[start : start + answerer.batch_size]
        records += _records(part, answerer([text for _, text in part], streamer))
        if streamer is None:
            write("".join(record["answer"] + "\n" for record in records[-len(part) :]))
    _report(len(records), answerer.new_tokens, time.perf_counter() - started)
    return records


def _write(answerer, lines, journal, total):
    started = time.perf_counter()
    window = answerer.batch_size * BATCHES_PER_WRITE
    with tqdm(total=total, initial=total - len(lines), unit="text", desc="generate") as bar:
        for start in range(0, len(lines), window):
            part = lines[start : start + window]
            journal.append(_records(part, answerer([text for _, text in part])))
            bar.update(len(part))
    _report(len(lines), answerer.new_tokens, time.perf_counter() - started)


def _print(text):
    """Without the flush a terminal would hold a streamed answer back until its line ends."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _records(lines, answers):
    return [
        {"line": number, "text": text, "answer": answer} for (number, text), answer in zip(lines, answers, strict=True)
    ]


def _report(texts, tokens, seconds):
    print(
        f"{texts} text{'s' * (texts != 1)}, {tokens} tokens in {seconds:.1f} s "
        f"({texts / seconds:.2f} texts/s, {tokens / seconds:.1f} tokens/s)",
        file=sys.stderr,
    )
