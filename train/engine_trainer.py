"""What transformers' Trainer and accelerate leave open under FSDP2 and DeepSpeed: a trained part that is saved whole, an optimizer's
state that any engine and any number of processes takes up, FSDP2 on the CPU, and a word where nothing was sharded."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from layalign import shards
from layalign.saving import Weights
from layalign.train.engines import SHARDED

RUNNING = "running.json"


class EngineTrainer(Trainer):
    """A Trainer under the engine of a recipe.

    Attributes:
        engine: "none", "ddp", "fsdp2" or "deepspeed"; to be set before the Trainer is initialised.
        precision: "fp32" or "bf16" by autocast, likewise.
    """

    engine = "ddp"
    precision: Literal["fp32", "bf16"] = "fp32"
    deepspeed: Any

    @property
    def sharded(self) -> bool:
        """Whether this process may hold a part of the model only. It stays so when the stage has ended."""
        return self.engine in SHARDED

    @property
    def keeps_whole(self) -> bool:
        """Whether this process keeps whole weights of a sharded model: the first one is enough, of an LLM that is trained 27 GB."""
        return not self.sharded or self.args.should_save

    def whole_weights(self) -> Weights:
        """A copy of the trained part, whole, on the CPU; of a sharded one only where it `keeps_whole`, else {}. All processes call this
        together."""
        weights = self.model.trained_state_dict(keep=self.keeps_whole)
        copy = not shards.is_sharded(self.model)  # what was gathered is nobody else's; ZeRO-2 shards no weights
        return {name: value.detach().to("cpu", copy=copy) for name, value in weights.items()}

    def give_up_engine(self) -> None:
        """Let go of what the engine holds, so that the next stage's engine begins with another, whole model."""
        if self.is_deepspeed_enabled:
            self.deepspeed.destroy()
            # While this stands, transformers would load the next bases in partitions.
            unset_hf_deepspeed_config()
            self.deepspeed = None
        if self.sharded:
            self.model_wrapped = self.model
            self.accelerator.free_memory()

    def refuse_other_engine(self, checkpoint: Path, total_given: bool) -> None:
        """Before going on from a checkpoint.

        Args:
            checkpoint: its folder.
            total_given: whether the examples of a step are given for all processes together.

        Raises:
            ValueError: its state cannot be taken up, or its steps were other ones, in so many processes under this engine.
        """
        running = json.loads((checkpoint / RUNNING).read_text(encoding="utf-8"))
        before, now = running.get("processes", len(running["loss_sums"])), self.args.world_size
        wrote, mine = running.get("engine", "ddp"), self._full_engine()
        if wrote != mine and any(name.startswith("deepspeed") for name in (wrote, mine)):
            raise ValueError(
                f"parallel: {checkpoint} was written under {wrote}, and this is {mine}: DeepSpeed's state goes on under the "
                "same stage of DeepSpeed only; restore parallel and deepspeed, or choose another output folder"
            )
        if before == now:
            return
        if mine.startswith("deepspeed"):
            raise ValueError(
                f"parallel: {checkpoint} was written by {before} processes, and there are {now}: DeepSpeed's state goes on in "
                "the same number only; start so many"
            )
        if not total_given:
            raise ValueError(
                f"gradient_accumulation: {checkpoint} was written by {before} processes, and there are {now}, in which a step would "
                "take another number of examples; start so many, or begin a run with global_batch_size, which divides itself"
            )

    def engine_record(self) -> dict[str, Any]:
        """What a checkpoint says about the engine."""
        return {"engine": self._full_engine(), "processes": self.args.world_size}

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, and FSDP2 on the CPU, which accelerate passes over.

        Raises:
            ValueError: another engine than the recipe's.
        """
        if self.engine == "fsdp2":
            # Else accelerate has FSDP2 round to bf16 what the root takes and gives, the loss among it, and add gradients up in bf16.
            self.args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.engine == "fsdp2" and state.distributed_type == DistributedType.MULTI_CPU:
            plugin: Any = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for shared in (AcceleratorState._shared_state, PartialState._shared_state):
                shared["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = plugin
            os.environ["ACCELERATE_USE_FSDP"] = "true"  # accelerate looks here for how gradients are synchronised
            self.is_fsdp_enabled = True
        found = {DistributedType.FSDP: "fsdp2", DistributedType.DEEPSPEED: "deepspeed"}.get(
            self.accelerator.distributed_type
        )
        if (self.engine if self.sharded else None) != found:
            raise ValueError(f"parallel: {self.engine}, but accelerate was set up for {found or 'no sharding'}")

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """What accelerate puts around a model that is not sharded. Copies are not kept: they would outlive the gathered weights."""
        if not self.sharded or self.precision != "bf16":
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, torch.bfloat16, cache_enabled=False)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained part and the configuration, by the first process; the Trainer's would gather the bases too."""
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        weights = self.whole_weights()
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=weights)
        return None

    def _full_engine(self):
        if self.engine != "deepspeed":
            return "ddp" if self.engine == "none" else self.engine
        return f"deepspeed, stage {self.args.hf_deepspeed_config.get_value('zero_optimization.stage')}"

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)  # into the model as it still is: whole
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._check_sharded()
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                # Not strict: the bases are in no checkpoint.
                self.deepspeed.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _check_sharded(self):
        """That what the recipe asks for has happened: every parameter is shared out."""
        if self.is_deepspeed_enabled and self.args.hf_deepspeed_config.get_value("zero_optimization.stage") < 3:
            return
        is_shared = shards.is_partition if self.is_deepspeed_enabled else shards.is_shard
        left = [name for name, parameter in self.model.named_parameters() if not is_shared(parameter)]
        if left:
            raise ValueError(
                f"parallel: {self.engine} has left {len(left)} parameters whole in every process ({', '.join(left[:3])}, ...); "
                "quantised bases are such: train these with ddp"
            )

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled:
            self.deepspeed.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            # As without sharding, by the parameters' order: any number of processes reads it, under DDP or FSDP2.
            state = self.optimizer.state_dict()
            state["state"] = _each(state["state"], lambda index, value: self._kept(shards.whole(value)))
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        return None

    def _kept(self, value):
        if not self.args.should_save:
            return None
        return value.cpu() if isinstance(value, torch.Tensor) else value

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        if not self.is_deepspeed_enabled:
            file = Path(checkpoint) / OPTIMIZER_NAME
            # On a GPU each process copies its own part of the file; on the CPU a part would go on being the file's.
            mapped = self.args.device.type != "cpu"
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

            def mine(index: int, value: Any) -> Any:
                fits = isinstance(value, torch.Tensor) and value.shape == parameters[index].shape and value.dim() > 0
                if fits:
                    return shards.split_like(value, parameters[index])
                return value.clone() if isinstance(value, torch.Tensor) else value

            state["state"] = _each(state["state"], mine)
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        return None


def _each(state, change):
    """An optimizer's state with every value changed, in an order that is the same in all processes."""
    return {
        index: {name: change(index, value) for name, value in sorted(values.items())}
        for index, values in sorted(state.items())
    }
