"""One thread a test process, Triton's interpreter where there is no GPU, the options of the random tests, and a saved model over
tiny random bases; numbers are among their words, so that answers can be scored."""

import os

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and the processes share the cores
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when it is first imported

WORDS = [
    "what",
    "is",
    "how",
    "many",
    "apples",
    "and",
    "plus",
    "ni",
    "ngapi",
    "tufaha",
    "na",
    "question",
    "answer",
    "so",
]
NUMBERS = [str(number) for number in range(40)]


def pytest_addoption(parser):
    group = parser.getgroup("random calls")
    group.addoption(
        "--fuzz", type=int, metavar="N", help="random calls of each operator (300; 40 with compiled kernels)"
    )
    group.addoption("--fuzz-seed", type=int, metavar="S", help="only the random call of seed S")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and compiled Triton kernels"))


def word_tokenizer(end_after_text):
    """A WordLevel tokenizer over WORDS and NUMBERS, with </s> after each text if asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS, *NUMBERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if end_after_text:
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a tiny mT5 and a tiny Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(end_after_text=True)
    encoder = MT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    MT5EncoderModel(encoder).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    tokenizer = word_tokenizer(end_after_text=False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llm = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **special, initializer_range=0.5)
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="session")
def model_folder(bases, tmp_path_factory):
    """A saved model whose gates are open, so that the encoder's side matters in every layer."""
    from layalign import LayAlignForConditionalGeneration, LayAlignProcessor

    torch.manual_seed(1)
    model = LayAlignForConditionalGeneration.from_bases(str(bases / "encoder"), str(bases / "llm"))
    for name, parameter in model.trained_parameters():
        if "gate" in name:
            parameter.data.fill_(0.7)
    processor = LayAlignProcessor.from_bases(str(bases / "encoder"), str(bases / "llm"), "question {text} answer")
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder):
    """(model, processor)."""
    from layalign.loading import load_model

    return load_model(model_folder, device="cpu")


@pytest.fixture
def questions():
    """Questions of different lengths."""
    return [
        " ".join(
            ("what is", *NUMBERS[index % 7 :: 9][: 1 + index % 5], "plus", str(index), "na " * (index % 4))
        ).strip()
        for index in range(23)
    ]
