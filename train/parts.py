"""Which parts of the model a stage of a recipe trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layalign.configuration import LayAlignConfig
from layalign.parts import TRAINED_PART, parts_of

if TYPE_CHECKING:
    from layalign.model import LayAlignForConditionalGeneration
    from layalign.train.recipe import Recipe


def model_settings(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe are settings of LayAlignConfig. Without an encoder, an LLM alone has neither adapter nor aligner."""
    alone = {"adapter": None, "aligner": None} if recipe.encoder is None else {}
    own = {key: value for key, value in recipe.model.items() if key != "dtype"}
    beside = {name: getattr(recipe, name) for name in ("quantization", "lora", "train_llm", "train_encoder")}
    return alone | own | beside


def has_soft_prompts(recipe: Recipe) -> bool:
    """Whether the LLM reads what an encoder makes of a question as positions of its own."""
    return recipe.encoder is not None and LayAlignConfig(**model_settings(recipe)).adapter is not None


def stage_parts(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The parts that a stage trains: those of its `train`; else all that the recipe trains, but in the translation stage no base and
    no LoRA beside a trained part: they would be moved by soft prompts that say nothing yet.
    """
    has = parts_of(LayAlignConfig(**model_settings(recipe)))
    asked = recipe.stages[name].train
    if asked is not None:
        return tuple(part for part in has if part in asked)
    part = tuple(part for part in has if part in TRAINED_PART)
    return part if part and name == "translation" else has


def train_stage_parts(model: LayAlignForConditionalGeneration, recipe: Recipe, name: str) -> None:
    """Let gradients flow into the parts that a stage trains, of the encoder into what the recipe says."""
    parts = stage_parts(recipe, name)
    if "encoder" in parts:
        model.config.train_encoder = recipe.train_encoder
    model.train_only(parts)


def check_parts(recipe: Recipe) -> None:
    """Check that a recipe's settings of its model go together, and that its stages train what there is.

    Raises:
        ValueError: beginning with the key.
    """
    if recipe.encoder is None and not recipe.train_llm and recipe.lora is None:
        raise ValueError(
            "encoder: required, a name or a folder; only an LLM alone, with train_llm or lora, is trained without"
        )
    try:
        has = parts_of(LayAlignConfig(**model_settings(recipe)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"model: {error}") from None
    if recipe.encoder is None and {"adapter", "aligner"} & set(has):
        raise ValueError("encoder: required: adapter and aligner join it to the LLM; an LLM alone has neither")
    if recipe.encoder is not None and not {"adapter", "aligner"} & set(has):
        raise ValueError("encoder: adapter and aligner are both none, an LLM alone: leave the encoder out")
    for name, stage in recipe.stages.items():
        for part in stage.train or ():
            if part not in has:
                raise ValueError(f"stages.{name}.train: this recipe trains no {part}; it has {', '.join(has)}")
        trained = {"lora", "llm"} & set(stage_parts(recipe, name))
        if stage.llm_learning_rate is not None and not trained:
            raise ValueError(f"stages.{name}.llm_learning_rate: this stage trains neither the LLM nor LoRA")
        if stage.encoder_learning_rate is not None and "encoder" not in stage_parts(recipe, name):
            raise ValueError(f"stages.{name}.encoder_learning_rate: this stage does not train the encoder")
        if recipe.encoder is None and not recipe.llm_input[name]:
            raise ValueError(
                f"stages.{name}: without an encoder and with llm_input.{name} false, the LLM would read nothing"
            )
    for part, key in (("lora", "lora"), ("llm", "train_llm"), ("encoder", "train_encoder")):
        if part in has and not any(part in stage_parts(recipe, name) for name in recipe.stages):
            raise ValueError(
                f"{key}: no stage trains it (by default the task stage does); name it in a stage's train: [{', '.join(has)}]"
            )
