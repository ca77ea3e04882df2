"""transformers' auto classes and pipelines after `import transformers, layalign` and nothing more, in either order."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import layalign
from layalign import LayAlignForConditionalGeneration, LayAlignProcessor, auto_classes

LAYALIGN_FIRST = """
import layalign, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
AutoConfig.for_model("llama")
assert "layalign.model" not in sys.modules, "others' models do not load it"
assert type(AutoProcessor.from_pretrained(folder)).__name__ == "LayAlignProcessor"
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=False)) is layalign.LayAlignConfig
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="bfloat16")
assert type(model) is layalign.LayAlignForConditionalGeneration and model.dtype == model.llm.dtype == torch.bfloat16
"""
TRANSFORMERS_FIRST = """
import transformers
transformers.AutoProcessor, transformers.pipeline  # their modules are there before ours
import layalign
assert "layalign.model" not in sys.modules
pipe = transformers.pipeline("layalign-generation", model=folder, model_kwargs={"attention_backend": "torch"})
assert type(pipe) is layalign.LayAlignPipeline and pipe.model.config.attention_backend == "torch"
assert pipe("what is 3", max_new_tokens=2)[0]["generated_text"]
pickle.loads(pickle.dumps(transformers.CONFIG_MAPPING))["layalign"] is layalign.LayAlignConfig
"""


@pytest.mark.parametrize("lines", [LAYALIGN_FIRST, TRANSFORMERS_FIRST], ids=["layalign first", "transformers first"])
def test_in_a_fresh_process(lines, model_folder):
    code = f"import pickle, sys\nfolder = {str(model_folder)!r}\nimport torch\ntorch.set_num_threads(1)\n{lines}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "already registered" not in result.stderr


def test_every_auto_class(model_folder, loaded):
    assert type(transformers.AutoConfig.from_pretrained(model_folder)) is layalign.LayAlignConfig
    assert type(transformers.AutoProcessor.from_pretrained(model_folder)) is LayAlignProcessor
    for auto in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        model = auto.from_pretrained(model_folder, attn_implementation="eager", dtype="bfloat16", gate="scalar")
        assert type(model) is LayAlignForConditionalGeneration
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        with pytest.raises(ValueError, match="does not take 'foo'"):
            auto.from_pretrained(model_folder, foo=1)
    made = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(made) is LayAlignForConditionalGeneration
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.get_vocab() == loaded[1].tokenizer.get_vocab(), "the LLM's, which decodes answers"


def test_the_encoders_attention_through_an_auto_class(bases, make_encoder, tmp_path):
    make_encoder("bert").save_pretrained(tmp_path / "bert")
    LayAlignForConditionalGeneration.from_bases(tmp_path / "bert", bases / "llm").save_pretrained(tmp_path / "model")
    for asked in ("eager", {"encoder_config": "eager"}):
        model = transformers.AutoModel.from_pretrained(tmp_path / "model", attn_implementation=asked)
        assert model.encoder.config._attn_implementation == "eager"


def test_a_model_without_a_processor_gives_an_error_and_no_tokenizer(loaded, tmp_path):
    loaded[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no processor"):
        transformers.AutoProcessor.from_pretrained(tmp_path)
    loaded[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no processor"):
        transformers.AutoProcessor.from_pretrained(tmp_path)


def test_text_generation_says_which_pipeline_it_is(loaded):
    model, processor = loaded
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    with pytest.raises(ValueError, match=r"layalign\.LayAlignPipeline takes texts"):
        pipe("what is 3", max_new_tokens=2)


def test_reloading_and_watching_again_change_nothing(model_folder):
    auto_classes.watch()
    importlib.reload(layalign)
    assert sys.meta_path.count(auto_classes.Watcher) == 1
    module = importlib.reload(sys.modules["transformers.models.auto.processing_auto"])
    assert type(module.AutoProcessor.from_pretrained(model_folder)).__name__ == "LayAlignProcessor"
    assert type(module.__spec__.loader).__module__.startswith(("_frozen", "importlib")), "not ours any more"


def test_stand_ins():
    for stand_in in (auto_classes.CONFIG, auto_classes.MODEL, auto_classes.PROCESSOR, auto_classes.PIPELINE):
        real = pickle.loads(pickle.dumps(stand_in))
        assert real is stand_in.load() and real.__name__ == stand_in.__name__
        assert copy.copy(stand_in) is not None and not hasattr(stand_in, "__len__")
    assert type(auto_classes.CONFIG(adapter="gelu")) is layalign.LayAlignConfig
    assert auto_classes.CONFIG.model_type == "layalign"
