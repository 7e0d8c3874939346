"""calibrate.py: texts, windows, Gram matrices."""
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pytest
import torch

import calibrate as C
from eval_ppl import evaluation_windows
from support import texts as T
from conftest import ROOT, SHARED, distance, in_process, write_checkpoint
from model import LAYERS, READS
from support.checkpoint import Checkpoint
from support.script import InputError
from support.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo():
    return Checkpoint(ROOT / "demo")


def test_stdlib_splits_share_no_file():
    train, test = T.stdlib_rows("train"), T.stdlib_rows("test")
    assert not set(train) & set(test)
    assert 0.02 < len(test) / (len(train) + len(test)) < 0.09
    assert any("class OrderedDict" in row for row in train + test)
    assert not any(
        "unittest.main()" in row and "class TestCase(" in row for row in train if row.startswith("from test")
    )


def test_calibration_windows_follow_the_released_recipe(demo, tmp_path):
    """random.seed(3), randint(0, len - 10T - 1), 10T characters, first T tokens after one BOS; shorter skipped."""
    import random
    import sentencepiece
    text = "\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(3000))
    (tmp_path / "t.txt").write_text(text)
    random.seed(3)
    sp, expected = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "demo" / "tokenizer.model")), []
    while len(expected) < 5:
        i = random.randint(0, len(text) - 320 - 1)
        ids = [1] + sp.encode(text[i:i + 320])
        if len(ids) >= 32:
            expected.append(ids[:32])
    assert C.calibration_windows(str(tmp_path / "t.txt"), demo, 5, 32, 3).tolist() == expected
    assert C.calibration_windows(str(tmp_path / "t.txt"), demo, 5, 32, 4).tolist() != expected


def test_the_text_is_not_replaced_by_its_windows(demo, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(1000) % 50)
    before = (tmp_path / "ids.npy").read_bytes()
    (tmp_path / "link.npy").symlink_to(tmp_path / "ids.npy")
    for out in ("ids.npy", "link.npy"):
        done = in_process("calibrate", "--ckpt", demo.folder, "--calib", tmp_path / "ids.npy", "--out", tmp_path / out)
        assert done.returncode == 2 and "the text that is read" in done.stderr
    assert (tmp_path / "ids.npy").read_bytes() == before


def test_windows_go_to_an_array_only(tiny, tmp_path):
    """Not over a checkpoint's own files."""
    np.save(tmp_path / "ids.npy", np.arange(100) % 50)
    before = {path: path.read_bytes() for path in tiny.iterdir()}
    for name in ("model.safetensors", "config.json", "windows"):
        done = in_process("calibrate", "--ckpt", tiny, "--calib", tmp_path / "ids.npy", "--samples", 2, "--seqlen", 8,
                          "--out", tiny / name)
        assert done.returncode == 2 and "expected the name of a .npy file" in done.stderr
    assert before == {path: path.read_bytes() for path in tiny.iterdir()}


def test_evaluation_windows_are_disjoint_and_cover_the_text(demo, tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"import module{i}"}) for i in range(90)))
    windows, tokens, per_byte = evaluation_windows(str(tmp_path / "t.jsonl"), demo, 16)
    joined = "\n\n".join(f"import module{i}" for i in range(90))
    ids = [1] + Tokenizer(demo).encode(joined)
    assert (
        windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
        and tokens == len(ids)
        and per_byte == tokens / len(joined)
    )


def test_token_arrays(tiny, tmp_path, windows):
    ckpt = Checkpoint(tiny)
    np.save(tmp_path / "two.npy", windows.numpy().astype(np.int32))
    np.save(tmp_path / "one.npy", windows.flatten().numpy())
    two, one = str(tmp_path / "two.npy"), str(tmp_path / "one.npy")
    assert T.with_defaults(ckpt, two) == (two, 6, 24)
    assert torch.equal(C.calibration_windows(two, ckpt, 6, 24), windows)
    assert torch.equal(evaluation_windows(two, ckpt)[0], windows)
    assert torch.equal(evaluation_windows(one, ckpt, 10)[0], windows.flatten()[:140].view(14, 10))      # no BOS added
    stream = windows.flatten().tolist()
    for row in C.calibration_windows(one, ckpt, 4, 10).tolist():
        assert any(row == stream[i:i + 10] for i in range(len(stream)))
    with pytest.raises(InputError, match="leave --seqlen out"):
        T.with_defaults(ckpt, two, None, 12)


