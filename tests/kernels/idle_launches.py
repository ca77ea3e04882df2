"""A program for test_direct_launches.py, in a process without the interpreter: what a driver without a GPU is handed by calls that
take the long way, by plans through Triton, and by plans directly. Prints one JSON object."""

import dataclasses
import importlib.util
import json
import sys
import threading
import warnings
from pathlib import Path

import torch
from triton import knobs

from bench.host_cost import idle_gpu
from layalign.kernels import plans, repeated_launch
from layalign.kernels.adaptive_fusion_attention import adaptive_fusion_attention
from layalign.kernels.adaptive_fusion_attention.gpu.operator import PLANS

spec = importlib.util.spec_from_file_location("attention_cases", Path(__file__).with_name("attention_cases.py"))
cases = importlib.util.module_from_spec(spec)
sys.modules["attention_cases"] = cases
spec.loader.exec_module(cases)

of_thread = threading.local()  # .launches: (compiled kernel, grid, arguments as they came) of the last run


def launched(compiled, grid, arguments):
    of_thread.launches.append((compiled, grid, arguments))


def run(inputs, keywords):
    """A call and its gradients -> its launches, each (compiled kernel, grid, what stands for the arguments)."""
    launches = of_thread.launches = []
    outputs = adaptive_fusion_attention(*inputs, **keywords, backend="triton")
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    leaves = [x for x in inputs if x.requires_grad]
    if leaves and out.numel():
        torch.autograd.grad(out, leaves, torch.ones(out.shape, dtype=out.dtype))
    given = [*inputs, *(x for x in keywords.values() if isinstance(x, torch.Tensor))]
    return [(compiled, grid, described(arguments, given, {})) for compiled, grid, arguments in launches], direct(
        launches
    )


def direct(launches):
    """How many came with addresses alone."""
    return sum(not any(isinstance(x, torch.Tensor) for x in leaves(arguments)) for _, _, arguments in launches)


def leaves(arguments):
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from leaves(argument)
        else:
            yield argument


def described(argument, given, fresh):
    """Arguments with a name for each tensor or address: the input that it is of, or the n-th of others."""
    if isinstance(argument, tuple):
        return tuple(described(x, given, fresh) for x in argument)
    address = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
    if not isinstance(argument, torch.Tensor) and not (isinstance(argument, int) and argument > 2**32):
        return argument
    if address == 0:  # of an empty tensor
        return 0
    for number, x in enumerate(given):
        if x.data_ptr() == address:
            return f"input {number}"
    return fresh.setdefault(address, f"fresh {len(fresh)}")


def compare(count):
    """Random calls: the same kernels, grids and arguments whichever way -> how many calls, launches, direct ones."""
    found = {"calls": 0, "launches": 0, "direct": 0, "differ": []}
    for seed in range(count):
        case = cases.draw(seed, [torch.bfloat16, torch.float16, torch.float32])
        if case.layout == "strided" or not case.queries:
            continue
        inputs, keywords = case.inputs(), case.keywords()
        plans.enabled = False
        want, _ = run(inputs, keywords)
        plans.enabled = True
        for _ in range(3):  # the long way, rehearsed, directly
            got, now = run(inputs, keywords)
            if got != want:
                found["differ"].append(seed)
        again = dataclasses.replace(case, seed=seed + 1000)
        got, now = run(again.inputs(), again.keywords())  # elsewhere in memory
        if got != want:
            found["differ"].append(seed)
        found["calls"] += 1
        found["launches"] += len(want)
        found["direct"] += now
    return found


def plain_call():
    inputs = [x.detach() for x in cases.random_inputs(1, 4, 2, 20, 20, 12, 64, (1,), torch.bfloat16, torch.float32)]
    return inputs, {}


def again(times=3):
    """How many launches of the last of so many like calls were direct."""
    PLANS.clear()
    return [run(*plain_call())[1] for _ in range(times)][-1]


def hooks():
    """A profiler's hook sees every launch; without it they are direct again."""
    seen = []
    before = again()
    knobs.runtime.launch_enter_hook.add(seen.append)
    during = [run(*plain_call())[1] for _ in range(2)][-1]
    knobs.runtime.launch_enter_hook.remove(seen.append)
    return {"before": before, "during": during, "after": run(*plain_call())[1]}


def pre_run_hook():
    from layalign.kernels.adaptive_fusion_attention.gpu.forward import forward_kernel

    forward_kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    during = again()
    forward_kernel.pre_run_hooks.clear()
    return {"during": during, "after": again()}


def unlike_what_triton_hands_over():
    """Were Triton's arguments others than a plan's, the plan would stay with Triton."""
    repeated_launch._rehearsed.clear()
    equal = repeated_launch._equal
    repeated_launch._equal = lambda theirs, ours: False
    during = again(4)
    repeated_launch._equal = equal
    return {"during": during, "after": again()}


def refused():
    """A launcher that takes no addresses: one warning, and every launch is there."""
    again()
    compiled = of_thread.launches[-1][0]
    start = compiled._run

    def picky(*arguments):
        if not any(isinstance(x, torch.Tensor) for x in leaves(arguments[9:])):
            raise TypeError("Pointer argument must have data_ptr method")
        return start(*arguments)

    compiled._run = picky
    PLANS.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = [run(*plain_call()) for _ in range(4)]
    compiled._run = start
    return {
        "launches": [len(found) for found, _ in counts],
        "direct": [number for _, number in counts],
        "warnings": sum("refuses direct launches" in str(x.message) for x in caught),
    }


def threads():
    """Threads that make, rehearse and run plans at once, more of them than are kept -> how often a launch was another."""
    calls = []
    for length in range(8):
        shape = (1, 4, 2, 20, 20 + length, 12, 64, (1,))
        inputs = cases.random_inputs(*shape, torch.bfloat16, torch.float32)
        calls.append((inputs, {}))
    plans.enabled = False
    want = [run(*call)[0] for call in calls]
    plans.enabled, plans.MOST_PLANS = True, 5
    PLANS.clear()
    repeated_launch._rehearsed.clear()
    differ, direct = [], []

    def work(first):
        for number in range(200):
            place = (first + number // 4) % len(calls)
            got, now = run(*calls[place])
            direct.append(now)
            if got != want[place]:
                differ.append(place)

    workers = [threading.Thread(target=work, args=(first,)) for first in (0, 3, 3, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    plans.MOST_PLANS = 256
    again()
    left = of_thread.launches[-1][0]._run.__qualname__
    return {"runs": len(direct), "differ": differ, "direct": sum(direct) > 0, "kept": len(PLANS) <= 5, "left": left}


with idle_gpu("sm_90", launched):
    print(
        json.dumps(
            {
                "compare": compare(int(sys.argv[1])),
                "hooks": hooks(),
                "pre_run_hook": pre_run_hook(),
                "unlike": unlike_what_triton_hands_over(),
                "threads": threads(),
                "refused": refused(),
            }
        )
    )
