"""The commands as a user runs them: the method on a checkpoint, every promise about files, and bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial


import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import air
import influence
from conftest import ROOT, SHARED, air_main, distance, in_process, script, write_checkpoint
from model import LAYERS, READS
from support.checkpoint import Checkpoint

KEYS = {
    "method",
    "rate",
    "signal",
    "delta",
    "params_dense",
    "params_compressed",
    "rate_decomposed",
    "rate_file",
    "ppl_dense",
    "ppl_compressed",
    "text",
    "seqlen",
    "windows",
    "ranks",
    "loss",
    "repairs",
    "seconds",
    "peak_rss_bytes",
}


# air.py as a user runs it, without starting an interpreter each time: arguments -> returncode, stdout, stderr.
air_py = partial(in_process, "air")


@pytest.fixture
def job(tiny, tmp_path, windows):
    """The arguments of a small air.py run: (checkpoint, arguments, output folder)."""
    np.save(tmp_path / "w.npy", windows.numpy())
    out = tmp_path / "out"
    return (
        tiny,
        ["--ckpt", tiny, "--calib", tmp_path / "w.npy", "--text", tmp_path / "w.npy", "--out", out, "--device", "cpu"],
        out,
    )


@pytest.mark.parametrize("method", ["air", "svdllm", "svd", "fwsvd", "asvd"])
def test_every_method_writes_a_checkpoint_that_loads(method, job, tmp_path, windows):
    ckpt, arguments, out = job
    done = air_py(*arguments, "--method", method, "--rate", 0.5, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    result, written = json.loads((tmp_path / "r.json").read_text()), Checkpoint(out)
    assert KEYS <= result.keys() and result["ppl_compressed"] > 0
    stored = sum(w.numel() for w in load_file(out / "model.safetensors").values())
    dense = load_file(ckpt / "model.safetensors")
    assert (result["params_compressed"], result["params_dense"]) == (stored, sum(w.numel() for w in dense.values()))
    layers = [f"model.layers.{l}.{name}" for l in range(2) for name in LAYERS]
    assert (
        result["ranks"]
        == written.cfg.ranks
        == {layer: air.rank_at(0.5, *dense[layer + ".weight"].shape) for layer in layers}
    )
    assert written.raw["air"]["method"] == method and written.raw["air"]["calibration"]["sha256"]
    assert torch.isfinite(written.model()(windows)).all()
    assert str(out) in done.stdout and f"{result['ppl_compressed']:.3f}" in done.stdout
    assert not list(tmp_path.glob("*.partial"))


def test_the_written_factors_give_the_same_logits_bit_for_bit(job, windows, monkeypatch):
    """The dense model with the factors air computed, in memory: the loaded checkpoint's logits are equal."""
    ckpt, arguments, out = job
    kept, add = {}, air.Writer.add
    monkeypatch.setattr(
        air.Writer, "add", lambda self, part, tensors, note=None: (kept.update(tensors), add(self, part, tensors, note))
    )
    air_main(monkeypatch, *arguments, "--quiet")
    written = Checkpoint(out)
    model = written.model()
    model.load_state_dict(kept)
    assert torch.equal(model(windows), written.model()(windows))


