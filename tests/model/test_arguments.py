"""Each argument of loading: where the weights are then and in which dtype; and wrong ones, refused by name."""

import json
import os
import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import BitsAndBytesConfig

from layalign import LayAlignForConditionalGeneration, LayAlignPipeline, LayAlignProcessor
from layalign.arguments import found_by
from layalign.loading import load_model
from layalign.quantization import checked_quantization
from tests.tiny_models import MAP

COMMITS = {"main": "a" * 40, "later": "b" * 40}
MODELS = LayAlignForConditionalGeneration


def dtypes(module):
    return {parameter.dtype for parameter in module.parameters()}


def put_on_hub(cache, name, revision, folder, inside=""):
    """A folder as transformers finds a hub name at a revision in a cache."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(COMMITS[revision])
    shutil.copytree(folder, place / "snapshots" / COMMITS[revision] / inside)


@pytest.fixture
def hub(bases, model_folder, tmp_path):
    """A cache with both bases and a model over them, each with a revision `later`, whose weights are other ones."""
    cache = tmp_path / "cache"
    for role in ("encoder", "llm"):
        put_on_hub(cache, f"some/{role}", "main", bases / role)
        later = tmp_path / "later" / role
        from transformers import AutoModelForCausalLM, AutoModelForTextEncoding

        kind = AutoModelForCausalLM if role == "llm" else AutoModelForTextEncoding
        model = kind.from_pretrained(bases / role)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        shutil.copytree(bases / role, later)
        model.save_pretrained(later)
        put_on_hub(cache, f"some/{role}", "later", later)
    model = MODELS.from_pretrained(model_folder)
    model.config.encoder_name_or_path, model.config.llm_name_or_path = "some/encoder", "some/llm"
    for revision in COMMITS:
        with torch.no_grad():
            model.adapter.boundary.fill_(len(revision))
        model.save_pretrained(tmp_path / "model")
        shutil.copy(model_folder / "processor_config.json", tmp_path / "model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_folder / name, tmp_path / "model")
        shutil.copytree(
            model_folder / "encoder_tokenizer", tmp_path / "model" / "encoder_tokenizer", dirs_exist_ok=True
        )
        put_on_hub(cache, "some/model", revision, tmp_path / "model")
    return {"cache_dir": str(cache), "local_files_only": True}


@pytest.mark.parametrize(
    ("given", "encoder", "llm"),
    [
        ({"dtype": torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32, torch.float32),
        ({"dtype": {"llm": "bfloat16"}}, torch.float32, torch.bfloat16),
        ({"dtype": "bfloat16", "encoder_kwargs": {"dtype": "float32"}}, torch.float32, torch.bfloat16),
        ({"llm_kwargs": {"torch_dtype": torch.float16}}, torch.float32, torch.float16),
    ],
)
def test_dtype(given, encoder, llm, pair, model_folder):
    fresh, saved = MODELS.from_bases(**pair, **given), MODELS.from_pretrained(model_folder, **given)
    assert dtypes(saved.encoder) == dtypes(fresh.encoder) == {encoder}
    assert {parameter.dtype for name, parameter in fresh.llm.named_parameters() if "gate" not in name} == {llm}
    assert {parameter.dtype for _, parameter in fresh.trained_parameters()} == {torch.float32}
    assert {parameter.dtype for _, parameter in saved.trained_parameters()} == {llm}


def test_attention_of_the_encoder(bases, make_encoder, tmp_path, ids):
    make_encoder("bert").save_pretrained(tmp_path / "bert")
    given = {"encoder": tmp_path / "bert", "llm": bases / "llm"}
    for asked in ({"attn_implementation": "eager"}, {"encoder_kwargs": {"attn_implementation": "eager"}}):
        model = MODELS.from_bases(**given, **asked)
        assert model.encoder.config._attn_implementation == "eager"
        assert model.llm.config._attn_implementation == "layalign"
    assert MODELS.from_bases(**given).encoder.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "model")
    loaded = MODELS.from_pretrained(tmp_path / "model", attn_implementation={"encoder_config": "eager"})
    assert loaded.encoder.config._attn_implementation == "eager"


def test_revisions_of_a_hub_name_are_read_and_pinned(hub, model_folder, tmp_path):
    def first(model, role):
        return next(getattr(model, role).parameters()).flatten()[0].item()

    main = MODELS.from_bases("some/encoder", "some/llm", **hub)
    assert main.config.base_sources == {role: {"revision": COMMITS["main"]} for role in ("encoder", "llm")}
    later = MODELS.from_bases("some/encoder", "some/llm", llm_kwargs={"revision": "later"}, **hub)
    assert first(later, "llm") == pytest.approx(first(main, "llm") + 1)
    assert first(later, "encoder") == first(main, "encoder")
    later.save_pretrained(tmp_path / "pinned")
    again = MODELS.from_pretrained(tmp_path / "pinned", **hub)
    assert first(again, "llm") == first(later, "llm"), "a saved model finds the revision that it was made with"
    with pytest.raises(ValueError, match=r"llm 'some/llm' is not the one trained with"):
        MODELS.from_pretrained(tmp_path / "pinned", llm_kwargs={"revision": "main"}, **hub)
    other = MODELS.from_pretrained(tmp_path / "pinned", llm_kwargs={"revision": "main"}, check_bases=False, **hub)
    assert first(other, "llm") == first(main, "llm")
    for revision in COMMITS:
        model, processor = load_model("some/model", device="cpu", revision=revision, **hub)
        assert model.adapter.boundary[0].item() == len(revision)
        assert processor(["what"])["encoder_input_ids"].shape[0] == 1
    fresh = LayAlignProcessor.from_bases("some/encoder", "some/llm", llm_kwargs={"revision": "later"}, **hub)
    assert fresh.encoder_tokenizer.get_vocab() == processor.encoder_tokenizer.get_vocab()
    with pytest.raises(ValueError, match="does not take 'foo'"):
        LayAlignProcessor.from_bases("some/encoder", "some/llm", foo=1, **hub)


def test_a_name_that_is_not_in_the_cache(hub, tmp_path):
    with pytest.raises(ValueError, match="encoder 'some/encoder' is neither"):
        MODELS.from_bases("some/encoder", "some/llm", cache_dir=tmp_path / "empty", local_files_only=True)
    with pytest.raises(ValueError, match="'some/model' holds no LayAlign model"):
        MODELS.from_pretrained("some/model", cache_dir=tmp_path / "empty", local_files_only=True)


def test_subfolders(bases, model_folder, tmp_path, ids, logits):
    for role in ("encoder", "llm"):
        shutil.copytree(bases / role, tmp_path / "both" / role)
    given = {f"{role}_kwargs": {"subfolder": role} for role in ("encoder", "llm")}
    model = MODELS.from_bases(tmp_path / "both", tmp_path / "both", **given)
    assert model.config.base_sources == {role: {"subfolder": role} for role in ("encoder", "llm")}
    model.save_pretrained(tmp_path / "saved")
    assert MODELS.from_pretrained(tmp_path / "saved").config.llm_config.hidden_size == 32
    shutil.copytree(model_folder, tmp_path / "outer" / "inner")
    loaded = MODELS.from_pretrained(tmp_path / "outer", subfolder="inner")
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, logits)


def test_what_goes_on_to_transformers(pair, monkeypatch):
    seen = {}
    from layalign import loading

    real = loading.load_checked
    monkeypatch.setattr(
        loading,
        "load_checked",
        lambda auto, path, role, dtype, check, **kwargs: (
            seen.update({role: kwargs}) or real(auto, path, role, dtype, check, **kwargs)
        ),
    )
    shared = {
        "token": "hf_x",
        "force_download": False,
        "trust_remote_code": False,
        "use_safetensors": True,
        "weights_only": True,
    }
    MODELS.from_bases(**pair, **shared, llm_kwargs={"token": False, "variant": None}, encoder_kwargs={"proxies": {}})
    assert seen == {"encoder": shared | {"proxies": {}}, "llm": shared | {"token": False}}
    assert found_by(seen["llm"]) == {"token": False, "force_download": False, "trust_remote_code": False}


def test_a_variant_that_is_not_there(pair):
    with pytest.raises(ValueError, match=r"encoder .* cannot be loaded.*fp16"):
        MODELS.from_bases(**pair, variant="fp16")


def test_a_quantisation_configuration_of_transformers(pair, model_folder, ids, tmp_path):
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = MODELS.from_pretrained(model_folder, quantization_config=config)
    kind = type(model.llm.model.layers[0].self_attn.k_proj).__name__
    assert kind == "Linear4bit" and {type(one).__name__ for one in model.encoder.modules()} & {"Linear4bit"} == set()
    own = MODELS.from_pretrained(model_folder, quantization={"llm": {"bits": "4bit", "library": "bitsandbytes"}})
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, own(**ids).logits)
        placed = MODELS.from_pretrained(model_folder, quantization_config=config, device_map="cpu")
        assert torch.equal(placed(**ids).logits, own(**ids).logits)
    model.save_pretrained(tmp_path / "saved")
    again = MODELS.from_pretrained(tmp_path / "saved")
    assert again.config.quantization == {"llm": {"config": config.to_dict()}}
    with torch.no_grad():
        assert torch.equal(again(**ids).logits, model(**ids).logits), "it comes back as it was saved"
    plain = MODELS.from_pretrained(tmp_path / "saved", quantization="none")
    assert type(plain.llm.model.layers[0].self_attn.k_proj) is torch.nn.Linear
    both = MODELS.from_bases(
        **pair, quantization_config={"encoder": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    )
    assert {type(one).__name__ for one in both.encoder.modules()} & {"Linear8bitLt"}
    assert type(both.llm.model.layers[0].self_attn.k_proj) is torch.nn.Linear


def test_settings_in_place_of_the_saved_ones(model_folder):
    model = MODELS.from_pretrained(model_folder, attention_backend="reference", fold_at_inference=False)
    assert (model.config.attention_backend, model.config.fold_at_inference) == ("reference", False)


def test_what_a_pipeline_and_load_model_pass_on(model_folder):
    import transformers

    pipe = transformers.pipeline(
        "layalign-generation",
        model=str(model_folder),
        dtype="bfloat16",
        device_map="cpu",
        model_kwargs={"attention_backend": "torch"},
    )
    assert isinstance(pipe, LayAlignPipeline)
    assert dtypes(pipe.model) == {torch.bfloat16} and pipe.model.config.attention_backend == "torch"
    with pytest.raises(ValueError, match="does not take 'foo'"):
        transformers.pipeline("layalign-generation", model=str(model_folder), model_kwargs={"foo": 1})
    model, _ = load_model(model_folder, device_map="cpu", dtype={"llm": "bfloat16"})
    assert dtypes(model.llm) == {torch.bfloat16}
    with pytest.raises(ValueError, match="device and device_map"):
        load_model(model_folder, device="cpu", device_map="cpu")


WRONG = {
    "from_bases does not take 'foo'; it takes dtype, .*device_map": {"foo": 1},
    "does not take 'devicemap'; did you mean 'device_map'": {"devicemap": "auto"},
    "does not take 'gates'; did you mean 'gate'": {"gates": "head"},
    "does not take 'encoder_config'": {"encoder_config": {}},
    "does not take 'keys_to_ignore_at_inference'": {"keys_to_ignore_at_inference": []},
    "does not take 'llm_name_or_path'": {"llm_name_or_path": "x"},
    "does not take 'state_dict'": {"state_dict": {}},
    "does not take 'output_loading_info'": {"output_loading_info": True},
    "it takes token": {"use_auth_token": "x"},
    "dtype: got 'bf16', takes float32, .*'auto'": {"dtype": "bf16"},
    "dtype: got 'bfloat', .*did you mean 'bfloat16'": {"dtype": "bfloat"},
    "dtype: got torch.int8": {"dtype": torch.int8},
    "dtype: got 16": {"dtype": 16},
    "dtype: 'lm' is not a base; did you mean 'llm'": {"dtype": {"lm": "float16"}},
    "dtype and torch_dtype: two names of one thing": {"dtype": "float16", "torch_dtype": "float16"},
    "device_map: got 'gpu', takes auto": {"device_map": "gpu"},
    "device_map: got 'atuo'.*did you mean 'auto'": {"device_map": "atuo"},
    "device_map: got 7, torch finds 0 CUDA": {"device_map": 7},
    "device_map: got 'cuda', torch finds 0 CUDA": {"device_map": "cuda"},
    "device_map: got True": {"device_map": True},
    "device_map: got 'meta'": {"device_map": "meta"},
    "device_map: LlamaForCausalLM has no module 'model.layer.0'; did you mean 'model.layers.0'": {
        "device_map": {"model.layer.0": "cpu"}
    },
    "device_map: says nothing of model.layers.1": {
        "device_map": {key: "cpu" for key in MAP if key != "model.layers.1"}
    },
    "device_map: says nothing of the LLM": {"device_map": {"encoder": "cpu"}},
    "device_map: puts modules on 'disk'; give offload_folder": {"device_map": MAP},
    "device_map: 'llm' is there twice": {"device_map": {"": "cpu", "llm": "cpu"}},
    "offload_folder: got 'x' without a device_map": {"offload_folder": "x"},
    "max_memory: got .* without a device_map": {"max_memory": {"cpu": "1GB"}},
    "max_memory: says how a device_map is made": {"max_memory": {"cpu": "1GB"}, "device_map": "cpu"},
    "max_memory: takes": {"max_memory": "1GB", "device_map": "auto"},
    "quantization_config: takes .*got 'nonsense'": {"quantization_config": "nonsense"},
    "quantization_config: transformers does not take": {"quantization_config": {"quant_method": "nonsense"}},
    "quantization and quantization_config: both": {
        "quantization": {"llm": "8bit"},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    },
    "attn_implementation: given twice": {
        "attn_implementation": "eager",
        "encoder_kwargs": {"attn_implementation": "sdpa"},
    },
    "would drop the cross-attention": {"attn_implementation": {"llm_config": "sdpa"}},
    "llm_kwargs: attn_implementation would drop": {"llm_kwargs": {"attn_implementation": "sdpa"}},
    "attn_implementation: .*nonsense": {"attn_implementation": "nonsense"},
    "revision: from_bases reads two bases; give each its own": {"revision": "main"},
    "subfolder: from_bases reads two bases": {"subfolder": "x"},
    "token: got 3, takes a str or True or False": {"token": 3},
    "cache_dir: got 3, takes a str or a path": {"cache_dir": 3},
    "local_files_only: got 'yes', takes True or False": {"local_files_only": "yes"},
    "trust_remote_code: got 1": {"trust_remote_code": 1},
    "encoder_kwargs: takes a mapping of dtype": {"encoder_kwargs": "fp16"},
    "encoder_kwargs does not take 'revison'; did you mean 'revision'": {"encoder_kwargs": {"revison": "x"}},
    "encoder_kwargs: device_map is the LLM's": {"encoder_kwargs": {"device_map": "cpu"}},
    "llm_kwargs: revision: got 1": {"llm_kwargs": {"revision": 1}},
    "device_map: given twice": {"device_map": "cpu", "llm_kwargs": {"device_map": "cpu"}},
    "encoder_states and encoder_layers": {"encoder_states": "last", "encoder_layers": [0]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message, pair):
    """Beside others that are right."""
    with pytest.raises(ValueError, match=message):
        MODELS.from_bases(**pair, gate="head", **WRONG[message])


def test_wrong_arguments_of_the_others_are_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"from_pretrained does not take 'foo'; it takes .*revision.*gate"):
        MODELS.from_pretrained(model_folder, foo=1, dtype="bfloat16")
    with pytest.raises(ValueError, match="config: takes a LayAlignConfig"):
        MODELS.from_pretrained(model_folder, config=str(model_folder))
    with pytest.raises(ValueError, match="gate must be one of"):
        MODELS.from_pretrained(model_folder, gate="nonsense")
    with pytest.raises(ValueError, match="from_published does not take 'foo'"):
        MODELS.from_published(tmp_path / "x.bin", encoder="a", llm="b", foo=1)


def test_a_module_is_used_as_it_is(make_encoder, make_llm):
    for given, message in (
        ({"dtype": "bfloat16"}, "dtype: the encoder is a module of torch.float32"),
        ({"llm_kwargs": {"revision": "x"}}, "revision: the llm is a module"),
        ({"device_map": "cpu"}, "device_map: the llm is a module"),
    ):
        with pytest.raises(ValueError, match=message):
            MODELS.from_bases(make_encoder(), make_llm(), **given)
    MODELS.from_bases(make_encoder(), make_llm(), dtype="float32", token="hf_x")


def test_bases_that_move_with_the_model(bases, model_folder, tmp_path, ids, logits):
    for role in ("encoder", "llm"):
        shutil.copytree(bases / role, tmp_path / "here" / role)
    model = MODELS.from_pretrained(model_folder, encoder=tmp_path / "here" / "encoder", llm=tmp_path / "here" / "llm")
    model.save_pretrained(tmp_path / "here" / "model")
    saved = json.loads((tmp_path / "here" / "model" / "config.json").read_text())
    assert saved["base_sources"] == {"encoder": {"beside": "../encoder"}, "llm": {"beside": "../llm"}}
    assert model.config.base_sources is None, "what is saved depends on the folder, the model does not"
    os.rename(tmp_path / "here", tmp_path / "there")
    moved = MODELS.from_pretrained(tmp_path / "there" / "model")
    with torch.no_grad():
        assert torch.equal(moved(**ids).logits, logits)
    assert moved.config.llm_name_or_path == str(tmp_path / "there" / "llm")
    os.rename(tmp_path / "there" / "llm", tmp_path / "gone")
    looked = f"{tmp_path}/here/llm and {tmp_path}/there/llm"
    with pytest.raises(ValueError, match=f"its llm is not where it was, looked in {looked}; pass llm="):
        MODELS.from_pretrained(tmp_path / "there" / "model")
    again = MODELS.from_pretrained(tmp_path / "there" / "model", llm=tmp_path / "gone")
    assert again.config.llm_name_or_path == str(tmp_path / "gone")


def test_files_saved_before_these_settings_still_load(model_folder, tmp_path, ids, logits):
    shutil.copytree(model_folder, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["base_sources"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(MODELS.from_pretrained(tmp_path / "old")(**ids).logits, logits)


def test_shards_are_reloadable(pair, tmp_path, ids):
    model = MODELS.from_bases(**pair, train_llm=True).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "llm").glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(MODELS.from_pretrained(tmp_path)(**ids).logits, model(**ids).logits)


def test_settings_of_a_configuration_have_one_form():
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert checked_quantization({"llm": {"config": config}}) == {"llm": {"config": config}}
