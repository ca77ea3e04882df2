"""LayAlign: join a frozen multilingual encoder to a frozen LLM, at the price of the bare LLM (arXiv 2502.11405).

Everything public is imported on first use: `import layalign` alone loads neither torch nor transformers, and the operators load
torch but not transformers. The same holds for what `layalign.kernels` and `layalign.train` export. These two are folders without
an `__init__.py`, so it is listed here, which runs before either is imported.
"""

from __future__ import annotations

from importlib import import_module

from layalign.auto_classes import watch

TYPE_CHECKING = False  # a name that checkers know: importing typing would double the time that this file takes
if TYPE_CHECKING:  # the names below as they see them
    from types import ModuleType
    from typing import Any

    from layalign import nn as nn
    from layalign.configuration import LayAlignConfig as LayAlignConfig
    from layalign.fusing import fuse as fuse
    from layalign.fusing import unfuse as unfuse
    from layalign.generation.pipeline import LayAlignPipeline as LayAlignPipeline
    from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention as adaptive_fusion_attention
    from layalign.kernels.adaptive_fusion_attention import (
        adaptive_fusion_attention_reference as adaptive_fusion_attention_reference,
    )
    from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_decode_paged as adaptive_fusion_decode_paged
    from layalign.kernels.adaptive_fusion_attention import (
        adaptive_fusion_decode_paged_reference as adaptive_fusion_decode_paged_reference,
    )
    from layalign.kernels.layerwise_aligner import cross_key_values as cross_key_values
    from layalign.kernels.layerwise_aligner import cross_key_values_reference as cross_key_values_reference
    from layalign.kernels.layerwise_aligner import fold_key_values as fold_key_values
    from layalign.kernels.layerwise_aligner import fold_key_values_reference as fold_key_values_reference
    from layalign.kernels.layerwise_aligner import layer_mix as layer_mix
    from layalign.kernels.layerwise_aligner import layer_mix_reference as layer_mix_reference
    from layalign.kernels.layerwise_aligner import stream_linear as stream_linear
    from layalign.kernels.layerwise_aligner import stream_linear_reference as stream_linear_reference
    from layalign.model import LayAlignForConditionalGeneration as LayAlignForConditionalGeneration
    from layalign.processor import LayAlignProcessor as LayAlignProcessor

__version__ = "0.1.0"

_OPERATORS = {
    "adaptive_fusion_attention": "layalign.kernels.adaptive_fusion_attention",
    "adaptive_fusion_attention_reference": "layalign.kernels.adaptive_fusion_attention",
    "adaptive_fusion_decode_paged": "layalign.kernels.adaptive_fusion_attention",
    "adaptive_fusion_decode_paged_reference": "layalign.kernels.adaptive_fusion_attention",
    "layer_mix": "layalign.kernels.layerwise_aligner",
    "layer_mix_reference": "layalign.kernels.layerwise_aligner",
    "stream_linear": "layalign.kernels.layerwise_aligner",
    "stream_linear_reference": "layalign.kernels.layerwise_aligner",
    "cross_key_values": "layalign.kernels.layerwise_aligner",
    "cross_key_values_reference": "layalign.kernels.layerwise_aligner",
    "fold_key_values": "layalign.kernels.layerwise_aligner",
    "fold_key_values_reference": "layalign.kernels.layerwise_aligner",
}
_EXPORTS = _OPERATORS | {
    "LayAlignConfig": "layalign.model",  # so that AutoModel.from_config knows its model
    "LayAlignForConditionalGeneration": "layalign.model",
    "LayAlignPipeline": "layalign.generation.pipeline",
    "LayAlignProcessor": "layalign.processor",
    "fuse": "layalign.fusing",
    "unfuse": "layalign.fusing",
}
_MODULES = ("nn",)
_TRAIN_EXPORTS = {
    "train": "layalign.train.stages",
    "load_recipe": "layalign.train.recipe",
    "Recipe": "layalign.train.recipe",
    "StageRecipe": "layalign.train.stage_recipe",
    "DataSource": "layalign.train.data.data_source",
}

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def _exported(module: ModuleType, exports: dict[str, str], name: str) -> Any:
    if name not in exports:
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    value = getattr(import_module(exports[name]), name)
    setattr(module, name, value)
    return value


def _export(name: str, exports: dict[str, str]) -> None:
    """Give a folder without an `__init__.py` exports that are imported on first use."""
    module = import_module(name)
    module.__dict__.update(
        __all__=sorted(exports),
        __getattr__=lambda name: _exported(module, exports, name),
        __dir__=lambda: sorted({*exports, *module.__dict__}),
    )


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    return _exported(import_module(__name__), _EXPORTS, name)


def __dir__() -> list[str]:
    return sorted(__all__)


# Not the attention: `layalign.kernels.adaptive_fusion_attention` is its folder, which a function must not shadow.
_export("layalign.kernels", {name: home for name, home in _OPERATORS.items() if name != home.rpartition(".")[2]})
_export("layalign.train", _TRAIN_EXPORTS)
# transformers' auto classes and pipelines, when they are there.
watch()
