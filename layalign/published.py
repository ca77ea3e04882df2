"""The authors' checkpoint format: one `pytorch_model.bin` with the state dict of the whole model, bases included.

This file reads, checks and writes it and builds no model: `model.py` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import WEIGHTS_NAME, cached_file

from layalign import mapped
from layalign.base_samples import is_unused
from layalign.configuration import LayAlignConfig
from layalign.kernels.files import whole_file
from layalign.projections import attention_modules
from layalign.quantization import is_quantized
from layalign.saving import Weights

RENAMED = {
    "mapping.mlp.linear1.": "adapter.linear1.",
    "mapping.mlp.linear2.": "adapter.linear2.",
    "encoder_aligner.projector.fc1.": "aligner.mix.",
    "encoder_aligner.projector.fc2.": "aligner.project.",
    "encoder_aligner.projector.fc3.": "aligner.project2.",
}
BOUNDARY = "mapping.end_boundary"
GATE = "model_llm.model.model.layers.{}.self_attn.adaption_gate"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FAMILIES = ("llama", "mistral")
# Settings of which the published code has these alone, beside those of its aligner.
EXPRESSIBLE = {"adapter": "mlp", "gate": "scalar", "llm_layers": None, "adapter_width": None, "aligner_width": None}
# How zip archives begin; what torch.save wrote without one around it cannot be mapped.
ARCHIVE = b"PK\x03\x04"


@dataclass(frozen=True)
class PublishedCheckpoint:
    """The state dict of a published checkpoint, read and recognised.

    Attributes:
        path: where it was read from, for messages.
        state: name -> tensor, memory-mapped.
    """

    path: str
    state: Weights

    @classmethod
    def read(cls, checkpoint: str | Path, **kwargs: Any) -> PublishedCheckpoint:
        """Read the tensors of a `pytorch_model.bin`: a pickle with code in it is refused, unexecuted.

        Args:
            checkpoint: the file, its folder or a hub name.
            kwargs: that find it, as transformers takes them (revision, subfolder, ...).

        Raises:
            ValueError: not such a checkpoint, a damaged or an unsafe file.
        """
        state = read_tensors(published_file(checkpoint, **kwargs))
        if "encoder_aligner.projector.fc1.weight" not in state or "mapping.mlp.linear1.weight" not in state:
            raise ValueError(
                f"{checkpoint}: not a published LayAlign state dict (no encoder_aligner.projector.fc1 or mapping.mlp)"
            )
        return cls(str(checkpoint), state)

    @property
    def aligner(self) -> str:
        """The kind of aligner in it."""
        return "mlp" if "encoder_aligner.projector.fc3.weight" in self.state else "linear"

    @property
    def encoder_layers(self) -> list[int]:
        """The encoder states that its aligner mixes."""
        return list(range(self.state["encoder_aligner.projector.fc1.weight"].shape[1]))

    def trained_part(self, llm: PreTrainedModel, config: LayAlignConfig) -> Weights:
        """The trained part by our names, for a model of `config` over `llm`.

        Raises:
            ValueError: it was trained with another number of layers, or a tensor is missing.
        """
        layers, streams = config.fused_layers, self.state["encoder_aligner.projector.fc1.weight"].shape[0]
        if streams != 2 * len(layers):
            raise ValueError(f"{self.path} was trained with {streams // 2} LLM layers, the given LLM has {len(layers)}")
        trained = {}
        for name, value in self.state.items():
            for theirs, ours in RENAMED.items():
                if name.startswith(theirs):
                    trained[ours + name.removeprefix(theirs)] = value
        trained["adapter.boundary"] = self._tensor(BOUNDARY).flatten()
        return trained | {ours: self._tensor(theirs) for theirs, ours in _gate_names(llm, config)}

    def check_bases(self, encoder: PreTrainedModel, llm: PreTrainedModel) -> None:
        """Compare the bases inside with the given ones.

        Raises:
            ValueError: they are not the same.
        """
        for name, value in _published_bases(encoder, llm):
            if is_unused(name):
                continue
            if value.is_meta:
                raise ValueError(
                    f"{self.path}: {name} of the given base lies on the disk (device_map) and cannot be compared; "
                    "check_bases=False skips this"
                )
            theirs = self.state.get(name)
            if theirs is None or theirs.shape != value.shape or not mapped.equal(theirs, value):
                why = (
                    "is missing"
                    if theirs is None
                    else f"differs (shape {tuple(theirs.shape)}, given base {tuple(value.shape)})"
                )
                raise ValueError(
                    f"{self.path}: {name} {why}: the checkpoint was trained on other bases than the given ones "
                    "(check_bases=False skips this)"
                )

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self.state:
            raise ValueError(f"{self.path}: no tensor {name}, which every published LayAlign checkpoint holds")
        return self.state[name]


def published_file(checkpoint: str | Path, **kwargs: Any) -> Path:
    """The file of a published checkpoint.

    Args:
        checkpoint: the file, its folder or a hub name.
        kwargs: that find it on the hub, as transformers takes them (revision, subfolder, ...).

    Raises:
        ValueError: none there.
    """
    path = Path(checkpoint)
    if (
        path.is_file()
        or path.suffix in (".bin", ".pt", ".pth")
        or not (path.is_dir() or HUB_NAME.fullmatch(str(checkpoint)))
    ):
        return path
    try:
        return Path(cached_file(str(checkpoint), WEIGHTS_NAME, **kwargs) or "")
    except OSError as error:
        raise ValueError(f"{checkpoint}: neither a folder nor a hub name with a {WEIGHTS_NAME}: {error}") from error


def read_tensors(checkpoint: str | Path, entry: str | None = None) -> Weights:
    """The tensors of a pickled state dict, memory-mapped where its format allows: a pickle with code in it is refused, unexecuted.

    Args:
        checkpoint: a file that torch.save wrote.
        entry: the state dict's name in the file, None where it is the file's content.

    Raises:
        ValueError: no such file, a damaged or an unsafe one, or one that holds something else.
    """
    if not Path(checkpoint).is_file():
        raise ValueError(
            f"no file {checkpoint}: give the path of the published {WEIGHTS_NAME}, its folder or its name on the hub"
        )
    try:
        with open(checkpoint, "rb") as file:
            archived = file.read(len(ARCHIVE)) == ARCHIVE
        state = mapped.load(checkpoint) if archived else torch.load(checkpoint, map_location="cpu", weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a file that is no pickle the reader raises whatever it stumbles over
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{checkpoint}: damaged, or holds more than tensors (such pickles are not executed): {said}"
        ) from error
    if entry is not None:
        if not isinstance(state, dict) or entry not in state:
            raise ValueError(f"{checkpoint}: a dict with {entry!r} was expected, got {_summary(state)}")
        state = state[entry]
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"{checkpoint}: a state dict (names to tensors) was expected, got {_summary(state)}")
    return state


def write_published(
    path: str | Path, config: LayAlignConfig, encoder: PreTrainedModel, llm: PreTrainedModel, trained: Weights
) -> None:
    """Write the authors' format.

    Args:
        path: the file to write; it appears whole or not at all.
        config: the model's settings.
        encoder, llm: its bases.
        trained: its trained part, by our names.

    Raises:
        ValueError: a model their code cannot express (other LLM families, gates, adapters or a part of the layers).
    """
    _check_expressible(config)
    if is_quantized(llm.config) or is_quantized(encoder.config):
        raise ValueError("the published format holds the bases' own weights, and a base is quantised; load it as it is")
    state = dict(_published_bases(encoder, llm))
    for theirs, ours in RENAMED.items():
        state |= {theirs + name.removeprefix(ours): value for name, value in trained.items() if name.startswith(ours)}
    state[BOUNDARY] = trained["adapter.boundary"].view(1, 1, -1)
    state |= {theirs: trained[ours] for theirs, ours in _gate_names(llm, config)}
    state["llm_embedding_layer.weight"] = llm.get_input_embeddings().weight
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, "wb") as file:
        torch.save({name: value.detach().cpu() for name, value in state.items()}, file)


def _summary(state: Any) -> str:
    if not isinstance(state, dict):
        return type(state).__name__
    names = sorted(map(str, state))
    return f"one of {', '.join(names[:3])}" + (" and more" if len(names) > 3 else "")


def _check_expressible(config: LayAlignConfig) -> None:
    wrong = [
        f"{name}={getattr(config, name)!r}" for name, value in EXPRESSIBLE.items() if getattr(config, name) != value
    ]
    if config.lora is not None:
        raise ValueError("the published format has no place for LoRA: merge_lora() adds it to the LLM's weights")
    states = [] if config.aligner is None else config.mixed_states
    if wrong or config.aligner is None or states != list(range(len(states))) or config.encoder_states == "mean":
        raise ValueError(
            f"the published format holds adapter='mlp', an aligner over the first encoder states, gate='scalar' and all LLM layers; "
            f"this model has {wrong or [f'aligner={config.aligner!r}', f'encoder states {states}']}"
        )
    if config.llm_config.model_type not in FAMILIES:
        raise ValueError(
            f"the published code runs {FAMILIES} only, this model's LLM is {config.llm_config.model_type!r}"
        )


def _gate_names(llm: PreTrainedModel, config: LayAlignConfig) -> Iterator[tuple[str, str]]:
    """(published name, our name) of every gate."""
    names = {module: name for name, module in llm.named_modules(prefix="llm")}
    modules = attention_modules(llm)
    for layer in config.fused_layers:
        yield GATE.format(layer), f"{names[modules[layer]]}.fusion_gate.value"


def _published_bases(encoder: PreTrainedModel, llm: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, tensor) of both bases."""
    for name, value in encoder.state_dict().items():
        yield f"encoder_mt.{name}", value
    for name, value in llm.state_dict().items():
        if ".fusion_gate." not in name:
            yield "model_llm.model." + name.replace(".self_attn.", ".self_attn.model."), value
