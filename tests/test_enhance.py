"""enhance/: block refinement, retraining, LoRA and quantization against brute force and published algorithms."""
import copy
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, TINY, distance, in_process, script, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import air
from calibrate import calibration_windows
from enhance import lora as lora_file
from enhance import quantize as quantize_file
from enhance import refine as refine_file
from enhance import retrain as retrain_file
from enhance.lora import Adapter, prompt_of, tokens_of
from enhance.quantize import gptq, output_error, quantize_factor
from enhance.refine import Pairs, Recipe, refine_block
from enhance.retrain import Loss
from eval_ppl import evaluate, evaluation_windows
from experiments import scale
from experiments.stack import block_tensors
from generate import Decoder, generate
from model import LAYERS, Llama, LowRank, rope
from support import result as shared
from support.checkpoint import Checkpoint, TensorFolder, Writer, result_bytes, written_bytes
from support.config import parse_config
from support.learning import Course, balance, learn, linear_at, own, rate_at, warm_up_of
from support.even import EVEN, SHRINKS, clipped, even_scale, refit, rotate, smooth
from support.ranks import held_windows
from support.task import Task, code_of, dense_of, prepare, spare_windows, split
from support.packed import WIDTHS, dequantize, grid_of, pack, unpack, widen
from support.script import InputError
from support.texts import instruction_rows

CPU, FP32, FP64 = torch.device("cpu"), torch.float32, torch.float64


FILES = {"refine": refine_file, "retrain": retrain_file, "lora": lora_file, "quantize": quantize_file}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny dense checkpoint on grouped-query heads and its result at rate 0.5."""
    folder = tmp_path_factory.mktemp("start")
    write_checkpoint(folder / "tiny", dtype=torch.bfloat16)
    np.save(folder / "ids.npy", np.random.RandomState(0).randint(0, 64, size=4000))
    result_of(folder / "tiny", folder / "small",
              ("--calib", folder / "ids.npy", "--samples", "16", "--seqlen", "16"))
    return folder


@pytest.fixture
def made(start):
    """(A result, what it was made of, the arguments all share.)"""
    return start / "small", start / "tiny", ["--calib", start / "ids.npy", "--samples", "16", "--seqlen", "16"]


def result_of(dense, out, usual):
    """The Checkpoint that air.py makes of `dense` at rate 0.5."""
    done = in_process("air", "--ckpt", dense, "--rate", "0.5", "--out", out, "--text", "none", *usual)
    assert done.returncode == 0, done.stderr
    return Checkpoint(out)


def enhance(name, start, out, *more):
    return in_process(f"enhance/{name}", "--ckpt", start, "--out", out, "--text", "none", *more)


def enhanced(name, start, out, *more):
    done = enhance(name, start, out, *more)
    assert done.returncode == 0, done.stderr
    return Checkpoint(out)


def task_of(ckpt, windows, held=None, **options):
    held = windows[:2] if held is None else held
    return Task("test", ckpt, options, "ids", windows, held, "none", None, CPU, FP32, 3, "out")


# -------------------------------------------------------------------------------- what they share
def test_a_short_course_leaves_its_warm_up():
    """The demo's 56 windows in batches of 64 are 3 steps: a hundred of warm-up would be 3 % of the peak at most."""
    for steps, usual, wanted in ((3, 100, 0), (42, 100, 8), (70, 10, 10), (5000, 100, 100)):
        assert warm_up_of(steps, usual) == wanted
        shares = [linear_at(step, steps, warm_up_of(steps, usual)) for step in range(steps)]
        assert max(shares) == 1.0 and 0 < shares[-1] < 0.5


def test_learning_rates_by_hand():
    assert [rate_at(i, 10, 2, 0.1) for i in (0, 1)] == [0.5, 1.0] and rate_at(2, 10, 2, 0.1) == 1.0
    assert np.isclose(rate_at(6, 10, 2, 0.1), 0.55) and rate_at(9, 10, 2, 0.1) > 0.1
    assert [linear_at(i, 10, 2) for i in (0, 2, 6, 9)] == [0.5, 1.0, 0.5, 0.125]


def test_balanced_factors_have_the_same_product_bit_by_bit():
    layer = LowRank(20, 30, 7)
    with torch.no_grad():
        layer.V.weight.mul_(1e-4)
        layer.U.weight[:, 3] = 0
        layer.V.weight[3] = 0
    U, V = layer.U.weight.detach().clone(), layer.V.weight.detach().clone()
    balance(layer)
    # Rank by rank, since a sum over ranks may be rounded in another order.
    for r in range(7):
        assert torch.equal(torch.outer(U[:, r], V[r]), torch.outer(layer.U.weight[:, r], layer.V.weight[r]))
    lengths = layer.U.weight.norm(dim=0) / layer.V.weight.norm(dim=1)
    assert all(0.4 < ratio < 2.5 for i, ratio in enumerate(lengths.tolist()) if i != 3)


def test_the_dense_model_is_found_and_another_refused(made, tmp_path):
    small, dense, _ = made
    ckpt = Checkpoint(small)
    assert dense_of(ckpt, None).folder == dense
    other = write_checkpoint(tmp_path / "other", dtype=torch.bfloat16, seed=1)
    with pytest.raises(InputError, match="weights or its config.json are others"):
        dense_of(ckpt, other)
    wider = write_checkpoint(tmp_path / "wider", dtype=torch.bfloat16, num_hidden_layers=3)
    with pytest.raises(InputError, match="differ beyond the ranks"):
        dense_of(ckpt, wider)
    moved = shutil.copytree(dense, tmp_path / "moved")
    assert dense_of(ckpt, moved).folder == moved
    ckpt.raw["air"]["source"]["path"] = str(tmp_path / "gone")
    with pytest.raises(InputError, match="not there any more"):
        dense_of(ckpt, None)
    # A result from before it was recorded.
    ckpt.raw["air"].pop("source")
    with pytest.raises(InputError, match="--dense"):
        dense_of(ckpt, None)


@pytest.mark.parametrize("name", ("refine", "retrain", "lora", "quantize"))
def test_bad_input_is_one_sentence_and_nothing_is_written(made, tmp_path, name):
    small, dense, usual = made
    np.save(tmp_path / "one.npy", np.arange(16)[None])
    one = ("--calib", tmp_path / "one.npy", "--samples", "1")       # an array that holds one window alone
    for start, more, said in ((dense, (), "is dense"), (tmp_path / "none", (), "does not exist"),
                              (small, ("--calib", "x.txt"), "x.txt"), (small, ("--out", small), "already exists"),
                              # What learns holds one out, at no dtype in which gradients vanish.
                              *([(small, one, "2 or more"), (small, ("--dtype", "float16"), "bfloat16")]
                                if name != "quantize" else [])):
        done = enhance(name, start, tmp_path / "o", *usual, *more)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()


@pytest.mark.parametrize("name", ("enhance/quantize", "peers/slicegpt"))
def test_windows_to_evaluate_on_bring_their_length(made, tmp_path, name):
    """A 2-D array's own, within the model's context and what --seqlen says; of files of peers/, too."""
    start = made[0] if name == "enhance/quantize" else ROOT / "demo"
    vocab = Checkpoint(start).cfg.vocab
    for shape, more, said in (((3, 600), (), "a window has 600 tokens"), ((3, 1), (), "a window has 1 tokens"),
                              ((3, 20), ("--seqlen", 16), "--seqlen says 16"), ((3, 20), (), None)):
        np.save(tmp_path / "w.npy", np.random.RandomState(0).randint(0, vocab, size=shape))
        np.save(tmp_path / "ids.npy", np.random.RandomState(1).randint(0, vocab, size=1000))
        done = in_process(name, "--ckpt", start, "--calib", tmp_path / "ids.npy", "--samples", 2, "--text",
                          tmp_path / "w.npy", "--out", tmp_path / "o", *more)
        if said is None:
            assert done.returncode == 0 and "3 windows of 20" in done.stdout, done.stderr
        else:
            assert done.returncode == 2 and said in done.stderr and not (tmp_path / "o").exists(), done.stderr


def test_results_replace_results_alone(made, tmp_path):
    """--json onto what a run reads, or onto anything of somebody's, would lose it."""
    small, dense, usual = made
    shutil.copytree(small, tmp_path / "small")
    shutil.copytree(dense, tmp_path / "dense")
    shutil.copy(usual[1], tmp_path / "ids.npy")
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    quantize = ("enhance/quantize", "--ckpt", tmp_path / "small", "--out", tmp_path / "o", "--text", "none")
    commands = (quantize, ("air", "--ckpt", tmp_path / "dense", "--out", tmp_path / "o", "--text", "none"),
                ("peers/slicegpt", "--ckpt", tmp_path / "dense", "--out", tmp_path / "o", "--text", "none"))
    for path in ("ids.npy", "rows.json", "notes.json", "small/config.json", "dense/config.json",
                 "dense/model.safetensors"):
        before = (tmp_path / path).read_bytes()
        for name, *more in (*commands, ("eval_ppl", "--ckpt", tmp_path / "small", "--text", tmp_path / "ids.npy")):
            calib = () if name == "eval_ppl" else ("--calib", tmp_path / "ids.npy", *usual[2:])
            done = in_process(name, *more, *calib, "--json", tmp_path / path)
            assert done.returncode == 2 and "is there and holds no results" in done.stderr, (name, path, done.stderr)
        assert (tmp_path / path).read_bytes() == before and not (tmp_path / "o").exists()
    (tmp_path / "r.json").touch()                   # as mktemp leaves it
    for _ in range(2):
        done = in_process(*quantize, *usual, "--overwrite", "--json", tmp_path / "r.json")
        assert done.returncode == 0 and json.loads((tmp_path / "r.json").read_text())["by"] == "quantize"


