"""What one of the two stages is made of."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from layalign.languages import language_code
from layalign.train.data.batches import check_budget
from layalign.train.data.data_source import DataSource
from layalign.train.data.mixing import TEMPERATURE, check_mixing
from layalign.train.prompts import check_template
from layalign.train.settings import CONFIG, Count, Number, Settings, Share, Switch, Whole, one_or_several

DEFAULT_SAVE_MINUTES = 5.0
Sources = Annotated[list[DataSource], one_or_several(dict, DataSource, of=DataSource)]


@dataclass(config=CONFIG, kw_only=True, slots=True)
class StageRecipe(Settings):
    """One of the two training stages. The optimiser's defaults are the paper's."""

    data: Sources
    """Sources, read one after the other (one source need not be in a list)."""
    eval_data: Sources | None = None
    """Sources to evaluate on."""
    hold_out: Whole = 0
    """Instead: so many records are taken out of `data` at random and evaluated on."""
    steps: Count | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: Number | None = None
    """Passes over the data; 3 where neither steps nor epochs are given."""
    batch_size: Count = 8
    """Examples in one forward call of one process."""
    eval_batch_size: Count | None = None
    """The same in evaluations; None: `batch_size`."""
    global_batch_size: Count | None = None
    """Examples in one optimizer step, over all processes; divided by these and by `batch_size`, it gives the forward calls of a
    step."""
    gradient_accumulation: Count | None = None
    """Or these: the forward calls of a step (1 where neither is given)."""
    learning_rate: Share = 4e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after its warm-up."""
    warmup_ratio: Annotated[Share, Field(le=0.999)] = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: Share = 3e-7
    """AdamW's."""
    betas: list[Annotated[Share, Field(lt=1)]] = field(default_factory=lambda: [0.8, 0.999])
    """AdamW's two."""
    eps: Share = 1e-8
    """AdamW's."""
    max_grad_norm: Number = 1.0
    """The gradient's norm is cut to it."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of the computation: "bf16" is autocast over fp32 trained parameters; "auto" is that on a machine that multiplies in bf16, and fp32
    on others, whose products in bf16 are several times slower."""
    gradient_checkpointing: Switch = False
    use_reentrant: Switch = False
    """Only false is taken: reentrant gradient checkpointing cannot work here."""
    prompt: str | None = None
    """What the LLM reads beside the soft prompts, with {source} and {language}, or "chat": the source by the LLM's chat template;
    where `llm_input` of the stage is true."""
    source_max_length: Count = 200
    """Tokens of the source, and of the prompt, to which longer ones are cut."""
    target_max_length: Annotated[Count, Field(ge=2)] = 200
    """Tokens of the target, to which longer ones are cut."""
    eval_steps: Whole | None = None
    """Evaluate every so many steps, and after the last one; None or 0: never."""
    keep: Literal["best", "last"] = "last"
    """Which weights the stage ends with: the last, or the best by the held-out loss."""
    early_stopping: Count | None = None
    """The stage ends when so many evaluations in a row have brought no better one; None: never."""
    save_steps: Whole | None = None
    """A checkpoint every so many steps; 0: never."""
    save_minutes: Annotated[Number, Field(le=1e6)] | None = None
    """A checkpoint every so many minutes; 0: never. Where neither this nor `save_steps` is given, at most 5 minutes of work are
    ever lost. A finished stage is always saved."""
    log_steps: Count = 10
    """A log every so many steps."""
    keep_checkpoints: Count = 2
    """So many stay, the newest ones."""
    length_grouped: Switch = False
    """Batches of similar length; `batch_size` then has a say in which examples share a step."""
    packing: Switch = False
    """The examples of a forward call lie end to end and none is filled up: the same losses with less work where lengths differ."""
    batch_tokens: Count | None = None
    """With packing, in place of `batch_size`: so many positions of the LLM in one forward call of one process, at most. The examples
    of an optimizer step, `global_batch_size`, are divided into calls of alike size."""
    train: (
        Annotated[list[Literal["adapter", "aligner", "gates", "lora", "llm", "encoder"]], one_or_several(str, of=str)]
        | None
    ) = None
    """The parts trained in this stage; None: all that the recipe trains, in the translation stage without lora, llm and encoder."""
    llm_learning_rate: Share | None = None
    """Of LoRA or the LLM; None: `learning_rate`."""
    encoder_learning_rate: Share | None = None
    """Of the encoder; None: `learning_rate`."""
    mixing: dict[str, Number] | None = None
    """How much of an epoch each language has: a weight for each, {sw: 2, de: 1}, or {temperature: 0.3}, in proportion to n^0.3 for n
    records; None: every record once."""

    def __post_init__(self) -> None:
        check_budget(self)
        if not self.data:
            raise ValueError("data: at least one source is needed")
        if len(self.betas) != 2:
            raise ValueError(f"betas: two numbers from 0 to below 1, got {self.betas}")
        if self.train is not None and len(set(self.train)) < max(len(self.train), 1):
            raise ValueError(f"train: distinct parts, at least one, got {self.train}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("epochs: give steps or epochs, not both")
        if self.steps is None:
            self.epochs = 3.0 if self.epochs is None else self.epochs
            if not 0 < self.epochs <= 1e6:
                raise ValueError(f"epochs: must be above 0 and at most 1000000, got {self.epochs}")
        if self.use_reentrant:
            raise ValueError(
                "use_reentrant: reentrant gradient checkpointing cannot work: all LLM layers share the aligner's output"
            )
        if self.hold_out and self.eval_data:
            raise ValueError("hold_out: give hold_out or eval_data, not both")
        if self.eval_steps and not (self.hold_out or self.eval_data):
            raise ValueError("eval_steps: needs eval_data or hold_out to evaluate on")
        if self.keep == "best" and not self.eval_steps:
            raise ValueError("keep: best is found by evaluations, but eval_steps is not set")
        if self.early_stopping is not None and not self.eval_steps:
            raise ValueError("early_stopping: counts evaluations, but eval_steps is not set")
        if self.global_batch_size is not None and self.gradient_accumulation is not None:
            raise ValueError(
                f"gradient_accumulation: follows from global_batch_size; got {self.gradient_accumulation} and "
                f"{self.global_batch_size}, give one of them"
            )
        self.accumulation(1)
        if self.mixing is not None:
            check_mixing(self.mixing)
            # As records have them: `yor_Latn` in `languages` is the same language.
            self.mixing = {
                key if key == TEMPERATURE else language_code(key): weight for key, weight in self.mixing.items()
            }
        if self.prompt is not None and (wrong := set(check_template(self.prompt, "prompt")) - {"source", "language"}):
            raise ValueError(f"prompt: takes {{source}} and {{language}}, got {sorted(wrong)}")

    def accumulation(self, processes: int) -> int:
        """Forward calls of one process in one optimizer step; of batch_tokens, which the data's lengths decide, 1.

        Args:
            processes: that train together.

        Raises:
            ValueError: a global_batch_size that cannot be divided so.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation or 1
        if self.batch_tokens is not None:
            return 1
        at_once = processes * self.batch_size
        if self.global_batch_size % at_once:
            nearest = max(round(self.global_batch_size / at_once), 1) * at_once
            raise ValueError(
                f"global_batch_size: {self.global_batch_size} examples do not divide into forward calls of {at_once} "
                f"({processes} {'process' if processes == 1 else 'processes'} x batch_size {self.batch_size}); "
                f"{nearest} would, or another batch_size"
            )
        return self.global_batch_size // at_once

    @property
    def minutes_between_saves(self) -> float | None:
        """How long may pass before a checkpoint is made; None: any time."""
        default = DEFAULT_SAVE_MINUTES if self.save_steps is None else None
        return default if self.save_minutes is None else self.save_minutes or None
