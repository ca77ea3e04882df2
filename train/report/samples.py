"""A few records of a run for its report: what they ask, what is wanted, and, where asked, what the trained model answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layalign.kernels.files import read_json, write_json
from layalign.loading import load_model
from layalign.train.run_folder import SAMPLES

if TYPE_CHECKING:
    from layalign.processor import LayAlignProcessor
    from layalign.train.data.collate import StageData

_KEPT = 24
_NEW_TOKENS = 256


def keep_samples(folder: Path, data: StageData, processor: LayAlignProcessor) -> None:
    """Write some of a stage's records to `folder`'s samples.json: held-out ones where there are any, a language after the other.

    Args:
        folder: of the run.
        data: the stage's.
        processor: whose tokenizers made the records.
    """
    records = data.train if data.held_out is None else data.held_out
    languages = {name: places[:_KEPT].tolist() for name, places in records.by_language().items()}
    samples: list[dict[str, Any]] = []
    for turn in range(_KEPT):
        for name, places in languages.items():
            if turn < len(places) and len(samples) < _KEPT:
                question, text, length = records[places[turn]]
                samples.append(
                    {
                        "lang": name,
                        "held_out": data.held_out is not None,
                        "source": processor.encoder_tokenizer.decode(question, skip_special_tokens=True),
                        "target": processor.tokenizer.decode(text[length:], skip_special_tokens=True),
                        "encoder_ids": question.tolist(),
                        "prompt_ids": text[:length].tolist(),
                    }
                )
    write_json(folder / SAMPLES, samples)


def answer_samples(folder: Path, count: int, device: str | None = None) -> None:
    """Let the run's trained model answer the first `count` of its samples; the answers are kept in samples.json.

    Args:
        folder: of the run.
        count: how many.
        device: as `load_model` takes it.

    Raises:
        ValueError: no trained model there yet, no samples, or broken ones.
    """
    if not (folder / "model").is_dir():
        raise ValueError(f"--samples: {folder} has no trained model yet (model/); the report can be made without")
    try:
        samples: list[dict[str, Any]] = read_json(folder / SAMPLES, list)
        asked = [(sample["encoder_ids"], sample["prompt_ids"]) for sample in samples[:count]]
    except FileNotFoundError:
        raise ValueError(f"--samples: {folder} holds no {SAMPLES}; runs of an earlier version kept none") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--samples: {folder / SAMPLES} is damaged ({error!r}); remove it and make the report without"
        ) from None
    model, processor = load_model(str(folder / "model"), device=device)
    for sample, (question, prompt) in zip(samples, asked, strict=False):
        encoder_ids = torch.tensor([question], device=model.device)
        ids = torch.tensor([prompt], dtype=torch.long, device=model.device) if prompt else None
        with torch.inference_mode():
            made = model.generate(
                encoder_input_ids=encoder_ids, input_ids=ids, max_new_tokens=_NEW_TOKENS, do_sample=False
            )
        sample["answer"] = processor.tokenizer.decode(made[0], skip_special_tokens=True)
    write_json(folder / SAMPLES, samples)
