"""`layalign generate`: texts from arguments, files or standard input, and jobs that go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from layalign.generation.lines import Line, read_lines
from layalign.generation.logits import NaNLogits
from layalign.generation.mixin import chosen_setting
from layalign.generation.texts import BATCH_SIZE, MAX_NEW_TOKENS, Answerer
from layalign.journal import Check, Journal, Record
from layalign.loading import check_model_path, fingerprint, load_model
from layalign.prompts import DEFAULT_PROMPT

BATCHES_PER_WRITE = 4
LOADING = ("dtype", "device", "devices", "encoder", "llm")
ENGINES = ("transformers", "vllm")
ON_BAD_LINE = ("error", "skip")
_SHOWN = 10
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Invalid buffer size")


class Asking(NamedTuple):
    """How the lines of a job are asked: in what language, by what seed they are sampled, whether bad ones are left out, by what engine,
    where it is not transformers, and how many at a time, where answers depend on it: a batch draws from one seed."""

    lang: str | None
    seed: int | None
    skip: bool = False
    engine: str | None = None
    batch_size: int | None = None

    def __call__(self, answerer: Answerer, lines: list[Line], streamer: Any = None) -> list[Record]:
        """A record a line; that of a line which cannot be answered has no answer and says why.

        Raises:
            ValueError: such a line, where none is left out.
        """
        good = [line for line in lines if line.wrong is None]
        answers = dict(zip([line.number for line in good], self._answers(answerer, good, streamer), strict=True))
        found = [answers.get(line.number, line) for line in lines]
        refuse([line for line in found if isinstance(line, Line)], self.skip)
        return [
            {"line": line.number, "text": line.text, "answer": None, "error": answer.wrong}
            if isinstance(answer, Line)
            else {"line": line.number, "text": line.text, "answer": answer}
            for line, answer in zip(lines, found, strict=True)
        ]

    def _answers(self, answerer: Answerer, lines: list[Line], streamer: Any = None) -> list[str | Line]:
        """An answer each; the line in its place where there is not enough memory for it, or the model's logits are NaN."""
        if not lines:
            return []
        if self.seed is not None:
            torch.manual_seed(self.seed + lines[0].number)
            answerer.seeds = [self.seed + line.number for line in lines]
        try:
            return list(answerer([line.text for line in lines], streamer, self.lang and [self.lang] * len(lines)))
        except NaNLogits as error:
            reason = str(error)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(said in str(error) for said in _NO_MEMORY):
                raise
            reason = ""
        if len(lines) > 1:
            return [answer for line in lines for answer in self._answers(answerer, [line])]
        if not reason:
            count = answerer.encoder_tokens(lines[0].text)
            reason = f"got {count} tokens, for which there is not enough memory here; encoder_max_length cuts it"
        return [lines[0]._replace(wrong=reason)]


def refuse(bad: Sequence[Line], skip: bool = False) -> None:
    """Raise ValueError for lines that cannot be answered, unless they are left out."""
    if bad and not skip:
        listed = _listed([(line.number, line.wrong) for line in bad])
        raise ValueError(f"{listed}; on_bad_line='skip' (--on-bad-line skip) answers the others")


def _listed(bad: Sequence[tuple[Any, Any]]) -> str:
    """(number, reason) of the first lines, and how many more there are."""
    shown = "; ".join(f"line {number}: {reason}" for number, reason in bad[:_SHOWN])
    return shown + (f"; and {len(bad) - _SHOWN} more lines" if len(bad) > _SHOWN else "")


def generate_texts(
    model_path: str | Path,
    texts: str | Sequence[str] = (),
    *,
    file: str | Path | None = None,
    output: str | Path | None = None,
    stream: bool = True,
    write: Callable[[str], None] | None = None,
    lang: str | None = None,
    seed: int | None = None,
    on_bad_line: str = "error",
    engine: str = "transformers",
    **answering: Any,
) -> list[Record]:
    """Answer texts given as arguments, the lines of a file, or those of standard input.

    Args:
        model_path: a folder or hub name.
        texts: the texts.
        file: a path, "-" for standard input. With neither, standard input is read unless it is a terminal. Lines of white
            space alone are passed over.
        output: a JSON-lines file that gets {"line": 1-based, "text", "answer"}, in order, as it goes. The same call after
            an interruption continues it; another job's file is refused, and one of whose lines one was changed, lost or
            doubled. None: answers go to `write` (standard output).
        stream: show a single text's answer while it is written.
        write: what takes answers where there is no output.
        lang: the texts' language, for encoders and prompts that are told it.
        seed: of sampling; drawn anew for every batch, by its first line, so that a job that goes on does not repeat itself, and gives
            with the same batch size the same again; with vllm for every line, whatever the batch.
        on_bad_line: "error": a line that cannot be answered (not UTF-8, a surrogate, too long for the encoder) is told before
            any is answered; "skip": it gets the answer null and an "error" that says why (an empty line on `write`).
        engine: "transformers", or "vllm" where that is installed (`layalign.serving`): for long files, as it never waits for the
            longest answer of a batch. Of loading it takes the dtype, of sampling temperature, top_p, top_k and the seed.
        answering: dtype, device, devices, encoder and llm as in `layalign.loading.load_model`, and the rest as in
            `layalign.generation.texts.Answerer`: max_new_tokens, batch_size, prompt, encoder_max_length, and
            anything transformers' generate takes.

    Returns:
        The records. The throughput goes to standard error.

    Raises:
        ValueError: no text, one that cannot be answered, a missing file or model, an output of another job.
    """
    if on_bad_line not in ON_BAD_LINE:
        raise ValueError(f"on_bad_line: got {on_bad_line!r}, takes {' or '.join(ON_BAD_LINE)}")
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, takes {' or '.join(ENGINES)}")
    lines = read_lines(texts, file)
    check_model_path(model_path)
    length = chosen_setting("max_new_tokens", answering) or MAX_NEW_TOKENS
    answering = {"max_new_tokens": length, "prompt": DEFAULT_PROMPT, **answering}
    loading = {name: answering.pop(name) for name in LOADING if name in answering}
    stream = stream and chosen_setting("num_beams", answering) in (None, 1) and engine == "transformers"
    drawn_together = answering.get("batch_size", BATCH_SIZE) if seed is not None and engine == "transformers" else None
    asking = Asking(lang, seed, on_bad_line == "skip", None if engine == "transformers" else engine, drawn_together)
    refuse([line for line in lines if line.wrong], asking.skip)

    def load(lines: list[Line]) -> tuple[Answerer, list[Line]]:
        """The model, and the lines with what is wrong with them; ValueError where that is not to be left out."""
        answerer = _answerer(model_path, engine, loading, answering)
        answerer.check_languages(lang and [lang])
        lines = [line if line.wrong else line._replace(wrong=answerer.unanswerable(line.text)) for line in lines]
        refuse([line for line in lines if line.wrong], asking.skip)
        return answerer, lines

    if output is None:
        return _show(*load(lines), asking, stream, write or _print)
    job = _description(model_path, lines, asking, loading.get("dtype"), **answering)
    with Journal(output, job, check=_checker(lines)) as journal:
        done = len(journal.records)
        if done < len(lines):
            # A batch of which a part is there is drawn again as a whole.
            _write(*load(lines[done - done % (drawn_together or 1) :]), asking, journal, len(lines))
        return journal.records


