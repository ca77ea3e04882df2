"""How bounds of packed sequences are read where nobody may look at them: on a device, and by compiled code.

Bounds that break their rule (from 0, never falling, up to the length) would have the kernels read other memory and leave rows of
the output as the allocator gave them. To look first costs a wait for the device. So they are repaired there, which good bounds
leave as they are: cut to 0 .. length, each at least the one before, the first 0 and the last the length. Every position then
belongs to one sequence.
"""

from torch import Tensor


def repaired(bounds: Tensor, length: int) -> Tensor:
    """Bounds (n + 1,) int32 of n packed sequences in `length` positions, repaired by PyTorch's operators: nothing waits."""
    bounds = bounds.clamp(0, length)
    bounds[0] = 0
    bounds = bounds.cummax(dim=0).values
    bounds[-1] = length
    return bounds
