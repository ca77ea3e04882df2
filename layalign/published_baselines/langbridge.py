"""A published LangBridge folder: transformers' own layout, with encoder, LLM and alignment in one state dict."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from layalign import mapped
from layalign.kernels.files import read_json
from layalign.published import read_tensors
from layalign.saving import Weights

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Its alignments: the adapter that each is, and the names of its parts.
ADAPTERS = {"linear": "linear", "ffn": "gelu"}
RENAMED = {
    "linear": {"linear.": "adapter.linear2.", "enc_eos": "adapter.boundary"},
    "ffn": {"ffn.0.": "adapter.linear1.", "ffn.2.": "adapter.linear2.", "enc_eos": "adapter.boundary"},
}
# What its training adds to the encoder's tokenizer, in this order: white space that mT5's takes for one space.
ADDED_TOKENS = [*string.whitespace[1:], "  ", "   ", "    "]


@dataclass(frozen=True)
class LangBridge:
    """A published LangBridge folder, read and recognised.

    Attributes:
        path: the folder, for messages.
        state: name -> tensor.
        encoder, llm: the names of its bases.
        alignment: "linear" or "ffn".
    """

    path: str
    state: Weights
    encoder: str
    llm: str
    alignment: str

    @classmethod
    def read(cls, checkpoint: str | Path) -> LangBridge:
        """The folder's content.

        Raises:
            ValueError: no such folder, or a file of it that is missing, damaged, unsafe or another model's.
        """
        settings = cls.settings(checkpoint)
        state = _state(Path(checkpoint))
        if not any(name.startswith("lb.alignment.") for name in state):
            raise ValueError(f"{checkpoint}: not a LangBridge state dict (no lb.alignment)")
        return cls(str(checkpoint), state, settings["enc"], settings["lm"], settings["alignments"])

    @staticmethod
    def settings(checkpoint: str | Path) -> dict[str, str]:
        """enc, lm and alignments of its config.json. Raises as `read`."""
        file = Path(checkpoint) / "config.json"
        if not file.is_file():
            raise ValueError(f"checkpoint: {checkpoint} is no LangBridge folder (no config.json)")
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        if not isinstance(settings, dict) or not all(isinstance(settings.get(name), str) for name in ("enc", "lm")):
            raise ValueError(f"{file}: not a LangBridge configuration, which names its bases as enc and lm")
        kind = settings.setdefault("alignments", "linear")
        if kind not in ADAPTERS:
            raise ValueError(
                f"{file}: alignments {kind!r}; LayAlign's adapters are LangBridge's {' and '.join(ADAPTERS)}"
            )
        return settings

    @property
    def adapter(self) -> str:
        """The kind of adapter in it."""
        return ADAPTERS[self.alignment]

    def trained(self) -> Weights:
        """The trained part by LayAlign's names."""
        prefix = "lb.alignment."
        own = {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}
        return renamed(own, RENAMED[self.alignment], self.path)

    def put_into(self, role: str, module: PreTrainedModel) -> bool:
        """Copy the folder's "encoder" or "llm" into a base, unless they are the same; whether they were not.

        Raises:
            ValueError: weights that are missing or of another shape.
        """
        own = module.state_dict()
        tied: dict[int, list[str]] = {}
        for name, value in own.items():
            tied.setdefault(value.data_ptr(), []).append(name)
        theirs = {name: self._of_base(role, module, tied[value.data_ptr()], value.shape) for name, value in own.items()}
        if all(mapped.equal(theirs[name], value) for name, value in own.items()):
            return False
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(theirs[name])
        return True

    def _of_base(self, role: str, module: PreTrainedModel, names: list[str], shape: torch.Size) -> torch.Tensor:
        """A weight of a base that has these names; one of them may be all that the folder keeps."""
        if role == "encoder":
            published = [f"lb.enc.{name}" for name in names]
        else:  # the LLM without its head, the head, and the embeddings once more
            inner = f"{module.base_model_prefix}."
            published = [
                f"lb.lm.{name.removeprefix(inner)}" if name.startswith(inner) else f"lb.{name}" for name in names
            ]
            if any(name.endswith("embed_tokens.weight") for name in names):
                published.append("lb.embeddings.weight")
        found = next((self.state[name] for name in published if name in self.state), None)
        if found is None or found.shape != shape:
            what = "there is no" if found is None else f"shape {tuple(found.shape)} instead of {tuple(shape)} of"
            raise ValueError(f"{self.path}: {what} {published[0]}: it was trained on another {role} than the given one")
        return found


def renamed(state: Weights, names: Mapping[str, str], origin: str) -> Weights:
    """A trained part by LayAlign's names.

    Args:
        state: it by the names of its authors.
        names: beginnings of theirs, and ours.
        origin: where it comes from, for messages.

    Raises:
        ValueError: a part is missing.
    """
    trained = {}
    for theirs, ours in names.items():
        found = [name for name in state if name.startswith(theirs)]
        if not found:
            raise ValueError(f"{origin}: no tensor {theirs.rstrip('.')}; it has {', '.join(sorted(state)[:4])}")
        for name in found:
            trained[ours + name.removeprefix(theirs)] = state[name]
    trained["adapter.boundary"] = trained["adapter.boundary"].flatten()
    return trained


def _state(folder: Path) -> Weights:
    """All tensors of a folder that transformers wrote, in one file or several."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
                raise ValueError(f"{index}: holds no weight_map of tensors' names to files; restore or remove it")
            files = sorted(set(named.values()))
            if outside := [file for file in files if file != Path(file).name]:
                raise ValueError(f"{index}: names a file outside its folder: {outside[0]}")
            return {key: value for file in files for key, value in _tensors(folder / file).items()}
    raise ValueError(f"checkpoint: {folder} holds no weights ({' or '.join(WEIGHTS)}, or their index)")


def _tensors(file: Path) -> Weights:
    if file.suffix != ".safetensors":
        return read_tensors(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing, damaged or no safetensors file: {error}") from error
