"""The authors' checkpoint format: parity with their recorded outputs and with our own slow formula of their computation."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layalign import LayAlignForConditionalGeneration, mapped
from layalign.published import BOUNDARY, RENAMED

HERE = Path(__file__).parent
CASES = ["llama_mha", "llama_mha_nopad"]

spec = importlib.util.spec_from_file_location("published_formula", HERE / "published_formula.py")
published_formula = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published_formula)


def our_name(name):
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    name = name.replace(BOUNDARY, "adapter.boundary")
    return name.replace("model_llm.model.model.", "llm.model.").replace("adaption_gate", "fusion_gate.value")


def relative_error(ours, theirs):
    """In norm: transformers computes RoPE's angles and RMS norms in fp32 even in an fp64 model."""
    return ((ours.view_as(theirs).double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(params=CASES)
def golden(request, load_golden):
    return load_golden(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_golden_loss_and_gradients(golden, row_batch, dtype):
    """fp64 holds every gradient to 1e-5 of the published fp32 one. In fp32 a gate's gradient, one number left over from a large
    cancelling sum, can be off by 1.3e-5 of itself (their own is off by up to 7e-7), so there the gates are compared as one vector."""
    model, case = golden
    model = model.to(dtype)
    if dtype == torch.float64:
        model.config.attention_backend = "reference"
    out = model(**row_batch(case))
    assert out.loss.item() == pytest.approx(case["loss"].item(), rel=1e-5 if dtype == torch.float32 else 1e-6)
    out.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.trained_parameters()}
    theirs = {our_name(name): gradient for name, gradient in case["grads"].items()}
    assert theirs.keys() == ours.keys()
    if dtype == torch.float32:
        gates = sorted(name for name in theirs if "fusion_gate" in name)
        ours["gates"], theirs["gates"] = (torch.cat([grads.pop(name) for name in gates]) for grads in (ours, theirs))
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) < 1e-5, name


@pytest.mark.parametrize("fold", [True, False])
def test_golden_generation(golden, row_batch, fold):
    """The loss without gradients is 1e-5 from theirs, 1e-4 with folded weights, which round elsewhere."""
    model, case = golden
    model.config.fold_at_inference = fold
    with torch.no_grad():
        loss = model(**row_batch(case)).loss
    assert (model.aligner._kept is not None) == fold
    assert loss.item() == pytest.approx(case["loss"].item(), rel=1e-4 if fold else 1e-5)
    encoder = {"encoder_input_ids": case["input_ids_mt"], "encoder_attention_mask": case["attention_mask_mt"]}
    task = model.generate(
        **encoder,
        input_ids=case["input_ids_prompt"],
        attention_mask=case["mask_prompt"],
        max_new_tokens=16,
        do_sample=False,
    )
    assert torch.equal(task, case["generated_task"])
    assert torch.equal(model.generate(**encoder, max_new_tokens=16, do_sample=False), case["generated_translation"])


def test_golden_survives_our_formats(golden, row_batch, tmp_path):
    """published -> ours -> published keeps every tensor, and the outputs."""
    model, case = golden
    folder = Path(model.config.llm_name_or_path).parent
    model.save_pretrained(tmp_path / "ours")
    again = LayAlignForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert again(**row_batch(case)).loss.item() == model(**row_batch(case)).loss.item()
    again.save_published(tmp_path / "pytorch_model.bin")
    ours = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    theirs = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture
def published(make_encoder, tmp_path):
    """A random checkpoint in the published format and its bases; GQA, padding everywhere."""
    torch.manual_seed(3)
    encoder = make_encoder()
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        )
    )
    state = {f"encoder_mt.{name}": value for name, value in encoder.encoder.state_dict().items()}
    for name, value in llm.state_dict().items():
        state["model_llm.model." + name.replace(".self_attn.", ".self_attn.model.")] = value
    for i in range(3):
        state[f"model_llm.model.model.layers.{i}.self_attn.adaption_gate"] = torch.randn(1)
    shapes = {"mapping.mlp.linear1": (48, 24), "mapping.mlp.linear2": (32, 48)}
    shapes |= {"encoder_aligner.projector.fc1": (6, 3), "encoder_aligner.projector.fc2": (32, 24)}
    for name, shape in shapes.items():
        state[name + ".weight"], state[name + ".bias"] = (
            torch.randn(shape) * shape[1] ** -0.5,
            torch.randn(shape[0]) * 0.1,
        )
    state[BOUNDARY] = torch.randn(1, 1, 32)
    case = {
        "input_ids_mt": torch.randint(3, 50, (3, 5)),
        "attention_mask_mt": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        "input_ids_prompt": torch.randint(3, 60, (3, 4)),
        "mask_prompt": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]),
        "labels": torch.randint(3, 60, (3, 3)),
        "mask_label": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
    }
    return encoder, llm, state, case, tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("compatible", [True, False])
def test_slow_formula(published, row_batch, compatible, structure):
    encoder, llm, state, case, path = published
    if structure == "mlp":
        state["encoder_aligner.projector.fc3.weight"] = torch.randn(32, 32) * 0.2
        state["encoder_aligner.projector.fc3.bias"] = torch.randn(32) * 0.2
    torch.save(state, path)
    model = LayAlignForConditionalGeneration.from_published(
        path, encoder=encoder, llm=llm, compatible=compatible, attention_backend="reference"
    ).double()
    with torch.no_grad():
        hidden_states = encoder(
            case["input_ids_mt"], case["attention_mask_mt"], output_hidden_states=True
        ).hidden_states
    leaves = {
        name: value.double().requires_grad_(our_name(name) in dict(model.trained_parameters()))
        for name, value in state.items()
    }
    arguments = [case[key] for key in ("input_ids_prompt", "mask_prompt", "labels", "mask_label")]
    expected = published_formula.published_loss(
        leaves, llm.config, hidden_states, case["attention_mask_mt"], *arguments, compatible
    )
    loss = model(**row_batch(case)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    expected.backward()
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.trained_parameters()}
    for name, value in leaves.items():
        if value.grad is not None:
            assert relative_error(ours.pop(our_name(name)), value.grad) < 1e-5, name
    assert not ours


def test_other_bases_are_noticed(published, make_encoder):
    encoder, llm, state, _, path = published
    torch.save(state, path)
    with torch.no_grad():
        llm.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"up_proj.*other bases"):
        LayAlignForConditionalGeneration.from_published(path, encoder=encoder, llm=llm)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


