"""Both stages by transformers' own Trainer: python examples/plain_trainer.py runs/plain [STEPS]

Each stage is a Trainer with a collator that makes batches with the processor: the translation stage without a prompt, the task stage with
one. All that TrainingArguments has applies: evaluation, checkpoints, label smoothing, several processes by torchrun.
"""

import sys

from transformers import Trainer, TrainingArguments

from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

BASES = {"encoder": "layalign:tiny_encoder", "llm": "layalign:tiny_llm"}  # any names, folders or modules
PAIRS = [("Tom hat zwei Stifte.", "Tom has two pens."), ("Tom ana kalamu mbili.", "Tom has two pens.")] * 8
QUESTION = "Tom has {} pens. Then Tom buys three pens. How many pens does Tom have now?"
TASKS = [(QUESTION.format(number), f"{number} + 3 = {number + 3}.") for number in range(2, 10)]


def train(model: LayAlignForConditionalGeneration, processor: LayAlignProcessor, stage: str, folder: str, steps: int):
    """Train one stage; checkpoints hold the trained part and refer to the bases."""

    def batch(examples):
        source, target = zip(*examples, strict=True)
        return processor(list(source), prompt=list(source) if stage == "task" else None, target=list(target))

    arguments = TrainingArguments(
        f"{folder}/{stage}",
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        label_smoothing_factor=0.1 if stage == "task" else 0.0,
        logging_steps=5,
        report_to=[],
        remove_unused_columns=False,  # the collator reads texts, which forward does not take
    )
    data = TASKS if stage == "task" else PAIRS
    Trainer(model, arguments, batch, data, processing_class=processor).train()


def main(folder: str, steps: str = "20"):
    model = LayAlignForConditionalGeneration.from_bases(**BASES)
    processor = LayAlignProcessor.from_bases(**BASES, prompt_template="{text}")
    for stage in ("translation", "task"):
        train(model, processor, stage, folder, int(steps))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    answer = model.eval().generate(**processor([TASKS[0][0]]).to(model.device), max_new_tokens=12)
    print(processor.batch_decode(answer, skip_special_tokens=True)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
