"""TrainedParts: what of a model is trained, how it is saved, and LoRA merged into the LLM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from layalign import base_models, parts, saving, shards
from layalign.adapters import check_adapters
from layalign.arguments import Arguments
from layalign.base_samples import check_same
from layalign.configuration import LayAlignConfig
from layalign.kernels.files import MANIFEST
from layalign.lora import merge_lora
from layalign.model_card import model_card, write_card
from layalign.offloading import at_hand, is_offloaded
from layalign.parts import PARTS
from layalign.publishing import PublishedToHub
from layalign.quantization import is_quantized
from layalign.saving import LLM_FOLDER, Weights
from layalign.sharing import TRAINED, is_shared

# Arguments of `save_pretrained` that are those of `push_to_hub`.
_OF_PUSHING = ("push_to_hub", "repo_id", "private", "token", "revision", "create_pr", "commit_message")

if TYPE_CHECKING:
    from typing_extensions import Self


class TrainedParts(PublishedToHub):
    """A model of which the trained part is trained and saved, and beside it LoRA on the LLM or the LLM itself."""

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of adapter, aligner, gates and LoRA, and of LLM and encoder where they are trained; every other parameter
        is frozen."""
        return parts.trained_parameters(self)

    def trained_state_dict(self, state_dict: Weights | None = None, keep: bool = True) -> Weights:
        """What is trained, of a state dict (default: this model's), whole. Where FSDP2 or ZeRO-3 shard it, all processes call this, and it
        comes to be on the CPU, tensor by tensor: an LLM that is trained may have no room as a whole beside its shards. Without `keep` a
        process takes part and gets nothing: {}."""
        state_dict = self.state_dict(keep_vars=True) if state_dict is None else state_dict
        saved = self._saved_names(state_dict)
        trained = ((name, value) for name, value in state_dict.items() if name in saved)
        whole = ((name, shards.whole_to_keep(self._at_hand(name, value)).detach()) for name, value in trained)
        return {name: value for name, value in whole if keep}

    def _saved_names(self, names: Iterable[str]) -> set[str]:
        """Those of a state dict's names that are of what is trained and saved. Of the encoder each weight is once."""
        encoder = {name for name, _ in self.trained_parameters() if parts.part_of(name) == "encoder"}
        return {
            name
            for name in names
            if name in encoder
            or (parts.part_of(name) != "encoder" and parts.is_trained(name))
            or _of_llm(name, self.config.train_llm)
        }

    def _at_hand(self, name: str, value: Any) -> Any:
        """A value of the state dict, brought back where it is offloaded."""
        path, _, leaf = name.rpartition(".")
        return value if value.device.type != "meta" else at_hand(self.get_submodule(path), leaf)

    @property
    def num_trained_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for _, parameter in self.trained_parameters())

    def train_only(self, chosen: Sequence[str] | None = None) -> Self:
        """This model, gradients flowing into the given parts alone, which makes it ready to be trained again after loading.

        "llm" is full fine-tuning: the LLM becomes fp32 (4 bytes a weight, as many for its gradient, 8 for AdamW's moments), and from
        then on it is saved with the trained part (`train_llm` in its configuration). So is "encoder" (`train_encoder`).

        Args:
            chosen: of "adapter", "aligner", "gates", "lora", "llm" and "encoder"; None: all that its configuration trains.

        Raises:
            ValueError: a part that this model has not, or full fine-tuning of a quantised or shared LLM or beside LoRA, or
                what is trained of an LLM with offloaded layers, or a quantised encoder.
        """
        chosen = parts.parts_of(self.config) if chosen is None else chosen
        has = {*parts.parts_of(self.config), *(() if self.config.lora else ("llm",))}
        has |= set() if self.encoder is None else {"encoder"}
        if unknown := [part for part in chosen if part not in has]:
            raise ValueError(
                f"train_only: this model has no {', '.join(map(str, unknown))}; it has {', '.join(part for part in PARTS if part in has)}"
            )
        within = [part for part in chosen if part in ("lora", "llm")]
        if within and is_offloaded(self.llm):
            raise ValueError(
                f"train_only: {' and '.join(within)}: layers of the LLM are offloaded by its device_map, where they cannot be trained "
                "(lora, train_llm); load it without, or train adapter, aligner and gates alone"
            )
        if "llm" in chosen:
            if is_quantized(self.llm.config):
                raise ValueError(
                    "train_llm: the LLM is quantised, which is only ever frozen; load it as it is, or train lora"
                )
            if is_shared(self.llm):
                raise ValueError(TRAINED)
            self.config.train_llm = True
            self.llm.float()
        if "encoder" in chosen:
            if is_quantized(self.encoder.config):
                raise ValueError("train_encoder: the encoder is quantised, which is only ever frozen; load it as it is")
            self.config.train_encoder = self.config.train_encoder or True
            self.encoder.float()
        parts.let_train(self, chosen)
        return self

    def merge_lora(self) -> Self:
        """This model, its LoRA added to the LLM's weights: it answers the same, faster, for its aligner folds again.

        What was the base is then an LLM of its own, saved with the trained part (`train_llm`). In the LLM's dtype the sums are
        rounded. Without LoRA nothing happens.

        Raises:
            ValueError: a quantised LLM, where rounding would take away what was trained, or one that another model answers with.
        """
        if self.config.lora is None:
            return self
        if is_shared(self.llm):
            raise ValueError(TRAINED.replace("train_llm", "merge_lora"))
        merge_lora(self.llm)
        self.config.lora, self.config.train_llm = None, True
        parts.let_train(self, [part for part in parts.parts_of(self.config) if part != "llm"])
        return self

    def save_pretrained(self, save_directory: str | Path, *, state_dict: Weights | None = None, **kwargs: Any) -> None:
        """Write config.json and the trained part, LoRA and a trained encoder in it (safetensors), and a trained LLM in transformers' own
        format in the folder `llm`; frozen bases are only referred to. A model card (README.md) says what is known of the model, unless
        someone else's is there. Arguments as in transformers.

        Raises:
            ValueError: adapters of PEFT that are not the model's own, which would be lost, or an argument that asks for files which
                `from_pretrained` does not read.
        """
        check_adapters(self, saving=True)
        if other := [name for name in ("variant", "distributed_checkpoint") if kwargs.get(name)]:
            raise ValueError(
                f"save_pretrained: {other[0]}: got {kwargs[other[0]]!r}; the trained part is one file, {SAFE_WEIGHTS_NAME}, and "
                "no other is read; choose another folder, or leave it out"
            )
        folder, weights = Path(save_directory), self.trained_state_dict(state_dict)
        part = {name: value for name, value in weights.items() if parts.is_trained(name)}
        if self.config.train_llm:
            own = {name.removeprefix("llm."): value for name, value in weights.items() if name not in part}
            passed = {name: kwargs[name] for name in ("is_main_process", "max_shard_size") if name in kwargs}
            self.llm.save_pretrained(folder / LLM_FOLDER, state_dict=own, **passed)
        for role, base in (("encoder", self.encoder), ("llm", self.llm)):
            if base is not None and not (role == "encoder" and self.config.train_encoder):  # it is known by what it was
                base_models.sampled(self.config, role, base)
        pushed = {name: kwargs.pop(name) for name in _OF_PUSHING if name in kwargs}
        kwargs.pop("max_shard_size", None)  # the trained part is one file
        nothing = not part  # transformers takes its tensors out as it writes them
        before, self.config.base_sources = self.config.base_sources, base_models.beside(self.config, folder)
        try:
            # In names of today: older ones of a base's family (Gemma 3's, Jina's) would stand in the way of loading.
            super().save_pretrained(save_directory, state_dict=part, **(kwargs | {"save_original_format": False}))
        finally:
            self.config.base_sources = before
        if not kwargs.get("is_main_process", True):
            return
        if nothing:  # an LLM alone; transformers writes no file without a tensor
            save_file({}, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / MANIFEST).unlink(missing_ok=True)  # of what was there before
        name = folder.resolve().name.removesuffix(".partial").lstrip(".")
        write_card(folder, model_card(self, name))
        if pushed.pop("push_to_hub", False):
            self.push_to_hub(pushed.pop("repo_id", name), **pushed)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Where not all has to be there, weights of frozen bases, which `save_pretrained` does not write, are not missing.

        Raises:
            ValueError: what `save_pretrained` wrote of a model whose LLM is trained, without that LLM. transformers' Trainer takes a
                checkpoint so, and would go on from the LLM that there is.
        """
        saved = set() if strict else self._saved_names(self.state_dict(keep_vars=True))
        if (
            not strict
            and self.config.train_llm
            and set(state_dict) == {name for name in saved if parts.is_trained(name)}
        ):
            raise ValueError(
                f"load_state_dict: the trained LLM is not among the weights, it is in {LLM_FOLDER}/ of their folder: load that by "
                "from_pretrained, or train by `layalign train`, which resumes with it"
            )
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if not strict:
            found.missing_keys[:] = [name for name in found.missing_keys if name in saved]
        return found

    def _dropout(self, mode: bool) -> None:
        """Dropout where it is trained, and nowhere else in the LLM."""
        training = {parts.part_of(name) for name, own in self.named_parameters() if own.requires_grad}
        for name, module in self.llm.named_modules():
            if isinstance(module, nn.Dropout):
                module.train(mode and ("lora" if ".lora_dropout." in name else "llm") in training)
            else:
                _let_drop(module, not mode or "llm" in training)


def read_trained(folder: str | Path, config: LayAlignConfig) -> Weights:
    """What `save_pretrained` wrote of what is trained, by the model's names.

    Args:
        folder: where; a run has compared it with its manifest before.
        config: of the model that is to go on with it: whether the LLM belongs to it, and what its bases are known by.

    Raises:
        ValueError: a file that is missing or damaged, or other bases than those trained with.
    """
    kept = saving.read_settings(str(folder), None, Arguments()).base_samples
    for role in ("encoder", "llm"):
        check_same(role, getattr(config, f"{role}_name_or_path"), kept, config.base_samples)
    weights = saving.trained_weights(str(folder), compared=True)
    if config.train_llm:
        llm = saving.load_own_llm(str(folder))
        weights |= {f"llm.{name}": value.detach() for name, value in llm.named_parameters()}
    return weights


def _let_drop(module: nn.Module, drops: bool) -> None:
    """Shares of dropout that a module's own code looks at in training mode (OPT's and BioGPT's): its own, or none."""
    kept: dict[str, float] = vars(module).pop("_kept_dropout", {})
    if not drops:
        kept |= {name: own for name, own in vars(module).items() if "drop" in name and type(own) is float and own > 0}
        if kept:
            module._kept_dropout = kept  # type: ignore[assignment]
    for name, value in kept.items():
        setattr(module, name, value if drops else 0.0)


def _of_llm(name: str, whole: bool) -> bool:
    return whole and parts.part_of(name) == "llm"
