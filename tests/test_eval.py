"""eval_ppl.py: perplexity and divergence against float64 by hand."""
import json
import math
import shutil

import numpy as np
import pytest
import torch

import eval_ppl as E
from conftest import ROOT, script, write_checkpoint
from support.checkpoint import Checkpoint

CPU = torch.device("cpu")


def test_perplexity_by_hand(tiny, windows):
    ckpt = Checkpoint(tiny)
    p = ckpt.model(dtype=torch.float64)(windows).softmax(-1)
    nll = [-math.log(p[w, t, windows[w, t + 1]]) for w in range(6) for t in range(23)]
    found = E.evaluate(ckpt, windows, CPU, torch.float32)
    assert found["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-6)
    assert found["ppl"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5) and found["nonfinite"] == 0


def test_js_divergence_by_hand():
    torch.manual_seed(0)
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    for x, y, found in zip(a.double().softmax(-1), b.double().softmax(-1), E.js_divergence(a, b)):
        kl = lambda u, w: sum(ui * math.log2(ui / wi) for ui, wi in zip(u.tolist(), w.tolist()))      # noqa: E731
        assert found == pytest.approx((kl(x, (x + y) / 2) + kl(y, (x + y) / 2)) / 2, rel=1e-4)
    assert torch.equal(E.js_divergence(a, a), torch.zeros(5))
    apart = torch.tensor([200.0, 0.0]), torch.tensor([0.0, 200.0])
    assert E.js_divergence(*apart) == pytest.approx(1.0)


def test_divergence_between_checkpoints(tiny, tmp_path, windows):
    ckpt, other = Checkpoint(tiny), Checkpoint(write_checkpoint(tmp_path / "other", seed=1))
    states = [E.last_states(each, windows, CPU, torch.float32) for each in (ckpt, other)]
    assert E.evaluate(ckpt, windows, CPU, torch.float32, states[0])["js"] == pytest.approx(0, abs=1e-6)
    p, q = (c.model()(windows)[:, :-1] for c in (ckpt, other))
    found = E.evaluate(ckpt, windows, CPU, torch.float32, states[1])["js"]
    assert found == pytest.approx(E.js_divergence(p, q).mean().item(), rel=1e-5)


def test_non_finite_logits_are_reported_not_dropped(tiny, tmp_path, windows):
    """A huge norm weight overflows fp16 logits in some windows; the perplexity is then not a number."""
    ckpt = Checkpoint(tiny)
    norm, lm_head = ckpt.head()
    ckpt.head = lambda *_: (norm * 1e38, lm_head)
    found = E.evaluate(ckpt, windows, CPU, torch.float32)
    assert found["nonfinite"] > 0 and math.isnan(found["ppl"])


def test_the_other_models_overflow_is_not_this_ones(tiny, tmp_path, windows, capsys, monkeypatch):
    ckpt, other = Checkpoint(tiny), Checkpoint(write_checkpoint(tmp_path / "other", seed=1))
    alone = E.evaluate(ckpt, windows, CPU, torch.float32)
    norm, lm_head = other.head()
    other.head = lambda *_: (norm * 1e38, lm_head)
    found = E.evaluate(ckpt, windows, CPU, torch.float32, E.last_states(other, windows, CPU, torch.float32))
    assert (found["ppl"], found["nonfinite"]) == (alone["ppl"], 0) and math.isnan(found["js"])
    np.save(tmp_path / "w.npy", windows.numpy())
    monkeypatch.setattr(E, "evaluate", lambda *arguments: found)
    monkeypatch.setattr("sys.argv", ["eval_ppl.py", "--ckpt", str(tiny), "--against", str(tmp_path / "other"), "--text",
                                     str(tmp_path / "w.npy"), "--device", "cpu"])
    E.main()
    printed = capsys.readouterr()
    assert f"perplexity {alone['ppl']:.4f}" in printed.out and "the divergence is not a number" in printed.err


def test_models_of_two_tokenizers_are_not_compared(tmp_path):
    """The same weights beside other pieces: divergence of what stands for other texts would say nothing."""
    shutil.copytree(ROOT / "demo", tmp_path / "other")
    config = {"added_tokens_decoder": {"5": {"content": "import", "special": False}}}
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.txt").write_text("import os\nimport sys\n" * 200)
    done = script("eval_ppl", "--ckpt", ROOT / "demo", "--against", tmp_path / "other", "--text", tmp_path / "a.txt",
                  "--windows", 1, "--device", "cpu")
    assert done.returncode == 2 and "--against has another tokenizer" in done.stderr


def test_script_writes_the_keys(tiny, tmp_path, windows):
    np.save(tmp_path / "w.npy", windows.numpy())
    done = script(
        "eval_ppl",
        "--ckpt",
        tiny,
        "--text",
        tmp_path / "w.npy",
        "--against",
        tiny,
        "--json",
        tmp_path / "r.json",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"ppl", "nll", "bits_per_byte", "tokens", "windows", "seqlen", "text", "js"} <= result.keys()
    assert (result["tokens"], result["windows"], result["seqlen"], result["bits_per_byte"]) == (144, 6, 24, None)
    assert f"perplexity {result['ppl']:.4f}" in done.stdout


def test_bits_a_byte(tiny, windows):
    ckpt = Checkpoint(tiny)
    found = E.evaluate(ckpt, windows, CPU, torch.float32)
    assert E.bits_per_byte(found, 1 / 3) == pytest.approx(math.log2(math.exp(found["nll"])) / 3)  # three bytes a token
    assert E.bits_per_byte(found, None) is None
