"""A trained part to start from: one of ours, or the published file, whole or a part of it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from layalign.folders import damage
from layalign.kernels.files import MANIFEST
from layalign.model import LayAlignForConditionalGeneration
from layalign.parts import TRAINED_PART, is_trained, part_of
from layalign.published import BOUNDARY, GATE, RENAMED, PublishedCheckpoint
from layalign.saving import LLM_FOLDER, Weights, load_trained_part

logger = logging.getLogger(__name__)

PARTS = (*TRAINED_PART, "lora")


def initial_file(path: str | os.PathLike) -> Path:
    """The file with the trained part that a path stands for.

    Args:
        path: folder of a saved model, a run, a stage or a checkpoint, or the published file (or its folder).

    Raises:
        ValueError: none there, or one that its folder's manifest says is damaged.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if not given.is_dir():
        raise ValueError(
            f"init_from: {given} is not there; it takes the folder of a trained model, or a {WEIGHTS_NAME}"
        )
    places = [given / SAFE_WEIGHTS_NAME, given / "model" / SAFE_WEIGHTS_NAME, given / "final" / SAFE_WEIGHTS_NAME]
    file = next((place for place in (*places, given / WEIGHTS_NAME) if place.is_file()), None)
    if file is None:
        raise ValueError(
            f"init_from: the folder {given} holds no trained part: neither {SAFE_WEIGHTS_NAME}, model/, final/ nor {WEIGHTS_NAME}"
        )
    if (file.parent / MANIFEST).is_file() and (reason := damage(file.parent)):
        raise ValueError(f"init_from: {file.parent} is damaged: {reason}")
    return file


class InitialWeights:
    """A trained part on disk, read and recognised.

    Args:
        path: see `initial_file`.
        only: names of PARTS; None: all, and LoRA where the file holds it: a model's own is fresh otherwise.

    Raises:
        ValueError: no trained part there, a damaged or an unsafe file, or one without anything of a part asked for.
    """

    def __init__(self, path: str | os.PathLike, only: Sequence[str] | None = None):
        self.file = initial_file(path)
        self._published: PublishedCheckpoint | None = None
        if self.file.suffix == ".safetensors":
            try:
                found = load_file(self.file)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"init_from: {self.file} is damaged or no safetensors file: {error}") from error
            self._weights = {name: value for name, value in found.items() if is_trained(name)}
        else:
            self._published = PublishedCheckpoint.read(self.file)
            # The gates get our names when there is a model: these depend on its LLM's modules.
            self._weights = _named_as_ours(self._published)
        if only is None and any(part_of(name) == "encoder" for name in self._weights):
            raise ValueError(
                f"init_from: {self.file} holds a trained encoder, which no run can begin with; only takes adapter, aligner and gates of it"
            )
        holds_lora = any(part_of(name) == "lora" for name in self._weights)
        whole = PARTS if holds_lora else TRAINED_PART
        self.only = tuple(whole if only is None else only)
        for part in self.only:
            here = part == "gates" and self._published is not None and GATE.format(0) in self._published.state
            if only is not None and not here and not any(part_of(name) == part for name in self._weights):
                raise ValueError(f"init_from: {self.file} holds nothing of the {part} that only asks for")

    def digest(self) -> str:
        """A SHA-256 over the tensors that are taken, which tells whether they are still those that a run began with."""
        weights = {name: value for name, value in self._weights.items() if part_of(name) in self.only}
        if self._published is not None and "gates" in self.only:
            gate = GATE.partition(".{}")[0]
            weights |= {
                name: value
                for name, value in self._published.state.items()
                if name.startswith(gate) and name.endswith(GATE.rpartition(".")[2])
            }
        digest = hashlib.sha256()
        for name in sorted(weights):
            value = weights[name].contiguous()
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def load_into(self, model: LayAlignForConditionalGeneration) -> None:
        """Copy the parts asked for into a model; the others stay as they are.

        Raises:
            ValueError: tensors that are missing, left over or of another shape, by name.
        """
        own_llm = self.file.parent / LLM_FOLDER
        if own_llm.is_dir() and Path(model.config.llm_name_or_path or "").resolve() != own_llm.resolve():
            logger.warning("init_from: %s was trained with the LLM in %s; give that as llm too", self.file, own_llm)
        weights = self._weights
        if self._published is not None and "gates" in self.only:
            weights = self._published.trained_part(model.llm, model.config)
        taken = {name: value for name, value in weights.items() if part_of(name) in self.only}
        kept = {name: value for name, value in model.trained_parameters() if part_of(name) not in self.only}
        try:
            load_trained_part(model, {**kept, **taken}, str(self.file))
        except ValueError as error:
            raise ValueError(f"init_from: {error}") from None


def _named_as_ours(published: PublishedCheckpoint) -> Weights:
    """Adapter and aligner of a published checkpoint."""
    weights = {
        ours + name.removeprefix(theirs): value
        for name, value in published.state.items()
        for theirs, ours in RENAMED.items()
        if name.startswith(theirs)
    }
    if BOUNDARY in published.state:
        weights["adapter.boundary"] = published.state[BOUNDARY].flatten()
    return weights
