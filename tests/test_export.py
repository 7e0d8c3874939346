"""What a result says to other tools, and the result multiplied out; transformers itself: test_transformers.py."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import air
from conftest import TINY, distance, write_checkpoint
from model import LAYERS
from support import checkpoint, export
from support.checkpoint import Checkpoint
from support.config import MODELING, compressed_config, dense_config
from support.script import InputError

RANKS = {f"model.layers.{l}.{name}": 5 + i for l in (0, 1) for i, name in enumerate(LAYERS)}
LOW = {"air": {"ranks": RANKS}}
PARTLY = {"air": {"ranks": {layer: k for layer, k in RANKS.items() if ".1." in layer and "o_proj" not in layer}}}
QWEN = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
CASES = {
    "llama": dict(TINY, **LOW),
    "wide heads, biases": dict(TINY, head_dim=12, attention_bias=True, mlp_bias=True, **LOW),
    "mistral, partly": dict(TINY, architectures=["MistralForCausalLM"], model_type="mistral", **PARTLY),
    "qwen2, partly": dict(TINY | QWEN, **PARTLY),
    "qwen2, tied": dict(TINY | QWEN | {"tie_word_embeddings": True}, **LOW),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def result(request, tmp_path):
    """A result with random factors, its config.json as air.py writes it."""
    raw = CASES[request.param]
    folder = write_checkpoint(tmp_path / "result", raw)
    (folder / "config.json").write_text(json.dumps(compressed_config(raw, raw["air"])))
    return folder


def run(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    main()


def test_a_result_has_a_type_and_classes_of_its_own(tmp_path, windows, monkeypatch):
    source = write_checkpoint(tmp_path / "source", dict(TINY | QWEN))
    for name in ("vocab.json", "merges.txt", "chat_template.jinja", "special_tokens_map.json"):
        (source / name).write_text(name)
    np.save(tmp_path / "w.npy", windows.numpy())
    run(monkeypatch, air.main, "--ckpt", source, "--out", tmp_path / "out", "--quiet", "--text", "none",
        "--calib", tmp_path / "w.npy", "--device", "cpu")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("air_qwen2", ["AirQwen2ForCausalLM"])
    assert raw["auto_map"] == {"AutoConfig": "modeling_air.AirQwen2Config", "AutoModel": "modeling_air.AirQwen2Model",
                               "AutoModelForCausalLM": "modeling_air.AirQwen2ForCausalLM"}
    assert (tmp_path / "out" / "modeling_air.py").read_text() == MODELING.read_text()
    assert (tmp_path / "out" / "chat_template.jinja").exists() and (tmp_path / "out" / "merges.txt").exists()
    assert dense_config(raw) == json.loads((source / "config.json").read_text())
    assert compressed_config(raw, raw["air"]) == raw                # of a result again: as it is
    assert Checkpoint(tmp_path / "out").cfg.biases == Checkpoint(source).cfg.biases


def test_results_of_older_versions_are_read(result, windows):
    """Their type was the source's."""
    expected = Checkpoint(result).model()(windows)
    raw = json.loads((result / "config.json").read_text())
    (result / "config.json").write_text(json.dumps(dense_config(raw) | {"air": raw["air"]}))
    assert torch.equal(Checkpoint(result).model()(windows), expected)


def test_the_export_is_the_same_function(result, windows, tmp_path, monkeypatch, capsys):
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "modeling_air.py"):
        (result / name).write_text(name)
    run(monkeypatch, export.main, result, "--dense", tmp_path / "dense")
    ckpt, dense = Checkpoint(result), Checkpoint(tmp_path / "dense")
    assert distance(dense.model()(windows), ckpt.model()(windows)) < 1e-5
    assert not dense.cfg.ranks and dense.cfg.tied == ckpt.cfg.tied and dense.cfg.biases == ckpt.cfg.biases
    kind = ckpt.raw["model_type"].removeprefix("air_")
    assert (dense.raw["model_type"], dense.raw["architectures"]) == (kind, [kind.capitalize() + "ForCausalLM"])
    assert not {"air", "auto_map"} & dense.raw.keys()
    found = sorted(path.name for path in (tmp_path / "dense").iterdir())
    assert found == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    said = capsys.readouterr().out
    assert f"{ckpt.parameters():,} -> {dense.parameters():,} parameters" in said and "as before AIR" in said
    assert not list(tmp_path.glob("*.partial"))


