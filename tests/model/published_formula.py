"""The published computation, slow and written from its description: plain loops in fp64 over a published state dict.

It shares no code with the package. Llama layers are computed here too; only the encoder's hidden states come from outside.
"""

import torch


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, position, theta):
    """RoPE of one head vector (D,) at a position, the two-halves form."""
    half = x.shape[0] // 2
    angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[:half], x[half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


def logits_of_row(state, config, hidden_states, mask, soft_inputs, position_of, cross_mask):
    """Logits (S, V) of one example.

    state: published state dict in fp64; hidden_states: E+1 encoder states (T, De) of this example; mask: (S,) bool of the assembled
    row; soft_inputs: (S, Dl) assembled embeddings; position_of: (S,) position of each column; cross_mask: (T,) bool.
    """
    heads, layers, eps = config.num_attention_heads, config.num_hidden_layers, config.rms_norm_eps
    theta = config.rope_parameters["rope_theta"]
    group = heads // config.num_key_value_heads
    mix, mix_bias = state["encoder_aligner.projector.fc1.weight"], state["encoder_aligner.projector.fc1.bias"]
    project, project_bias = state["encoder_aligner.projector.fc2.weight"], state["encoder_aligner.projector.fc2.bias"]

    def stream(j):
        mixed = sum(mix[j, e] * hidden_states[e] for e in range(mix.shape[1])) + mix_bias[j]
        out = mixed.clamp(min=0) @ project.T + project_bias
        if "encoder_aligner.projector.fc3.weight" in state:
            out = (
                out.clamp(min=0) @ state["encoder_aligner.projector.fc3.weight"].T
                + state["encoder_aligner.projector.fc3.bias"]
            )
        return out

    x = soft_inputs
    for i in range(layers):
        prefix = f"model_llm.model.model.layers.{i}."
        attention = prefix + "self_attn.model."
        normed = rms_norm(x, state[prefix + "input_layernorm.weight"], eps)
        q, k, v = (normed @ state[attention + f"{name}_proj.weight"].T for name in "qkv")
        cross_k = stream(2 * i) @ state[attention + "k_proj.weight"].T
        cross_v = stream(2 * i + 1) @ state[attention + "v_proj.weight"].T
        gate = state[prefix + "self_attn.adaption_gate"]
        size = q.shape[1] // heads
        out = torch.zeros(x.shape[0], heads * size, dtype=torch.float64)
        for head in range(heads):
            own, shared = (
                slice(head * size, head * size + size),
                slice(head // group * size, head // group * size + size),
            )
            for s in range(x.shape[0]):
                query = rotate(q[s, own], position_of[s], theta)
                seen = [n for n in range(s + 1) if mask[n]]
                if seen:
                    scores = (
                        torch.stack([query @ rotate(k[n, shared], position_of[n], theta) for n in seen]) / size**0.5
                    )
                    out[s, own] = scores.softmax(0) @ torch.stack([v[n, shared] for n in seen])
                visible = [t for t in range(len(cross_mask)) if cross_mask[t]]
                scores = torch.stack([query @ cross_k[t, shared] for t in visible]) / size**0.5
                out[s, own] = out[s, own] + gate * (
                    scores.softmax(0) @ torch.stack([cross_v[t, shared] for t in visible])
                )
        x = x + out @ state[attention + "o_proj.weight"].T
        normed = rms_norm(x, state[prefix + "post_attention_layernorm.weight"], eps)
        up = normed @ state[prefix + "mlp.up_proj.weight"].T
        activated = torch.nn.functional.silu(normed @ state[prefix + "mlp.gate_proj.weight"].T)
        x = x + (activated * up) @ state[prefix + "mlp.down_proj.weight"].T
    return rms_norm(x, state["model_llm.model.model.norm.weight"], eps) @ state["model_llm.model.lm_head.weight"].T


def published_loss(state, config, hidden_states, encoder_mask, prompt, prompt_mask, labels, label_mask, compatible):
    """Mean loss of a batch as the published code computes it (compatible), or with the padding handled right."""
    embed = state["model_llm.model.model.embed_tokens.weight"]
    rows = []
    for b in range(len(prompt)):
        h = hidden_states[-1][b]
        hidden = (h @ state["mapping.mlp.linear1.weight"].T + state["mapping.mlp.linear1.bias"]).clamp(min=0)
        soft = hidden @ state["mapping.mlp.linear2.weight"].T + state["mapping.mlp.linear2.bias"]
        one = torch.tensor([True])
        vectors = torch.cat(
            [
                embed[config.bos_token_id][None],
                soft,
                state["mapping.end_boundary"][0],
                embed[prompt[b]],
                embed[labels[b]],
            ]
        )
        mask = torch.cat([one, encoder_mask[b].bool(), one, prompt_mask[b].bool(), label_mask[b].bool()])
        targets = torch.full((len(mask),), -100)
        targets[len(mask) - labels.shape[1] :] = torch.where(label_mask[b].bool(), labels[b], -100)
        rows.append((vectors, mask, targets))
    width = max(int(mask.sum()) for _, mask, _ in rows)
    total, count = 0.0, 0
    for b, (vectors, mask, targets) in enumerate(rows):
        order = [i for i in range(len(mask)) if not mask[i]] + [i for i in range(len(mask)) if mask[i]]
        order = order[len(order) - width :]
        squeezed = mask[order]
        # The published labels stay where they were while everything else moves.
        targets = targets[len(targets) - width :] if compatible else targets[order]
        position_of = torch.arange(width) if compatible else (squeezed.long().cumsum(0) - 1).clamp(min=0)
        cross_mask = torch.ones_like(encoder_mask[b]) if compatible else encoder_mask[b]
        logits = logits_of_row(
            state,
            config,
            [h[b] for h in hidden_states],
            squeezed,
            vectors[order],
            position_of.double(),
            cross_mask.bool(),
        )
        for s in range(width - 1):
            if targets[s + 1] != -100:
                total, count = total - logits[s].log_softmax(0)[targets[s + 1]], count + 1
    return total / count
