"""How questions are read, as the server's settings and each request say."""

import pytest

from tests.serving.conftest import NEW, QUESTIONS, engine, generated, served

pytest.importorskip("vllm", reason="vLLM is not installed (make vllm)")

SHORT, SHORTER = 9, 5


@pytest.fixture(scope="module")
def llm(model_folder):
    """Cuts questions at SHORT tokens unless they say otherwise, and takes none over 30."""
    reading, longest = {"encoder_max_length": SHORT}, {"longest_question": 30}
    return engine(model_folder, max_model_len=256, mm_processor_kwargs=reading, hf_overrides=longest)


def asked(text, **reading):
    return {"encoder_prompt": {"prompt": text, "mm_processor_kwargs": reading}, "decoder_prompt": None}


def test_settings_of_the_server_and_of_a_request(llm, model_folder):
    cut = generated(model_folder, QUESTIONS, least=NEW, encoder_max_length=SHORT)
    assert served(llm, QUESTIONS) == cut
    more = generated(model_folder, QUESTIONS, least=NEW, encoder_max_length=SHORTER)
    assert served(llm, [asked(text, encoder_max_length=SHORTER) for text in QUESTIONS]) == more
    whole = generated(model_folder, QUESTIONS[:1], least=NEW)
    assert served(llm, [asked(QUESTIONS[0], encoder_max_length=None)]) == whole
    assert cut != more and cut[0] != whole[0]


def test_refused(llm):
    from vllm.exceptions import VLLMValidationError

    for reading, said in (
        ({"language": "sw"}, "takes lang, encoder_max_length, got language"),
        ({"encoder_max_length": 0}, "must be a positive number"),
        ({"encoder_max_length": 100}, "this model takes 30"),
    ):
        with pytest.raises(VLLMValidationError, match=said):
            served(llm, [asked("na " * 60, **reading)])


def test_a_server_is_refused_at_once(model_folder):
    with pytest.raises(ValueError, match="takes lang, encoder_max_length, got language"):
        engine(model_folder, max_model_len=256, mm_processor_kwargs={"language": "sw"})