def test_products_are_rounded_once_and_the_logits_shift_is_told(tmp_path, windows, monkeypatch, capsys):
    folder = write_checkpoint(tmp_path / "result", CASES["llama"], torch.bfloat16)
    run(monkeypatch, export.main, folder, "--dense", tmp_path / "dense")
    small, dense = load_file(folder / "model.safetensors"), load_file(tmp_path / "dense" / "model.safetensors")
    for layer in RANKS:
        exact = small[layer + ".U.weight"].double() @ small[layer + ".V.weight"].double()
        found = dense[layer + ".weight"]
        assert found.dtype == torch.bfloat16 and torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)
    ids = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))
    wide, other = (Checkpoint(path).model(dtype=torch.float32)(ids) for path in (folder, tmp_path / "dense"))
    rms, greatest, own = export.moved(Checkpoint(folder), Checkpoint(tmp_path / "dense"))
    assert rms == pytest.approx((wide - other).square().mean().sqrt().item(), rel=1e-3) and rms > 1e-3
    assert greatest == pytest.approx((wide - other).abs().max().item(), rel=1e-3)
    assert own == pytest.approx(wide.var(-1, unbiased=False).mean().sqrt().item(), rel=1e-3)
    assert f"UV in bfloat16 moves the logits by {rms:.1e}" in capsys.readouterr().out


def test_it_is_written_block_by_block(result, windows, tmp_path, monkeypatch):
    """One part a block, and shards where it is large: never the whole model at once."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    parts, add = [], checkpoint.Writer.add
    monkeypatch.setattr(checkpoint.Writer, "add",
                        lambda self, part, tensors, note=None: (parts.append(list(tensors)), add(self, part, tensors)))
    run(monkeypatch, export.main, result, "--dense", tmp_path / "dense")
    assert len(parts) == 3 and all({name.split(".")[2] for name in part} == {str(l)}
                                   for l, part in enumerate(parts[:2]))
    dense = Checkpoint(tmp_path / "dense")
    assert len(dense.files) == 3
    assert distance(dense.model()(windows), Checkpoint(result).model()(windows)) < 1e-5


def refuse(monkeypatch, tmp_path, arguments, expected):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=expected) as error:
        run(monkeypatch, export.main, *arguments)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_it_refuses(tmp_path, monkeypatch):
    """A dense input, and every target that exists: another's, the result itself, an older export, a file."""
    dense = write_checkpoint(tmp_path / "source")
    result = write_checkpoint(tmp_path / "result", CASES["llama"])
    run(monkeypatch, export.main, result, "--dense", tmp_path / "export")
    (tmp_path / "file").write_text("x")
    refuse(monkeypatch, tmp_path, [dense, "--dense", tmp_path / "new"], "is dense")
    refuse(monkeypatch, tmp_path, [tmp_path / "export", "--dense", tmp_path / "new"], "is dense")
    refuse(monkeypatch, tmp_path, [tmp_path / "nothing", "--dense", tmp_path / "new"], "does not exist")
    for taken in (dense, result, tmp_path / "export", tmp_path / "file", tmp_path):
        refuse(monkeypatch, tmp_path, [result, "--dense", taken], "already exists; name another folder for --dense")
    refuse(monkeypatch, tmp_path, [result, "--dense", tmp_path / "file" / "new"], "cannot write to")
    # A section that says nothing, or names a layer there is not, makes no result of a dense model.
    for ranks in ({}, {"model.layers.9.mlp.up_proj": 3}):
        shutil.rmtree(tmp_path / "result")
        write_checkpoint(tmp_path / "result", dict(TINY, air={"ranks": ranks}))
        refuse(monkeypatch, tmp_path, [result, "--dense", tmp_path / "new"], "is dense")


def test_an_overflow_leaves_nothing(tmp_path, monkeypatch):
    """Factors that fp16 holds, whose product it does not."""
    folder = write_checkpoint(tmp_path / "result", CASES["llama"], torch.float16)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.U.weight"].fill_(1000)
    state["model.layers.1.mlp.up_proj.V.weight"].fill_(1000)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="model.layers.1.mlp.up_proj.weight is not finite in torch.float16"):
        run(monkeypatch, export.main, folder, "--dense", tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
