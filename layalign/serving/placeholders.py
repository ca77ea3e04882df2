"""What stands in the LLM's prompt for the soft prompts, and what it tells: which encoder output belongs to which request.

The LLM reads [bos] [soft prompts] [boundary] [text]. vLLM knows requests by token ids, so ids stand for soft prompts and boundary.
They are digits of a hash of the question. vLLM gives encoder outputs in the order in which they were scheduled, which need not be
that of the batch: a request that was preempted and comes back is scheduled before new ones, and stands behind them. Each is
recognised by the digits, and two questions are never taken for each other on account of their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

# A hash of so many bits: of two of a million questions at the same time it is the same once in a billion times.
BITS = 64


def digits(encoder_ids: Sequence[int], vocabulary: int) -> list[int]:
    """Token ids, at most as many as there are soft prompts and a boundary, that tell a question from others.

    Args:
        encoder_ids: T of them, the encoder's of the question.
        vocabulary: of the LLM.
    """
    count, space = 0, 1
    while space < 2**BITS and count <= len(encoder_ids):
        count, space = count + 1, space * vocabulary
    content = ",".join(map(str, encoder_ids)).encode()
    number = int.from_bytes(hashlib.sha256(content).digest(), "big") % space
    found = []
    for _ in range(count):
        number, digit = divmod(number, vocabulary)
        found.append(digit)
    return found


def decoder_ids(encoder_ids: Sequence[int], text_ids: Sequence[int], bos: int | None, vocabulary: int) -> list[int]:
    """The token ids of a request: [bos] [T + 1 placeholders] [text].

    Args:
        encoder_ids: T of them.
        text_ids: what the LLM reads beside the soft prompts.
        bos: its beginning of sequence, where it has one.
        vocabulary: of the LLM.
    """
    found = digits(encoder_ids, vocabulary)
    rest = [bos or 0] * (len(encoder_ids) + 1 - len(found))
    return [*([] if bos is None else [bos]), *found, *rest, *text_ids]