def test_options_out_of_bounds_are_refused(made, tmp_path):
    small, dense, usual = made
    done = enhance("retrain", small, tmp_path / "o", *usual, "--teacher", dense, "--weight", "2")
    assert done.returncode == 2 and "--weight is 2.0; expected 0 to 1" in done.stderr
    for name, option, value in (("refine", "--epochs", -1), ("refine", "--lr", 0), ("refine", "--batch", 0),
                                ("retrain", "--every", 0), ("lora", "--rank", 0),
                                ("lora", "--dropout", 1), ("quantize", "--group", -4), ("retrain", "--lr", "nan")):
        done = enhance(name, small, tmp_path / "o", *usual, option, value)
        assert done.returncode == 2 and f"{option} is" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_a_run_reads_is_not_replaced_with_its_output(made, tmp_path):
    """--overwrite replaces a folder as a whole: what lies in it would be gone when it is wanted."""
    small, dense, usual = made
    outer = tmp_path / "outer"
    shutil.copytree(small, outer)
    shutil.copytree(small, outer / "inner")
    shutil.copytree(dense, outer / "dense")
    shutil.copy(usual[1], outer / "ids.npy")
    for name, start, more in (("quantize", outer / "inner", ()), ("quantize", small, ("--calib", outer / "ids.npy")),
                              ("refine", small, ("--dense", outer / "dense")),
                              ("quantize", small, ("--text", outer / "ids.npy")),
                              ("retrain", small, ("--teacher", outer / "dense"))):
        done = enhance(name, start, outer, *usual, *more, "--overwrite")
        assert done.returncode == 2 and "lies inside --out" in done.stderr and done.stderr.count("\n") == 1
    done = in_process("air", "--ckpt", outer / "dense", "--out", outer, "--text", "none", *usual, "--overwrite")
    assert done.returncode == 2 and "lies inside --out" in done.stderr
    # Nor the dense model that is read because the result says where it is.
    done = in_process("air", "--ckpt", outer / "dense", "--out", tmp_path / "other", "--text", "none", *usual)
    assert done.returncode == 0, done.stderr
    done = enhance("refine", tmp_path / "other", outer, *usual, "--epochs", "0", "--overwrite")
    assert done.returncode == 2 and "outer/dense lies inside --out" in done.stderr and (outer / "dense").is_dir()
    # The folder itself may be what it starts from.
    enhanced("quantize", outer, outer, *usual, "--overwrite")


def test_a_users_own_folder_is_not_taken_for_parts(made, tmp_path):
    small, dense, usual = made
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes.txt").write_text("precious")
    for done in (enhance("quantize", small, tmp_path / "mine", *usual),
                 in_process("air", "--ckpt", dense, "--out", tmp_path / "mine", "--text", "none", *usual)):
        assert done.returncode == 2 and "notes.txt, which no run wrote" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "mine.partial" / "notes.txt").read_text() == "precious"
    # What a run leaves that is killed within its first part is.
    for name in ("model-block-000.safetensors.partial", "manifest.json.partial"):
        (tmp_path / "mine.partial" / "notes.txt").unlink(missing_ok=True)
        (tmp_path / "mine.partial" / name).write_text("torn")
    enhanced("quantize", small, tmp_path / "mine", *usual)
    assert not (tmp_path / "mine.partial").exists()


def test_every_dense_model_that_is_named_is_held_against_the_result(made, tmp_path):
    small, dense, usual = made
    shutil.copytree(dense, tmp_path / "touched")
    config = json.loads((dense / "config.json").read_text()) | {"transformers_version": "5"}
    (tmp_path / "touched" / "config.json").write_text(json.dumps(config))
    for name in FILES:
        for given, said in ((tmp_path / "none", "does not exist"), (small, "is compressed itself"),
                            (tmp_path / "touched", "its weights or its config.json are others")):
            done = enhance(name, small, tmp_path / "o", *usual, "--dense", given)
            assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = enhance("refine", small, tmp_path / "o", *usual, "--seed", 10**22)
    assert done.returncode == 2 and "--seed is" in done.stderr and "Traceback" not in done.stderr


def test_what_a_run_writes_on_the_way_is_asked_of_the_disk(made, tmp_path, monkeypatch):
    """Training states are larger than the result, codes smaller. Twice the result holds its parts and the one file."""
    small, _, usual = made
    needs, taken, times = {}, [], []
    init, save, whole = Writer.__init__, TensorFolder.save, Writer.assemble

    def watched(self, out, need, *more, **named):
        needs[out] = need
        init(self, out, need, *more, **named)

    def measured(folder):
        files = folder.rglob("*.safetensors")
        taken.append(sum(w.nbytes for path in files for w in load_file(path).values()))

    def noted(self, name, tensors, *more):
        save(self, name, tensors, *more)
        times.extend([name] * name.startswith("training"))
        measured(self.path)

    def assembled(self):
        target = whole(self)
        measured(self.partial)
        return target
    for owner, name, function in ((Writer, "__init__", watched), (TensorFolder, "save", noted),
                                  (Writer, "assemble", assembled)):
        monkeypatch.setattr(owner, name, function)
    # Without the room for config.json, manifest and the files' heads: more than all of these tiny ones.
    for file in (shared, retrain_file, quantize_file):
        monkeypatch.setattr(file, "result_bytes", lambda *a: result_bytes(*a) - 2**22)
    for name, more in (("retrain", ("--epochs", 2, "--batch", 3, "--every", 2)), ("quantize", ("--bits", 3)),
                       ("lora", ("--epochs", 2, "--batch", 3, "--every", 5)), ("retrain", ("--epochs", 0))):
        taken.clear()
        times.clear()
        done = enhance(name, small, tmp_path / "o", *usual, *more, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert name == "quantize" or f"training states (written {len(times)} times)" in done.stderr
        # But for the number of steps beside every parameter; a state of no step has no moments.
        most = math.inf if 0 in more else 1.3 * max(taken)
        assert 0.99 * max(taken) <= needs[str(tmp_path / "o")] <= most
    assert written_bytes(3e9) == 6e9 and written_bytes(3e9, 1e9) == 6e9 and written_bytes(3e9, 5e9) == 8e9
    assert written_bytes(6e9) == 6e9 and written_bytes(6e9, 1e9) == 7e9         # shards are moved, not copied


@pytest.mark.parametrize("name", ("refine", "lora", "retrain", "quantize"))
def test_a_plan_comes_first_and_what_does_not_fit_in_memory_is_refused(made, tmp_path, monkeypatch, name):
    small, _, usual = made
    usual = list(usual) + ([] if name == "quantize" else ["--epochs", "1"])
    monkeypatch.setattr(shared, "free_bytes", lambda device: 10_000)
    done = enhance(name, small, tmp_path / "o", *usual)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not list(tmp_path.glob("o*"))
    assert re.search(r"the run needs \d+\.\d GB of cpu memory and 0\.0 GB are free; .+ less$", done.stderr.strip())
    monkeypatch.undo()
    said = enhance(name, small, tmp_path / "o", *usual).stderr.split("\n")
    plan = next(i for i, line in enumerate(said) if re.match(
        r"plan: about \d+\.\d min, \d+\.\d\d GB of memory, result \d+\.\d\d GB.* \(measured: [\d,]+ GFLOP/s\)$", line))
    assert said[0].startswith(f"{name} of small: ") and plan < min(
        i for i, line in enumerate(said) if line.startswith(("block 0", "step ", "adapters on ")))


@pytest.mark.parametrize("name,more", (("refine", ("--epochs", 2)), ("retrain", ("--epochs", 2)), ("quantize", ()),
                                       ("lora", ("--epochs", 1))))
def test_an_fp32_start_is_left_alone_in_memory_too(start, tmp_path, name, more):
    """Such a checkpoint hands out its own memory: what was trained in it would be measured as the start."""
    write_checkpoint(tmp_path / "fp32")
    usual = ["--calib", start / "ids.npy", "--samples", "16", "--seqlen", "16"]
    done = in_process("air", "--ckpt", tmp_path / "fp32", "--out", tmp_path / "small", "--text", "none", *usual)
    assert done.returncode == 0, done.stderr
    rates = () if name == "quantize" else ("--lr", "2e-3", "--batch", "4")
    done = in_process(f"enhance/{name}", "--ckpt", tmp_path / "small", "--out", tmp_path / "o", "--windows", "4",
                      *usual, *more, *rates, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    windows, _, _ = evaluation_windows(str(start / "ids.npy"), Checkpoint(tmp_path / "small"), 16, 4)
    before, after = (evaluate(Checkpoint(tmp_path / folder), windows, CPU, FP32)["ppl"] for folder in ("small", "o"))
    assert result["ppl_before"] == before and result["ppl_after"] == after
    assert after != before or name == "retrain"         # whose random text teaches nothing


# -------------------------------------------------------------------------------- refinement
def recipe(block, **changes):
    angles = tuple(each.to(FP64) for each in rope(block.cfg, 16))
    usual = {"epochs": 3, "lr": 1e-3, "weight_decay": 0.01, "batch": 4, "error": "squared"}
    return Recipe(**usual | changes, angles=angles, dtype=FP32, stored=FP64)


def test_the_gradient_of_a_blocks_error_equals_finite_differences(made):
    small, dense, _ = made
    block = Checkpoint(small).block(0, CPU, FP64).requires_grad_(True)
    whole = Checkpoint(dense).block(0, CPU, FP64)
    x = torch.randn(3, 16, 32, dtype=FP64, generator=torch.Generator().manual_seed(0))
    for error in ("squared", "relative"):
        how = recipe(block, error=error)
        y = whole(x + 0.1, how.angles)
        # By hand: a sum over tokens and channels, each token over its own energy or not.
        out = block(x, how.angles)
        scale = (y**2).mean(-1, keepdim=True) if error == "relative" else torch.ones_like(y[..., :1])
        found = how.error_of(block, x, y)
        assert torch.isclose(found, ((out - y)**2 / scale).sum() / y.numel())
        found.backward()
        for name, w in block.named_parameters():
            i = tuple(s // 2 for s in w.shape)
            with torch.no_grad():
                w[i] += 1e-5
                up = how.error_of(block, x, y)
                w[i] -= 2e-5
                down = how.error_of(block, x, y)
                w[i] += 1e-5
            assert torch.isclose(w.grad[i], (up - down) / 2e-5, rtol=1e-4, atol=1e-9), name
        block.zero_grad()


def test_a_course_is_adamw_written_out(made, monkeypatch):
    """Twelve steps in float64, a batch in parts: moments, decay beside the gradient, clipping, warm-up and cosine."""
    small, dense, _ = made
    block = Checkpoint(small).block(0, CPU, FP32).double().requires_grad_(True)
    monkeypatch.setattr(refine_file, "MICRO_BATCH", 32)             # two of three windows
    x = 3 * torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = tuple(each.double() for each in rope(block.cfg, 16))
    y = 100 * Checkpoint(dense).block(0, CPU, FP32).double()(x, angles)
    by_hand = copy.deepcopy(block)
    balance(by_hand)
    m, v = ({name: 0 for name, _ in by_hand.named_parameters()} for _ in range(2))
    epochs, lr, decay = 12, 1e-2, 0.3
    norms = []
    for t in range(epochs):
        (by_hand(x, angles) - y).square().mean().backward()
        norms.append(math.sqrt(sum(p.grad.square().sum() for p in by_hand.parameters())))
        now = lr if t < 1 else lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (t - 1) / (epochs - 1))))
        with torch.no_grad():
            for name, p in by_hand.named_parameters():
                g = p.grad * min(1.0, 1 / (norms[-1] + 1e-6))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                step = m[name] / (1 - 0.9**(t + 1)) / (v[name] / (1 - 0.999**(t + 1))).sqrt().add(1e-15)
                p.copy_((1 - now * decay) * p - now * step)
                p.grad = None
    assert min(norms) > 1                                           # it was clipped
    how = Recipe(epochs, lr, decay, 8, "squared", angles, FP32, dict.fromkeys(block.state_dict(), torch.float64))
    found = refine_block(block, Pairs(x, y), Pairs(x, y), how, 0)
    assert found["epoch"] == epochs and found["after"] < found["before"]
    for (name, a), b in zip(block.named_parameters(), by_hand.parameters()):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), name


