"""What requests may bring, by the functions that vLLM calls: no server is started."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")

VOCABULARY, WIDTH = 100, 4


@pytest.fixture
def renderer():
    """One whose tokenizer has no beginning of sequence, as Qwen's."""
    from layalign.serving.requests import QuestionRenderer

    made = QuestionRenderer.__new__(QuestionRenderer)
    made.tokenizer = SimpleNamespace(bos_token_id=None, max_token_id=VOCABULARY - 1)
    made.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY, hf_config=SimpleNamespace())
    return made


def test_token_ids_in_place_of_messages_are_refused(renderer):
    """vLLM takes them of any client of its chat, with no connector of caches configured."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.online_renderer import _reused_prompt_token_ids

    messages = [{"role": "user", "content": "2 + 5?"}]
    request = SimpleNamespace(kv_transfer_params={"prompt_token_ids": [1, 2, 3]})
    with pytest.raises(VLLMValidationError, match="takes a text") as refused:
        _reused_prompt_token_ids(request, renderer, messages)
    assert refused.value.parameter == "kv_transfer_params.prompt_token_ids"
    for without in (None, {}, {"do_remote_decode": True}):
        assert _reused_prompt_token_ids(SimpleNamespace(kv_transfer_params=without), renderer, messages) is None


def test_only_ids_that_belong_to_a_question_pass(renderer):
    """The engine looks at a request's two prompts by the same method, one after the other; other endpoints have none for the encoder."""
    from vllm.exceptions import VLLMValidationError

    from layalign.serving.requests import EncoderPrompt

    whole = [1, 2, VOCABULARY - 1]
    for given in (whole, [*whole, 5]):  # a beam's
        renderer.validate_token_ids(EncoderPrompt(2, whole))
        renderer.validate_token_ids(given)
        with pytest.raises(VLLMValidationError, match="takes a text"):
            renderer.validate_token_ids(given)
    # One whose LLM's prompt was never looked at lets no other pass.
    renderer.validate_token_ids(EncoderPrompt(2, whole))
    with pytest.raises(VLLMValidationError, match="takes a text"):
        renderer.validate_token_ids([1, 2, 3])
    outside = [1, VOCABULARY]
    renderer.validate_token_ids(EncoderPrompt(2, outside))
    with pytest.raises(VLLMValidationError, match="out of vocabulary"):
        renderer.validate_token_ids(outside)


@pytest.mark.parametrize("own", [None, 0])
def test_a_tokenizer_without_a_beginning_of_sequence(renderer, own):
    """The prompt is the processor's, to the token: nothing comes before it, whatever it begins with."""
    prompt = [5, 6, 7] if own is None else [own, 5, 6]
    made = {"type": "multimodal", "prompt_token_ids": prompt, "encoder_prompt_token_ids": [0, 0]}
    made |= {"mm_kwargs": {}, "mm_hashes": {}, "mm_placeholders": {}}
    renderer._process_singleton = lambda given, skip_mm_cache: dict(made)
    renderer._get_skip_decoder_start_token = lambda: True
    found = renderer._process_enc_dec({"encoder_prompt": {}, "decoder_prompt": None})
    assert found["decoder_prompt"]["prompt_token_ids"] == prompt


def reading_model():
    """ServedLayAlign with its bookkeeping alone: it notes the cross keys and values that it is to write."""
    from layalign.serving.model import ServedLayAlign

    model = ServedLayAlign.__new__(ServedLayAlign)
    nn.Module.__init__(model)
    written = []
    model.has_bos, model.width = True, WIDTH
    model.fused = [SimpleNamespace(write=lambda keys, values: written.append(keys))]
    adapter = SimpleNamespace(boundary=torch.full((WIDTH,), -1.0))
    model.encoder_side = SimpleNamespace(adapter=adapter, by_layer=lambda states: [(states, states)])
    return model, written


def question(number, tokens=5):
    """(encoder output, token ids of the request)."""
    from layalign.serving.placeholders import decoder_ids, digits

    encoder_ids = [number] * tokens
    output = torch.full((tokens, WIDTH + 2), float(number))
    output.digits = digits(encoder_ids, VOCABULARY)
    return output, decoder_ids(encoder_ids, [7, 8], 1, VOCABULARY)


def test_a_request_without_a_question_beside_others():
    """It begins in the same step, before, between and behind them: the others get what is theirs, whatever the order of outputs."""
    model, written = reading_model()
    (first, ids), (second, others) = question(3), question(4, 6)
    stray = [1, 9, 9, 9]
    rows = [stray, others, stray, ids, stray]
    input_ids = torch.tensor([token for row in rows for token in row])
    positions = torch.tensor([place for row in rows for place in range(len(row))])
    found = model._read_questions(input_ids, positions, torch.zeros(len(input_ids), WIDTH), [first, second])
    expected = [0.0] * 4 + [0, *[4.0] * 6, -1, 0, 0] + [0.0] * 4 + [0, *[3.0] * 5, -1, 0, 0] + [0.0] * 4
    assert found[:, 0].tolist() == expected
    assert written[0][:, 0].tolist() == [4.0] * 6 + [3.0] * 5


@pytest.mark.parametrize("order", ["before", "behind"])
def test_a_request_with_the_beginning_of_another(order):
    """Its ids are no secret, as answers may bring them; it has no room for the soft prompts."""
    model, _ = reading_model()
    output, ids = question(3, 20)
    stray = ids[: 1 + len(output.digits)]
    rows = [stray, ids] if order == "before" else [ids, stray]
    input_ids = torch.tensor([token for row in rows for token in row])
    positions = torch.tensor([place for row in rows for place in range(len(row))])
    found = model._read_questions(input_ids, positions, torch.zeros(len(input_ids), WIDTH), [output])
    expected = [[0.0] * len(stray), [0, *[3.0] * 20, -1, 0, 0]]
    assert found[:, 0].tolist() == [value for row in expected[:: 1 if order == "before" else -1] for value in row]
    with pytest.raises(RuntimeError, match="other requests"):
        positions = torch.arange(len(stray))
        model._read_questions(torch.tensor(stray), positions, torch.zeros(len(stray), WIDTH), [output])


def test_outputs_that_belong_to_no_request():
    model, _ = reading_model()
    (first, ids), (second, _) = question(3), question(4)
    with pytest.raises(RuntimeError, match="other requests"):
        model._read_questions(torch.tensor(ids), torch.arange(len(ids)), torch.zeros(len(ids), WIDTH), [first, second])
