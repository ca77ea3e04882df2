"""QuestionRenderer: the requests of vLLM's engine and servers, read as questions for the encoder."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

# The modality under which vLLM carries what the encoder reads.
MODALITY = "question"
# What vLLM calls the token ids that a chat request may bring in place of its messages, where its own servers share out the work.
REUSED_IDS = "kv_transfer_params.prompt_token_ids"


class EncoderPrompt(list[int]):
    """What vLLM is told of the encoder's prompt, by which a request with a question is known; the engine gets the question itself.

    Args:
        tokens: of the question.
        whole: the token ids of the LLM's prompt that belongs to it.
    """

    def __init__(self, tokens: int, whole: list[int]):
        super().__init__([0] * tokens)
        self.whole = whole


class QuestionRenderer(HfRenderer):
    """Makes of a prompt, which is a question in any language, what the processor reads.

    A prompt is a text, {"prompt": text}, or {"encoder_prompt": question, "decoder_prompt": text for the LLM}; a conversation is one
    message of the user. The text for the LLM is otherwise the model's own template, filled in by the processor.
    """

    # Of each thread: the LLM's prompt whose encoder prompt has just been looked at, see `validate_token_ids`.
    _begun = threading.local()

    def render_messages(self, messages: Sequence[Any], params: Any) -> tuple[list[Any], Any]:
        """The question of a conversation, which the last message asks."""
        if params.chat_template_kwargs.get("tools"):
            raise VLLMValidationError(
                "tools: LayAlign's prompt has no place for descriptions of tools", parameter="tools"
            )
        question = conversation_question(messages)
        return [{"role": "user", "content": question}], {"encoder_prompt": {"prompt": question}, "decoder_prompt": None}

    async def render_messages_async(self, messages: Sequence[Any], params: Any) -> tuple[list[Any], Any]:
        """The same; there is nothing to wait for."""
        return self.render_messages(messages, params)

    def tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """The request that carries a question to the processor, whose tokenizers read it."""
        if "encoder_prompt" not in prompt:
            prompt = {"encoder_prompt": prompt, "decoder_prompt": None}
        if getattr(params, "truncate_prompt_tokens", None) is not None:
            raise VLLMValidationError(
                "truncate_prompt_tokens: a question is read whole or not at all; shorten it",
                parameter="truncate_prompt_tokens",
            )
        asked = dict(prompt["encoder_prompt"])
        question = asked.get("prompt")
        if not isinstance(question, str):
            raise VLLMValidationError(
                "prompt: takes a text, which the encoder's tokenizer reads, got token ids of the LLM's",
                parameter="prompt",
            )
        if not question.strip():
            raise VLLMValidationError("prompt: the question is empty", parameter="prompt")
        if asked.get("multi_modal_data"):
            raise VLLMValidationError("multi_modal_data: LayAlign reads text alone", parameter="multi_modal_data")
        item = {"text": question} | _text_of(prompt["decoder_prompt"])
        asked |= {"prompt_token_ids": [], "multi_modal_data": {MODALITY: [item]}}
        return {"encoder_prompt": asked, "decoder_prompt": None}

    async def tokenize_prompt_async(self, prompt: Any, params: Any) -> Any:
        """The same."""
        return self.tokenize_prompt(prompt, params)

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        """Pass the ids of a request that has a question.

        vLLM calls this last before the engine, of the encoder's prompt and then of the LLM's. Some of its endpoints make prompts of
        their own for the LLM, past all that stands above: ids in place of a chat's messages, `/generative_scoring`. Their
        cross-attention would have no keys, which leaves its output as the memory was.

        Raises:
            VLLMValidationError: ids without a question, or outside of the vocabulary.
        """
        if isinstance(token_ids, EncoderPrompt):
            self._begun.whole = token_ids.whole
            return
        whole, self._begun.whole = getattr(self._begun, "whole", None), None
        # Beams go on behind it.
        if parameter == REUSED_IDS or whole is None or list(token_ids[: len(whole)]) != whole:
            raise VLLMValidationError(
                f"{parameter or 'prompt'}: takes a text, which the encoder's tokenizer reads, got token ids of the LLM's",
                parameter=parameter or "prompt",
            )
        super().validate_token_ids(token_ids, parameter=parameter)

    def get_dec_start_token_id(self) -> int:
        """Never put anywhere, as the processor gives whole prompts (`skip_decoder_start_token`); vLLM asks for it all the same, and finds
        none where the tokenizer has no beginning of sequence (Qwen)."""
        return 0


def conversation_question(messages: Sequence[Any]) -> str:
    """The question of a conversation in OpenAI's form.

    Raises:
        VLLMValidationError: other messages than one of the user's, for which the prompt that the model was trained with has no
            place, or contents that are not text.
    """
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if {"system", "developer"} & set(roles):
        raise VLLMValidationError(
            "messages: a system message has no place in what this model was trained to read; say it in the question",
            parameter="messages",
        )
    if roles != ["user"]:
        said = ", ".join(map(str, roles)) or "none"
        raise VLLMValidationError(
            f"messages: takes one message of the user, got {said}: this model answers a question at a time and would not see earlier turns",
            parameter="messages",
        )
    content = messages[0].get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "\n".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise VLLMValidationError(
            "messages: the content must be text, in a string or in parts of type text", parameter="messages"
        )
    return content


def _text_of(prompt: Any) -> dict[str, Any]:
    """What a decoder prompt says of the text for the LLM."""
    if prompt is None:
        return {}
    if isinstance(prompt.get("prompt_token_ids"), Sequence):
        return {"prompt_ids": list(prompt["prompt_token_ids"])}
    return {"prompt": prompt["prompt"]}