def test_wikitext2_has_the_known_number_of_tokens(tmp_path):
    raw, spm = (
        SHARED / "data" / "wikitext2" / "wiki.test.raw",
        SHARED / "data" / "tokenizers" / "llama2_tokenizer.model",
    )
    if not raw.exists():
        pytest.skip("WikiText-2 and the LLaMA tokenizer are not at ../shared/data")
    folder = write_checkpoint(tmp_path / "llama", vocab_size=32000, max_position_embeddings=2048)
    shutil.copy(spm, folder / "tokenizer.model")
    windows, tokens, _ = evaluation_windows(str(raw), Checkpoint(folder), 2048)
    assert (tokens, tuple(windows.shape)) == (341_469, (166, 2048)) and windows[0, 0] == 1


def test_gram_equals_a_sum_of_outer_products(tmp_path, windows):
    """Float64, token by token, from inputs computed by the whole model through module hooks."""
    ckpt = Checkpoint(write_checkpoint(tmp_path / "q", architectures=["Qwen2ForCausalLM"]))
    model, inputs = ckpt.model(dtype=torch.float64), {}
    for l, block in enumerate(model.model.layers):
        for name in LAYERS:
            block.get_submodule(name).register_forward_pre_hook(
                lambda module, x, key=(l, name): inputs.setdefault(key, []).append(x[0]))
    for ids in windows:
        model(ids[None])
    h = C.embed(ckpt, windows, torch.float64)
    for l, stats in C.forward_sweep(ckpt, h, "cpu", gram=True):
        for name in LAYERS:
            X = torch.cat([x[0] for x in inputs[l, name]])
            outer = sum(torch.outer(x, x) for x in X)
            assert distance(stats[READS[name] + ".gram"], outer) < 1e-12
            assert stats[READS[name] + ".tokens"] == windows.numel()
            assert distance(stats[READS[name] + ".mean_abs"], X.abs().mean(0)) < 1e-12
    assert distance(h, whole_hidden(model, windows)) < 1e-12


def whole_hidden(model, windows):
    """The last block's output of the whole model at once."""
    out = {}
    model.model.layers[-1].register_forward_hook(lambda module, x, y: out.update(y=y))
    model(windows)
    return out["y"]


def test_a_download_that_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "DATA", tmp_path)
    (tmp_path / "wikitext-2-raw-v1.zip").write_bytes(b"something else")
    with pytest.raises(InputError, match="SHA-256"):
        T.download("wikitext-2-raw-v1.zip")
    name = "c4-validation.00000-of-00008.json.gz"           # no published sum: the first one is kept
    (tmp_path / name).write_bytes(b"one")
    assert T.download(name) == tmp_path / name
    (tmp_path / name).write_bytes(b"two")
    with pytest.raises(InputError, match="SHA-256"):
        T.download(name)


def test_processes_that_fetch_at_once_do_not_take_each_others_files(tmp_path, monkeypatch):
    """Each has a partial file of its own; one that is there and right is only read."""
    monkeypatch.setattr(T, "DATA", tmp_path)
    content = b"x" * 100_000
    source = ("http://nowhere/t.zip", hashlib.sha256(content).hexdigest())

    class Slow(io.BytesIO):
        headers = {}

        def read(self, n=-1):
            if self.tell() and os.getpid() == 1:            # the second one, half way through the first
                monkeypatch.setattr(os, "getpid", lambda: 2)
                assert T.download("t.zip", source).read_bytes() == content
            return super().read(min(n, 50_000) if n > 0 else n)
    monkeypatch.setattr(T.urllib.request, "urlopen", lambda *a, **_: Slow(content))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert T.download("t.zip", source).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["t.zip"]      # nor is a pinned sum kept beside it


def test_jsonl_keeps_unusual_line_breaks_and_names_the_bad_line(tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text(
        json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n" + json.dumps({"text": "d"}) + "\n"
    )
    assert T.rows_of(str(good), "test") == ["a\u2028b\x85c", "d"]
    for bad in ('{"text": null}', '{"no": 1}', "[]", "x"):
        (tmp_path / "bad.jsonl").write_text('{"text": "ok"}\n' + bad)
        with pytest.raises(InputError, match="line 2"):
            T.rows_of(str(tmp_path / "bad.jsonl"), "test")


def test_digest_knows_the_shape(windows):
    assert T.digest(windows) != T.digest(windows.reshape(24, 6)) and T.digest(windows) == T.digest(windows.clone())
