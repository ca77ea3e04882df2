"""A training step and an answer under FSDP2, one process on a CPU: python fsdp2_step.py FOLDER, which test_projections.py fills.

results.pt gets for each way to shard (loss, loss without gradients, gradients, the error once key projections are trained).
"""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from layalign import LayAlignForConditionalGeneration
from layalign.projections import attention_modules


def step(folder, batch, projections):
    """projections: names of the modules that are sharded on their own."""
    model = LayAlignForConditionalGeneration.from_pretrained(
        folder / "model", encoder=folder / "encoder", llm=folder / "llm"
    )
    mesh = init_device_mesh("cpu", (1,))
    attentions = attention_modules(model.llm).values()
    layers = [layer for layer in model.llm.modules() if any(child in attentions for child in layer.children())]
    for layer in layers:
        for name, module in layer.named_modules():
            if name.split(".")[-1] in projections:
                fully_shard(module, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.trained_parameters()}
    with torch.no_grad():
        answers = model.eval()(**batch).loss
    assert model.aligner._kept is not None, "not folded"
    next(iter(attentions)).requires_grad_(True)
    try:
        model(**batch)
    except ValueError as error:
        return loss.detach(), answers, gradients, str(error)
    return loss.detach(), answers, gradients, "none"


folder = Path(sys.argv[1])
batch, names = torch.load(folder / "given.pt")
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
torch.save([step(folder, batch, projections) for projections in ([], names)], folder / "results.pt")
distributed.destroy_process_group()
