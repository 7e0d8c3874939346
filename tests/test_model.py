"""model.py: the network against another implementation, and checkpoints in and out."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import model as M
from support import checkpoint
from conftest import TINY, write_checkpoint
from support.checkpoint import Checkpoint, Writer
from support.config import parse_config
from support.script import InputError
from model import LowRank

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_logits_equal_another_implementation(path, tmp_path):
    golden = np.load(path)
    ckpt = Checkpoint(write_checkpoint(tmp_path, json.loads(str(golden["config"]))))
    logits = ckpt.model()(torch.from_numpy(golden["ids"].astype(np.int64)))
    assert np.abs(logits.numpy() - golden["logits"]).max() < 1e-4


def test_golden_files_cover_what_the_issue_names():
    named = {"llama-grouped", "llama-3.1-rope", "mistral", "qwen2.5", "qwen2.5-tied", "qwen3", "qwen3-tied-biased"}
    assert named <= {path.stem for path in GOLDEN}


def test_logits_equal_the_authors(official):
    folder, numbers = official
    logits = Checkpoint(folder).model()(torch.from_numpy(numbers["windows"][:1]).long())[0]
    assert np.abs(logits.numpy() - numbers["logits_window0"]).max() < 1e-4


def test_attention_equals_a_loop_over_heads():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 2, 5, 4).double(), torch.randn(2, 2, 5, 4).double()
    for b in range(2):
        for head in range(6):
            kv = head // 3                                  # query heads 0-2 read kv head 0, heads 3-5 kv head 1
            scores = q[b, head] @ k[b, kv].T / 2
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            expected = scores.softmax(-1) @ v[b, kv]
            assert torch.allclose(M.attention(q, k, v)[b, head], expected)


def test_low_rank_equals_its_product():
    layer = LowRank(8, 6, 3, bias=True).double()
    x = torch.randn(4, 8).double()
    assert torch.allclose(layer(x), x @ (layer.U.weight @ layer.V.weight).T + layer.U.bias)


def test_old_and_new_configurations_read_the_same():
    """LLaMA 1's config.json has no rope_theta, kv heads or max_position_embeddings; new ones nest RoPE's keys."""
    old = {k: v for k, v in TINY.items() if k not in ("rope_theta", "num_key_value_heads", "max_position_embeddings")}
    old |= {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 64}
    assert parse_config(old) == parse_config(TINY | {"num_key_value_heads": 4})
    new = {k: v for k, v in TINY.items() if k != "rope_theta"} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}
    }
    assert parse_config(new).rope_theta == 5e5


def test_sliding_window_bounds_the_context():
    mistral = TINY | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 48}
    assert parse_config(mistral).context == 48
    assert parse_config(mistral | {"sliding_window": None}).context == 64
    assert parse_config(mistral | {"use_sliding_window": False}).context == 48          # a Qwen2 key
    absent = {key: value for key, value in mistral.items() if key != "sliding_window"}
    # the format's default
    assert parse_config(absent | {"max_position_embeddings": 32768}).context == 4096
    assert parse_config(TINY | {"model_type": "mistral", "sliding_window": 48}).context == 48       # model_type decides
    qwen = TINY | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 48}
    assert parse_config(qwen | {"use_sliding_window": False}).context == 64
    assert parse_config(qwen | {"use_sliding_window": True, "max_window_layers": 2}).context == 64  # no layer slides
    assert parse_config(qwen | {"use_sliding_window": True, "max_window_layers": 1}).context == 48


@pytest.mark.parametrize("layout", ["file", "shards", "bin", "bin-shards", "fp16", "bf16"])
def test_layouts(layout, tmp_path, windows):
    folder = write_checkpoint(
        tmp_path / "ckpt", dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(layout, torch.float32)
    )
    expected = Checkpoint(folder).model(dtype=torch.float32)(windows)
    state, path = load_file(folder / "model.safetensors"), folder
    if layout == "file":
        path = (folder / "model.safetensors").rename(folder / "llama7b.safetensors")
    if layout.startswith("bin") or layout == "shards":
        (folder / "model.safetensors").unlink()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)      # a buffer old checkpoints carry
        names = sorted(state)
        parts = [names] if layout == "bin" else [names[::2], names[1::2]]
        end, save = ("bin", torch.save) if layout.startswith("bin") else ("safetensors", save_file)
        stem = "pytorch_model" if end == "bin" else "model"
        files = [f"{stem}.{end}"] if layout == "bin" else [f"{stem}-0000{i}-of-00002.{end}" for i in (1, 2)]
        for file, part in zip(files, parts):
            save({name: state[name] for name in part}, folder / file)
        if layout != "bin":
            weight_map = {name: file for file, part in zip(files, parts) for name in part}
            (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(Checkpoint(path).model(dtype=torch.float32)(windows), expected)


def test_blocks_one_at_a_time_equal_the_whole_model(tiny, windows):
    ckpt = Checkpoint(tiny)
    whole, x = ckpt.model(), ckpt.tensor("model.embed_tokens.weight")[windows]
    for l in range(2):
        x = ckpt.block(l)(x, M.rope(ckpt.cfg, windows.shape[1]))
    assert torch.equal(M.to_logits(x, ckpt.head(), ckpt.cfg), whole(windows))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    folder = write_checkpoint(tmp_path / "ckpt")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="could run code and are not loaded"):
        Checkpoint(folder)
    assert not (tmp_path / "ran").exists()


# ---- the writer


def test_a_models_shapes_are_had_without_random_numbers(tiny, monkeypatch):
    """nn.Embedding draws normal numbers, more than a second on the meta device: a header must not wait for them."""

    def drawn(*_, **__):
        raise AssertionError("a normal number was drawn")
    for name in ("normal_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, drawn)
    monkeypatch.setattr(torch.Tensor, "normal_", drawn)
    assert Checkpoint(tiny).cfg.n_layers == 2


def test_writer_shards_and_reads_back(tiny, tmp_path, monkeypatch, windows):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    ckpt = Checkpoint(tiny)
    with Writer(tmp_path / "out", 0) as writer:
        for name in ckpt.names:
            writer.add(f"model-{name}.safetensors", {name: ckpt.tensor(name)})
        writer.finish(ckpt.raw | {"air": {}})
    again = Checkpoint(tmp_path / "out")
    assert len(again.files) > 2 and (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert torch.equal(again.model()(windows), ckpt.model()(windows))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]


def test_writer_leaves_nothing_when_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Writer(tmp_path / "out", 0) as writer:
            writer.add("model-x.safetensors", {"x": torch.ones(3)})
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_writer_replaces_only_compressed_checkpoints(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        Writer(out, 0)
    with pytest.raises(InputError, match="not a compressed checkpoint"):
        Writer(out, 0, overwrite=True)
    (out / "config.json").write_text('{"air": {}}')
    with pytest.raises(ZeroDivisionError):
        with Writer(out, 0, overwrite=True):
            1 / 0
    assert (out / "thesis.tex").exists()                    # the old one stays until the new one is whole
    with Writer(out, 0, overwrite=True) as writer:
        writer.add("model-x.safetensors", {"x": torch.ones(3)})
        writer.finish({"air": {"new": 1}})
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


def test_writer_refuses_a_small_disk_and_overflow(tmp_path):
    with pytest.raises(InputError, match="GB free"):
        Writer(tmp_path / "out", 1e18)
    assert not list(tmp_path.iterdir())
    with Writer(tmp_path / "out", 0) as writer, pytest.raises(RuntimeError, match="not finite"):
        writer.add("model-x.safetensors", {"x": torch.tensor([1e6]).half()})
