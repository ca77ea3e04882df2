"""LayAlignConfig: one model's settings, among them the paper's baselines and ablations."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

ALIGNERS = ("linear", "mlp", None)
ADAPTERS = ("mlp", "gelu", "linear", None)
GATES = ("scalar", "head", "dynamic")
ENCODER_STATES = ("all", "last", "mean")
BACKENDS = ("auto", "triton", "torch", "flash", "reference")
STAGES = ("translation", "task")


class LayAlignConfig(PreTrainedConfig):
    """Settings of a LayAlign model.

    Args:
        encoder_config, llm_config: configurations of the two frozen bases (a transformers config or its dict).
        encoder_name_or_path, llm_name_or_path: where the bases come from: a hub name, a folder, or `layalign:NAME` for a base
            shipped with the package. Only these references are saved, never the bases themselves.
        adapter: "mlp" (linear, ReLU, linear: the paper's), "linear" (LangBridge), "gelu" (linear, GELU, linear: what LangBridge's
            code calls ffn) or None (no soft prompt; the paper's ablation).
        aligner: "linear" (mix over encoder layers, ReLU, linear: the paper's), "mlp" (a further ReLU and linear) or None
            (no cross-attention: MindMerger, or LangBridge with adapter="linear").
        gate: "scalar" (one per LLM layer: the paper's), "head" (one per query head) or "dynamic" (from the hidden state, Table 8).
        encoder_states: what the aligner reads: "all" (every state in `encoder_layers`, mixed with learned weights), "last" (only
            the encoder's final state, Table 7), "mean" (the unweighted mean of `encoder_layers`, Table 11) or a list of state indices.
        encoder_layers: state indices for "all" and "mean"; 0 is the embedding output. None: all but the last.
        llm_layers: LLM layers that get cross-attention. None: all.
        llm_input: per stage, whether the LLM sees the prompt text beside the soft prompt (Table 9).
        mask_cross_padding: False lets cross-attention see encoder padding, as the published code does (compatibility only).
        published_training: True reproduces what the published code does in calls with labels (compatibility only): positions count
            padding, and labels stay in the columns they had before padding was squeezed out, so that rows with padding are trained
            on shifted labels.
        attention_backend: backend of `layalign.adaptive_fusion_attention` and the aligner's operators.
        fold_at_inference: keep the aligner's projection multiplied into the LLM's key and value projections while nothing is
            trained, which answers faster, whatever the number of tokens. Takes 2 L kv De values: 1 GB in bf16 for mT5-xl and a 7B
            LLM with 32 key/value heads, 0.27 GB with 8.

    Raises:
        ValueError: a setting outside the values above, or indices outside the base's layers.
    """

    model_type = "layalign"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig, "llm_config": AutoConfig}
    is_composition: ClassVar[bool] = True

    encoder_config: Any = None
    llm_config: Any = None
    encoder_name_or_path: str | None = None
    llm_name_or_path: str | None = None
    adapter: str | None = "mlp"
    aligner: str | None = "linear"
    gate: str = "scalar"
    encoder_states: Any = "all"
    encoder_layers: list[int] | None = None
    llm_layers: list[int] | None = None
    llm_input: Any = None
    mask_cross_padding: bool = True
    published_training: bool = False
    attention_backend: str = "auto"
    fold_at_inference: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder_config = _as_config(self.encoder_config, "encoder_config")
        self.llm_config = _as_config(self.llm_config, "llm_config")
        self.llm_input = {"translation": False, "task": True} | dict(self.llm_input or {})
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name, allowed in (
            ("adapter", ADAPTERS),
            ("aligner", ALIGNERS),
            ("gate", GATES),
            ("attention_backend", BACKENDS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.adapter is None and self.aligner is None:
            raise ValueError("adapter and aligner are both None: nothing would join the encoder to the LLM")
        if not isinstance(self.encoder_states, (list, tuple)) and self.encoder_states not in ENCODER_STATES:
            raise ValueError(
                f"encoder_states must be one of {ENCODER_STATES} or a list of state indices, got {self.encoder_states!r}"
            )
        for stage, value in self.llm_input.items():
            if stage not in STAGES or not isinstance(value, bool):
                raise ValueError(f"llm_input takes {STAGES} with true or false, got {stage!r}: {value!r}")
        if self.encoder_config is not None:
            count = encoder_depth(self.encoder_config) + 1
            _check_indices("encoder_states", self.mixed_states, count, "encoder states (embedding output included)")
        if self.llm_config is not None:
            _check_indices(
                "llm_layers", self.fused_layers, self.llm_config.get_text_config().num_hidden_layers, "LLM layers"
            )

    @property
    def _attn_implementation(self) -> str | None:
        return getattr(self, "_attn_implementation_internal", None)

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        """Own value only. transformers' setter also overwrites the bases': with None they would drop their padding masks silently."""
        self._attn_implementation_internal = value.get("") if isinstance(value, dict) else value

    @property
    def mixed_states(self) -> list[int]:
        """Indices into the encoder's hidden states that the aligner reads."""
        depth = encoder_depth(self.encoder_config)
        if isinstance(self.encoder_states, (list, tuple)):
            return list(self.encoder_states)
        if self.encoder_states == "last":
            return [depth]
        return list(range(depth)) if self.encoder_layers is None else list(self.encoder_layers)

    @property
    def fused_layers(self) -> list[int]:
        """Indices of the LLM layers with cross-attention; empty without an aligner."""
        if self.aligner is None:
            return []
        if self.llm_layers is not None:
            return list(self.llm_layers)
        return list(range(self.llm_config.get_text_config().num_hidden_layers))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The LLM's configuration (caches and generation are sized by it); the encoder's with `encoder=True`."""
        if self.llm_config is None:
            return self
        if encoder and not decoder:
            return self.encoder_config
        return self.llm_config.get_text_config(decoder=True)


def encoder_depth(config: PreTrainedConfig) -> int:
    """Number of layers of an encoder: encoder-decoder configs (NLLB, M2M100) name it `encoder_layers`."""
    depth = getattr(config, "encoder_layers", None)
    return config.num_hidden_layers if depth is None else depth


def _as_config(value: Any, name: str) -> PreTrainedConfig | None:
    if value is None or isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict) or "model_type" not in value:
        raise ValueError(
            f"{name} must be a transformers config or its dict with a model_type, got {type(value).__name__}"
        )
    settings = dict(value)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _check_indices(name: str, indices: list[Any], count: int, what: str) -> None:
    wrong = [index for index in indices if not isinstance(index, int) or not 0 <= index < count]
    if wrong or len(set(indices)) != len(indices) or (not indices and name == "encoder_states"):
        raise ValueError(f"{name} must be distinct indices from 0 to {count - 1} ({count} {what}), got {indices}")


AutoConfig.register("layalign", LayAlignConfig)