@pytest.mark.parametrize(
    "content", ["code", "truncated", "text", "empty", "no such keys", "not a dict", "missing gate", "wrong layers"]
)
def test_bad_checkpoints(content, published, tmp_path):
    encoder, llm, state, _, path = published
    touched = tmp_path / "touched"
    if content == "code":
        malicious = Malicious()
        malicious.target = str(touched)
        Malicious.__reduce__ = lambda self: (Path.touch, (touched,))
        torch.save(state | {"x": malicious}, path)
    elif content == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "text":
        path.write_text("this is no checkpoint")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "no such keys":
        torch.save({"weight": torch.zeros(1)}, path)
    elif content == "not a dict":
        torch.save([torch.zeros(1)], path)
    elif content == "missing gate":
        del state["model_llm.model.model.layers.1.self_attn.adaption_gate"]
        torch.save(state, path)
    elif content == "wrong layers":
        state["encoder_aligner.projector.fc1.weight"] = torch.zeros(8, 3)
        state["encoder_aligner.projector.fc1.bias"] = torch.zeros(8)
        torch.save(state, path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        LayAlignForConditionalGeneration.from_published(path, encoder=encoder, llm=llm)
    assert not touched.exists(), "code in the checkpoint was executed"


def test_what_the_published_code_cannot_express_is_refused(make_model, tmp_path):
    for settings in (
        {"gate": "head"},
        {"aligner": None},
        {"llm_layers": [0]},
        {"adapter": "linear"},
        {"encoder_states": "last"},
    ):
        with pytest.raises(ValueError, match="published"):
            make_model(**settings).save_published(tmp_path / "out.bin")
    with pytest.raises(ValueError, match="qwen3"):
        make_model("qwen3").save_published(tmp_path / "out.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a process has had in memory at most")
def test_a_file_larger_than_the_memory_it_may_take(tmp_path):
    """A checkpoint and bases of 3 GB each, sparse, in a process that counts its memory, pages of mapped files included."""
    command = [sys.executable, "-m", "tests.model.sparse_published", str(tmp_path), "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "pytorch_model.bin").stat().st_size > 3e9
    assert int(result.stdout) < 1.6e9
    written = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    assert written < 1e8, "no second copy on the disk"


def test_a_checkpoint_mapped_for_reading_alone(published, tmp_path):
    """As it is where the kernel wants room for all of a file that is mapped to be written to."""
    state, path = published[2], published[4]
    state = state | {"scalar": torch.tensor(1.5), "turned": torch.randn(6, 2).T, "none": torch.zeros(0, 3)}
    torch.save({"all": state, "step": 3}, path)
    found = mapped.load_read_only(path)
    assert found["step"] == 3 and found["all"].keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found["all"][name], value) and found["all"][name].dtype == value.dtype, name


def test_a_file_that_cannot_be_mapped_to_be_written_to(published, monkeypatch):
    encoder, llm, state, _, path = published
    torch.save(state, path)
    real = torch.load

    def load(*args, **kwargs):
        if kwargs.get("mmap"):
            raise RuntimeError("unable to mmap 28580245327 bytes from file: Cannot allocate memory (12)")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    model = LayAlignForConditionalGeneration.from_published(path, encoder=encoder, llm=llm)
    assert torch.equal(model.adapter.boundary, state[BOUNDARY].flatten())


def test_comparing_in_parts(monkeypatch):
    monkeypatch.setattr(mapped, "CHUNK", 100)
    left = torch.randn(50, 3)
    assert (
        mapped.equal(left, left.clone())
        and mapped.equal(left, left.bfloat16())
        and mapped.equal(left[0, 0], left[0, 0])
    )
    for place in ((0, 0), (49, 2)):
        other = left.clone()
        other[place] += 1
        assert not mapped.equal(left, other)


def test_a_hub_name_and_a_folder_as_source(published, tmp_path):
    encoder, llm, state, _, path = published
    torch.save(state, path)
    commit = "c" * 40
    place = tmp_path / "cache" / "models--some--published"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit / "math-v1.0").mkdir(parents=True)
    path.rename(place / "snapshots" / commit / "math-v1.0" / "pytorch_model.bin")
    hub = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True, "subfolder": "math-v1.0"}
    for source, found in (("some/published", hub), (place / "snapshots" / commit / "math-v1.0", {})):
        model = LayAlignForConditionalGeneration.from_published(source, encoder=encoder, llm=llm, **found)
        assert torch.equal(model.adapter.boundary, state[BOUNDARY].flatten())
    with pytest.raises(ValueError, match=r"neither a folder nor a hub name with a pytorch_model\.bin"):
        LayAlignForConditionalGeneration.from_published(
            "some/published", encoder=encoder, llm=llm, **hub | {"subfolder": "none"}
        )


@pytest.mark.parametrize("protocol", [2, 3])
def test_files_without_an_archive_are_read(protocol, make_model, make_encoder, make_llm, tmp_path):
    """What old versions of torch wrote cannot be mapped."""
    model = make_model()
    model.save_published(tmp_path / "new.bin")
    state = torch.load(tmp_path / "new.bin", weights_only=True)
    old = tmp_path / "old.bin"
    torch.save(state, old, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    loaded = LayAlignForConditionalGeneration.from_published(old, encoder=make_encoder(), llm=make_llm())
    for name, value in model.trained_state_dict().items():
        assert torch.equal(loaded.trained_state_dict()[name], value), name