def test_what_would_be_worse_is_not_kept_and_no_epoch_changes_no_bit(made, tmp_path):
    small, _, usual = made
    for more in (("--epochs", "0"), ("--epochs", "2", "--lr", "0.5")):
        again = enhanced("refine", small, tmp_path / f"r{more[1]}", *usual, *more)
        state = load_file(tmp_path / f"r{more[1]}" / "model.safetensors")
        before = load_file(small / "model.safetensors")
        assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
        assert again.raw["air"]["enhanced"][0]["by"] == "refine"
    files = [(tmp_path / "r0" / "model.safetensors").read_bytes(), (small / "model.safetensors").read_bytes()]
    assert files[0] == files[1]


def test_each_parameter_keeps_its_own_dtype(made, tmp_path):
    """Norms in fp32 beside matrices in bf16: none is rounded to another's."""
    _, dense, usual = made
    shutil.copytree(dense, tmp_path / "mixed")
    path = tmp_path / "mixed" / "model.safetensors"
    state = {name: w.float() * 1.001 if "norm" in name else w for name, w in load_file(path).items()}
    save_file(state, path)
    result_of(tmp_path / "mixed", tmp_path / "small", usual)
    before = load_file(tmp_path / "small" / "model.safetensors")
    for name in ("refine", "retrain", "lora"):
        enhanced(name, tmp_path / "small", tmp_path / name, *usual, "--epochs", "0")
        after = load_file(tmp_path / name / "model.safetensors")
        assert {key: w.dtype for key, w in after.items()} == {key: w.dtype for key, w in before.items()}
        assert all(torch.equal(w, after[key]) for key, w in before.items() if "norm" in key)


def test_refinement_lowers_the_error_of_the_last_block_and_goes_on_after_a_kill(made, tmp_path):
    small, dense, usual = made
    more = (*usual, "--epochs", "4", "--batch", "2", "--lr", "3e-3")
    enhanced("refine", small, tmp_path / "whole", *more, "--json", tmp_path / "r.json")
    blocks = json.loads((tmp_path / "r.json").read_text())["blocks"]
    assert len(blocks) == 2 and all(each["after"] < each["before"] for each in blocks)
    # Killed after the first block, the run ends in the same file.
    code = ("import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, %r)\n"
            "import support.result as shared\nfrom enhance import refine\n"
            "add = shared.Writer.add\n"
            "def once(self, *a):\n    add(self, *a)\n    import os; os._exit(9)\n"
            "shared.Writer.add = once\nrefine.main()") % str(ROOT)
    killed = subprocess.run([sys.executable, "-c", code, "refine.py", "--ckpt", small, "--out", tmp_path / "parts",
                             "--text", "none", *map(str, more)], capture_output=True, text=True)
    assert killed.returncode == 9 and not (tmp_path / "parts").exists()
    for option, value in (("lr", "1e-3"), ("epochs", "5"), ("batch", "3"), ("error", "relative"), ("seed", "4")):
        other = enhance("refine", small, tmp_path / "parts", *more, f"--{option}", value)
        assert other.returncode == 2 and "was made with another" in other.stderr and f"{option} (" in other.stderr
    done = enhance("refine", small, tmp_path / "parts", *more)
    assert "going on: 1 of 2" in done.stderr
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    other = enhance("refine", small, tmp_path / "whole", "--overwrite", *more, "--lr", "0.9")
    assert other.returncode == 0                        # nothing of another run lies in the way


def test_a_block_learns_the_dense_stream_from_the_compressed_one(made, windows, monkeypatch):
    """X̂ and f(X) of block 1 against two whole models, the first's block 0 refined."""
    small, dense, _ = made
    ckpt, whole = Checkpoint(small), Checkpoint(dense)
    seen = []
    real = refine_block
    monkeypatch.setattr(refine_file, "refine_block", lambda block, pairs, held, *a: seen.append(
        [each.clone() for each in (*pairs, *held)]) or real(block, pairs, held, *a))
    task = task_of(ckpt, windows, epochs=2, lr=1e-2, weight_decay=0.01, batch=4, error="squared")
    (_, first, _), _ = refine_file.refine(task, whole, lambda l: None)
    models = [ckpt.model(CPU, FP32), whole.model(CPU, FP32)]
    models[0].load_state_dict(models[0].state_dict() | first)
    with torch.no_grad():
        for l in (0, 1):
            for model, which, at in ((models[0], 0, l), (models[1], 1, l + 1)):
                for ids, x in ((windows, seen[l][which]), (task.held, seen[l][2 + which])):
                    assert distance(x, output_of(model, at - 1, ids)) < 1e-5, (l, which)
    assert distance(output_of(models[0], 0, windows), output_of(ckpt.model(CPU, FP32), 0, windows)) > 1e-3


def output_of(model, l, ids):
    """The output of block l of a whole model; -1: the embeddings."""
    if l < 0:
        return F.embedding(ids, model.model.embed_tokens.weight)
    seen = []
    hook = model.model.layers[l].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


# -------------------------------------------------------------------------------- held out
def test_held_out_windows_share_no_text_with_what_is_learnt_from(made, tmp_path):
    """On a text in which random windows overlap, and on one too short for any other."""
    small, _, usual = made
    text = torch.randint(0, 64, (4000,), generator=torch.Generator().manual_seed(0))
    starts = [0, 100, 200, 300, 400, 500, 600, 10, 668, 1000, 1600]        # the eighth overlaps the first
    drawn = torch.stack([text[i:i + 100] for i in starts])
    learnt, held = split(drawn[:7], drawn[7:])
    assert torch.equal(learnt, drawn[:7]) and torch.equal(held, drawn[9:10])        # 668 to 700 is the seventh's
    learnt, held = split(drawn[:8], None)                                   # rows, which are none of a text
    assert torch.equal(learnt, drawn[:7]) and torch.equal(held, drawn[7:8])
    learnt, held = split(drawn[:7], drawn[7:8])                             # there is no other
    assert torch.equal(learnt, drawn[:7]) and torch.equal(held, drawn[7:8])
    np.save(tmp_path / "short.npy", text[:300].numpy().astype(np.int64))
    args = ("--calib", tmp_path / "short.npy", "--samples", "16", "--seqlen", "60", "--epochs", "1")
    done = enhance("refine", small, tmp_path / "o", *usual, *args)
    quiet = enhance("refine", small, tmp_path / "o", *usual, *args, "--overwrite", "--quiet")
    assert quiet.stderr.startswith("warning: every held-out window overlaps") and quiet.stderr.count("\n") == 1
    assert "every held-out window overlaps" in done.stderr and "16 + 2 held out" in done.stderr
    # By no number of what the start, or what enhanced it, was fitted to.
    ckpt = Checkpoint(small)
    for seeds, free in (([3], 5), ([5], 7), ([3, 5], 7), ([4, 3], 6), ([5, 7], 9), ([9], 5)):
        first, *others = ({"seed": seed} for seed in seeds)
        ckpt.raw = ckpt.raw | {"air": ckpt.raw["air"] | first | {"enhanced": others}}
        spare = spare_windows(str(usual[1]), ckpt, torch.zeros(16, 16), 3)
        assert torch.equal(spare, calibration_windows(str(usual[1]), ckpt, 8, 16, free)), seeds
    np.save(tmp_path / "long.npy", text.numpy().astype(np.int64))
    args = ("--calib", tmp_path / "long.npy", "--samples", "16", "--seqlen", "60", "--epochs", "1")
    done = enhance("refine", small, tmp_path / "p", *usual, *args)
    assert "overlaps" not in done.stderr and "16 + 2 held out" in done.stderr
    done = enhance("quantize", small, tmp_path / "q", *usual, "--samples", "1")     # holds none out
    assert done.returncode == 0 and "quantize of small: 1 x 16 tokens" in done.stderr


