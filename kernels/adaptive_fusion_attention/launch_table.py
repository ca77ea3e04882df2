"""The shipped launch configurations of adaptive-fusion attention."""

from ..launch import LaunchConfig

INTERPRETER = {
    "forward": LaunchConfig(block_m=32, block_n=16, warps=4, stages=1),
    "key_value_gradients": LaunchConfig(block_m=16, block_n=32, warps=4, stages=1),
    "query_gradients": LaunchConfig(block_m=32, block_n=16, warps=4, stages=1),
}


def launch_config(kernel, *, architecture, dtype, head_dim, length, plain):
    return INTERPRETER[kernel]


def launch_candidates(kernel, *, architecture, dtype, head_dim, length, plain):
    return [INTERPRETER[kernel]]
