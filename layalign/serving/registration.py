"""What vLLM is told: the model, its configuration, and how its requests are read."""

from __future__ import annotations

import logging
from typing import Any

ARCHITECTURE = "LayAlignForConditionalGeneration"
# vLLM's name of a tokenizer together with what reads requests.
MODE = "layalign"


def register() -> None:
    """Tell vLLM of LayAlign: its general plugin, called once in each of vLLM's processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils import config as vllm_config

    from layalign.serving.settings import ServedConfig

    vllm_config._CONFIG_REGISTRY[ServedConfig.model_type] = ServedConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = _ReadsQuestions
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: the class would import torch in processes that only read requests.
        ModelRegistry.register_model(ARCHITECTURE, "layalign.serving.model:ServedLayAlign")
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(MODE, "layalign.serving.requests", "QuestionRenderer")


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