def test_the_same_seed_gives_the_same_file(tmp_path):
    text = "\n\n".join(f"def f{i}(x, y={i}):\n    return x * {i} + y" for i in range(2000))
    (tmp_path / "t.txt").write_text(text)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done = script(
            "air",
            "--ckpt",
            ROOT / "demo",
            "--calib",
            tmp_path / "t.txt",
            "--text",
            "none",
            "--samples",
            4,
            "--seqlen",
            64,
            "--layers",
            "0:1",
            "--seed",
            seed,
            "--out",
            tmp_path / name,
            "--device",
            "cpu",
        )
        assert done.returncode == 0, done.stderr
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_statistics_are_used_again(job, tmp_path):
    """Another rate, method, signal or δ reads them back and gives the same file as a run without them."""
    ckpt, arguments, out = job
    assert air_py(*arguments, "--stats", tmp_path / "s").returncode == 0
    block = tmp_path / "s" / "block_001.gram.safetensors"
    stamp = block.stat().st_mtime_ns
    for options in (
        ["--rate", 0.4],
        ["--delta", 5],
        ["--method", "svdllm"],
        ["--method", "asvd"],
        ["--signal", "magnitude"],
    ):
        fresh = air_py(*arguments, *options, "--overwrite", "--out", tmp_path / "fresh")
        again = air_py(*arguments, *options, "--overwrite", "--stats", tmp_path / "s")
        assert fresh.returncode == again.returncode == 0, fresh.stderr + again.stderr
        assert block.stat().st_mtime_ns == stamp
        a, b = load_file(out / "model.safetensors"), load_file(tmp_path / "fresh" / "model.safetensors")
        for layer in Checkpoint(out).cfg.ranks:
            assert (
                distance(
                    a[layer + ".U.weight"] @ a[layer + ".V.weight"], b[layer + ".U.weight"] @ b[layer + ".V.weight"]
                )
                < 1e-3
            )
    assert air_py(*arguments, "--signal", "fisher", "--overwrite", "--stats", tmp_path / "s").returncode == 0
    assert "self_attn.q_proj.gram" in load_file(block)
    for kind in ("lrp", "fisher"):
        assert f"self_attn.q_proj.{kind}" in load_file(block.with_name(f"block_001.{kind}.safetensors"))
    other = write_checkpoint(tmp_path / "other", seed=5)
    refused = air_py(*arguments, "--ckpt", other, "--overwrite", "--stats", tmp_path / "s")
    assert refused.returncode == 2 and "another checkpoint" in refused.stderr


def test_json_goes_to_a_device_too(job, tmp_path):
    """/dev/stdout is written to, not replaced; a link's file is written, and the link stays."""
    _, arguments, _ = job
    done = script("air", *arguments, "--quiet", "--json", "/dev/stdout")
    assert done.returncode == 0, done.stderr
    assert KEYS <= json.loads(done.stdout[done.stdout.index("{"):]).keys()
    # So is the file that a shell has put in its place: neither what it held nor what was printed is lost.
    log = tmp_path / "log.txt"
    log.write_text("earlier\n")
    with open(log, "a") as f:
        command = [sys.executable, ROOT / "air.py", *arguments, "--overwrite", "--quiet", "--json", "/dev/stdout"]
        assert subprocess.run(list(map(str, command)), stdout=f).returncode == 0
    said = log.read_text()
    assert said.startswith("earlier\n") and "parameters" in said and KEYS <= json.loads(said[said.index("{"):]).keys()
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert script("air", *arguments, "--overwrite", "--json", tmp_path / "link.json").returncode == 0
    assert (tmp_path / "link.json").is_symlink() and KEYS <= json.loads((tmp_path / "real.json").read_text()).keys()


def test_a_signal_of_the_forward_pass_keeps_the_weights_dtype(job, monkeypatch, tmp_path):
    """Wanda's |W|·‖x‖ as one line of SIGNALS, as README says: ΣXXᵀ is fp64, the sweep stays fp32."""
    wanda = influence.Signal(None, None, lambda W, gram: W.abs() * gram.diagonal().sqrt())
    monkeypatch.setitem(influence.SIGNALS, "wanda", wanda)
    _, arguments, out = job
    done = air_py(*arguments, "--signal", "wanda", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "r.json").read_text())["loss"]
    assert all(after < before for _, before, after in losses.values())


@pytest.mark.parametrize("ridge", [(), ("--ridge", 0), ("--ridge", 0.5)])
def test_losses_mean_the_same_for_every_method(ridge, job, tmp_path):
    """L_act of SVD-LLM(W): what air starts from, and what svdllm ends with, the ridge included in both."""
    _, arguments, _ = job
    found = {}
    for method in ("air", "svdllm"):
        done = air_py(*arguments, *ridge, "--method", method, "--overwrite", "--json", tmp_path / "r.json")
        assert done.returncode == 0, done.stderr
        found[method] = json.loads((tmp_path / "r.json").read_text())
    assert found["air"]["ridge"] == found["svdllm"]["ridge"]
    for layer, (act, _, _) in found["air"]["loss"].items():
        assert act == pytest.approx(found["svdllm"]["loss"][layer][0], rel=2e-3), layer


