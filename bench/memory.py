"""What a call allocates, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def saved_bytes(function: Callable, given: Iterable[Tensor]) -> int:
    """What `function` keeps for the backward pass, in whole allocations, beside the memory of the tensors `given`."""
    known = {x.untyped_storage().data_ptr() for x in given}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = function()  # alive while counted: no address is used twice
    del results
    return sum(kept.values())


def peak_bytes(work: Callable, device: torch.device) -> int:
    """The most memory that is allocated at once while `work` runs, beside what was before it."""
    if device.type != "cuda":
        return _peak_bytes_of_cpu(work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes_of_cpu(work):
    """From the profiler's record of every allocation and release by PyTorch."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak
