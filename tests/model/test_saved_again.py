"""What `save_pretrained` writes is what `from_pretrained` reads: settings, unusual bases, and what cannot be had is refused."""

import json

import pytest
import torch
import transformers
from transformers import GenerationConfig

from layalign import LayAlignForConditionalGeneration
from layalign.loading import fingerprint, load_encoder
from tests.model.conftest import SIZES

load = LayAlignForConditionalGeneration.from_pretrained
join = LayAlignForConditionalGeneration.from_bases
INPUTS = {"encoder_input_ids": torch.tensor([[3, 4, 5]]), "input_ids": torch.tensor([[6, 7]])}
CODE = """from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "of_its_own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def bases_of(make_encoder, make_llm, tmp_path):
    """Folders of both bases."""
    make_encoder().save_pretrained(tmp_path / "encoder")
    make_llm().save_pretrained(tmp_path / "llm")
    return {"encoder": tmp_path / "encoder", "llm": tmp_path / "llm"}


def lively(model):
    with torch.no_grad():
        for name, own in model.trained_parameters():
            if "fusion_gate" in name:
                own.fill_(0.5)
    return model.eval()


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    again = load(folder)
    assert torch.equal(again(**INPUTS).logits, model.eval()(**INPUTS).logits)
    return again


@pytest.mark.parametrize("train_llm", [False, True])
def test_an_llm_that_reads_pictures_too(make_encoder, train_llm, tmp_path):
    """Gemma 3 of 4B and above: transformers knows its weights by older names, which are written by default."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=SIZES | {"head_dim": 8, "sliding_window": 8},
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "llm")
    make_encoder().save_pretrained(tmp_path / "encoder")
    model = lively(join(tmp_path / "encoder", tmp_path / "llm", train_llm=train_llm))
    saved_and_loaded(model, tmp_path / "model")