def _answerer(model_path: str | Path, engine: str, loading: dict[str, Any], answering: dict[str, Any]) -> Answerer:
    if engine == "transformers":
        return Answerer(*load_model(model_path, **loading), **answering)
    placed = [name for name, value in loading.items() if value is not None and name != "dtype"]
    if placed:
        raise ValueError(f"{', '.join(placed)}: the engine vllm takes the bases where the model says, on all devices")
    from layalign.serving.answering import EngineAnswerer

    return EngineAnswerer(model_path, dtype=loading.get("dtype"), **answering)


def _checker(lines: Sequence[Line]) -> Check:
    """Finds a record that is not the answer to the line at its place."""

    def wrong(place: int, record: Record) -> str | None:
        if place >= len(lines):
            return f"one line too many, {len(lines)} were asked"
        number, text, _ = lines[place]
        if (record.get("line"), record.get("text")) != (number, text) or "answer" not in record:
            return f"not the answer to line {number} of what is asked"
        return None

    return wrong


def _description(
    model_path: str | Path,
    lines: list[Line],
    asking: Asking,
    dtype: str | None,
    *,
    max_new_tokens: int,
    prompt: str | None,
    batch_size: int | None = None,
    **generate_kwargs: Any,
) -> Record:
    """What tells this job from others; the batch size changes none but sampled answers and as bf16 and fp16 round."""
    for name, value in generate_kwargs.items():
        if " at 0x" in repr(value):
            raise ValueError(
                f"{name}: got {value!r}, which the next start could not know again, so that a job with an output would not go on; "
                "leave output out"
            )
    # A job that is not told them stays the same job.
    told = {name: value for name, value in asking._asdict().items() if value not in (None, False)}
    return {
        **told,
        "kind": "generate",
        "model": fingerprint(model_path),
        "texts": hashlib.sha256(json.dumps([line.text for line in lines]).encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "prompt": "the processor's" if prompt == DEFAULT_PROMPT else prompt,
        "dtype": dtype or "auto",
        "generate": {name: repr(value) for name, value in sorted(generate_kwargs.items())},
    }


def _show(
    answerer: Answerer, lines: list[Line], asking: Asking, stream: bool, write: Callable[[str], None]
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
        records += asking(answerer, part, streamer)
        if streamer is None or records[-1]["answer"] is None:
            write("".join((record["answer"] or "") + "\n" for record in records[-len(part) :]))
    _report(records, answerer.new_tokens, time.perf_counter() - started)
    return records


def _write(answerer: Answerer, lines: list[Line], asking: Asking, journal: Journal, total: int) -> None:
    started = time.perf_counter()
    window = asking.batch_size or answerer.batch_size * BATCHES_PER_WRITE
    before = len(journal.records)
    with tqdm(total=total, initial=before, unit="text", desc="generate") as bar:
        for first in range(0, len(lines), window):
            part = lines[first : first + window]
            there = len(journal.records) - (total - len(lines)) - first
            journal.append(asking(answerer, part)[there:])
            bar.update(len(part) - there)
    _report(journal.records[before:], answerer.new_tokens, time.perf_counter() - started)


def _print(text: str) -> None:
    """Without the flush a terminal would hold a streamed answer back until its line ends."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(records: Sequence[Record], tokens: int, seconds: float) -> None:
    texts = len(records)
    print(
        f"{texts} text{'s' * (texts != 1)}, {tokens} tokens in {seconds:.1f} s "
        f"({texts / seconds:.2f} texts/s, {tokens / seconds:.1f} tokens/s)",
        file=sys.stderr,
    )
    bad = [(record["line"], record["error"]) for record in records if record["answer"] is None]
    if bad:
        print(f"{len(bad)} not answered: {_listed(bad)}", file=sys.stderr)