def test_the_ridge_and_too_few_tokens_are_told(job, tmp_path):
    ckpt, arguments, out = job
    done = air_py(*arguments, "--quiet", "--text", "none")
    assert "warning" not in done.stderr                                         # 144 tokens for 48 inputs
    section = json.loads((out / "config.json").read_text())["air"]
    assert section["ridge"] == pytest.approx({str(n): 0.1 * (n / 144) ** 1.5 for n in (32, 48)})
    few = np.load(tmp_path / "w.npy")[:3]
    np.save(tmp_path / "few.npy", few)
    done = air_py("--ckpt", ckpt, "--calib", tmp_path / "few.npy", "--out", tmp_path / "o", "--quiet", "--text", "none",
                  "--device", "cpu")
    assert done.stderr.startswith("warning: 72 calibration tokens are 1.5 for each") and "--samples 4" in done.stderr


def test_layers_leaves_the_other_blocks_dense(job):
    ckpt, arguments, out = job
    assert air_py(*arguments, "--layers", "1:2").returncode == 0
    before, after = load_file(ckpt / "model.safetensors"), load_file(out / "model.safetensors")
    for name, w in before.items():
        if ".layers.1." in name and "proj" in name:
            assert name not in after and name.replace(".weight", ".U.weight") in after
        else:
            assert torch.equal(after[name], w)


