"""The authors' checkpoint format: one `pytorch_model.bin` with the state dict of the whole model, bases included."""

import os
import pickle
from pathlib import Path

import torch

from layalign.projections import attention_modules
from layalign.saving import load_trained_part

RENAMED = {
    "mapping.mlp.linear1.": "adapter.linear1.",
    "mapping.mlp.linear2.": "adapter.linear2.",
    "encoder_aligner.projector.fc1.": "aligner.mix.",
    "encoder_aligner.projector.fc2.": "aligner.project.",
    "encoder_aligner.projector.fc3.": "aligner.project2.",
}
BOUNDARY = "mapping.end_boundary"
GATE = "model_llm.model.model.layers.{}.self_attn.adaption_gate"
FAMILIES = ("llama", "mistral")


def from_published(cls, checkpoint, *, encoder, llm, compatible=False, check_bases=True, **settings):
    """Load the authors' checkpoint onto its two bases.

    Args:
        checkpoint: path of `pytorch_model.bin`. Only tensors are read: a pickle with code in it is refused, unexecuted.
        encoder, llm: the bases it was trained on (names, folders or modules).
        compatible: reproduce the published code's quirks: no padding mask in the cross-attention, and what `published_training` in
            LayAlignConfig describes. Off, answers and losses do not depend on the batch.
        check_bases: compare the bases inside the checkpoint with the given ones.

    Raises:
        ValueError: not such a checkpoint, a damaged or unsafe file, or bases that are not the ones in it.
    """
    state = _read(checkpoint)
    mix = state.get("encoder_aligner.projector.fc1.weight")
    if mix is None or "mapping.mlp.linear1.weight" not in state:
        raise ValueError(
            f"{checkpoint}: not a published LayAlign state dict (no encoder_aligner.projector.fc1 or mapping.mlp)"
        )
    if compatible:
        settings |= {"mask_cross_padding": False, "published_training": True}
    aligner = "mlp" if "encoder_aligner.projector.fc3.weight" in state else "linear"
    model = cls.from_bases(encoder, llm, aligner=aligner, encoder_layers=list(range(mix.shape[1])), **settings)
    layers = model.config.fused_layers
    if mix.shape[0] != 2 * len(layers):
        raise ValueError(
            f"{checkpoint} was trained with {mix.shape[0] // 2} LLM layers, the given LLM has {len(layers)}"
        )
    trained = {}
    for name, value in state.items():
        for theirs, ours in RENAMED.items():
            if name.startswith(theirs):
                trained[ours + name.removeprefix(theirs)] = value
    trained["adapter.boundary"] = _tensor(state, BOUNDARY, checkpoint).flatten()
    for layer, name in zip(layers, _gate_names(model), strict=True):
        trained[name] = _tensor(state, GATE.format(layer), checkpoint)
    load_trained_part(model, trained, str(checkpoint))
    if check_bases:
        _compare_bases(model, state, checkpoint)
    return model.eval()


def save_published(model, path):
    """Write the authors' format. `path`: the file to write; it appears whole or not at all.

    Raises:
        ValueError: a model their code cannot express (other LLM families, gates, adapters or a part of the layers).
    """
    config = model.config
    wrong = [
        f"{name}={getattr(config, name)!r}"
        for name, value in {"adapter": "mlp", "gate": "scalar", "llm_layers": None}.items()
        if getattr(config, name) != value
    ]
    states = config.mixed_states
    if wrong or config.aligner is None or states != list(range(len(states))) or config.encoder_states == "mean":
        raise ValueError(
            f"the published format holds adapter='mlp', an aligner over the first encoder states, gate='scalar' and all LLM layers; "
            f"this model has {wrong or [f'aligner={config.aligner!r}', f'encoder states {states}']}"
        )
    if config.llm_config.model_type not in FAMILIES:
        raise ValueError(
            f"the published code runs {FAMILIES} only, this model's LLM is {config.llm_config.model_type!r}"
        )
    state = dict(_published_bases(model))
    own = model.trained_state_dict()
    for theirs, ours in RENAMED.items():
        state |= {theirs + name.removeprefix(ours): value for name, value in own.items() if name.startswith(ours)}
    state[BOUNDARY] = own["adapter.boundary"].view(1, 1, -1)
    state |= {
        GATE.format(layer): own[name] for layer, name in zip(config.fused_layers, _gate_names(model), strict=True)
    }
    state["llm_embedding_layer.weight"] = model.llm.get_input_embeddings().weight
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        torch.save({name: value.detach().cpu() for name, value in state.items()}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _read(checkpoint):
    if not Path(checkpoint).is_file():
        raise ValueError(f"no file {checkpoint}: give the path of the published pytorch_model.bin")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{checkpoint}: damaged, or holds more than tensors (such pickles are not executed): {error}"
        ) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"{checkpoint}: a state dict (names to tensors) was expected, got {type(state).__name__}")
    return state


def _tensor(state, name, checkpoint):
    if name not in state:
        raise ValueError(f"{checkpoint}: no tensor {name}, which every published LayAlign checkpoint holds")
    return state[name]


def _gate_names(model):
    names = {module: name for name, module in model.named_modules()}
    modules = attention_modules(model.llm)
    return [f"{names[modules[layer]]}.fusion_gate.value" for layer in model.config.fused_layers]


def _published_bases(model):
    """(published key, tensor) of both bases."""
    for name, value in model.encoder.state_dict().items():
        yield f"encoder_mt.{name}", value
    for name, value in model.llm.state_dict().items():
        if ".fusion_gate." not in name:
            yield "model_llm.model." + name.replace(".self_attn.", ".self_attn.model."), value


def _compare_bases(model, state, checkpoint):
    for name, value in _published_bases(model):
        theirs = state.get(name)
        if theirs is None or theirs.shape != value.shape or not torch.equal(theirs.to(value.dtype), value.cpu()):
            why = (
                "is missing"
                if theirs is None
                else f"differs (shape {tuple(theirs.shape)}, given base {tuple(value.shape)})"
            )
            raise ValueError(
                f"{checkpoint}: {name} {why}: the checkpoint was trained on other bases than the given ones (check_bases=False skips this)"
            )
