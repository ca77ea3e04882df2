"""What the trainer reads, batch by batch, and the held-out loss of all of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from layalign.train.data.batches import EvaluationBatches, TokenBatches
from layalign.train.data.sampling import EpochSampler

if TYPE_CHECKING:
    from layalign.train.data.collate import EncodedRecords
    from layalign.train.stage_recipe import StageRecipe

AROUND = 2  # bos and boundary, which stand beside a record's own tokens in the LLM


def order_of(stage: StageRecipe, data: EncodedRecords, seed: tuple[int, ...]) -> EpochSampler:
    """The order of a stage's records.

    Args:
        stage, data: whose.
        seed: ints that it is a function of, beside the epoch.
    """
    lengths = data.lengths if stage.length_grouped else None
    # Batches of a token budget have the same examples in any number of processes as they are.
    whole_steps = 1 if stage.batch_tokens else stage.global_batch_size or 1
    return EpochSampler(len(data), seed, stage.batch_size, lengths, data.mixture, whole_steps)


def token_batches(stage: StageRecipe, data: EncodedRecords, order: EpochSampler, processes: int) -> TokenBatches | None:
    """The batches of a stage with batch_tokens, over all its epochs; None: it has none.

    Raises:
        ValueError: a record longer than the budget.
    """
    if stage.batch_tokens is None or stage.global_batch_size is None:
        return None
    steps = math.ceil(len(order) / stage.global_batch_size)
    epochs = math.ceil(stage.steps / steps if stage.steps else stage.epochs or 0)
    lengths = data.lengths + AROUND
    return TokenBatches(order, lengths, stage.global_batch_size, stage.batch_tokens, processes, epochs)


class StageLoaders(Trainer):
    """A Trainer whose batches are a stage's, and whose held-out loss is a function of the held-out records alone: the mean over their
    label tokens, where the Trainer's is a mean of batches' means.

    Attributes:
        stage: of the recipe.
    """

    stage: StageRecipe
    _order: EpochSampler
    _token_batches: TokenBatches | None

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `batch_size` records in the stage's order, or those of its token budget."""
        if self._token_batches is None:
            return super().get_train_dataloader()
        return self._loader(self.train_dataset, self._token_batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The held-out records, each once, whatever the number of processes."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.stage.eval_batch_size or (None if self.stage.batch_tokens else self.stage.batch_size)
        lengths = data.lengths + AROUND
        budget = self.stage.batch_tokens or 0
        self._held_out = EvaluationBatches(lengths, self.args.world_size, size, budget, data.languages)
        self._held_out_names = [name or "unknown" for name in data.language_names]
        return self._loader(data, self._held_out)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's, with the loss of all label tokens, and of those of each language where there are several."""
        self._evaluated: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # A process has as many batches as any other.
        sums = self.accelerator.gather(torch.stack(self._evaluated)).cpu().double()
        total, count = sums.sum(0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        if len(self._held_out_names) > 1:
            # Gathered by process, each of which has had every so many of the batches.
            of_batch = sums.reshape(self.args.world_size, -1, 2).transpose(0, 1).reshape(-1, 2)
            languages = torch.tensor(self._held_out.languages)
            for language, name in enumerate(self._held_out_names):
                if language in self._held_out.languages:
                    total, count = of_batch[languages == language].sum(0).tolist()
                    output.metrics[f"{metric_key_prefix}_loss_{name}"] = total / max(count, 1)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The loss alone, without logits; its sum and its label tokens are kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs, num_items_in_batch=1, skip_logits=True)
        count = (out.labels != -100).sum()
        self._evaluated.append(torch.stack([out.loss.float(), count.float()]))
        return out.loss / count.clamp(min=1), None, None

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self._order

    def _loader(self, data, batches):
        loader = DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # Nothing is drawn from it, but a loader that begins draws a seed for its workers: from this process' own it would, where an
            # evaluation was put off, come after what a checkpoint keeps of it, and dropout go on otherwise.
            generator=torch.Generator(),
        )
        # The batches are as many as the processes want already, and of no one size, which is all that evening out is for.
        even, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = even
