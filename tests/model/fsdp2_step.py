"""A training step and an answer under FSDP2, one process on a CPU: python fsdp2_step.py FOLDER, which test_projections.py fills.

results.pt gets for each way to shard (loss, loss without gradients, gradients), the first attention's own weights trained too or not.
Of the projections' gathered weights, those of one layer at a time are there, and none between forward and backward.
"""

import gc
import sys
import weakref
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from layalign import LayAlignForConditionalGeneration, modules
from layalign.projections import attention_modules

GATHERED = []
gather = modules._layer_weights


def remembering(projections, dtype):
    """Weights as gathered; all that were gathered before for another layer must be gone."""
    gc.collect()
    alive = [weight for weight in GATHERED if weight() is not None]
    assert len(alive) <= 4, f"weights of {len(alive)} projections at once"
    weights = gather(projections, dtype)
    # A gathered weight of one process shares its memory with the shard; what the operators get is another.
    weights = [None if parts is None else [part.clone() for part in parts] for parts in weights]
    GATHERED.extend(weakref.ref(part) for parts in weights for part in parts or ())
    return weights


modules._layer_weights = remembering


def step(folder, batch, projections, trained):
    """projections: names of the modules that are sharded on their own; trained: whether the first attention's weights are."""
    model = LayAlignForConditionalGeneration.from_pretrained(
        folder / "model", encoder=folder / "encoder", llm=folder / "llm"
    )
    mesh = init_device_mesh("cpu", (1,))
    attentions = attention_modules(model.llm).values()
    if trained:
        next(iter(attentions)).requires_grad_(True)
    layers = [layer for layer in model.llm.modules() if any(child in attentions for child in layer.children())]
    for layer in layers:
        for name, module in layer.named_modules():
            if name.split(".")[-1] in projections:
                fully_shard(module, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    GATHERED.clear()
    loss = model(**batch).loss
    gathered = len(GATHERED)
    assert gathered > 0
    gc.collect()
    assert not any(weight() is not None for weight in GATHERED), "kept for the backward pass"
    loss.backward()
    assert len(GATHERED) == 2 * gathered, "the backward pass gathers them again"
    gradients = {
        name: parameter.grad.full_tensor() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    with torch.no_grad():
        answers = model.eval()(**batch).loss
    assert model.aligner._kept is None, "folded weights are whole"
    return loss.detach(), answers, gradients


folder = Path(sys.argv[1])
batch, names = torch.load(folder / "given.pt")
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
ways = [(projections, trained) for trained in (False, True) for projections in ([], names)]
torch.save([step(folder, batch, *way) for way in ways], folder / "results.pt")
distributed.destroy_process_group()