def test_biases_survive(tmp_path, windows):
    ckpt = write_checkpoint(tmp_path / "q", architectures=["Qwen2ForCausalLM"])
    np.save(tmp_path / "w.npy", windows.numpy())
    done = air_py(
        "--ckpt", ckpt, "--calib", tmp_path / "w.npy", "--out", tmp_path / "out", "--rate", 1, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, w in load_file(ckpt / "model.safetensors").items():
        if name.endswith(".bias"):
            assert torch.equal(after[name.replace(".bias", ".U.bias")], w)


def test_official_through_the_command_line(official, tmp_path):
    folder, numbers = official
    np.save(tmp_path / "w.npy", numbers["windows"])
    base = (
        "--ckpt",
        folder,
        "--calib",
        tmp_path / "w.npy",
        "--rate",
        0.6,
        "--stats",
        tmp_path / "s",
        "--device",
        "cpu",
        "--ridge",
        0,
    )
    for kind in ("wxg", "fisher"):
        assert air_py(*base, "--signal", kind, "--out", tmp_path / kind, "--text", "none").returncode == 0
    for out, options, key, tolerance in (
        ("unit", (), "air_unit", 2e-3),
        ("max", ("--scale", "max100"), "air_max100", 2e-3),
        ("svdllm", ("--method", "svdllm"), "svd_llm_w", 1e-4),
    ):
        done = air_py(*base, *options, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
        written = load_file(tmp_path / out / "model.safetensors")
        for layer, k in Checkpoint(tmp_path / out).cfg.ranks.items():
            assert (
                distance(written[layer + ".U.weight"] @ written[layer + ".V.weight"], numbers[f"{key}/{layer}"])
                < tolerance
            )
            assert k == numbers[f"rank/{layer}"]
    for l in range(2):
        stats = {k: x for kind in ("gram", "lrp", "wxg", "fisher")
                 for k, x in load_file(tmp_path / "s" / f"block_{l:03}.{kind}.safetensors").items()}
        for name in LAYERS:
            layer = f"model.layers.{l}.{name}"
            assert distance(stats[READS[name] + ".gram"], numbers[f"gram/{layer}"]) < 1e-5
            for kind, theirs, tolerance in (
                ("lrp", "lrp", 2e-3),
                ("wxg", "weightxgrad", 1e-5),
                ("fisher", "fisher", 1e-5),
            ):
                assert distance(stats[f"{name}.{kind}"], numbers[f"{theirs}/{layer}"]) < tolerance
    logits = Checkpoint(tmp_path / "max").model()(torch.from_numpy(numbers["windows"][:1]).long())[0]
    assert distance(logits, numbers["air_logits_window0"]) < 2e-3


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the tokenizers are not at ../shared/data")
def test_sentencepiece_text_on_another_family(tmp_path):
    """A Mistral-shaped model with Mistral's tokenizer, calibrated and evaluated on real text files."""
    ckpt = write_checkpoint(
        tmp_path / "m", architectures=["MistralForCausalLM"], vocab_size=32000, num_key_value_heads=1
    )
    shutil.copy(SHARED / "data" / "tokenizers" / "mistral_v1_tokenizer.model", ckpt / "tokenizer.model")
    test = tmp_path / "test.raw"
    test.write_text((SHARED / "data" / "wikitext2" / "wiki.test.raw").read_text("utf-8")[:30000], "utf-8")
    done = air_py("--ckpt", ckpt, "--calib", SHARED / "data" / "c4" / "c4_demo.jsonl", "--text", test, "--samples", 4,
                  "--seqlen", 64, "--out", tmp_path / "out", "--json", tmp_path / "r.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "per byte" in done.stdout and (tmp_path / "out" / "tokenizer.model").exists()


# ---- bad input: one sentence, exit 2, nothing left behind


def edit(ckpt, **changes):
    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps(config | changes))


def retensor(ckpt, change):
    state = load_file(ckpt / "model.safetensors")
    change(state)
    save_file(state, ckpt / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"
BAD_CHECKPOINTS = {
    "no folder": (lambda c: shutil.rmtree(c), "does not exist"),
    "no config": (lambda c: (c / "config.json").unlink(), "no config.json"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "no weights"),
    "config is not JSON": (lambda c: (c / "config.json").write_text("{"), "not readable as a JSON object"),
    "config is a list": (lambda c: (c / "config.json").write_text("[]"), "is not a JSON object"),
    "config lacks a key": (lambda c: edit(c, hidden_size=None), "no 'hidden_size'"),
    "no heads": (lambda c: edit(c, num_attention_heads=0), "has num_attention_heads 0; expected a whole number"),
    "truncated": (lambda c: os.truncate(c / "model.safetensors", 5000), "cannot be read"),
    "corrupt": (lambda c: (c / "model.safetensors").write_bytes(b"\xff" * 5000), "cannot be read"),
    "empty": (lambda c: (c / "model.safetensors").write_bytes(b""), "cannot be read"),
    "missing tensor": (lambda c: retensor(c, lambda s: s.pop(Q)), f"lacks 1 tensor, such as {Q}"),
    "surplus tensor": (lambda c: retensor(c, lambda s: s.update(extra=torch.ones(2))), "1 tensor, such as extra"),
    "other shape": (lambda c: edit(c, intermediate_size=40), "config.json implies"),
    "integers": (lambda c: retensor(c, lambda s: s.update({Q: s[Q].to(torch.int8)})), "expected fp32, fp16 or bf16"),
    "NaN": (lambda c: retensor(c, lambda s: s[Q].__setitem__((0, 0), torch.nan)), "holds NaN or Inf"),
    "Inf": (lambda c: retensor(c, lambda s: s[Q].__setitem__((0, 0), torch.inf)), "holds NaN or Inf"),
    "architecture": (lambda c: edit(c, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "activation": (lambda c: edit(c, hidden_act="gelu"), "'gelu'"),
    "rope scaling": (lambda c: edit(c, rope_scaling={"rope_type": "yarn", "factor": 4}), "'yarn'"),
    "rope scaling text": (lambda c: edit(c, rope_scaling="yarn"), "expected an object"),
    "rope scaling keys": (
        lambda c: edit(c, rope_scaling={"rope_type": "llama3", "factor": 4}),
        "lacks low_freq_factor",
    ),
    "rope scaling of zero": (
        lambda c: edit(c, rope_scaling={"rope_type": "linear", "factor": 0}),
        "has rope_scaling.factor 0; expected a number above 0",
    ),
    "kv heads text": (lambda c: edit(c, num_key_value_heads="2"), "has num_key_value_heads '2'; expected a whole"),
    "half a layer": (lambda c: edit(c, num_hidden_layers=2.5), "has num_hidden_layers 2.5; expected a whole number"),
    "index without a map": (
        lambda c: ((c / "model.safetensors").unlink(), (c / "model.safetensors.index.json").write_text("{}")),
        "has no weight_map",
    ),
    "missing shard": (
        lambda c: (
            (c / "model.safetensors").unlink(),
            (c / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {Q: "model-00001-of-00002.safetensors"}})
            ),
        ),
        "model-00001-of-00002.safetensors",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints(case, job, tmp_path, monkeypatch):
    ckpt, arguments, out = job
    spoil, expected = BAD_CHECKPOINTS[case]
    spoil(ckpt)
    refuse(monkeypatch, tmp_path, arguments, expected)


def refuse(monkeypatch, tmp_path, arguments, expected):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(air.InputError) as error:
        air_main(monkeypatch, *arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


BAD_ARGUMENTS = {
    "rate 0": (["--rate", "0"], "above 0 and at most 1"),
    "rate 1.5": (["--rate", "1.5"], "above 0 and at most 1"),
    "rate nan": (["--rate", "nan"], "above 0"),
    "rank 0": (["--rate", "0.01"], "rank 0"),
    "sweeps": (["--sweeps", "-1"], "--sweeps"),
    "delta": (["--delta", "-1"], "--delta"),
    "ridge below 0": (["--ridge", "-0.5"], "--ridge"),
    "no ridge at all": (["--ridge", "nan"], "--ridge"),
    "an endless ridge": (["--ridge", "inf"], "--ridge"),
    "layers": (["--layers", "7:9"], "--layers"),
    "layers text": (["--layers", "x"], "--layers"),
    "samples of an array": (["--samples", "3"], "leave --samples out"),
    "no text": (["--text", "nowhere.txt"], "cannot be read"),
    "unknown text": (["--text", "ptb"], "is unknown"),
    "no array": (["--calib", "nowhere.npy"], "cannot be read"),
    "layers clipped": (["--layers", "0:9"], "--layers"),
    "layers open": (["--layers", "1"], "--layers"),
    "fp16 lrp": (["--dtype", "float16"], "bfloat16 or float32"),
    "fp16 fisher": (["--dtype", "float16", "--signal", "fisher"], "bfloat16 or float32"),
    "fp16 kfac": (["--dtype", "float16", "--method", "kfac"], "bfloat16 or float32"),
    "fp16 ranks": (["--dtype", "float16", "--method", "svdllm", "--ranks", "auto"], "bfloat16 or float32"),
    "json": (["--json", "nowhere/r.json"], "cannot write"),
    "tokenizer missing": (["--text", "stdlib"], "no tokenizer.model"),
    "out is here": (["--out", "."], "already exists"),
    "out is all": (["--out", "/", "--overwrite"], "not a compressed checkpoint"),
    "the script for a checkpoint": (["--ckpt", ROOT / "air.py"], "not a .safetensors or .bin file"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, job, tmp_path, monkeypatch):
    _, arguments, _ = job
    refuse(monkeypatch, tmp_path, [*arguments, *BAD_ARGUMENTS[case][0]], BAD_ARGUMENTS[case][1])


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--samples", "0"], "--samples is 0"),
        (["--seqlen", "0"], "expected 2 to 512"),
        (["--seqlen", "513"], "expected 2 to 512"),
        (["--calib", "short.txt"], "fewer than one window"),
        (["--text", "short.txt"], "fewer than one window"),
    ],
)
def test_bad_windows(options, expected, tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("x = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["air.py", "--ckpt", str(ROOT / "demo"), *options])
    with pytest.raises(air.InputError, match=expected):
        air.main()
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_token_ids_beyond_the_vocabulary(job, tmp_path, monkeypatch):
    _, arguments, _ = job
    np.save(tmp_path / "big.npy", np.full((2, 24), 64))
    refuse(monkeypatch, tmp_path, [*arguments, "--calib", tmp_path / "big.npy"], "vocabulary is 0 to 63")
    np.save(tmp_path / "float.npy", np.ones((2, 24)))
    refuse(monkeypatch, tmp_path, [*arguments, "--calib", tmp_path / "float.npy"], "integers")
    np.save(tmp_path / "none.npy", np.ones((0, 24), dtype=int))
    refuse(monkeypatch, tmp_path, [*arguments, "--text", tmp_path / "none.npy"], "of shape (0, 24)")


def test_the_least_rate_is_named(job, tmp_path, monkeypatch):
    """A rate that leaves some layer rank 0 is refused with the least one that leaves none; that one then works."""
    _, arguments, _ = job
    monkeypatch.setattr(sys, "argv", ["air.py", *map(str, arguments), "--rate", "0.06"])
    with pytest.raises(air.InputError) as error:
        air.main()
    least = str(error.value).split("expected ")[1].split(" or more")[0]
    air_main(monkeypatch, *arguments, "--text", "none", "--rate", least)


@pytest.mark.parametrize("method", ["air", "svdllm"])
def test_a_layer_whose_input_is_always_zero(method, job):
    """A pruned half-block: v_proj is zero, so o_proj sees nothing. Any S does; the run finishes.

    Without a ridge, which makes every matrix positive definite, it says so.
    """
    ckpt, arguments, out = job
    retensor(ckpt, lambda s: s["model.layers.1.self_attn.v_proj.weight"].zero_())
    said = "layers.1.self_attn.o_proj: ΣXXᵀ is not positive definite"
    for ridge, told in (((), False), (("--ridge", 0), True)):
        done = air_py(*arguments, "--method", method, "--overwrite", *ridge)
        assert done.returncode == 0 and (said in done.stderr) == told
        assert all(torch.isfinite(w).all() for w in load_file(out / "model.safetensors").values())


def test_plain_svd_reads_no_text(job, tmp_path):
    _, arguments, _ = job
    done = air_py(
        *arguments[:2], *arguments[6:], "--method", "svd", "--text", "none", "--calib", tmp_path / "nowhere.txt"
    )
    assert done.returncode == 0, done.stderr


def test_one_length_serves_calibration_and_a_stream_of_tokens(job, tmp_path):
    _, arguments, _ = job
    np.save(tmp_path / "stream.npy", np.arange(1000) % 64)
    done = air_py(*arguments, "--text", tmp_path / "stream.npy", "--json", tmp_path / "r.json")
    assert done.returncode == 0 and json.loads((tmp_path / "r.json").read_text())["seqlen"] == 24


def test_tokenizer_of_another_vocabulary(job, tmp_path, monkeypatch):
    ckpt, arguments, _ = job
    shutil.copy(ROOT / "demo" / "tokenizer.model", ckpt)
    refuse(monkeypatch, tmp_path, [*arguments, "--text", "stdlib"], "2,048 ids, the embedding 64 rows")
    (ckpt / "tokenizer.model").write_bytes(b"not one")
    refuse(monkeypatch, tmp_path, [*arguments, "--text", "stdlib"], "not a SentencePiece model")


def test_no_network(job, tmp_path, monkeypatch):
    import urllib.error
    from support import texts
    _, arguments, _ = job

    def offline(*_, **__):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(texts, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(texts.urllib.request, "urlopen", offline)
    for text in ("wikitext2", "c4"):
        monkeypatch.setattr(sys, "argv", ["air.py", *map(str, arguments), "--text", text])
        with pytest.raises(air.InputError, match="could not be fetched"):
            air.main()
    assert not list((tmp_path / "data").iterdir())


def test_cuda_without_a_gpu(job):
    _, arguments, out = job
    done = air_py(*arguments, "--device", "cuda")
    assert done.returncode == 2 and "sees no CUDA GPU" in done.stderr and not out.exists()


def test_existing_output_and_overwrite(job):
    _, arguments, out = job
    assert air_py(*arguments).returncode == 0
    first = (out / "model.safetensors").read_bytes()
    refused = air_py(*arguments, "--rate", 0.4)
    assert refused.returncode == 2 and "already exists" in refused.stderr and refused.stderr.count("\n") == 1
    assert (out / "model.safetensors").read_bytes() == first
    assert air_py(*arguments, "--rate", 0.4, "--overwrite").returncode == 0
    assert (out / "model.safetensors").read_bytes() != first


def test_overwrite_spares_the_neighbours(job, tmp_path):
    """Folders with names like ours stay; a trailing slash is fine; statistics inside the output are refused."""
    _, arguments, out = job
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "mine").write_text("x")
    for _ in range(2):
        assert air_py(*arguments, "--out", f"{out}/", "--overwrite").returncode == 0
    assert (tmp_path / "out.old" / "mine").exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "out",
        "out.old",
        "tiny",
        "w.npy",
    ]
    refused = air_py(*arguments, "--overwrite", "--stats", out / "stats")
    assert refused.returncode == 2 and "lies inside" in refused.stderr and (out / "config.json").exists()
    refused = air_py(*arguments, "--overwrite", "--spill", out / "spill")
    assert refused.returncode == 2 and "--spill" in refused.stderr and (out / "config.json").exists()
    refused = air_py(*arguments, "--overwrite", "--json", tmp_path / "new", "--out", tmp_path / "new")
    assert refused.returncode == 2 and "lies inside" in refused.stderr
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text("{}")
    refused = air_py(*arguments, "--overwrite", "--stats", tmp_path / "theirs")
    assert refused.returncode == 2 and "was not written by this program" in refused.stderr


def test_statistics_of_a_changed_checkpoint_or_damaged_file(job, tmp_path):
    ckpt, arguments, _ = job
    assert air_py(*arguments, "--stats", tmp_path / "s").returncode == 0
    block = tmp_path / "s" / "block_001.lrp.safetensors"
    whole = block.read_bytes()
    for bad in (whole[:1000], whole[:-9] + b"x" + whole[-8:], b""):
        block.write_bytes(bad)
        damaged = air_py(*arguments, "--overwrite", "--stats", tmp_path / "s")
        assert (
            damaged.returncode == 2 and "block_001.lrp.safetensors is not the file that was written" in damaged.stderr
        )
    block.write_bytes(whole)
    retensor(
        ckpt, lambda s: s.update({"model.layers.1.mlp.up_proj.weight": s["model.layers.1.mlp.up_proj.weight"] * 3})
    )
    changed = air_py(*arguments, "--overwrite", "--stats", tmp_path / "s")
    assert changed.returncode == 2 and "another checkpoint" in changed.stderr


def test_activations_that_overflow_are_said(job, tmp_path):
    ckpt, arguments, out = job
    retensor(
        ckpt, lambda s: s.update({"model.layers.0.mlp.up_proj.weight": s["model.layers.0.mlp.up_proj.weight"] * 1e30})
    )
    for method in ("svdllm", "asvd"):
        done = air_py(*arguments, "--method", method, "--text", "none")
        assert done.returncode == 1 and "activations overflowed" in done.stderr and not out.exists()


def test_a_full_disk(job, tmp_path, monkeypatch):
    _, arguments, out = job
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refuse(monkeypatch, tmp_path, arguments, "GB free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100 if path.name == "s" else 10**9)
    )
    (tmp_path / "s").mkdir()
    refuse(monkeypatch, tmp_path, [*arguments, "--stats", tmp_path / "s"], "GB free")
    monkeypatch.undo()

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("support.checkpoint.save_file", full)
    monkeypatch.setattr(sys, "argv", ["air.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        air.run(air.main)
    assert stop.value.code == 1 and not out.exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("how, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupted(how, code, tmp_path):
    """Ctrl-C says so and removes what it wrote; after kill -9 there is no target either; the next run finishes."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "air.py"),
        "--out",
        str(out),
        "--samples",
        "8",
        "--text",
        "none",
        "--device",
        "cpu",
    ]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731   a shell's background job ignores it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    for line in process.stderr:
        if "model.layers" in line:
            break
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == code and not out.exists()
    if how == signal.SIGINT:
        assert "interrupted" in err and "Traceback" not in err and not list(tmp_path.iterdir())
    again = subprocess.run([*command, "--layers", "5:6"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
