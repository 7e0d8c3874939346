"""A result in transformers, by the file that lies in it; skipped where transformers is not installed (make
test-transformers). The oracle is transformers' own dense model whose weights are the products UV."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_golden import weights
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"          # read when it is imported
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import air
from config_sweep import sweep
from conftest import ROOT, TINY, write_checkpoint
from experiments import decode
from experiments.shapes import SHAPES, random_model
from model import LAYERS, Llama
from public_configs import CONFIGS
from support import export
from support.checkpoint import Checkpoint
from support.config import MODELING, compressed_config, parse_config

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def config(kind, **changes):
    return dict(TINY, model_type=kind, architectures=[kind.capitalize() + "ForCausalLM"], **changes)


TIED = {"tie_word_embeddings": True}
CASES = {       # every family with both blocks compressed and with one, tied and not, with and without biases
    "llama": config("llama"),
    "llama biases": config("llama", attention_bias=True, mlp_bias=True, head_dim=12),
    "llama 3.1 tied": config("llama", rope_scaling=LLAMA3) | TIED,
    "mistral": config("mistral", sliding_window=48),
    "mistral tied": config("mistral", sliding_window=None) | TIED,
    "qwen2": config("qwen2", use_sliding_window=False, sliding_window=8),
    "qwen2 tied": config("qwen2", use_sliding_window=False) | TIED,
    "qwen3": config("qwen3", head_dim=12),
    "qwen3 biases tied": config("qwen3", head_dim=8, attention_bias=True) | TIED,
}
PARTLY = ("llama biases", "mistral", "qwen2 tied", "qwen3")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Where transformers copies the files of results to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def dense_model(raw, state=None):
    """transformers' own model of a config.json, with random weights, or those of `state`."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=torch.float32).eval()
    if state is None:
        shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
        state = {name: torch.from_numpy(w) for name, w in weights(shapes).items()}
    if raw["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def write_result(folder, raw, blocks, dtype=torch.float32):
    """A result of ranks 5 to 11 in `folder`; returns transformers' dense model of the same function."""
    state = dense_model(raw).state_dict()
    stored, ranks = dict(state), {}
    for i, layer in enumerate(f"model.layers.{l}.{name}" for l in blocks for name in LAYERS):
        k = ranks[layer] = 5 + i % 7
        U, sigma, Vh = torch.linalg.svd(stored.pop(layer + ".weight"), full_matrices=False)
        U, V = (U[:, :k] * sigma[:k]).to(dtype), Vh[:k].to(dtype)
        state[layer + ".weight"] = U.float() @ V.float()
        stored |= {layer + ".U.weight": U, layer + ".V.weight": V}
        if layer + ".bias" in stored:
            stored[layer + ".U.bias"] = stored.pop(layer + ".bias")
    if raw["tie_word_embeddings"]:
        del stored["lm_head.weight"]
    folder.mkdir(parents=True)
    save_file({name: w.to(dtype).contiguous() for name, w in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(compressed_config(raw, {"ranks": ranks})))
    shutil.copy(MODELING, folder)
    return dense_model(raw, {name: w.to(dtype).float() if name in stored else w for name, w in state.items()})


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request, tmp_path_factory):
    raw = CASES[request.param]
    folder = tmp_path_factory.mktemp("case") / "result"
    dense = write_result(folder, raw, (0,) if request.param in PARTLY else (0, 1))
    return SimpleNamespace(raw=raw, folder=folder, dense=dense)


def load(folder, **options):
    """The model, to which nothing is missing and in which nothing is left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True,
                                                       **options)
    assert not any(info.values()), info
    return model


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def farthest(a, b):
    return (a - b).abs().max().item()


def our_logits(folder, ids):
    return Checkpoint(folder).model(dtype=torch.float32)(ids)


@pytest.mark.parametrize("name", CONFIGS, ids=lambda name: name.replace(" ", "-"))
def test_public_configurations_compute_the_same(name, tmp_path):
    """The forms in which checkpoints are published, over the whole context that we allow."""
    raw = CONFIGS[name]
    shapes = {key: tuple(w.shape) for key, w in Llama(parse_config(raw)).state_dict().items()}
    if raw.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight")
    state = {key: torch.from_numpy(w) for key, w in weights(shapes).items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = torch.randint(64, (2, Checkpoint(tmp_path).cfg.context), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert farthest(our_logits(tmp_path, ids), logits(stock, ids)) < 1e-4


EDITED = [("llama", "rope_scaling"), ("llama", "rope_parameters"), ("mistral", "sliding_window"),
          ("qwen2", "layer_types"), ("qwen3", "head_dim")]


@pytest.mark.parametrize("family, key", EDITED)
def test_an_edited_key_computes_the_same_or_is_refused(family, key):
    """Five keys of tests/config_sweep.py, which has them all."""
    outcomes = [(shown, what, detail) for _, shown, what, detail in sweep(family, [key])]
    assert not [each for each in outcomes if each[1] == "DIFFERENT"]
    assert {"same", "refused"} <= {each[1] for each in outcomes}


def test_it_computes_what_the_products_do(case, windows):
    model = load(case.folder)
    name = case.raw["model_type"].capitalize()
    assert type(model).__name__ == f"Air{name}ForCausalLM" and type(model.model).__name__ == f"Air{name}Model"
    assert isinstance(model, getattr(transformers, f"{name}ForCausalLM"))
    assert model.num_parameters() == sum(w.numel() for w in load_file(case.folder / "model.safetensors").values())
    expected = logits(case.dense, windows)
    assert expected.std() > 0.3 and farthest(logits(model, windows), expected) < 1e-4
    assert farthest(our_logits(case.folder, windows), expected) < 1e-4
    if case.raw["tie_word_embeddings"]:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generate_with_its_cache(case, windows):
    """Greedy, step by step through the cache, against the dense model without one."""
    prompt = windows[:2, :6]
    found = load(case.folder).generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8,
                                       do_sample=False, pad_token_id=0, eos_token_id=-1)
    expected = prompt
    for _ in range(8):
        expected = torch.cat((expected, logits(case.dense, expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, expected)


def test_saved_by_transformers_both_read_it_again(case, windows, tmp_path):
    """config.json rewritten, shards, no tied head: the same model, there and here."""
    model = load(case.folder)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(load(tmp_path / "again"), windows), logits(model, windows))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (case.folder, tmp_path / "again"))
    keys = ("air", "model_type", "architectures", "auto_map")
    assert [after[key] for key in keys] == [before[key] for key in keys]
    assert torch.equal(our_logits(tmp_path / "again", windows), our_logits(case.folder, windows))


def test_in_bf16(case, windows):
    model = load(case.folder, dtype=torch.bfloat16)
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}
    expected = logits(case.dense, windows)
    difference = logits(model, windows).float() - expected
    assert difference.square().mean().sqrt() < 0.03 * expected.std()


@pytest.mark.parametrize("name", ["llama 3.1 tied", "qwen3"])
def test_a_bf16_result_loads_as_such(name, windows, tmp_path):
    raw = dict(CASES[name], torch_dtype="bfloat16")
    dense = write_result(tmp_path / "result", raw, (0, 1), torch.bfloat16)
    assert {w.dtype for w in load(tmp_path / "result").parameters()} == {torch.bfloat16}
    wide = load(tmp_path / "result", dtype=torch.float32)
    assert farthest(logits(wide, windows), logits(dense, windows)) < 1e-4


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_device_map(case, windows, where):
    model = load(case.folder, device_map=where)
    assert {w.device.type for w in model.parameters()} <= {"cpu", "cuda"}
    assert farthest(logits(model, windows.to(model.device)).cpu(), logits(case.dense, windows)) < 1e-4


def test_the_base_model_alone_is_low_rank(case, windows):
    """As vLLM builds it: AutoModel from the configuration, weights by name, no head and no plan to divide layers."""
    settings = AutoConfig.from_pretrained(case.folder, trust_remote_code=True)
    base = AutoModel.from_config(settings, trust_remote_code=True).eval()
    state = load_file(case.folder / "model.safetensors")
    base.load_state_dict({name.removeprefix("model."): w for name, w in state.items() if name != "lm_head.weight"})
    assert farthest(base(windows).last_hidden_state, case.dense.model(windows).last_hidden_state) < 1e-4
    assert base.is_backend_compatible() and not base.tp_plan
    # Both lists in the order in which vLLM asks for them.
    assert list(settings.auto_map) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]


@pytest.mark.parametrize("name", ["llama 3.1 tied", "qwen2 tied"])
def test_a_new_model_of_the_configuration(name, tmp_path):
    """Without weights: factors are drawn as the family draws its weights, and the tied head is the new embedding."""
    write_result(tmp_path / "result", CASES[name], (0, 1))
    settings = AutoConfig.from_pretrained(tmp_path / "result", trust_remote_code=True)
    base = AutoModel.from_config(settings, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(settings, trust_remote_code=True)
    for drawn in (base, model.model):
        assert drawn.layers[0].self_attn.q_proj.V.weight.std() < 1.5 * settings.initializer_range
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_it_is_refused_without_trust(case):
    for reader in (AutoConfig, AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="custom code"):
            reader.from_pretrained(case.folder, trust_remote_code=False)
    # And by what never asks: its type is nobody's.
    raw = json.loads((case.folder / "config.json").read_text())
    assert raw["model_type"] not in transformers.CONFIG_MAPPING
    assert not hasattr(transformers, raw["architectures"][0])


def test_two_results_of_one_name_in_one_process(windows, tmp_path):
    """transformers keeps a folder's classes under its last name."""
    made = [write_result(tmp_path / str(i) / "out", CASES[name], blocks)
            for i, (name, blocks) in enumerate((("llama", (0,)), ("llama", (0, 1)), ("qwen2", (1,))))]
    for i in (0, 1, 2, 0):
        assert farthest(logits(load(tmp_path / str(i) / "out"), windows), logits(made[i], windows)) < 1e-4


def test_it_needs_nothing_of_this_repository(tmp_path, windows):
    """In an interpreter that has never seen it, from another folder."""
    dense = write_result(tmp_path / "result", CASES["llama"], (0, 1))
    np.save(tmp_path / "ids.npy", windows.numpy())
    code = """
import sys, numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("result", trust_remote_code=True)
numpy.save("logits.npy", model(torch.from_numpy(numpy.load("ids.npy"))).logits.detach().numpy())
assert not any(str(getattr(module, "__file__", "")).startswith(sys.argv[1]) for module in list(sys.modules.values()))
"""
    beside = str(Path(transformers.__file__).parents[1])            # where make test-transformers has put it
    python = [sys.executable, "-c", code, str(ROOT) + "/support"]
    done = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": beside})
    assert done.returncode == 0, done.stderr
    assert farthest(torch.from_numpy(np.load(tmp_path / "logits.npy")), logits(dense, windows)) < 1e-4


def command(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    main()


def test_the_export_needs_no_trust_and_no_file(case, windows, tmp_path, monkeypatch):
    """The stock class on the multiplied-out weights; of a result that transformers has saved, the same file."""
    command(monkeypatch, export.main, case.folder, "--dense", tmp_path / "dense")
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values()) and type(stock).__name__ == case.raw["architectures"][0]
    assert type(stock).__module__.startswith("transformers.models.")
    assert farthest(logits(stock, windows), logits(case.dense, windows)) < 1e-4
    load(case.folder).save_pretrained(tmp_path / "again")
    command(monkeypatch, export.main, tmp_path / "again", "--dense", tmp_path / "dense-again")
    first, second = (load_file(tmp_path / each / "model.safetensors") for each in ("dense", "dense-again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense-again")
    assert farthest(logits(stock, windows), logits(case.dense, windows)) < 1e-4


@pytest.mark.parametrize("name, blocks", [("llama 3.1 tied", ":"), ("qwen2", "0:1")])
def test_what_air_py_writes(name, blocks, windows, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", CASES[name])
    np.save(tmp_path / "w.npy", windows.numpy())
    command(monkeypatch, air.main, "--ckpt", tmp_path / "source", "--out", tmp_path / "out", "--quiet",
            "--calib", tmp_path / "w.npy", "--text", "none", "--layers", blocks, "--device", "cpu")
    expected = our_logits(tmp_path / "out", windows)
    assert farthest(logits(load(tmp_path / "out"), windows), expected) < 1e-4


@pytest.mark.parametrize("name, tokenizer", [("llama", "LlamaTokenizerFast"), ("qwen2", "Qwen2Tokenizer"),
                                             ("mistral", "LlamaTokenizer"), ("llama", "PreTrainedTokenizerFast")])
def test_the_tokenizer_is_the_sources(name, tokenizer, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    dense = write_checkpoint(tmp_path / "dense", CASES[name])
    write_result(tmp_path / "result", CASES[name], (0, 1))
    for folder in (dense, tmp_path / "result"):
        own.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer}))
    source = AutoTokenizer.from_pretrained(dense)
    result = AutoTokenizer.from_pretrained(tmp_path / "result", trust_remote_code=True)
    text = "def read(self):\n    return  'äöü'"
    assert result(text).input_ids == source(text).input_ids and len(result(text).input_ids) > 30


def test_a_timed_side_has_our_weights(tmp_path):
    """experiments/decode.py times transformers with our dense weights: same logits, and seconds for every token."""
    config = dict(SHAPES["demo"], num_hidden_layers=2, tie_word_embeddings=True)
    model = random_model(config)
    theirs = decode.transformers_model(config, model)
    ids = torch.randint(2048, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert farthest(theirs(ids).logits, model(ids)) < 1e-4
    first, later = decode.transformers_side(config, model)(ids.tolist(), 5)
    assert first > 0 and len(later) == 4 and min(later) > 0
