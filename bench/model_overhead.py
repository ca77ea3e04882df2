"""What LayAlign costs over the bare LLM: time of a training step and of greedy generation, side by side in one run.

Three systems on the same random weights, positions and labels, each with the encoder's forward:
  bare       the LLM alone on embeddings that stand where LayAlign's soft prompts, boundary and text stand;
  layalign   this library;
  published  the authors' scheme, written anew: every attention call projects its query a second time, projects the
             cross keys and values again, and passes the cross result through the output projection on its own.
Training is forward, backward and an AdamW step of what the system trains (the bare LLM trains nothing, but its
gradient goes back to the embeddings, as it must with a soft prompt). All compute logits only where labels are.

    python bench/model_overhead.py --rounds 9 --tokens 64
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from layalign import LayAlignForConditionalGeneration, layer_mix, stream_linear


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; medians are reported")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--encoder-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--target-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12, help="LLM layers")
    parser.add_argument("--encoder-layers", type=int, default=8)
    parser.add_argument("--ragged", action="store_true", help="rows of different lengths, so that all masks are in use")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor instead of wall-clock seconds: busy machines"
    )
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    return parser.parse_args()


def build_bases(arguments):
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=arguments.layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    encoder = MT5EncoderModel(
        MT5Config(vocab_size=8192, d_model=512, d_kv=64, d_ff=1024, num_layers=arguments.encoder_layers, num_heads=6)
    )
    return encoder.eval(), llm.eval()


def build_batch(arguments):
    """The processor's tensors. With --ragged row i lacks 8 i tokens on the encoder's side and 8 i of the prompt."""
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, 8192, (arguments.batch, length), generator=generator)

    batch = {"encoder_input_ids": ids(arguments.encoder_tokens), "input_ids": ids(arguments.prompt_tokens)}
    batch["encoder_attention_mask"] = torch.ones_like(batch["encoder_input_ids"])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if arguments.ragged:
        for row in range(arguments.batch):
            batch["encoder_attention_mask"][row, arguments.encoder_tokens - 8 * row :] = 0
            batch["attention_mask"][row, arguments.prompt_tokens - 8 * row :] = 0
    target = ids(arguments.target_tokens)
    training = dict(batch)
    training["input_ids"] = torch.cat([batch["input_ids"], target], dim=1)
    training["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(target)], dim=1)
    training["labels"] = torch.cat([torch.full_like(batch["input_ids"], -100), target], dim=1)
    return batch, training


class LayAlign:
    def __init__(self, encoder, llm):
        self.model = LayAlignForConditionalGeneration.from_bases(encoder, llm)
        self.model.train()
        with torch.no_grad():
            for name, parameter in self.model.trained_parameters():
                if "fusion_gate" in name:
                    parameter.fill_(0.1)
        self.trained = [parameter for _, parameter in self.model.trained_parameters()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def loss(self, batch):
        return self.model(**batch).loss

    def train_step(self, batch):
        self.model.train()
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def generate(self, batch, tokens):
        self.model.eval()
        return self.model.generate(**batch, max_new_tokens=tokens, do_sample=False)


class BareLLM:
    """The plain LLM behind the plain encoder; what LayAlign reads there is worked out beforehand."""

    def __init__(self, encoder, llm, layalign):
        self.encoder, self.llm, self.layalign = encoder, llm.requires_grad_(False), layalign.model
        self.prepared = {}

    def prepare(self, batch):
        key = id(batch)
        if key not in self.prepared:
            with torch.no_grad():
                soft, soft_mask, _, _ = self.layalign.encode(
                    batch["encoder_input_ids"], batch["encoder_attention_mask"]
                )
                text = (batch["input_ids"], batch["attention_mask"], batch.get("labels"))
                self.prepared[key] = self.layalign.assemble(soft, soft_mask, *text)
        return self.prepared[key]

    def encode(self, batch):
        with torch.no_grad():
            return self.encoder(
                input_ids=batch["encoder_input_ids"],
                attention_mask=batch["encoder_attention_mask"],
                output_hidden_states=True,
            ).hidden_states

    def train_step(self, batch):
        embeddings, mask, labels = self.prepare(batch)
        embeddings = embeddings.detach().requires_grad_()
        self.encode(batch)
        self.llm_loss(embeddings, mask, labels).backward()

    def llm_loss(self, embeddings, mask, labels):
        # The label columns are the same for every system: the last ones, each predicted from the column before.
        columns = (labels[:, 1:] != -100).any(dim=0).nonzero().flatten()
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp_(min=0)
        logits = self.llm(
            inputs_embeds=embeddings,
            attention_mask=mask.long(),
            position_ids=position_ids,
            logits_to_keep=columns,
            use_cache=False,
        ).logits
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:][:, columns].flatten())

    @torch.no_grad()
    def generate(self, batch, tokens):
        embeddings, mask, _ = self.prepare(batch)
        self.encode(batch)
        return self.llm.generate(
            inputs_embeds=embeddings, attention_mask=mask.long(), max_new_tokens=tokens, do_sample=False
        )


class Published(BareLLM):
    """The bare LLM with the cross branch beside every attention module, computed in full at every call."""

    def __init__(self, encoder, llm, layalign):
        super().__init__(encoder, llm, layalign)
        self.aligner = copy.deepcopy(layalign.model.aligner)
        self.adapter = copy.deepcopy(layalign.model.adapter)
        self.gates = [torch.nn.Parameter(torch.full((1,), 0.1)) for _ in llm.model.layers]
        self.trained = [*self.aligner.parameters(), *self.adapter.parameters(), *self.gates]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        self.streams = self.cross_mask = None
        for index, layer in enumerate(llm.model.layers):
            layer.self_attn.forward = self.with_cross(layer.self_attn, layer.self_attn.forward, index)

    def with_cross(self, attention, forward, index):
        def heads(states):
            return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        def forward_with_cross(hidden_states, position_embeddings, **kwargs):
            out, weights = forward(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
            query = heads(attention.q_proj(hidden_states))
            query, _ = apply_rotary_pos_emb(query, query, *position_embeddings)
            attention.v_proj(hidden_states)  # the published code runs it, for the dtype of its result
            keys = heads(attention.k_proj(self.streams[2 * index]))
            values = heads(attention.v_proj(self.streams[2 * index + 1]))
            cross = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.cross_mask, enable_gqa=True)
            cross = attention.o_proj(cross.transpose(1, 2).flatten(2))
            return out + self.gates[index] * cross, weights

        return forward_with_cross

    def mix(self, batch):
        states = self.encode(batch)
        mix, project = self.aligner.mix, self.aligner.project
        streams = layer_mix(states[:-1], mix.weight, mix.bias)
        self.streams = stream_linear(streams, project.weight, project.bias)
        mask = batch["encoder_attention_mask"].bool()
        self.cross_mask = None if mask.all() else mask[:, None, None]
        return states[-1]

    def loss(self, batch):
        _, mask, labels = self.prepare(batch)
        soft = self.adapter(self.mix(batch))
        embeddings, mask, labels = self.layalign.assemble(
            soft, batch["encoder_attention_mask"].bool(), batch["input_ids"], batch["attention_mask"], batch["labels"]
        )
        return self.llm_loss(embeddings, mask, labels)

    def train_step(self, batch):
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def generate(self, batch, tokens):
        embeddings, mask, _ = self.prepare(batch)
        self.mix(batch)
        return self.llm.generate(
            inputs_embeds=embeddings, attention_mask=mask.long(), max_new_tokens=tokens, do_sample=False
        )


def check_that_the_systems_agree(systems, batch, training):
    """The two LayAlign systems compute the same thing, or comparing their times would mean nothing."""
    layalign, published = systems["layalign"], systems["published"]
    losses = [float(system.loss(training).detach()) for system in (layalign, published)]
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]), losses
    ids = [system.generate(batch, 4) for system in (layalign, published)]
    assert torch.equal(*ids), ids
    assert systems["bare"].generate(batch, 4).shape == ids[0].shape


def measure(systems, work, rounds, clock):
    """Seconds by system, one list entry a round; the order turns from round to round."""
    names = list(systems)
    seconds = {name: [] for name in names}
    for name in names:
        work(systems[name])
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            work(systems[name])
            seconds[name].append(clock() - start)
    return seconds


def summarize(seconds):
    """Medians, and the median over rounds of the ratio to the bare LLM in the same round."""
    bare = seconds["bare"]
    return {
        name: {
            "median_seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, bare, strict=True)),
            "seconds": values,
        }
        for name, values in seconds.items()
    }


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    encoder, llm = build_bases(arguments)
    batch, training = build_batch(arguments)
    layalign = LayAlign(encoder, copy.deepcopy(llm))
    systems = {
        "bare": BareLLM(encoder, copy.deepcopy(llm), layalign),
        "layalign": layalign,
        "published": Published(encoder, copy.deepcopy(llm), layalign),
    }
    check_that_the_systems_agree(systems, batch, training)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    works = {
        "train_step": lambda system: system.train_step(training),
        "generate": lambda system: system.generate(batch, arguments.tokens),
    }
    results = {name: summarize(measure(systems, work, arguments.rounds, clock)) for name, work in works.items()}
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    report = {"settings": settings, "torch": torch.__version__, **results}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))
    print(f"\n{'':12}" + "".join(f"{name:>22}" for name in systems))
    for work, table in results.items():
        cells = (f"{row['median_seconds'] * 1e3:9.0f} ms  {row['ratio']:5.2f} x" for row in table.values())
        print(f"{work:12}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
