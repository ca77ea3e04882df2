"""`layalign info`: what a saved model is, read from its folder alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from layalign.arguments import Arguments
from layalign.base_models import written_down
from layalign.configuration import SETTINGS, LayAlignConfig, encoder_depth
from layalign.loading import check_model_path, fingerprint
from layalign.parts import part_of
from layalign.saving import LLM_FOLDER, read_settings


def model_info(model_path: str) -> dict[str, Any]:
    """Bases, settings, trained parameters and fingerprint of a saved model; its weights are not loaded.

    Args:
        model_path: folder or hub name.

    Returns:
        JSON values: "model", "fingerprint" (of the trained part and its settings, as journals and results have it), "bases" by role
        (name, where it lies now or None, what is wrong, revision, class, layers, width, vocabulary), "trained" (parameters by part and
        "total", "dtype") and "settings".

    Raises:
        ValueError: no LayAlign model there, or one without whole weights.
    """
    check_model_path(model_path)
    config = read_settings(str(model_path), None, Arguments())
    return {
        "model": str(model_path),
        "fingerprint": fingerprint(model_path),
        "bases": {
            role: _base(role, config, str(model_path))
            for role in ("encoder", "llm")
            if getattr(config, f"{role}_config") is not None
        },
        "trained": _trained(str(model_path)),
        "settings": {name: getattr(config, name) for name in SETTINGS},
    }


def _base(role: str, config: LayAlignConfig, model_path: str) -> dict[str, Any]:
    own = getattr(config, f"{role}_config")
    text = own.get_text_config()
    found = wrong = None
    place: dict[str, Any] = {}
    if role == "llm" and config.train_llm:
        found, wrong = f"{model_path}/{LLM_FOLDER}", "trained with the model and saved with it"
    else:
        try:
            found, place = written_down(role, config, model_path)
        except ValueError as error:
            wrong = str(error)
    return {
        "name": getattr(config, f"{role}_name_or_path"),
        "found": found,
        **({"note": wrong} if wrong else {}),
        **place,
        "class": (own.architectures or [own.model_type])[0],
        "layers": encoder_depth(own) if role == "encoder" else text.num_hidden_layers,
        "width": text.hidden_size,
        "vocabulary": text.vocab_size,
        "dtype": str(own.dtype).removeprefix("torch."),
    }


def _trained(model_path: str) -> dict[str, Any]:
    """Numbers of trained values by part: adapter, aligner, gates, LoRA."""
    try:
        file = cached_file(model_path, SAFE_WEIGHTS_NAME)
        with safe_open(file, "pt") as weights:
            counts: Counter[str] = Counter()
            dtypes = set()
            for name in weights.keys():  # noqa: SIM118 it is no mapping
                own = weights.get_slice(name)
                counts[part_of(name) or name] += math.prod(own.get_shape())
                dtypes.add(own.get_dtype())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{model_path!r} has no whole {SAFE_WEIGHTS_NAME} with the trained part: {error}") from error
    return {**counts, "total": counts.total(), "dtype": ", ".join(sorted(dtypes))}


def info_text(info: dict[str, Any]) -> str:
    """`model_info` for people.

    Args:
        info: what it returned.
    """
    lines = [f"model        {info['model']}", f"fingerprint  {info['fingerprint']}", ""]
    for role, base in info["bases"].items():
        revision = f" at {base['revision']}" if "revision" in base else ""
        where = "" if base["found"] in (base["name"], None) else f", found in {base['found']}"
        sizes = f"{base['layers']} layers, width {base['width']:,}, {base['vocabulary']:,} tokens, {base['dtype']}"
        lines += [
            f"{role:<13}{base['name'] or 'not written down'}{revision}{where}",
            f"{'':<13}{base['class']}: {sizes}",
        ]
        if "note" in base:
            lines.append(f"{'':<13}{base['note']}")
    lines.append("")
    trained = dict(info["trained"])
    dtype, total = trained.pop("dtype"), trained.pop("total")
    lines.append(f"trained      {total:,} parameters, {dtype}")
    lines += [f"{'':<13}{part:<8} {count:>15,}" for part, count in sorted(trained.items())]
    lines += ["", *(f"{name:<24}{value}" for name, value in sorted(info["settings"].items()))]
    return "\n".join(lines)


def print_info(model: str, as_json: bool) -> None:
    """For the command line.

    Args:
        model: folder or hub name.
        as_json: one JSON object instead of a text.

    Raises:
        ValueError: see `model_info`.
    """
    import json

    info = model_info(model)
    print(json.dumps(info, indent=2, ensure_ascii=False) if as_json else info_text(info))