@pytest.mark.parametrize("name", ("refine", "retrain", "lora"))
def test_what_is_held_out_took_no_part_in_the_closed_form(made, tmp_path, monkeypatch, name):
    """All windows of the seed are learnt from, and those held out are none that air.py at the seed saw, be it on
    four times as many windows or for its ranks: on those a closed form is better than on any other."""
    small, _, usual = made
    seen = []
    monkeypatch.setattr(FILES[name], "prepare", lambda *a: seen.append(prepare(*a)) or seen[0])
    np.save(tmp_path / "long.npy", np.random.RandomState(1).randint(0, 64, size=40_000))
    done = enhance(name, small, tmp_path / "o", *usual, "--calib", tmp_path / "long.npy", "--epochs", "0")
    assert done.returncode == 0, done.stderr
    text, ckpt = str(tmp_path / "long.npy"), Checkpoint(small)
    drawn = calibration_windows(text, ckpt, 64, 16, 3)
    assert torch.equal(seen[0].windows, drawn[:16]) and seen[0].held.shape == (2, 16)
    for other in (drawn, held_windows(text, ckpt, drawn, 3)):
        assert not any(torch.equal(a, b) for a in seen[0].held for b in other)
    # The result says what would give the same.
    did = Checkpoint(tmp_path / "o").raw["air"]["enhanced"][-1]["calibration"]
    assert did == {"text": text, "samples": 16, "held_out": 2, "seqlen": 16}


def test_a_weight_without_a_teacher_is_refused(made, tmp_path):
    small, _, usual = made
    done = enhance("retrain", small, tmp_path / "o", *usual, "--weight", "0.9")
    assert done.returncode == 2 and "--teacher" in done.stderr and not (tmp_path / "o").exists()


# -------------------------------------------------------------------------------- retraining
def naive_loss(model, windows):
    logits = model(windows)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def test_the_loss_and_its_gradient_are_the_whole_models_whatever_the_micro_batch(made, windows, monkeypatch):
    small, _, _ = made
    model = Checkpoint(small).model(CPU, FP32)
    params = retrain_file.learning_factors(model)
    assert len(params) == 28 and not model.lm_head.weight.requires_grad
    naive_loss(model, windows).backward()
    wanted = {name: w.grad.clone() for name, w in params.items()}
    monkeypatch.setattr(retrain_file, "MICRO_BATCH", 48)
    model.zero_grad()
    loss = Loss(model, CPU, FP32)
    loss.add_gradient(windows)
    assert np.isclose(loss.mean(windows), naive_loss(model, windows).item(), rtol=1e-6)
    assert all(distance(w.grad, wanted[name]) < 1e-5 for name, w in params.items())
    # Hidden tokens carry none, whatever they are.
    hidden = windows.clone()
    hidden[:, :9] = -1 - hidden[:, :9]
    logits = model(windows)[:, 8:-1]
    alone = F.cross_entropy(logits.flatten(0, 1), windows[:, 9:].flatten()).item()
    assert np.isclose(loss.mean(hidden), alone, rtol=1e-6)


def test_a_teacher_is_a_divergence_and_none_from_itself(made, windows):
    small, dense, _ = made
    model = Checkpoint(small).model(CPU, FP32)
    teacher = Checkpoint(dense).model(CPU, FP32)
    p, q = (each(windows)[:, :-1].log_softmax(-1) for each in (teacher, model))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    found = Loss(model, CPU, FP32, teacher, 0.25).mean(windows)
    assert np.isclose(found, 0.75 * naive_loss(model, windows).item() + 0.25 * kl, rtol=1e-5)
    assert abs(Loss(model, CPU, FP32, model, 1.0).mean(windows)) < 1e-6


def test_the_best_by_held_out_loss_is_kept_and_patience_ends_it():
    w = torch.nn.Parameter(torch.tensor([4.0]))
    target, losses = 1.0, iter([9.0, 5.0, 6.0, 5.5, 4.0])

    def gradient(step):
        (w - target).square().sum().backward()

    course = Course({"w": w}, {"lr": 0.5, "every": 1, "patience": 2}, {"w": FP32})
    seen = []
    for step, loss in learn(course, 10, gradient, lambda: next(losses), lambda step: 1.0):
        seen.append((step, loss, w.item()))
    assert [loss for _, loss, _ in seen] == [9.0, 5.0, 6.0, 5.5] and w.item() == seen[1][2]


@pytest.mark.parametrize("function,times", (("TensorFolder.save", 4), ("sha256", 4)))
@pytest.mark.parametrize("name", ("retrain", "lora"))
def test_training_goes_on_after_a_kill_bit_by_bit(made, tmp_path, name, function, times):
    """Killed once a state is saved, and while one is, when the file is there and not yet in the manifest."""
    small, _, usual = made
    more = (*usual, "--epochs", "4", "--batch", "3", "--every", "2", "--lr", "1e-2")
    enhanced(name, small, tmp_path / "whole", *more)
    assert (load_file(tmp_path / "whole" / "model.safetensors")["model.layers.0.mlp.up_proj.V.weight"]
            != load_file(small / "model.safetensors")["model.layers.0.mlp.up_proj.V.weight"]).any()
    code = ("import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, %r)\n"
            "import support.checkpoint as files\nfrom enhance import %s as file\n"
            "called, left = files.%s, [%d]\n"
            "def once(*a):\n    found = called(*a)\n    left[0] -= 'training' in str(a[:2])\n"
            "    if not left[0]:\n        import os; os._exit(9)\n    return found\n"
            "files.%s = once\nfile.main()") % (str(ROOT), name, function, times, function)
    killed = subprocess.run([sys.executable, "-c", code, f"{name}.py", "--ckpt", small, "--out", tmp_path / "parts",
                             "--text", "none", *map(str, more)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    enhanced(name, small, tmp_path / "parts", *more)
    whole, parts = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts"))
    assert whole == parts
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir())


def test_a_run_killed_while_it_moves_its_result_into_place_trains_nothing_again(made, tmp_path, monkeypatch):
    small, _, usual = made
    more = (*usual, "--epochs", "2", "--batch", "3", "--lr", "1e-2")
    enhanced("retrain", small, tmp_path / "whole", *more)
    code = ("import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, %r)\n"
            "import os, support.result as shared\nfrom enhance import retrain as file\n"
            "shared.Writer.finish = lambda *a: os._exit(9)\nfile.main()") % str(ROOT)
    killed = subprocess.run([sys.executable, "-c", code, "retrain.py", "--ckpt", small, "--out", tmp_path / "parts",
                             "--text", "none", *map(str, more)], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    # What lies there is refused to those that would not go on from it, in words that fit.
    other = in_process("air", "--ckpt", made[1], "--out", tmp_path / "parts", "--text", "none", *usual)
    assert other.returncode == 2 and "or of enhance/" in other.stderr
    monkeypatch.setattr(Loss, "add_gradient", lambda *a: pytest.fail("trained again"))
    enhanced("retrain", small, tmp_path / "parts", *more)
    whole, parts = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("name", FILES)
def test_activations_that_overflow_are_a_sentence(made, tmp_path, name):
    small, dense, usual = made
    shutil.copytree(small, tmp_path / "huge")
    path = tmp_path / "huge" / "model.safetensors"
    state = load_file(path)
    huge = ("gate_proj.U", "up_proj.U", "down_proj.U")
    save_file({key: w * 1e16 if any(part in key for part in huge) else w for key, w in state.items()}, path)
    done = enhance(name, tmp_path / "huge", tmp_path / "out", *usual)
    assert done.returncode == 1 and "not finite" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_edited_loss_is_another_result(made, windows, monkeypatch):
    """Whatever a file takes its rules from is in the digest by which states and cells are told apart."""
    for name, folder, used in (("lora", "enhance", "enhance/retrain.py"), ("quantize", "enhance", "support/packed.py"),
                               ("quantize", "enhance", "support/even.py"), ("acip", "peers", "enhance/lora.py"),
                               ("acip", "peers", "enhance/retrain.py"), ("retrain", "enhance", "support/learning.py"),
                               ("retrain", "enhance", "support/task.py"), ("retrain", "enhance", "support/result.py"),
                               ("refine", "enhance", "model.py")):
        assert used in code_of(name, folder) and f"{folder}/{name}.py" in code_of(name, folder)


# -------------------------------------------------------------------------------- LoRA
def test_an_adapter_starts_as_nothing_and_merged_it_is_the_same_function():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 20, bias=True)
    x = torch.randn(5, 12)
    before, W = linear(x), linear.weight.detach().clone()
    adapter = Adapter(linear, 3, 6, 0.5).eval()
    assert torch.equal(adapter(x), before)
    with torch.no_grad():
        adapter.B.normal_()
    y = adapter(x)
    by_hand = x @ (W + 6 / 3 * adapter.B @ adapter.A).T + linear.bias
    assert torch.allclose(y, by_hand, atol=1e-5)
    assert torch.allclose(adapter.merged(FP32)(x), y, atol=1e-5)
    adapter.train()
    assert not torch.equal(adapter(x), y)               # dropout


def test_merged_logits_are_the_adapters_and_the_base_stays_bit_for_bit(made, windows):
    small, _, _ = made
    model = Checkpoint(small).model(CPU, FP32)
    before = copy.deepcopy(model.state_dict())
    options = {"rank": 4, "alpha": 8, "dropout": 0.1, "lr": 1e-2, "batch": 2, "epochs": 2, "every": 1}
    ckpt = Checkpoint(small)
    # As if it were stored in fp32: what rounding does is another test's.
    ckpt.tensors = {key: stored._replace(dtype=FP32) for key, stored in ckpt.tensors.items()}
    finer = copy.copy(ckpt)
    finer.tensors = {key: stored._replace(dtype=torch.float64) for key, stored in ckpt.tensors.items()}
    task = task_of(ckpt, windows, **options)
    stages, merged = {}, lora_file.merge

    def watched(model, which, ckpt):
        """Before an adapter is merged: its logits, and what it is put on."""
        adapters = {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapter)}
        assert {name.rpartition(".")[2] for name in adapters} == {which} and len(adapters) == 14
        logits = model.eval()(windows)
        for name, w in model.named_parameters():
            assert w.requires_grad == name.endswith((".A", ".B"))
        others = {name.replace(".linear", ""): w for name, w in model.state_dict().items()
                  if name[-2:] not in (".A", ".B")}
        done = stages["U"] if which == "V" else before
        assert all(torch.equal(w, done[name]) for name, w in others.items())
        exact = copy.deepcopy(model).double()
        wanted = exact(windows)
        merged(exact, which, finer)
        assert torch.allclose(exact(windows), wanted, rtol=0, atol=1e-10)
        adapters = merged(model, which, ckpt)
        assert distance(model(windows).detach(), logits.detach()) < 2e-6
        stages[which] = copy.deepcopy(model.state_dict())
        return adapters
    lora_file.merge = watched
    try:
        torch.manual_seed(0)
        balanced = copy.deepcopy(model)
        balance(balanced)
        before = balanced.state_dict()
        losses = list(lora_file.lora(task, model))
    finally:
        lora_file.merge = merged
    assert list(stages) == ["U", "V"]
    after = model.state_dict()
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"U", "V"} and losses[-1][2] <= losses[0][2]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", ("retrain", "lora"))
def test_the_loss_that_is_kept_is_that_of_the_stored_file(tmp_path, name, dtype):
    """Factors learn from the numbers on disk, whatever products are computed in, and are judged as they are stored."""
    write_checkpoint(tmp_path / "tiny", dtype=torch.float16)
    np.save(tmp_path / "ids.npy", np.random.RandomState(0).randint(0, 64, size=4000))
    usual = ("--calib", tmp_path / "ids.npy", "--samples", "16", "--seqlen", "16")
    start = result_of(tmp_path / "tiny", tmp_path / "small", usual)
    more = (*usual, "--batch", "4", "--every", "1", "--lr", "3e-3", "--dtype", dtype)
    for epochs in (0, 2):
        said = enhance(name, tmp_path / "small", tmp_path / str(epochs), *more, "--epochs", epochs).stderr
        after = Checkpoint(tmp_path / str(epochs))
        text = str(tmp_path / "ids.npy")
        windows = calibration_windows(text, start, 16, 16)
        held = split(windows, spare_windows(text, start, windows, 3))[1]
        loss = Loss(after.model(CPU, getattr(torch, dtype)), CPU, getattr(torch, dtype)).mean(held)
        stated = [float(each) for each in re.findall(r"held-out loss (\S+)", said)]
        assert abs(min(stated) - loss) < 1e-4
        if not epochs:              # nothing was learnt: the same products
            for layer in start.cfg.ranks:
                one, other = (ckpt.tensor(f"{layer}.U.weight").float() @ ckpt.tensor(f"{layer}.V.weight").float()
                              for ckpt in (start, after))
                assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_prompts_and_padding_carry_no_loss_and_the_end_is_learnt():
    class Words:
        bos, eos = [1], {2, 7}

        def encode(self, text):
            return [ord(c) % 50 + 10 for c in text]
    row = {"instruction": "ab", "input": "", "output": "xyz"}
    ids = tokens_of(row, Words(), 256)
    prompt = len(prompt_of(row)) + 1
    assert len(ids) == 256 and all(i < 0 for i in ids[:prompt]) and -1 - ids[0] == 1
    assert ids[prompt:prompt + 4] == [*Words().encode("xyz"), 2] and all(i == -1 for i in ids[prompt + 4:])
    long = tokens_of(row | {"output": "x" * 500}, Words(), 256)
    assert len(long) == 256 and long[-1] == ord("x") % 50 + 10


