"""Parameters that several processes hold together, FSDP2's shards and ZeRO-3's partitions, read whole."""

from __future__ import annotations

from typing import Any

import torch


def is_shard(tensor: Any) -> bool:
    """Whether this is an FSDP2 shard (a DTensor), told by its method: builds of torch without distributed lack the class."""
    return hasattr(tensor, "full_tensor")


def is_partition(tensor: Any) -> bool:
    """Whether this is a parameter that ZeRO-3 partitions, whether it is gathered at the moment or not."""
    return hasattr(tensor, "ds_id")


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether some of a module's parameters are to be gathered when it is called. Those of the model's root are, while it runs."""
    return any(is_shard(own) or is_partition(own) for own in module.parameters())


def whole(tensor: Any) -> Any:
    """The whole of a sharded tensor, any other as it is. All processes call this, for the same tensors in the same order."""
    if is_shard(tensor):
        place = tensor.device_mesh.device_type
        # Shards that wait on the CPU are gathered where the processes talk to each other.
        return (tensor if tensor.device.type == place else tensor.to(place)).full_tensor()
    if is_partition(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def whole_to_keep(tensor: Any) -> Any:
    """The same, that of a sharded tensor on the CPU."""
    return whole(tensor).cpu() if is_shard(tensor) or is_partition(tensor) else tensor


def part_of_process(tensor: Any) -> Any:
    """What this process holds of a tensor: its part of a sharded one, the whole of any other."""
    if is_shard(tensor):
        return tensor.to_local()
    if not is_partition(tensor):
        return tensor
    part = tensor.ds_tensor
    # All parts are equally long, and what the last ones have too much was never written: it may be NaN.
    before = part.numel() * torch.distributed.get_rank(tensor.ds_process_group)
    return part[: max(tensor.ds_numel - before, 0)]


def counts(tensor: Any) -> tuple[int, int]:
    """How many numbers a parameter has, and how many of them this process holds."""
    return tensor.ds_numel if is_partition(tensor) else tensor.numel(), part_of_process(tensor).numel()


def split_like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This process' part of a whole tensor, as a parameter of its shape is sharded; no process hears of another.

    Args:
        value: the same in every process.
        parameter: an FSDP2 shard, or a tensor that is whole.
    """
    if not is_shard(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    split = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    return split.to(parameter.device)