def test_a_trained_encoder_whose_names_have_changed(bases_of, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.JinaEmbeddingsV3Config(vocab_size=50, max_position_embeddings=64, pad_token_id=1, **sizes)
    transformers.JinaEmbeddingsV3Model(config).save_pretrained(tmp_path / "jina")
    saved_and_loaded(lively(join(tmp_path / "jina", bases_of["llm"], train_encoder=True)), tmp_path / "model")


def test_a_base_with_code_of_its_own(bases_of, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = bases_of["llm"]
    settings = json.loads((own / "config.json").read_text())
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    settings |= {"model_type": "of_its_own", "architectures": ["Model"], "auto_map": classes}
    (own / "config.json").write_text(json.dumps(settings))
    (own / "code.py").write_text(CODE)
    model = lively(join(**bases_of, trust_remote_code=True))
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model", trust_remote_code=True)
    assert type(again.llm).__name__ == "Model" and again.config.llm_config.model_type == "of_its_own"
    assert torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)
    with pytest.raises(ValueError, match=r"llm_layers must be distinct indices from 0 to 1"):
        load(tmp_path / "model", trust_remote_code=True, llm_layers=[5])
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(tmp_path / "model")


def test_a_pooler_that_a_checkpoint_lacks(bases_of, tmp_path):
    """It is drawn anew at each load, and LayAlign does not use it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.XLMRobertaConfig(vocab_size=50, pad_token_id=1, **sizes)
    transformers.XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "xlmr")
    model = lively(join(tmp_path / "xlmr", bases_of["llm"]))
    saved_and_loaded(model, tmp_path / "model")
    model.save_published(tmp_path / "new" / "published.bin")
    LayAlignForConditionalGeneration.from_published(
        tmp_path / "new" / "published.bin", encoder=tmp_path / "xlmr", llm=bases_of["llm"]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("of_bases", ["bfloat16", "float32"])
def test_published_over_bases_of_another_dtype(bases_of, dtype, of_bases, make_llm, tmp_path):
    join(**bases_of, dtype=dtype).save_published(tmp_path / "published.bin")
    published = LayAlignForConditionalGeneration.from_published
    published(tmp_path / "published.bin", **bases_of, dtype=of_bases)
    torch.manual_seed(99)
    other = make_llm()
    other.load_state_dict({name: own + 0.1 for name, own in other.state_dict().items()})
    with pytest.raises(ValueError, match="differs"):
        published(tmp_path / "published.bin", encoder=bases_of["encoder"], llm=other.to(getattr(torch, of_bases)))


def test_an_llm_alone_has_no_published_format(bases_of, tmp_path):
    with pytest.raises(ValueError, match="the published format holds adapter='mlp'"):
        join(None, bases_of["llm"], train_llm=True).save_published(tmp_path / "published.bin")


def test_settings_of_generate(bases_of, tmp_path):
    model = join(**bases_of)
    assert load_settings(model, tmp_path / "plain").max_new_tokens is None
    model.generation_config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.3)
    found = load_settings(model, tmp_path / "own")
    assert (found.max_new_tokens, found.repetition_penalty) == (7, 1.3)
    (tmp_path / "own" / "generation_config.json").unlink()
    assert load(tmp_path / "own").generation_config.max_new_tokens is None
    (tmp_path / "own" / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json: not JSON"):
        load(tmp_path / "own")


def load_settings(model, folder):
    model.save_pretrained(folder)
    return load(folder).generation_config


@pytest.mark.parametrize(
    "settings", [{"encoder_layers": range(2)}, {"llm_layers": range(1)}, {"encoder_states": (1, 2)}], ids=str
)
def test_indices_in_any_form(bases_of, settings, tmp_path):
    model = join(**bases_of, **settings)
    again = saved_and_loaded(lively(model), tmp_path / "model")
    ((name, given),) = settings.items()
    assert getattr(again.config, name) == getattr(model.config, name) == list(given)


@pytest.fixture
def trained(bases_of, tmp_path):
    """A folder of a model whose LLM was trained."""
    model = join(**bases_of, train_llm=True)
    with torch.no_grad():
        model.llm.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_a_trained_llm_is_not_replaced(trained, bases_of):
    with pytest.raises(ValueError, match=r"llm: the LLM of .* was trained with it and is saved in it \(llm/\)"):
        load(trained, llm=bases_of["llm"])
    with pytest.raises(ValueError, match=r"train_llm: got False, and the LLM of .* was trained with it"):
        load(trained, train_llm=False)
    with pytest.raises(ValueError, match="train_llm and quantization"):
        load(trained, quantization_config={"quant_method": "fp8"})


def test_what_says_nothing_is_refused(bases_of, make_llm, tmp_path):
    join(None, bases_of["llm"], train_llm=True).save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"encoder: .* is an LLM alone, which reads no encoder"):
        load(tmp_path / "alone", encoder=bases_of["encoder"])
    model = join(**bases_of)
    for given in ({"variant": "fp16"}, {"distributed_checkpoint": True}):
        with pytest.raises(ValueError, match=f"save_pretrained: {next(iter(given))}: got .* is one file"):
            model.save_pretrained(tmp_path / "model", **given)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="quantization: the llm is a module"):
        load(tmp_path / "model", llm=make_llm(), quantization_config={"quant_method": "fp8"})


def test_embeddings_of_another_width_than_the_layers(make_encoder):
    """Facebook's opt-350m."""
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
    )
    with pytest.raises(ValueError, match="OPTForCausalLM reads embeddings of width 16 and its layers have 32"):
        join(make_encoder(), transformers.OPTForCausalLM(config))


def test_a_list_in_a_folders_json_is_not_at_fault(bases_of):
    """modules.json of sentence-transformers."""
    (bases_of["encoder"] / "modules.json").write_text('[{"idx": 0}]')
    load_encoder(bases_of["encoder"])
    (bases_of["encoder"] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load_encoder(bases_of["encoder"])


def test_the_commit_of_a_module_from_a_hub(make_encoder, make_llm):
    llm = make_llm()
    llm.config._name_or_path, llm.config._commit_hash = "someone/llm", "a" * 40
    model = join(make_encoder(), llm)
    assert model.config.llm_name_or_path == "someone/llm"
    assert model.config.base_sources == {"llm": {"revision": "a" * 40}}


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "encoder_tokenizer/tokenizer.json"])
def test_the_fingerprint_sees_what_decides_answers(bases_of, name, tmp_path):
    join(**bases_of).save_pretrained(tmp_path / "model")
    before = fingerprint(tmp_path / "model")
    (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model" / name).write_text("{} ")
    assert fingerprint(tmp_path / "model") != before
