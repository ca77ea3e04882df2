"""Multiplying the shared projection into one layer's key or value projection, and when that pays."""


def fold_pays(tokens, encoder_width, llm_width, kv_width):
    """Whether folding saves operations for this number of tokens.

    Folding multiplies (kv, Dl) with (Dl, De) once and replaces, for each token, De x Dl + Dl x kv products by De x kv.
    """
    saved = encoder_width * llm_width + llm_width * kv_width - encoder_width * kv_width
    return tokens * saved > kv_width * llm_width * encoder_width


def fold_projection(weight, bias, proj_weight, proj_bias):
    """(kv, Dl) after (Dl, De) as one (kv, De) and its bias (kv,) or None, in fp32 and rounded once."""
    dtype = weight.dtype
    folded_weight = (weight.float() @ proj_weight.float()).to(dtype)
    if proj_bias is None:
        return folded_weight, bias
    folded_bias = weight.float() @ proj_bias.float()
    return folded_weight, (folded_bias if bias is None else folded_bias + bias.float()).to(dtype)