def test_the_template_is_alpacas():
    """Alpaca's own two texts, with and without an input, from its repository's README."""
    with_input = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                  "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
                  "### Input:\n{input}\n\n### Response:\n")
    without = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
               "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")
    rows = [{"instruction": f"Do {i}.", "input": f"in {i}" * (i % 2), "output": "o"} for i in range(10)]
    for row in rows:
        assert prompt_of(row) == (with_input if row["input"] else without).format(**row)
    assert prompt_of({"instruction": "a", "output": "b"}) == without.format(instruction="a")


def test_instructions_are_read_and_what_is_none_is_refused(made, tmp_path):
    path = tmp_path / "rows.json"
    for content, said in (("[", "JSON"), ("{}", "list"), ("[]", "list"), ('[{"instruction": "a"}]', "row 1"),
                          ('[{"instruction": "a", "output": "b"}, {"instruction": 1, "output": "b"}]', "row 2"),
                          ('[{"instruction": "a", "output": "b", "input": null}]', "row 1"), ("[3]", "row 1")):
        path.write_text(content)
        with pytest.raises(InputError, match=said):
            instruction_rows(path)
    if (SHARED / "data" / "alpaca" / "alpaca_2000.json").exists():
        assert len(instruction_rows(SHARED / "data" / "alpaca" / "alpaca_2000.json")) == 2000


