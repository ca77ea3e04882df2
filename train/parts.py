"""Which parts of the model a stage of a recipe trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layalign.configuration import LayAlignConfig
from layalign.parts import TRAINED_PART, parts_of

if TYPE_CHECKING:
    from layalign.train.recipe import Recipe


def model_settings(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe are settings of LayAlignConfig. Without an encoder, an LLM alone has neither adapter nor aligner."""
    alone = {"adapter": None, "aligner": None} if recipe.encoder is None else {}
    own = {key: value for key, value in recipe.model.items() if key != "dtype"}
    beside = {"quantization": recipe.quantization, "lora": recipe.lora, "train_llm": recipe.train_llm}
    return alone | own | beside


def stage_parts(recipe: Recipe, name: str) -> tuple[str, ...]:
    """The parts that a stage trains: those of its `train`; else all that the recipe trains, but in the translation stage no LLM and
    no LoRA beside a trained part: the LLM would be moved by soft prompts that say nothing yet.
    """
    has = parts_of(LayAlignConfig(**model_settings(recipe)))
    asked = recipe.stages[name].train
    if asked is not None:
        return tuple(part for part in has if part in asked)
    part = tuple(part for part in has if part in TRAINED_PART)
    return part if part and name == "translation" else has


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
        if recipe.encoder is None and not recipe.llm_input[name]:
            raise ValueError(
                f"stages.{name}: without an encoder and with llm_input.{name} false, the LLM would read nothing"
            )
    for part in ("lora", "llm"):
        if part in has and not any(part in stage_parts(recipe, name) for name in recipe.stages):
            key = "lora" if part == "lora" else "train_llm"
            raise ValueError(
                f"{key}: no stage trains it (by default the task stage does); name it in a stage's train: [{', '.join(has)}]"
            )
