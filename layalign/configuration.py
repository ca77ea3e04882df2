"""LayAlignConfig: one model's settings, among them the paper's baselines and ablations."""

from typing import Any, ClassVar, get_origin

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from layalign.lora import checked_lora
from layalign.quantization import checked_quantization

ALIGNERS = ("linear", "mlp", None)
ADAPTERS = ("mlp", "gelu", "linear", None)
GATES = ("scalar", "head", "dynamic")
ENCODER_STATES = ("all", "last", "mean")
BACKENDS = ("auto", "triton", "torch", "flash", "reference")
STAGES = ("translation", "task")
FLAGS = ("mask_cross_padding", "published_training", "fold_at_inference", "train_llm")


class LayAlignConfig(PreTrainedConfig):
    """Settings of a LayAlign model.

    Args:
        encoder_config, llm_config: configurations of the two frozen bases (a transformers config or its dict).
        encoder_name_or_path, llm_name_or_path: where the bases come from: a hub name, a folder, or `layalign:NAME` for a base
            shipped with the package. Only these references are saved, never the bases themselves.
        base_sources: what else finds them, {"encoder" or "llm": {"revision", "subfolder", "beside"}}: of a hub name the commit, of a
            folder its path from the model's own. Written when a model is made and saved.
        base_samples: a few of the bases' weights, {"encoder" or "llm": sample}, by which they are known again, see
            `layalign.base_samples`. Written when a model is made and saved.
        adapter: "mlp" (linear, ReLU, linear: the paper's), "linear" (LangBridge), "gelu" (linear, GELU, linear: what LangBridge's
            code calls ffn) or None (no soft prompt; the paper's ablation).
            "none" says the same here, of the aligner and of the gate.
        aligner: "linear" (mix over encoder layers, ReLU, linear: the paper's), "mlp" (a further ReLU and linear) or None
            (no cross-attention: MindMerger, or LangBridge with adapter="linear").
        gate: "scalar" (one per LLM layer: the paper's), "head" (one per query head), "dynamic" (from the hidden state, Table 8) or None
            (cross-attention is added as it is, with weight 1 from the first step on: section 4.3's ablation).
        adapter_width: inner width of the adapters "mlp" and "gelu"; None: 2 De, the paper's. MindMerger+ of Table 10 has 3 De.
        aligner_width: W of a further linear layer (De to W) and SiLU between the mixing and the projection of the aligner "linear",
            which then is not folded; None: there is none, the paper's. LayAlign+ of Table 10 has De.
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
        quantization: of the bases when they are loaded by name, see `layalign.quantization.checked_quantization`; None: none.
        lora: LoRA on the LLM, see `layalign.lora.checked_lora`; None: none. Keys and values of cross states go through it as the
            LLM's own do.
        train_encoder: whether the encoder is trained too, as LangBridge does with LLMs that are not fine-tuned: True, or "embeddings" for
            its input embeddings alone; what is trained of it is saved with the trained part, and loaded over the encoder.
        train_llm: whether the LLM is trained too; it is then saved with the trained part. With it or lora, adapter and aligner may
            both be None, and there is no encoder: an LLM alone.

    Raises:
        ValueError: a setting outside the values above, or indices outside the base's layers.
    """

    model_type = "layalign"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig, "llm_config": AutoConfig}
    is_composition: ClassVar[bool] = True
    # Of what forward returns, for transformers' Trainer: predictions are the logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "labels",
        "attention_mask",
        "past_key_values",
        "cache",
        "cu_seqlens",
    ]

    encoder_config: Any = None
    llm_config: Any = None
    encoder_name_or_path: str | None = None
    llm_name_or_path: str | None = None
    base_sources: Any = None
    base_samples: Any = None
    adapter: str | None = "mlp"
    aligner: str | None = "linear"
    gate: str | None = "scalar"
    adapter_width: int | None = None
    aligner_width: int | None = None
    encoder_states: Any = "all"
    encoder_layers: list[int] | None = None
    llm_layers: list[int] | None = None
    llm_input: Any = None
    mask_cross_padding: bool = True
    published_training: bool = False
    attention_backend: str = "auto"
    fold_at_inference: bool = True
    quantization: Any = None
    lora: Any = None
    train_encoder: Any = False
    train_llm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder_config = _as_config(self.encoder_config, "encoder_config")
        self.llm_config = _as_config(self.llm_config, "llm_config")
        self._in_one_form()
        super().__post_init__(**kwargs)
        self._check()

    def checked(self) -> None:
        """Check settings that were changed after they were made, and bring them into their one form.

        Raises:
            ValueError: a wrong one.
        """
        self._in_one_form()
        self._check()

    def _in_one_form(self) -> None:
        for name in ("adapter", "aligner", "gate"):
            if getattr(self, name) == "none":  # as command lines and YAML say it
                setattr(self, name, None)
        if not isinstance(self.llm_input, (dict, type(None))):
            raise ValueError(f"llm_input takes {STAGES} with true or false, got {self.llm_input!r}")
        self.llm_input = {"translation": False, "task": True} | (self.llm_input or {})
        for name in ("encoder_states", "encoder_layers", "llm_layers"):
            if isinstance(getattr(self, name), (tuple, range)):  # JSON knows lists
                setattr(self, name, list(getattr(self, name)))
        self.quantization, self.lora = checked_quantization(self.quantization), checked_lora(self.lora)

    def _check(self) -> None:
        for name, allowed in (
            ("adapter", ADAPTERS),
            ("aligner", ALIGNERS),
            ("gate", (*GATES, None)),
            ("attention_backend", BACKENDS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        self._check_widths()
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not (isinstance(self.train_encoder, bool) or self.train_encoder == "embeddings"):
            raise ValueError(f"train_encoder must be true, false or 'embeddings', got {self.train_encoder!r}")
        if self.train_encoder and "encoder" in (self.quantization or {}):
            raise ValueError("train_encoder and quantization: a quantised encoder is only ever frozen")
        if self.train_encoder and self.adapter is None and self.aligner is None:
            raise ValueError("train_encoder: adapter and aligner are both None, and an LLM alone has no encoder")
        if self.train_llm and self.lora is not None:
            raise ValueError(
                "train_llm and lora: all of the LLM's weights are trained, or LoRA beside them; give one of both"
            )
        if self.train_llm and "llm" in (self.quantization or {}):
            raise ValueError(
                "train_llm and quantization: a quantised LLM is only ever frozen; train lora on it instead"
            )
        if self.adapter is None and self.aligner is None:
            if not (self.train_llm or self.lora):
                raise ValueError(
                    "adapter and aligner are both None: nothing would join the encoder to the LLM, and without lora or train_llm "
                    "nothing would be trained"
                )
            if self.encoder_config is not None:
                raise ValueError("adapter and aligner are both None, an LLM alone: it takes no encoder")
        if not isinstance(self.encoder_states, (list, tuple)) and self.encoder_states not in ENCODER_STATES:
            raise ValueError(
                f"encoder_states must be one of {ENCODER_STATES} or a list of state indices, got {self.encoder_states!r}"
            )
        if self.encoder_layers is not None and self.encoder_states not in ("all", "mean"):
            raise ValueError(
                f"encoder_states and encoder_layers: encoder_states={self.encoder_states!r} says which states are read already; "
                f"leave out encoder_layers={self.encoder_layers!r}, which is for 'all' and 'mean'"
            )
        of_aligner = {"encoder_layers": None, "llm_layers": None, "gate": "scalar"}
        if self.aligner is None and (
            given := [name for name, left in of_aligner.items() if getattr(self, name) != left]
        ):
            raise ValueError(
                f"{given[0]}: got {getattr(self, given[0])!r}, which says something of an aligner; aligner is None"
            )
        if isinstance(self.llm_layers, (list, tuple)) and not self.llm_layers:
            raise ValueError(
                "llm_layers: empty, so that the aligner would be handed to no layer; aligner=None leaves it out"
            )
        for stage, value in self.llm_input.items():
            if stage not in STAGES or not isinstance(value, bool):
                raise ValueError(f"llm_input takes {STAGES} with true or false, got {stage!r}: {value!r}")
        if self.encoder_config is not None and not is_unread(self.encoder_config):
            count = encoder_depth(self.encoder_config) + 1
            _check_indices("encoder_states", self.mixed_states, count, "encoder states (embedding output included)")
        if self.llm_config is not None and not is_unread(self.llm_config):
            _check_indices(
                "llm_layers", self.fused_layers, self.llm_config.get_text_config().num_hidden_layers, "LLM layers"
            )

    def _check_widths(self) -> None:
        for name, part, kinds in (
            ("adapter_width", "adapter", ("mlp", "gelu")),
            ("aligner_width", "aligner", ("linear",)),
        ):
            width = getattr(self, name)
            if width is None:
                continue
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(f"{name} must be a positive whole number or None, got {width!r}")
            if getattr(self, part) not in kinds:
                raise ValueError(
                    f"{name}: got {width}, which is a width inside the {part} {' or '.join(map(repr, kinds))}; {part} is "
                    f"{getattr(self, part)!r}"
                )

    @property
    def _attn_implementation(self) -> str | None:
        return getattr(self, "_attn_implementation_internal", None)

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        """Own value only, which is the encoder's where a model is loaded. transformers' setter also overwrites the bases': with None they
        would drop their padding masks silently."""
        if isinstance(value, dict):
            value = value.get("", value.get("encoder_config"))
        self._attn_implementation_internal = value

    @property
    def lacks_bases(self) -> bool:
        """Whether the configuration of the LLM is missing, or that of the encoder where there is one."""
        alone = self.adapter is None and self.aligner is None
        return self.llm_config is None or (self.encoder_config is None and not alone)

    @property
    def mixed_states(self) -> list[int]:
        """Indices into the encoder's hidden states that the aligner reads."""
        depth = encoder_depth(self.encoder_config)
        if isinstance(self.encoder_states, (list, tuple)):
            return list(self.encoder_states)
        if self.encoder_states == "last":
            return [depth]
        return list(range(depth)) if self.encoder_layers is None else _as_list("encoder_layers", self.encoder_layers)

    @property
    def fused_layers(self) -> list[int]:
        """Indices of the LLM layers with cross-attention; empty without an aligner."""
        if self.aligner is None:
            return []
        if self.llm_layers is not None:
            return _as_list("llm_layers", self.llm_layers)
        return list(range(self.llm_config.get_text_config().num_hidden_layers))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The LLM's configuration (caches and generation are sized by it); the encoder's with `encoder=True`."""
        if self.llm_config is None:
            return self
        if encoder and not decoder:
            return self.encoder_config
        return self.llm_config.get_text_config(decoder=True)


# What a caller chooses; the rest is of the bases, and written down when a model is made.
OF_BASES = ("encoder_config", "llm_config", "encoder_name_or_path", "llm_name_or_path", "base_sources", "base_samples")
SETTINGS = tuple(
    name
    for name, kind in LayAlignConfig.__annotations__.items()
    if get_origin(kind) is not ClassVar and name not in OF_BASES
)


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
    if (kind := settings.pop("model_type")) in CONFIG_MAPPING:
        return AutoConfig.for_model(kind, **settings)
    # Of a base with code of its own, which brings its class when it is loaded.
    unread = PreTrainedConfig(**settings)
    unread.model_type = kind
    return unread


def is_unread(config: PreTrainedConfig | None) -> bool:
    """Whether a base's configuration is of a class that only the base's own code knows, and was read without that."""
    return type(config) is PreTrainedConfig


def _as_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple, range)):
        raise ValueError(f"{name} must be a list of indices or None, got {value!r}")
    return list(value)


def _check_indices(name: str, indices: list[Any], count: int, what: str) -> None:
    wrong = [index for index in indices if type(index) is not int or not 0 <= index < count]
    if wrong or len(set(indices)) != len(indices) or (not indices and name == "encoder_states"):
        raise ValueError(f"{name} must be distinct indices from 0 to {count - 1} ({count} {what}), got {indices}")


AutoConfig.register("layalign", LayAlignConfig)