def test_rows_without_room_for_an_answer_are_left_out_and_counted(made, tmp_path, monkeypatch, capsys):
    """What carries no loss would be a held-out loss of 0 that nothing is below."""
    class Letters:
        bos, eos = [1], {2}

        def __init__(self, ckpt=None):
            pass

        def encode(self, text):
            return [ord(c) % 50 + 10 for c in text]
    small, _, usual = made
    monkeypatch.setattr(lora_file, "Tokenizer", Letters)
    ckpt = Checkpoint(small)
    room = len(prompt_of({"instruction": "a"})) + 20
    rows = [{"instruction": "a" * n, "output": "b"} for n in (1, 400, 2, 400, 3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ids = lora_file.instructions(str(tmp_path / "rows.json"), ckpt, room)
    assert ids.shape == (3, room) and (ids[:, 1:] >= 0).any(1).all()
    said = capsys.readouterr().err
    assert "2 of 5 rows" in said and "end at" not in said
    # An answer that is cut is counted, one that ends with the last token is not.
    long = [{"instruction": "a", "output": "b" * n} for n in (18, 19, 80)]
    (tmp_path / "long.json").write_text(json.dumps(long))
    assert lora_file.instructions(str(tmp_path / "long.json"), ckpt, room).shape == (3, room)
    assert f"2 of 3 answers of {tmp_path / 'long.json'} end at {room} tokens" in capsys.readouterr().err
    # Within the context, where no length is given; a run with too few is refused in one more sentence.
    for context, wanted in ((40, 40), (5000, 256)):
        ckpt.cfg = replace(ckpt.cfg, context=context)
        assert lora_file.instructions(str(tmp_path / "rows.json"), ckpt, None).shape[1] == wanted
    capsys.readouterr()
    done = enhance("lora", small, tmp_path / "o", "--calib", tmp_path / "rows.json", "--seqlen", 16)
    assert done.returncode == 2 and "0 instructions of" in done.stderr and "5 of 5 rows" in done.stderr


# -------------------------------------------------------------------------------- quantization
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_packing_at_every_width(bits):
    for columns in (1, 7, 8, 9, 64, 131):
        codes = torch.randint(2**bits, (5, columns), generator=torch.Generator().manual_seed(columns))
        codes[0, :] = torch.arange(columns) % 2**bits
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape == (5, -(-columns * bits // 8))
        assert torch.equal(unpack(packed, bits, columns).long(), codes)
    # The published order: lowest bits first.
    assert pack(torch.tensor([[1, 2, 3, 0]]), 2).tolist() == [[0b00111001]]


def naive_rtn(W, bits, group):
    Q = torch.empty_like(W)
    for i, row in enumerate(W):
        for start in range(0, len(row), group or len(row)):
            part = row[start:start + (group or len(row))]
            low, high = min(part.min().item(), 0.0), max(part.max().item(), 0.0)
            scale = (high - low) / (2**bits - 1) or 1.0
            zero = round(-low / scale)
            codes = ((part / scale + zero).round()).clamp(0, 2**bits - 1)
            Q[i, start:start + len(part)] = (codes - zero) * scale
    return Q


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", (0, 5, 16))
def test_an_identity_hessian_is_rounding_to_nearest(bits, group):
    W = torch.randn(6, 37, dtype=FP64, generator=torch.Generator().manual_seed(bits))
    made = gptq(W, torch.eye(37), bits, group, FP64)
    scales, zeros = (each.repeat_interleave(group or 37, 1)[:, :37] for each in made[1:])
    Q = (made[0] - zeros) * scales
    assert distance(Q, naive_rtn(W, bits, group)) < 1e-6


def naive_grid(part, bits, shrinks=(1.0,)):
    """(scale, zero) of each row: of the shrinks that with the least squared error, a row at a time."""
    found = []
    for row in part.double():
        tried = []
        for shrink in shrinks:
            low, high = min(0.0, shrink * row.min().item()), max(0.0, shrink * row.max().item())
            scale = (high - low) / (2**bits - 1) or 1.0
            zero = round(-low / scale)
            values = torch.tensor([(c - zero) * scale for c in range(2**bits)], dtype=FP64)
            error = (row[:, None] - values).abs().amin(1).square().sum().item()
            tried.append((error, -shrink, scale, zero))
        found.append(min(tried)[2:])
    return torch.tensor(found, dtype=FP64).T[..., None]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_clipped_grid_is_the_best_of_those_tried(bits):
    g = torch.Generator().manual_seed(bits)
    w = torch.randn(7, 50, dtype=FP64, generator=g) * torch.logspace(-2, 2, 7)[:, None]
    w[2] = w[2].abs()                                       # 0 is one of the values all the same
    w[3] = 0
    w[4, 7] = 40 * w[4].abs().max()                         # one outlier
    scale, zero = naive_grid(w, bits, (1, *SHRINKS))
    found = clipped(w, bits, FP64)
    assert distance(found.scale, scale) < 1e-12 and torch.equal(found.zero.double(), zero)
    assert torch.isfinite(found.values(found.codes(w))).all() and (found.zero <= found.top).all()
    # Stored in half precision, the grid that was judged is the one that is stored.
    half = clipped(w.float(), bits, torch.bfloat16)
    assert half.scale.dtype == torch.bfloat16
    plain = grid_of(w.float(), bits, torch.bfloat16)
    lost = [(w - each.values(each.codes(w.float()))).square().sum(1) for each in (half, plain)]
    assert (lost[0] <= lost[1] * (1 + 1e-6)).all() and (bits == 8 or (lost[0] < 0.95 * lost[1]).any())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_least_numbers_of_a_dtype_are_not_rounded_to_none(bits, dtype):
    """Rows whose step the dtype cannot hold, or holds as few multiples of its least, stay within a step it can."""
    held = torch.finfo(dtype)
    least = held.smallest_normal * held.eps
    w = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    w *= least * torch.logspace(0, 4, 40)[:, None] / w.abs().amax(1, keepdim=True)
    w = w.to(dtype).float()
    w[7] = 0
    grid = grid_of(w, bits, dtype)
    exact = (w.amax(1, keepdim=True).clamp_min(0) - w.amin(1, keepdim=True).clamp_max(0)).double() / (2**bits - 1)
    worst = (grid.values(grid.codes(w)) - w).double().abs().amax(1, keepdim=True)
    # Half a step, and as much again where the code of 0 was rounded.
    assert (worst <= 1.01 * (exact / least).ceil() * least).all() and not worst[7].any() and grid.scale[7] == 1


def test_a_clipped_grid_comes_near_the_best_of_a_normal_distribution():
    """The mean squared error of the best evenly spaced quantizer (Max, 1960); ours has 0 among its few values."""
    w = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    for bits, best, above in ((4, 0.01154, 1.05), (3, 0.03744, 1.12)):
        grid = clipped(w, bits, FP32)
        error = (w - grid.values(grid.codes(w))).square().mean().item()
        plain = grid_of(w, bits, FP32)
        assert 0.98 * best < error < above * best
        assert error < (w - plain.values(plain.codes(w))).square().mean().item() / 2


def naive_gptq(W, H, bits, group, shrinks=(1.0,)):
    """Frantar et al.'s algorithm as Optimal Brain Quantization in order: after each column the inverse Hessian of the
    remaining ones by elimination; no Cholesky factor, no blocks."""
    W, H = W.double().clone(), H.double().clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    inverse = torch.linalg.inv(H)
    Q = torch.empty_like(W)
    n = W.shape[1]
    for j in range(n):
        if j == 0 or group and j % group == 0:
            part = W[:, j:j + group] if group else W
            scale, zero = naive_grid(part, bits, shrinks).squeeze(-1)
        Q[:, j] = ((W[:, j] / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        W[:, j:] -= torch.outer((W[:, j] - Q[:, j]) / inverse[j, j], inverse[j, j:])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return Q


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", (0, 32))
def test_gptq_equals_the_algorithm_column_by_column(bits, group, monkeypatch):
    monkeypatch.setattr(quantize_file, "BLOCK", 16)
    g = torch.Generator().manual_seed(bits + group)
    X = torch.randn(400, 70, dtype=FP64, generator=g) @ torch.randn(70, 70, dtype=FP64, generator=g)
    W = torch.randn(9, 70, dtype=FP64, generator=g)
    H = X.T @ X
    codes, scales, zeros = gptq(W, H, bits, group, FP64)
    wide = (group or 70)
    Q = (codes - zeros.repeat_interleave(wide, 1)[:, :70]) * scales.repeat_interleave(wide, 1)[:, :70]
    assert distance(Q, naive_gptq(W, H, bits, group)) < 1e-6
    assert output_error(W, Q, H) < output_error(W, naive_rtn(W, bits, group), H)
    # On clipped grids, each of what its columns are by then.
    made = gptq(W, H, bits, group, FP64, clipped)
    Q = dequantize(*made, group)
    assert distance(Q, naive_gptq(W, H, bits, group, (1, *SHRINKS))) < 1e-6
    # Hessians of any scale, and inputs that are always 0.
    again = gptq(W, 7 * H, bits, group, FP64)[0]
    assert torch.equal(again, codes)
    H[:, 3] = H[3] = 0
    assert torch.isfinite(gptq(W, H, bits, group, FP64)[1]).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_factor_is_worse_than_rounded_to_nearest(bits):
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(12, 20, generator=g) * torch.logspace(-3, 3, 20)
        _, Q, own, nearest = quantize_factor(torch.randn(6, 20, generator=g), X.T @ X,
                                             {"bits": bits, "group": 0, "rounding": "gptq", "clip": seed > 2}, FP32)
        assert own <= nearest


def uneven(folder, start, **changes):
    """A tiny checkpoint whose channels differ a thousandfold, as a real language model's do, and its result."""
    write_checkpoint(folder / "uneven", **changes)
    state = load_file(folder / "uneven" / "model.safetensors")
    size = torch.logspace(-1.5, 1.5, 32)
    for name in [name for name in state if name.endswith("layernorm.weight")]:
        state[name] *= size
    for name, w in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            state[name] = w / size
    save_file(state, folder / "uneven" / "model.safetensors")
    usual = ("--calib", start / "ids.npy", "--samples", "16", "--seqlen", "16")
    return result_of(folder / "uneven", folder / "small", usual), usual


@pytest.mark.parametrize("changes", ({}, {"architectures": ["Qwen2ForCausalLM"]},
                                     {"architectures": ["LlamaForCausalLM"], "mlp_bias": True, "attention_bias": True}))
def test_smoothing_leaves_the_blocks_output_as_it_is_bit_by_bit(start, tmp_path, changes):
    """On grouped-query heads, with biases, and where some layers were left dense."""
    ckpt, _ = uneven(tmp_path, start, **changes)
    dense = Checkpoint(tmp_path / "uneven")
    h = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    for left_dense in ((), ("v_proj", "up_proj"), ("o_proj", "gate_proj")):
        block, other = ckpt.block(1, CPU, FP32), dense.block(1, CPU, FP32)
        for half in ("self_attn", "mlp"):
            for name in left_dense:
                if hasattr(getattr(block, half), name):
                    setattr(getattr(block, half), name, getattr(getattr(other, half), name))
        block = own(block)
        angles = rope(ckpt.cfg, 16)
        before = block(h, angles)
        columns = lambda: torch.cat([w for name, w in block.named_parameters()       # noqa: E731
                                     if "q_proj.V" in name or "k_proj.V" in name]).square().mean(0).sqrt()
        spread = columns().max() / columns().min()
        scales = smooth(block, ckpt.cfg)
        assert torch.equal(block(h, angles), before) and spread > 100
        assert columns().max() / columns().min() < 6
        assert all(torch.equal(d, d.log2().round().exp2()) for d in scales.values())


def test_a_smoothed_result_has_lost_less_and_its_norms_carry_the_scales(start, tmp_path):
    ckpt, usual = uneven(tmp_path, start)
    windows, _, _ = evaluation_windows(str(start / "ids.npy"), ckpt, 16, 8)
    lost = {}
    for bits in (8, 4):
        for how in ((), ("--smooth",)):
            made = enhanced("quantize", ckpt.folder, tmp_path / f"{bits}{how}", *usual, "--bits", bits, *how)
            lost[bits, how] = distance(made.model()(windows), ckpt.model()(windows))
            norm = "model.layers.0.input_layernorm.weight"
            scale = made.tensor(norm) / ckpt.tensor(norm)
            assert bool((scale != 1).any()) == bool(how) and torch.equal(scale, scale.log2().round().exp2())
    assert all(lost[bits, ("--smooth",)] < lost[bits, ()] / 2 for bits in (8, 4)), lost
    # What reads a quantized result reads this one: the norms are of the packed factors.
    again = enhanced("quantize", tmp_path / "4('--smooth',)", tmp_path / "again", *usual, "--bits", 8)
    assert distance(again.model()(windows), Checkpoint(tmp_path / "4('--smooth',)").model()(windows)) < 0.05


def test_smoothing_leaves_dense_blocks_and_dead_columns_alone(start, tmp_path):
    ckpt, usual = uneven(tmp_path, start)
    done = in_process("air", "--ckpt", tmp_path / "uneven", "--rate", "0.5", "--out", tmp_path / "one", "--text",
                      "none", *usual, "--layers", "0:1")
    assert done.returncode == 0, done.stderr
    made = enhanced("quantize", tmp_path / "one", tmp_path / "q", *usual, "--smooth")
    before = Checkpoint(tmp_path / "one")
    for name in [name for name in before.names if "layers.1." in name]:
        assert torch.equal(made.tensor(name), before.tensor(name)), name
    # A dead column has no size: the others' scales are what they are without it.
    w = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 8.0, 64.0, 1.0, 8.0, 64.0])
    dead = torch.cat((w, torch.zeros(9, 3)), 1)
    assert torch.equal(even_scale([dead]), torch.cat((even_scale([w]), torch.ones(3))))
    assert torch.equal(even_scale([torch.zeros(4, 3)]), torch.ones(3))


@pytest.mark.parametrize("refits", (False, True))
def test_a_block_is_quantized_behind_the_quantized_ones(made, windows, monkeypatch, refits):
    """Block 1's input against a whole model whose block 0 is unpacked."""
    small, _, _ = made
    ckpt = Checkpoint(small)
    seen = []
    real = quantize_file.quantize_block
    monkeypatch.setattr(quantize_file, "quantize_block",
                        lambda block, h, *a: seen.append([x.clone() for x in h]) or real(block, h, *a))
    options = {"bits": 3, "group": 0, "rounding": "gptq"} | dict.fromkeys(EVEN, False) | {"refit": refits}
    task = task_of(ckpt, windows, windows[:0], **options)
    (_, first, _), _ = quantize_file.quantize(task, lambda l: None)
    model = ckpt.model(CPU, FP32)
    before = output_of(model, 0, windows)
    model.load_state_dict(model.state_dict() | block_tensors(ckpt, 0, first, options))
    assert len(seen[1]) == 1 + refits and all(distance(x, output_of(model, -1, windows)) < 1e-6 for x in seen[0])
    assert distance(seen[1][-1], output_of(model, 0, windows)) < 1e-5 < 1e-3 < distance(seen[1][-1], before)
    # The other stream, of what U is fitted to, is the unquantized model's.
    assert not refits or distance(seen[1][0], before) < 1e-6


@pytest.mark.parametrize("dead", (0, 2))
def test_gptqs_hessian_is_of_any_scale(dead):
    g = torch.Generator().manual_seed(dead)
    X = torch.randn(24, 400, generator=g)
    X[:dead] = 0
    W = torch.randn(10, 24, generator=g)
    codes = [gptq(W, X @ X.T * scale, 4, 0, FP32)[0] for scale in (1.0, 1e-8, 1e8)]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_inputs_of_u_come_through_the_quantized_v(made):
    small, _, _ = made
    ckpt = Checkpoint(small)
    block = ckpt.block(0, CPU, FP32)
    h = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    real = quantize_file.quantize_factor
    quantize_file.quantize_factor = lambda W, H, *a: seen.append((W.clone(), H)) or real(W, H, *a)
    try:
        with torch.no_grad():
            options = {"bits": 3, "group": 0, "rounding": "gptq"} | dict.fromkeys(EVEN, False)
            quantize_file.quantize_block(block, (h,), rope(ckpt.cfg, 16), options, FP32)
    finally:
        quantize_file.quantize_factor = real
    norm = ckpt.block(0, CPU, FP32).input_layernorm.weight
    x = (h / (h.square().mean(-1, keepdim=True) + ckpt.cfg.norm_eps).sqrt() * norm).flatten(0, 1)
    assert len(seen) == 14 and distance(seen[0][1], x.T @ x) < 1e-5
    z = x @ block.self_attn.q_proj.V.weight.T                   # by now V is the quantized one
    assert distance(seen[7][1], z.T @ z) < 1e-5
    old = x @ seen[0][0].T
    assert distance(seen[7][1], old.T @ old) > 1e-3


@pytest.mark.parametrize("changes", ({}, {"architectures": ["Qwen2ForCausalLM"]}))
def test_turned_ranks_are_alike_and_compute_what_they_did(start, tmp_path, changes):
    """On grouped-query heads and with biases; ranks fall by orders of magnitude where inputs do."""
    ckpt, _ = uneven(tmp_path, start, **changes)
    h = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    angles = rope(ckpt.cfg, 16)
    block = own(ckpt.block(1, CPU, FP32))
    before = block(h, angles)
    old = {name: layer for name, layer in own(block).named_modules() if isinstance(layer, LowRank)}
    rotate(block, 7)
    assert distance(block(h, angles), before) < 1e-5 and len(old) == 7
    for name, layer in old.items():
        new = block.get_submodule(name)
        # What is orthogonal keeps all inner products, and moves every rank.
        V, U, old_V, old_U = (w.weight.double() for w in (new.V, new.U, layer.V, layer.U))
        assert distance(V.T @ V, old_V.T @ old_V) < 1e-5 and distance(U @ U.T, old_U @ old_U.T) < 1e-5
        assert distance(V, old_V) > 0.5 and distance(U, old_U) > 0.5
    # Components of very different size end within a few times of each other.
    steep = LowRank(40, 30, 20, False)
    size = torch.logspace(0, -4, 20)
    steep.V.weight.data = torch.linalg.qr(torch.randn(40, 20)).Q.T * size[:, None]
    steep.U.weight.data = torch.linalg.qr(torch.randn(30, 20)).Q * size
    spread = lambda w: (w.norm(dim=0).max() / w.norm(dim=0).min()).item()               # noqa: E731
    rotate(torch.nn.Sequential(steep), 0)
    assert max(spread(steep.U.weight), spread(steep.V.weight.T)) < 100
    again, other = (own(ckpt.block(1, CPU, FP32)) for _ in range(2))
    rotate(again, 7)
    rotate(other, 8)
    w = block.self_attn.q_proj.V.weight
    assert torch.equal(w, again.self_attn.q_proj.V.weight) and distance(w, other.self_attn.q_proj.V.weight) > 0.5


@pytest.mark.parametrize("seed", range(3))
def test_refit_is_the_least_squares_solution(seed):
    """Against regression over the inputs themselves, ρ as k further rows."""
    g = torch.Generator().manual_seed(seed)
    U, V = torch.randn(9, 5, dtype=FP64, generator=g), torch.randn(5, 12, dtype=FP64, generator=g)
    Q = V + 0.3 * torch.randn(5, 12, dtype=FP64, generator=g)
    X = torch.randn(200, 12, dtype=FP64, generator=g) @ torch.randn(12, 12, dtype=FP64, generator=g)
    X_hat = X + 0.3 * torch.randn(200, 12, dtype=FP64, generator=g)
    Z = X_hat @ Q.T
    rho = 0.01 * Z.square().sum(0).mean()
    rows = torch.cat((Z, rho.sqrt() * torch.eye(5, dtype=FP64)))
    wanted = torch.cat((X @ V.T @ U.T, rho.sqrt() * U.T))
    fitted, gram = refit(U, V, Q, X_hat.T @ X_hat, X.T @ X_hat)
    assert fitted.dtype == FP32 and distance(fitted, torch.linalg.lstsq(rows, wanted).solution.T) < 1e-6
    assert distance(gram, Z.T @ Z) < 1e-12
    lost = [(X @ V.T @ U.T - Z @ each.double().T).norm() for each in (fitted, U)]
    assert lost[0] < 0.95 * lost[1]
    # Nothing was lost, and nothing is known: U stays.
    nothing = torch.zeros(12, 12)
    for same, _ in (refit(U, V, V, X.T @ X, X.T @ X), refit(U, V, Q, nothing, nothing)):
        assert distance(same, U) < 1e-6


def test_u_is_fitted_to_what_was_before_anything_was_rounded(made, monkeypatch):
    """Of every layer of a block: what it reads in both streams, by hooks on whole blocks."""
    small, _, _ = made
    ckpt = Checkpoint(small)
    was, block = ckpt.block(0, CPU, FP32), own(ckpt.block(0, CPU, FP32))
    g = torch.Generator().manual_seed(0)
    h = torch.randn(4, 16, 32, generator=g)
    streams = h, h + 0.3 * torch.randn(4, 16, 32, generator=g)
    angles = rope(ckpt.cfg, 16)
    real, seen = quantize_file.refitted, {}

    def inputs(of, name, h):
        found = []
        hook = of.get_submodule(name).register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, -2)))
        of(h, angles)
        hook.remove()
        return found[0]

    def note(name, both):
        """By now every V is the rounded one, and the inputs are behind the U that came before."""
        x, x_hat = inputs(was, name, streams[0]), inputs(block, name, streams[1])
        layer, Q = was.get_submodule(name), block.get_submodule(name).V.weight
        assert distance(Q, layer.V.weight) > 1e-3
        seen[name] = refit(layer.U.weight, layer.V.weight, Q, x_hat.T @ x_hat, x.T @ x_hat), real(name, both)
        return seen[name][1]
    monkeypatch.setattr(quantize_file, "refitted", note)
    with torch.no_grad():
        quantize_file.quantize_block(block, streams, angles,
                                     {"bits": 3, "group": 0, "rounding": "gptq", "clip": False, "refit": True}, FP32)
    assert list(seen) == list(LAYERS)
    # k, v and up read what was collected for q and gate; o and down what lies behind rounded U.
    for wanted, found in seen.values():
        assert distance(found[0], wanted[0]) < 1e-3 and distance(found[1], wanted[1]) < 1e-5


def test_turned_and_fitted_factors_lose_less(tmp_path):
    """Of the demo, whose singular values fall; two of its six blocks."""
    few = ["--samples", "16", "--seqlen", "128"]
    done = in_process("air", "--layers", "1:3", "--out", tmp_path / "a", "--text", "none", *few)
    assert done.returncode == 0, done.stderr
    small = Checkpoint(tmp_path / "a")
    windows, _, _ = evaluation_windows("stdlib", small, 128, 8)
    lost = {}
    for bits in (4, 3):
        for how in ((), ("--rotate",), ("--rotate", "--refit"), ("--rotate", "--refit", "--clip")):
            made = enhanced("quantize", tmp_path / "a", tmp_path / f"{bits}{len(how)}", *few, "--bits", bits, *how)
            lost[bits, len(how)] = distance(*(each.model(CPU, FP32)(windows) for each in (made, small)))
            did = made.raw["air"]["enhanced"][-1]
            assert all(did[name] == ("--" + name in how) for name in EVEN)
        assert lost[bits, 3] < lost[bits, 2]
        assert lost[bits, 2] < lost[bits, 1] < lost[bits, 0] and lost[bits, 2] < 0.85 * lost[bits, 0], lost


@pytest.mark.parametrize("bits,group", ((4, 0), (3, 16), (2, 8), (8, 0)))
def test_a_packed_result_is_read_everywhere_and_as_small_as_the_formula(made, tmp_path, bits, group, windows):
    small, _, usual = made
    ckpt = enhanced("quantize", small, tmp_path / "q", *usual, "--bits", str(bits), "--group", str(group))
    before = Checkpoint(small)
    assert ckpt.cfg == before.cfg and set(ckpt.names) == set(before.names) and ckpt.raw["air"]["quantized"] == {
        "bits": bits, "group": group}
    size = 0
    for name in before.names:
        rows, *columns = before.tensors[name].shape
        if ".U.weight" in name or ".V.weight" in name:
            groups = -(-columns[0] // group) if group else 1
            size += rows * -(-columns[0] * bits // 8) + rows * groups * (2 + 1)
            low, high = ckpt.tensor(name).float(), before.tensor(name).float()
            assert low.unique().numel() <= 2**bits * rows * groups and 0 < distance(low, high) < 1.2
        else:
            assert torch.equal(ckpt.tensor(name), before.tensor(name))
            size += before.tensors[name].read().nbytes
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as f:
        assert sum(f.get_tensor(name).nbytes for name in f.keys()) == size
    # By blocks, as the whole model, and what transformers' classes cannot unpack they are not offered.
    whole = ckpt.model(CPU, FP32)(windows)[:, :-1].log_softmax(-1).gather(-1, windows[:, 1:, None]).mean()
    assert np.isclose(evaluate(ckpt, windows, CPU, FP32)["nll"], -whole.item(), rtol=1e-5)
    assert "auto_map" not in ckpt.raw and not (tmp_path / "q" / "modeling_air.py").exists()


@pytest.mark.parametrize("changes", ({"architectures": ["Qwen2ForCausalLM"], "attention_bias": True},
                                     {"attention_bias": True, "mlp_bias": True}))
def test_biases_stay_as_they_are_and_a_killed_run_finds_them(tmp_path, changes):
    write_checkpoint(tmp_path / "tiny", **changes)
    np.save(tmp_path / "ids.npy", np.random.RandomState(0).randint(0, 64, size=4000))
    usual = ("--calib", tmp_path / "ids.npy", "--samples", "16", "--seqlen", "16")
    before = result_of(tmp_path / "tiny", tmp_path / "small", usual)
    biases = [name for name in before.names if name.endswith(".bias")]
    assert len(biases) >= 6
    every = ("--rotate", "--clip", "--refit")
    for name in FILES:
        more = every if name == "quantize" else ("--epochs", "1")
        after = enhanced(name, tmp_path / "small", tmp_path / name, *usual, *more)
        if name == "refine":                # which trains them
            continue
        # Nor does the dtype of products round what is not learnt.
        lower = enhanced(name, tmp_path / "small", tmp_path / f"{name}-lower", *usual, *more, "--dtype", "bfloat16")
        for bias in biases:
            assert all(torch.equal(ckpt.tensor(bias), before.tensor(bias)) for ckpt in (after, lower))
    code = ("import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, %r)\n"
            "import os, support.checkpoint as files\nfrom enhance import quantize as file\n"
            "save = files.TensorFolder.save\n"
            "def once(self, *a):\n    save(self, *a)\n    os._exit(9)\n"
            "files.TensorFolder.save = once\nfile.main()") % str(ROOT)
    killed = subprocess.run([sys.executable, "-c", code, "quantize.py", "--ckpt", tmp_path / "small", "--out",
                             tmp_path / "parts", "--text", "none", *every, *map(str, usual)],
                            capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    enhanced("quantize", tmp_path / "small", tmp_path / "parts", *usual, *every)
    whole, parts = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("quantize", "parts"))
    assert whole == parts


def test_what_is_left_dense_is_said_and_a_group_beyond_the_columns_takes_no_more(made, tmp_path):
    _, dense, usual = made
    done = in_process("air", "--ckpt", dense, "--rate", "0.5", "--out", tmp_path / "one", "--text", "none", *usual,
                      "--layers", "0:1")
    assert done.returncode == 0, done.stderr
    done = enhance("quantize", tmp_path / "one", tmp_path / "q", *usual)
    assert done.returncode == 0 and "block 1: dense, left as it is" in done.stderr
    assert widen(torch.ones(3, 1), 10**6, 8).shape == (3, 8)
    seen = []
    ones = SimpleNamespace(repeat_interleave=lambda times, dim: seen.append(times) or torch.ones(3, times))
    widen(ones, 10**6, 8)
    assert seen == [8]


def test_a_packed_result_that_was_damaged_is_refused(made, tmp_path):
    small, _, usual = made
    enhanced("quantize", small, tmp_path / "q", *usual)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    for section, said in (({"bits": 3, "group": 0}, "at 3 bits"), ({"bits": 5, "group": 0}, "bits"),
                          ({"bits": 4}, "group"), ({"bits": 4, "group": -1}, "group"),
                          ({"bits": "4", "group": 0}, "bits"), (None, "lacks|beyond")):
        air = {key: value for key, value in config["air"].items() if key != "quantized"}
        air |= {"quantized": section} if section else {}
        (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"air": air}))
        with pytest.raises(InputError, match=said):
            Checkpoint(tmp_path / "q")


# -------------------------------------------------------------------------------- together
def test_everything_composes_on_grouped_query_heads(made, tmp_path):
    small, dense, usual = made
    refined = enhanced("refine", small, tmp_path / "r", *usual, "--epochs", "1", "--batch", "4")
    packed = enhanced("quantize", tmp_path / "r", tmp_path / "q", *usual)
    assert [each["by"] for each in packed.raw["air"]["enhanced"]] == ["refine", "quantize"]
    # A packed result is a start, too, and is unpacked by what trains it, which says so.
    done = in_process("enhance/retrain", "--ckpt", tmp_path / "q", "--out", tmp_path / "t", *usual, "--epochs", "1")
    assert done.returncode == 0 and "is quantized, what retrain writes is not: quantize last" in done.stderr
    again = Checkpoint(tmp_path / "t")
    assert "quantized" not in again.raw["air"] and (tmp_path / "t" / "modeling_air.py").exists()
    adapted = enhanced("lora", small, tmp_path / "l", *usual, "--epochs", "1", "--batch", "4")
    assert adapted.cfg == refined.cfg
    done = in_process("support/export", tmp_path / "l", "--dense", tmp_path / "d")
    assert done.returncode == 0 and Checkpoint(tmp_path / "d").cfg == Checkpoint(dense).cfg
    unpacked = in_process("support/export", tmp_path / "q", "--dense", tmp_path / "e")
    assert unpacked.returncode == 0 and Checkpoint(tmp_path / "e").dtype == torch.bfloat16
    # Generation from the codes is generation from what they stand for.
    lines = [list(generate(Decoder(each.model(CPU, FP32)), [[5, 6, 7]], 6, temperature=0))
             for each in (packed, Checkpoint(tmp_path / "e"))]
    assert lines[0] == lines[1] and len(lines[0]) == 6


def test_everything_composes_on_the_demo(tmp_path):
    """air -> refine -> quantize -> generate, and air -> lora -> export; two of six blocks."""
    few = ["--samples", "8", "--seqlen", "128"]
    done = in_process("air", "--layers", "1:3", "--out", tmp_path / "a", "--text", "none", *few)
    assert done.returncode == 0, done.stderr
    small = Checkpoint(tmp_path / "a")
    assert {layer.split(".")[2] for layer in small.cfg.ranks} == {"1", "2"}
    refined = enhanced("refine", tmp_path / "a", tmp_path / "r", "--epochs", "2", "--batch", "2", "--lr", "3e-4", *few)
    packed = enhanced("quantize", tmp_path / "r", tmp_path / "q", *few)
    changed = {name.split(".")[2] for name in small.names if name.startswith("model.layers.")
               and not torch.equal(small.tensor(name), refined.tensor(name))}
    assert changed and changed <= {"1", "2"}            # blocks that are dense stay as they are
    windows = torch.arange(3, 131)[None].repeat(2, 1)
    ppl = [evaluate(each, windows, CPU, FP32)["nll"] for each in (small, refined, packed)]
    assert all(np.isfinite(ppl)) and len(set(ppl)) == 3
    said = script("generate", "--ckpt", tmp_path / "q", "--prompt", "def read(self", "--max-new-tokens", "8")
    assert said.returncode == 0 and said.stdout.startswith("def read(self")
    # The file itself is as small as four bits a number, three bytes a row and the rest say.
    size = 0
    for name in small.names:
        rows, *columns = small.tensors[name].shape
        four = ".U.weight" in name or ".V.weight" in name
        size += rows * (-(-columns[0] // 2) + 3) if four else small.tensors[name].read().nbytes
    assert size <= (tmp_path / "q" / "model.safetensors").stat().st_size <= 1.01 * size
    enhanced("lora", tmp_path / "a", tmp_path / "l", "--epochs", "1", "--batch", "4", *few)
    done = in_process("support/export", tmp_path / "l", "--dense", tmp_path / "d")
    assert done.returncode == 0, done.stderr
    merged, dense = Checkpoint(tmp_path / "l"), Checkpoint(tmp_path / "d")
    assert not dense.cfg.ranks
    logits = [each.model(CPU, FP32)(windows) for each in (merged, dense)]
    assert distance(*logits) < 2e-2                     # both are rounded to 16 bits


def test_a_shape_is_refined_and_counted(monkeypatch):
    """experiments/scale.py refine: a random result of a shape through the command; the counts in closed form."""
    monkeypatch.setitem(scale.SHAPES, "tiny", TINY)
    args = SimpleNamespace(folder=None, rate=0.6, samples=3, seqlen=16, device=None, dtype=None, what="refine",
                           shape="tiny", blocks=[1])
    row, = scale.runs(args)
    assert row["blocks"] == 1 and row["windows"] == [3, 16] and row["seconds"]["refine"] > 0
    shapes = {name: w.shape for name, w in Llama(parse_config(TINY)).state_dict().items() if ".layers.0." in name}
    whole = sum(shape.numel() for shape in shapes.values())
    small = sum(k * (m + n) for m, n in (s for s in shapes.values() if len(s) == 2) for k in [air.rank_at(0.6, m, n)])
    small += sum(shape.numel() for shape in shapes.values() if len(shape) == 1)
    graph = 4 * 2048 * (12 * TINY["hidden_size"] + 6 * TINY["intermediate_size"])
    assert row["implied"]["256 x 2048"] == {"device_bytes": 20 * small + 2 * whole + graph,
                                            "streams_bytes": 2 * 256 * 2048 * TINY["hidden_size"] * 2}
    shown = "\n".join(scale.refine_lines({"device": "mine", "date": "today"}, [row]))
    assert "| 1 block, 3 × 16 tokens, rate 0.6, one epoch |" in shown
