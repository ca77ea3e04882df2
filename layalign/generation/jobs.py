"""`layalign generate`: texts from arguments, files or standard input, and jobs that go on after an interruption."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from layalign.generation.texts import Answerer
from layalign.journal import Journal, Record
from layalign.loading import check_model_path, fingerprint, load_model
from layalign.prompts import DEFAULT_PROMPT

BATCHES_PER_WRITE = 4


class Line(NamedTuple):
    """A text and its place among the lines given, counted from 1."""

    number: int
    text: str


def generate_texts(
    model_path: str | Path,
    texts: str | Sequence[str] = (),
    *,
    file: str | Path | None = None,
    output: str | Path | None = None,
    stream: bool = True,
    write: Callable[[str], None] | None = None,
    lang: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    devices: str | None = None,
    **answering: Any,
) -> list[Record]:
    """Answer texts given as arguments, the lines of a file, or those of standard input.

    Args:
        model_path: a folder or hub name.
        texts: the texts.
        file: a path, "-" for standard input. With neither, standard input is read unless it is a terminal. Lines of white
            space alone are passed over.
        output: a JSON-lines file that gets {"line": 1-based, "text", "answer"}, in order, as it goes. The same call after
            an interruption continues it; another job's file is refused. None: answers go to `write` (standard output).
        stream: show a single text's answer while it is written.
        write: what takes answers where there is no output.
        lang: the texts' language, for encoders and prompts that are told it.
        dtype, device, devices: as in `layalign.loading.load_model`.
        answering: as in `layalign.generation.texts.Answerer`: max_new_tokens, batch_size, prompt, encoder_max_length, and
            anything transformers' generate takes.

    Returns:
        The records. The throughput goes to standard error.

    Raises:
        ValueError: no text, one that is too long for the encoder, a missing file or model, an output of another job.
    """
    lines = _read_texts(texts, file)
    check_model_path(model_path)
    answering = {"max_new_tokens": 256, "prompt": DEFAULT_PROMPT, **answering}

    def load(lines: list[Line]) -> Answerer:
        """Raises ValueError for a line that cannot be answered, before any is."""
        answerer = Answerer(*load_model(model_path, dtype, device, devices), **answering)
        given = [line.text for line in lines]
        answerer.check(given, lambda place: f"line {lines[place].number}", lang and [lang] * len(given))
        return answerer

    if output is None:
        return _show(load(lines), lines, lang, stream, write or _print)
    with Journal(output, _description(model_path, lines, lang, dtype, **answering)) as journal:
        remaining = lines[len(journal.records) :]
        if remaining:
            _write(load(remaining), remaining, lang, journal, len(lines))
        return journal.records


def _description(
    model_path: str | Path,
    lines: list[Line],
    lang: str | None,
    dtype: str | None,
    *,
    max_new_tokens: int,
    prompt: str | None,
    batch_size: int | None = None,
    **generate_kwargs: Any,
) -> Record:
    """What tells this job from others; the batch size changes no answer."""
    told = {} if lang is None else {"lang": lang}  # a job that is not told it stays the same job
    return {
        **told,
        "kind": "generate",
        "model": fingerprint(model_path),
        "texts": hashlib.sha256("\0".join(line.text for line in lines).encode("utf-8", "surrogatepass")).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "prompt": "the processor's" if prompt == DEFAULT_PROMPT else prompt,
        "dtype": dtype or "auto",
        "generate": {name: repr(value) for name, value in sorted(generate_kwargs.items())},
    }


def _read_texts(texts: str | Sequence[str], file: str | Path | None) -> list[Line]:
    """Every text there is."""
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
    found = [Line(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"texts: {file or 'the text given'} is empty")
    return found


def _file_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"file: no such file: {path}")
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"file: {path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _show(
    answerer: Answerer, lines: list[Line], lang: str | None, stream: bool, write: Callable[[str], None]
) -> list[Record]:
    started = time.perf_counter()
    records: list[Record] = []
    streamer = None
    if stream and len(lines) == 1:
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                write(text + ("\n" if stream_end else ""))

        streamer = Streamer(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for first in range(0, len(lines), answerer.batch_size):
        part = lines[first : first + answerer.batch_size]
        records += _records(part, answerer([line.text for line in part], streamer, lang and [lang] * len(part)))
        if streamer is None:
            write("".join(record["answer"] + "\n" for record in records[-len(part) :]))
    _report(len(records), answerer.new_tokens, time.perf_counter() - started)
    return records


def _write(answerer: Answerer, lines: list[Line], lang: str | None, journal: Journal, total: int) -> None:
    started = time.perf_counter()
    window = answerer.batch_size * BATCHES_PER_WRITE
    with tqdm(total=total, initial=total - len(lines), unit="text", desc="generate") as bar:
        for first in range(0, len(lines), window):
            part = lines[first : first + window]
            journal.append(_records(part, answerer([line.text for line in part], None, lang and [lang] * len(part))))
            bar.update(len(part))
    _report(len(lines), answerer.new_tokens, time.perf_counter() - started)


def _print(text: str) -> None:
    """Without the flush a terminal would hold a streamed answer back until its line ends."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _records(lines: list[Line], answers: list[str]) -> list[Record]:
    return [
        {"line": line.number, "text": line.text, "answer": answer} for line, answer in zip(lines, answers, strict=True)
    ]


def _report(texts: int, tokens: int, seconds: float) -> None:
    print(
        f"{texts} text{'s' * (texts != 1)}, {tokens} tokens in {seconds:.1f} s "
        f"({texts / seconds:.2f} texts/s, {tokens / seconds:.1f} tokens/s)",
        file=sys.stderr,
    )
