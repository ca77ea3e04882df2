"""LayAlign: join a frozen multilingual encoder to a frozen LLM, at the price of the bare LLM (arXiv 2502.11405).

Everything public is imported on first use: `import layalign` alone loads neither torch nor transformers, and the operators load
torch but not transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "adaptive_fusion_attention": "layalign.kernels.adaptive_fusion_attention",
    "adaptive_fusion_attention_reference": "layalign.kernels.adaptive_fusion_attention",
    "layer_mix": "layalign.kernels.layerwise_aligner",
    "layer_mix_reference": "layalign.kernels.layerwise_aligner",
    "stream_linear": "layalign.kernels.layerwise_aligner",
    "stream_linear_reference": "layalign.kernels.layerwise_aligner",
    "cross_key_values": "layalign.kernels.layerwise_aligner",
    "cross_key_values_reference": "layalign.kernels.layerwise_aligner",
    "fold_key_values": "layalign.kernels.layerwise_aligner",
    "fold_key_values_reference": "layalign.kernels.layerwise_aligner",
    "LayAlignConfig": "layalign.configuration",
    "LayAlignForConditionalGeneration": "layalign.model",
    "LayAlignPipeline": "layalign.pipeline",
    "LayAlignProcessor": "layalign.processor",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'layalign' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
