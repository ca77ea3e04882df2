"""Steps of transformers' Trainer, for one process and, run as a program, for each of two. They are forks of one process, with the
environment that torchrun gives them, so that torch and transformers are imported once.
"""

import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor
from tests.train.conftest import ENGLISH, NUMBERS

RECORDS = [
    {"source": " ".join(NUMBERS[: 1 + i % 4]), "target": " ".join(ENGLISH[i % 5 : i % 5 + 1 + i % 3])}
    for i in range(10)
]


def metrics(found):
    logits, labels = torch.tensor(found.predictions), torch.tensor(found.label_ids)
    return {
        "mean": F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(),
        "labels": int((labels != -100).sum()),
    }


def steps(folder, collate, output, batch_size, eval_batch_size):
    """Two SGD steps of two calls each over a batch of so many examples of a process."""
    model = LayAlignForConditionalGeneration.from_pretrained(folder).train_only()
    arguments = TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=eval_batch_size,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        logging_steps=1,
        optim="sgd",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=RECORDS[:8],
        eval_dataset=RECORDS,
        compute_metrics=metrics,
    )
    trainer.train()
    found = trainer.evaluate()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {name: found[name] for name in ("eval_mean", "eval_labels")},
        "weights": dict(model.trained_parameters()),
    }


def child(rank, port, processor, folder, output):
    counted = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    os.environ.update(counted, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    for stage in ("translation", "task"):

        def collate(examples, prompted=stage == "task"):
            source, target = [[example[name] for example in examples] for name in ("source", "target")]
            return processor(source, [f"answer : {text}" for text in source] if prompted else None, target)

        found = steps(folder, collate, Path(output) / stage, 2, 5)
        if rank == 0:
            torch.save(found, Path(output) / f"{stage}.pt")


def main(folder, encoder, llm, output):
    torch.set_num_threads(1)
    processor = LayAlignProcessor.from_bases(encoder, llm)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            status = 1
            try:
                child(rank, port, processor, folder, output)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in children))


if __name__ == "__main__":
    main(*sys.argv[1:])
