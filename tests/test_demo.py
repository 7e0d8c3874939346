"""demo/train.py: the run that made the bundled checkpoint, on a model of two small blocks and a few files."""
import argparse
import inspect
import json
import math
import shutil
import sys
import textwrap
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from demo import train
from model import PLAIN, Llama
from support.config import parse_config
from support.script import ROOT, InputError

SMALL = train.CONFIG | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2}
COMMAND = ["--tokens", "6144", "--batch", "1024", "--every", "2"]            # six steps


@pytest.fixture
def small(monkeypatch):
    rows = {"train": [Path(module.__file__).read_text() for module in (argparse, inspect, typing)],
            "test": [Path(textwrap.__file__).read_text()]}
    monkeypatch.setattr(train, "stdlib_rows", lambda split: rows[split])
    for name, value in {"CONFIG": SMALL, "MICRO_BATCH": 512, "WARMUP": 2, "EVERY": 1}.items():
        monkeypatch.setattr(train, name, value)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        train.main()
    return command


def log_of(out):
    log = json.loads((out / "train.json").read_text())["log"]
    return [(row["step"], row["tokens"], row["held_out_ppl"]) for row in log]


def test_a_killed_run_ends_where_it_would_have(tmp_path, small, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small("--out", whole, *COMMAND)
    update, left = train.update, [None] * 3

    def dies(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return update(*args)
    monkeypatch.setattr(train, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        small("--out", parts, *COMMAND)
    monkeypatch.setattr(train, "update", update)
    small("--out", parts, *COMMAND)
    assert [step for step, *_ in log_of(whole)] == [2, 4, 6] and log_of(whole) == log_of(parts)
    assert log_of(whole)[-1][2] < log_of(whole)[0][2]
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
        assert (whole / name).stat().st_mode == (whole / "train.json").stat().st_mode, name


@pytest.mark.parametrize("owner, name, at", [(train.Training, "save", 1), (train, "update", 3)])
def test_a_run_killed_before_its_first_state_goes_on(owner, name, at, tmp_path, small, monkeypatch):
    """Before any: the tokenizer is there; after a checkpoint of --keep, that is."""
    monkeypatch.setattr(train, "EVERY", 100)
    words = ["--tokens", "4096", "--batch", "1024", "--every", "100", "--keep", "2048"]
    small("--out", tmp_path / "whole", *words)
    real, calls = getattr(owner, name), []

    def dies(*args):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(owner, name, dies)
    with pytest.raises(KeyboardInterrupt):
        small("--out", tmp_path / "parts", *words)
    assert (tmp_path / "parts" / "tokenizer.model").exists()
    assert (tmp_path / "parts" / "0.002048M").exists() == (owner is train)
    small("--out", f"{tmp_path}/./parts/", *words)          # the same folder, by another name
    for file in ("model.safetensors", "0.002048M/model.safetensors", "tokenizer.model"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file


def test_the_checkpoint_of_the_lowest_perplexity_is_kept(tmp_path, small, monkeypatch):
    found = [9.0, 7.0, 8.0]
    monkeypatch.setattr(train, "perplexity", lambda *_: found.pop(0))
    small("--out", tmp_path / "run", *COMMAND, "--keep", "4096,6144")
    kept = {name: (tmp_path / "run" / name / "model.safetensors").read_bytes() for name in ("0.004096M", "0.006144M")}
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept["0.004096M"] != kept["0.006144M"]
    assert json.loads((tmp_path / "run" / "train.json").read_text())["best_held_out_ppl"] == 7.0


def test_another_runs_folder_is_refused(tmp_path, small):
    small("--out", tmp_path, *COMMAND)
    with pytest.raises(InputError, match="a run with other arguments"):
        small("--out", tmp_path, *COMMAND, "--lr", "1e-3")
    (tmp_path / "train.pt").unlink()
    with pytest.raises(InputError, match="name another --out"):
        small("--out", tmp_path, *COMMAND)
    for name in ("config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.00.pth",
                 "tokenizer.model", "train.json", "train.pt"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        shutil.copy(tmp_path / "tokenizer.model", folder)       # of a state, so that this is what is looked at
        (folder / name).write_text("mine")
        if name != "train.pt":
            (folder / "tokenizer.model").write_text("mine")
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(InputError, match="name another --out"):
            small("--out", folder, *COMMAND)
        assert before == {path: path.read_bytes() for path in folder.iterdir()}
    for words in (["--batch", "1000"], ["--batch", "0"], ["--tokens", "100"], ["--every", "0"], ["--keep", "many"],
                  ["--keep", "1.2.3"], ["--keep", "1e999"], ["--keep", "10"], ["--keep", "1024,8192"], ["--lr", "nan"],
                  ["--lr", "-1"], ["--dropout", "1"], ["--weight-decay", "-1"], ["--seed", "1" * 30]):
        with pytest.raises(InputError, match=f"{words[0]} "):
            small("--out", tmp_path / "new", *COMMAND, *words)
    assert not (tmp_path / "new").exists()


def random_model():
    torch.manual_seed(0)
    return Llama(parse_config(SMALL)).double()


def plain(model):
    return lambda ids: model(ids, PLAIN)


def test_micro_batches_are_one_batch():
    windows = torch.randint(2048, (4, 17))
    after, losses = [], []
    for batches in ([windows], list(windows.split(1))):
        model = random_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append(train.update(model, plain(model), [optimizer], batches))
        after.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
        assert all(w.grad is None for w in model.parameters())
    logits = random_model()(windows[:, :-1]).flatten(0, 1)
    wanted = F.cross_entropy(logits.float(), windows[:, 1:].flatten())
    assert torch.allclose(after[0], after[1], atol=1e-7)
    assert losses == pytest.approx([wanted.item()] * 2, rel=1e-6)
    # Clipped to a norm of 1, a step by plain gradients is as long as the rate.
    before = torch.cat([w.detach().flatten() for w in random_model().parameters()])
    assert (after[0] - before).norm() <= 0.1 + 1e-6


def test_perplexity_is_of_every_token_but_each_windows_first():
    model = random_model().float()
    windows = torch.randint(2048, (35, 12))
    nll = [-model(row[None])[0].log_softmax(-1)[t, row[t + 1]].item() for row in windows for t in range(11)]
    assert train.perplexity(model, windows, torch.float32) == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert model.training


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_every_parameter_is_trained_once_and_norms_do_not_decay(optimizer):
    model = random_model()
    optimizers = train.optimizers_of(model, SimpleNamespace(optimizer=optimizer, lr=1e-3, weight_decay=0.3))
    groups = [group for each in optimizers for group in each.param_groups]
    trained = [w for group in groups for w in group["params"]]
    decay = {id(w): group["weight_decay"] for group in groups for w in group["params"]}
    assert len(trained) == len(decay) == len(list(model.parameters()))
    assert all(decay[id(w)] == (0.3 if w.dim() == 2 else 0) for w in model.parameters())
    by_muon = [w for each in optimizers[:-1] for group in each.param_groups for w in group["params"]]
    assert len(by_muon) == (14 if optimizer == "muon" else 0)          # seven of each block, no table


def test_a_whole_window_shares_what_is_dropped():
    torch.manual_seed(0)
    ops = train.regularised("cpu", 0.25)
    x = torch.ones(64, 5, 40)
    kept = ops.silu(x) / F.silu(x)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75]) and kept.mean().item() == pytest.approx(1, abs=0.05)
    assert train.regularised("cpu", 0).silu is PLAIN.silu


def test_the_rate_rises_and_ends_at_a_tenth():
    rates = [train.rate_at(step, 1000) for step in range(1001)]
    assert rates[0] == 0 and rates[50] == 0.5 and max(rates) == rates[100] == 1
    assert rates[550] == pytest.approx(0.55) and rates[1000] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))


def test_the_bundled_checkpoint_is_of_its_logs_best_evaluation():
    facts = json.loads((ROOT / "demo" / "train.json").read_text())
    assert facts["best_held_out_ppl"] == min(row["held_out_ppl"] for row in facts["log"])
    assert facts["arguments"]["optimizer"] == "adamw"
