"""What the versions of transformers that LayAlign takes do differently."""

from __future__ import annotations

from dataclasses import fields

import transformers
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast

VERSION = Version(transformers.__version__)
# The cache, as an argument of models and in their outputs: 5.24 renamed it, and `generate` passes and looks for the new name alone.
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"

# Before, prompt lookup took the last embeddings of its first step for those of the tokens it had guessed: other answers than greedy's.
PROMPT_LOOKUP = Version("5.18")


def can_look_up_prompts() -> bool:
    """Whether prompt lookup gives greedy decoding's answers with this transformers."""
    return VERSION >= PROMPT_LOOKUP
