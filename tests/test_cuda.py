"""On a GPU every stage gives what it gives on a CPU, in fp32 within rounding; in bf16, the default there, nearly so."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, distance, in_process, write_checkpoint

import air
from eval_ppl import evaluate, last_states
from experiments import choices, decode, table11
from experiments.shapes import SHAPES, at_rate, random_model
from generate import Decoder, generate
from influence import BACKWARD, SIGNALS
from support.checkpoint import Checkpoint

# Wide enough for support/fast.py.
WIDE = {"hidden_size": 512, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 4}
# Training in fp32 rounds otherwise on a GPU, step after step.
LEARNT = 2e-2


@pytest.fixture
def text(tmp_path):
    np.save(tmp_path / "ids.npy", np.random.RandomState(0).randint(0, 64, size=4000))
    return ["--calib", tmp_path / "ids.npy", "--samples", "16", "--seqlen", "16", "--text", "none"]


@pytest.fixture
def logits(windows):
    return lambda folder: Checkpoint(folder).model()(windows)


def both(name, tmp_path, *arguments, dtype="float32"):
    """The folders that a script writes on the CPU and on the GPU."""
    folders = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{name.replace('/', '-')}-{device}"
        done = in_process(name, *arguments, "--device", device, "--dtype", dtype, "--out", out)
        assert done.returncode == 0, done.stderr
        folders.append(out)
    return folders


# ------------------------------------------------------------ the method
@pytest.mark.parametrize("method", air.METHODS)
def test_every_method_gives_the_same_model(gpu, tiny, tmp_path, text, logits, method):
    cpu, cuda = both("air", tmp_path, "--ckpt", tiny, "--method", method, *text)
    assert distance(logits(cuda), logits(cpu)) < 1e-3


# Those with a metric have methods of their own.
@pytest.mark.parametrize("signal", [name for name in BACKWARD if SIGNALS[name].metric is None])
def test_every_signal_gives_the_same_model(gpu, tiny, tmp_path, text, logits, signal):
    cpu, cuda = both("air", tmp_path, "--ckpt", tiny, "--signal", signal, *text)
    assert distance(logits(cuda), logits(cpu)) < 1e-3


def test_a_wide_model_is_the_same_by_the_fast_solve(gpu, tmp_path, text, logits):
    folder = write_checkpoint(tmp_path / "wide", **WIDE)
    cpu, cuda = both("air", tmp_path, "--ckpt", folder, *text)
    assert distance(logits(cuda), logits(cpu)) < 1e-3


def test_measured_ranks_are_the_same(gpu, tiny, tmp_path, text):
    cpu, cuda = both("air", tmp_path, "--ckpt", tiny, "--method", "kfac", "--ranks", "auto", *text)
    assert Checkpoint(cuda).cfg.ranks == Checkpoint(cpu).cfg.ranks


def test_kept_statistics_are_read_back_onto_the_gpu(gpu, tiny, tmp_path, text, logits):
    kept = ["--stats", tmp_path / "stats"]
    first = in_process("air", "--ckpt", tiny, *text, *kept, "--out", tmp_path / "a", "--dtype", "float32")
    again = in_process("air", "--ckpt", tiny, *text, *kept, "--out", tmp_path / "b", "--dtype", "float32")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert distance(logits(tmp_path / "a"), logits(tmp_path / "b")) == 0


def test_the_default_is_bf16_on_the_gpu_and_near_the_cpus(gpu, tmp_path):
    """The demo as `python air.py` does it, which is told nothing of a GPU."""
    found = {}
    for name, more in {"gpu": [], "cpu": ["--device", "cpu"]}.items():
        written = ["--out", tmp_path / name, "--json", tmp_path / f"{name}.json"]
        arguments = ["--samples", "16", "--windows", "20", *written]
        done = in_process("air", "--ckpt", ROOT / "demo", *arguments, *more)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["gpu"]["peak_gpu_bytes"] > 0 and found["cpu"]["peak_gpu_bytes"] is None
    for key in ("ppl_dense", "ppl_compressed"):
        assert math.isclose(found["gpu"][key], found["cpu"][key], rel_tol=0.02)


# ------------------------------------------------------------ what is stacked on it
@pytest.fixture
def small(tiny, tmp_path, text):
    done = in_process("air", "--ckpt", tiny, *text, "--device", "cpu", "--out", tmp_path / "small")
    assert done.returncode == 0, done.stderr
    return tmp_path / "small"


@pytest.mark.parametrize("name, options", [
    ("refine", ["--epochs", "2", "--batch", "4"]),
    ("refine", ["--epochs", "2", "--batch", "4", "--error", "relative"]),
    ("retrain", ["--epochs", "1", "--batch", "4"]),
    ("lora", ["--epochs", "1", "--batch", "4", "--dropout", "0"]),
    ("quantize", ["--bits", "4"]),
    ("quantize", ["--bits", "8", "--group", "8", "--rounding", "rtn"]),
])
def test_every_enhancement_gives_the_same_model(gpu, small, tmp_path, text, logits, name, options):
    cpu, cuda = both(f"enhance/{name}", tmp_path, "--ckpt", small, *options, *text)
    assert distance(logits(cuda), logits(cpu)) < LEARNT


def test_a_teacher_stands_on_the_gpu(gpu, small, tiny, tmp_path, text, logits):
    options = ["--epochs", "1", "--batch", "4", "--teacher", tiny]
    cpu, cuda = both("enhance/retrain", tmp_path, "--ckpt", small, *options, *text)
    assert distance(logits(cuda), logits(cpu)) < LEARNT


@pytest.mark.parametrize("name, options", [
    ("slicegpt", ["--slicing", "0.25"]),
    ("slicegpt", ["--slicing", "0.25", "--normed"]),
    ("blockpruner", ["--rate", "0.7"]),
    ("acip", ["--rate", "0.7", "--stop", "0.6", "--lr", "1e-3", "--adapter-steps", "2", "--rank", "2",
              "--dropout", "0"]),
])
def test_every_peer_gives_the_same_model(gpu, tiny, tmp_path, text, logits, name, options):
    cpu, cuda = both(f"peers/{name}", tmp_path, "--ckpt", tiny, *options, *text)
    assert distance(logits(cuda), logits(cpu)) < LEARNT


@pytest.mark.parametrize("name", ["refine", "retrain", "lora", "quantize"])
def test_enhancements_run_in_bf16(gpu, small, tmp_path, text, name):
    out = tmp_path / "out"
    done = in_process(f"enhance/{name}", "--ckpt", small, *text, "--out", out)
    assert done.returncode == 0, done.stderr
    assert Checkpoint(out).cfg.ranks


# ------------------------------------------------------------ perplexity, scores, text
def test_perplexity_and_divergence_are_the_same(gpu, small, tiny, windows):
    found = []
    for device in ("cpu", gpu):
        dense = last_states(Checkpoint(tiny), windows, torch.device(device), torch.float32)
        found.append(evaluate(Checkpoint(small), windows, torch.device(device), torch.float32, dense))
    for key in ("ppl", "js"):
        assert math.isclose(found[0][key], found[1][key], rel_tol=1e-4)


def test_choices_have_the_same_scores(gpu, tiny):
    groups = [choices.Group((1, 2, 3), ((4, 5), (6,))), choices.Group((7,), ((8, 9, 10),))]
    model = Checkpoint(tiny).model()
    cpu = choices.scores(model, groups)
    cuda = choices.scores(model.to(gpu), groups)
    for ours, theirs in zip(cuda, cpu):
        assert np.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rate", [None, 0.6])
def test_generated_tokens_are_the_cpus(gpu, rate, compile):
    if compile and not decode.compiles():
        pytest.skip("--compile needs a C++ compiler and torch 2.13")
    config = at_rate(SHAPES["demo"], rate)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    cpu = list(generate(Decoder(random_model(config)), prompts, 12, temperature=0))
    decoder = Decoder(random_model(config, gpu), compile=compile)
    assert list(generate(decoder, prompts, 12, temperature=0)) == cpu
    assert len(decoder.graphs)


# ------------------------------------------------------------ measurements
def test_a_row_of_table_11_is_measured_and_beyond_its_budget_it_is_not(gpu):
    spec = {"config": SHAPES["demo"], "device": "cuda", "dtype": "bfloat16", "prompt": 4, "new_tokens": 8, "batch": 2,
            "budget_gb": 40.0, "switches": table11.ALL}
    row = table11.run_row(spec)
    assert not row["oom"] and row["us_per_token"] > 0 and row["peak_bytes"] > row["weight_bytes"]
    try:
        assert table11.run_row(spec | {"budget_gb": 0.012})["oom"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_sides_of_decode_take_turns_on_the_gpu(gpu, tmp_path):
    sides = decode.sides_of(SHAPES["demo"], at_rate(SHAPES["demo"], 0.6), gpu, torch.bfloat16, tmp_path)
    common = {"dtype": "bfloat16", "vocab": 2048}
    rows = decode.rows_of(sides, (2, 8, 4), common, 1)
    wanted = {"dense", "0.6"} | ({"dense, compiled", "0.6, compiled"} if decode.compiles() else set())
    assert wanted <= {row["side"] for row in rows}
