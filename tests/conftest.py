"""One thread a test process, Triton's interpreter where there is no GPU, the options of the random tests, and a saved model over
tiny random bases; numbers are among their words, so that answers can be scored."""

import os
from pathlib import Path

import pytest
import torch

from tests.forked import Forks
from tests.tiny_models import save_bases, word_tokenizer

HERE = Path(__file__).parent
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
# Files that take a minute or more of one process: they begin first, or one core would wait for another's last file.
LONG = [
    "test_readme.py",
    *(f"train/test_{name}.py" for name in ("processes", "engines", "plan", "stopping", "adapted", "packing", "resume")),
    *(f"bench/test_{name}.py" for name in ("first_light", "check")),
    *(
        f"kernels/test_{name}.py"
        for name in ("plans", "triton_attention", "aligner_compile", "gluon_compile", "attention_fuzz")
    ),
    *(
        f"kernels/test_{name}.py"
        for name in ("compile_gates", "attention_lines", "attention", "compile", "aligner", "triton_decode")
    ),
    "tables/test_rows.py",
    *("attacks/test_attacks.py", "attacks/test_disks.py", "model/test_families.py"),
]
NUMBERS = [str(number) for number in range(40)]


def pytest_addoption(parser):
    group = parser.getgroup("random calls")
    group.addoption(
        "--fuzz",
        type=int,
        metavar="N",
        help="random calls of each operator (100; 40 with compiled kernels; 1000 if thorough)",
    )
    group.addoption("--fuzz-from", type=int, metavar="S", default=0, help="the seed of the first of them")
    group.addoption("--fuzz-seed", type=int, metavar="S", help="only the random call of seed S")
    parser.addoption(
        "--thorough", action="store_true", help="whole sweeps, of which CI runs a part, and more random calls"
    )


def pytest_collection_modifyitems(config, items):
    places = {HERE / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))
    if not config.getoption("thorough"):
        left = [item for item in items if item.get_closest_marker("thorough")]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if not item.get_closest_marker("thorough")]
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and compiled Triton kernels"))


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter in two fifths of its time, from here on."""
    from tests.quick_interpreter import quick_and_quiet

    with quick_and_quiet():
        yield


@pytest.fixture(scope="session")
def forks():
    """Python processes that need no time to import torch and the trainer."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of a tiny mT5 and a tiny Llama."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizers = (
        word_tokenizer([*WORDS, *NUMBERS], end_after_text=end, apart_from_signs=True) for end in (True, False)
    )
    save_bases(folder, *tokenizers, encoder_heads=4, initializer_range=0.5)
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
