"""What vLLM is told: the model, its configuration, and how its requests are read."""

from __future__ import annotations

import logging
from typing import Any

ARCHITECTURE = "LayAlignForConditionalGeneration"
# vLLM's name of a tokenizer together with what reads requests.
MODE = "layalign"
# That this is written for: it uses parts of vLLM that are not its public interface.
VERSION = "0.32"


def register() -> None:
    """vLLM's general plugin, called once in each of its processes, whatever model they serve: where this vLLM is another than the one
    that LayAlign is written for, a warning, and the process goes on."""
    try:
        tell_vllm()
    except ValueError as error:
        logging.getLogger("vllm.layalign").warning("%s; not registered", error)


def tell_vllm() -> None:
    """Tell vLLM of LayAlign, once or more often.

    Raises:
        ValueError: this vLLM lacks what LayAlign needs of it.
        ModuleNotFoundError: no vLLM.
    """
    import vllm

    try:
        # All that is looked for comes before the first change.
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry
        from vllm.transformers_utils.config import _CONFIG_REGISTRY

        from layalign.serving.settings import ServedConfig

        known = ARCHITECTURE in ModelRegistry.get_supported_archs()
        add_model = ModelRegistry.register_model
        add_tokenizer, add_renderer = TokenizerRegistry.register, RENDERER_REGISTRY.register
        _CONFIG_REGISTRY[ServedConfig.model_type] = ServedConfig
        MODELS_CONFIG_MAP[ARCHITECTURE] = _ReadsQuestions
        if not known:
            # By name: the class would import torch in processes that only read requests.
            add_model(ARCHITECTURE, "layalign.serving.model:ServedLayAlign")
            add_tokenizer(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
            add_renderer(MODE, "layalign.serving.requests", "QuestionRenderer")
    except (ImportError, AttributeError, TypeError) as error:
        found = getattr(vllm, "__version__", "of no version")
        raise ValueError(f"LayAlign serves on vLLM {VERSION}, this is {found}: {error}") from error


class _ReadsQuestions:
    """vLLM's hook into a model's settings."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Requests are read as questions, whatever the tokenizer; what each request would be refused for is said at once.

        Raises:
            ValueError: --mm-processor-kwargs with what the processor does not take.
        """
        from layalign.serving.settings import checked_reading

        model_config.tokenizer_mode = MODE
        checked_reading(model_config.get_multimodal_config().mm_processor_kwargs or {})

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Prefixes are not shared: what a token of the LLM's is worth hangs on the question that the encoder read. vLLM says so of
        models with an encoder, and ends in the scheduler where it is asked for all the same."""
        if vllm_config.cache_config.enable_prefix_caching:
            logging.getLogger("vllm.layalign").warning(
                "LayAlign shares no prefixes between requests; enable_prefix_caching is off"
            )
            vllm_config.cache_config.enable_prefix_caching = False
