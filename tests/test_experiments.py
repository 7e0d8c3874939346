"""experiments/: means and verdicts, compression in memory, resuming, the README's blocks, the committed results."""
import copy
import importlib
import json
import math
import re
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, distance, script, write_checkpoint
from safetensors.torch import load_file, save_file

import air
from air import Options, als_sweep, normalise, pick_ranks, profile
from eval_ppl import evaluate, last_states
from experiments import common, report
from experiments.common import Lab, Setup, compress
from experiments.report import compare, find, mean_spread, refresh, show
from influence import attn_lrp
from model import LAYERS
from support.checkpoint import Checkpoint
from support.script import InputError
from support.texts import digest

SCRIPTS = ("table2", "table7", "table8", "fig1", "fig2", "fig3", "fig5", "fig6", "a6", "open_questions")
RESULTS = ROOT / "experiments" / "results"
CPU, FP32 = torch.device("cpu"), torch.float32


# -------------------------------------------------------------------------------- means and words
def test_mean_and_spread_by_hand():
    assert mean_spread([2.0, 4.0, 9.0]) == (5.0, math.sqrt((9 + 1 + 16) / 2))
    assert mean_spread([2.0, 4.0, 9.0])[1] == pytest.approx(statistics.stdev([2.0, 4.0, 9.0]))
    assert mean_spread([7.0]) == (7.0, None)
    assert show([22.0, 23.0, 24.0]) == "23.00 ± 1.00" and show([7.0]) == "7.00"
    assert show([1500.0, 2500.0]) == "2,000 ± 707.1" and show([math.inf]) == "inf"
    assert [report.number(x) for x in (99_400.0, 123_456.0, 9.03e8, 2.5e12)] == ["99,400", "1.2e5", "9.0e8", "2.5e12"]


def test_a_table_has_as_many_cells_in_each_row():
    assert report.table(["", "b"], [["|W|", 1]]) == "|  | b |\n| --- | ---: |\n| \\|W\\| | 1 |"
    for row in (["a"], ["a", 1, 2]):
        with pytest.raises(ValueError):
            report.table(["", "b"], [row])


def test_no_difference_is_a_paired_mean_within_its_spread():
    # The levels of the seeds are far apart; paired, 1 % below at each of them is a difference.
    lower = compare([99.0, 198.0, 396.0], [100.0, 200.0, 400.0])
    assert lower == (pytest.approx(-1), pytest.approx(0, abs=1e-9), "lower")
    mean, spread, word = compare([102.0, 99.0, 101.0], [100.0] * 3)         # +2, -1, +1: mean 2/3, spread 1.53
    assert (mean, spread, word) == (pytest.approx(2 / 3), pytest.approx(math.sqrt(7 / 3)), "no difference")
    assert compare([103.0, 101.0, 102.0], [100.0])[2] == "higher"           # one value stands for every seed
    assert compare([5.0, 6.0], [5.0, 6.0])[2] == "no difference"
    assert compare([5.0], [4.0])[2] == "undecided" and compare([5.0, None], [4.0, 4.0])[2] == "undecided"
    assert report.percent(compare([None], [4.0])) == report.percent(compare([1.0], [0.0])) == "not measured"
    assert report.percent(lower).startswith("-1.0 ± 0.0 %") and report.percent(compare([5.0], [4.0])) == "+25.0 %"
    assert report.percent(compare([23.73, 43.73], [1.0])) == "+3,273 ± 1,414 %"
    assert report.percent(compare([1.0, 4e4], [1.0])) == "+2.0e6 ± 2.8e6 % (no difference)"


def test_figures_of_ruined_models_are_told():
    assert mean_spread([1e200, 2e200, 3e200]) == (2e200, math.inf)
    closed = importlib.import_module("experiments.closed")
    figures = {"SVD-LLM(W)": [10.0], "AIR, δ = 2": [None], "SVD": [1e6]}
    result = {"rows": [{"variant": name, "rate": 0.6, "ppl": {"text": ppl}} for name, ppl in figures.items()]}
    assert closed.cells(result, "AIR, δ = 2", 0.6) == ["–", "not measured"]
    assert closed.cells(result, "SVD", 0.6) == ["1.0e6", "far above"]


# -------------------------------------------------------------------------------- verdicts, told both ways
BASE = {"checkpoint": "made-up", "calibs": ["A", "B"], "dense": {"text": 5.0, "text2": 7.0},
        "texts": {t: {"name": t.upper(), "windows": 1, "of": 1, "seqlen": 8} for t in ("text", "text2")},
        "calibration": {"text": "A", "samples": 64, "seqlen": 8, "seeds": [3, 4, 5]}}


def rows(settings, level):
    """Rows as Lab.measure returns them: perplexity level(setting) at three seeds."""
    made = []
    for setting in settings:
        values = [level(setting) * seed for seed in (0.9, 1.0, 1.1)]
        js = [value / 1e4 for value in values]
        measured = {"ppl": {"text": values, "text2": values}, "js": {"text": js, "text2": js}, "descent": [0.8] * 3}
        made.append(setting | measured)
    return BASE | {"rows": made}


def grid(**axes):
    made = [{}]
    for key, values in axes.items():
        made = [each | {key: value} for each in made for value in values]
    return made


def cases():
    """Per script: a result on which every claim of the paper holds, and one on which none does."""
    rates = (0.8, 0.6, 0.4, 0.2)
    order = {"svdllm": 100, "asvd": 300, "svd": 500, "fwsvd": 900}
    gap = {0.8: 0.80, 0.6: 0.75, 0.4: 0.65, 0.2: 0.5}
    setting = grid(method=("svd", "fwsvd", "asvd", "svdllm", "air"), rate=rates)
    yield "table2", rows(setting, lambda s: order.get(s["method"], 100 * gap[s["rate"]])), \
        rows(setting, lambda s: {"svdllm": 1000, "fwsvd": 400, "asvd": 300, "svd": 500}.get(s["method"], 1100))
    signals = ("ones", "magnitude", "grad", "wxg", "fisher", "lrp", "lrp-all")
    setting = grid(rate=(0.6, 0.4), signal=signals, scale=("mean", "max100"))
    yield "table7", rows(setting, lambda s: 120 if s["signal"] in ("ones", "magnitude") else 100), \
        rows(setting, lambda s: {"ones": 90, "magnitude": 80, "fisher": 130, "lrp-all": 70}.get(s["signal"], 100))
    ways = [{"order": order, "sweeps": n}
            for order, n in (("backward", 1), ("forward", 1), ("backward", 2), ("backward", 10))]
    setting = [{"rate": rate} | way for rate in (0.6, 0.4) for way in ways]

    def sweeps(good):
        made = rows(setting, lambda s: 100 + (5 if good else -5) * (s["order"] == "forward" or s["sweeps"] > 1))
        for row in made["rows"]:
            row["descent"] = [0.9 - (0.01 if good else -0.01) * row["sweeps"]] * 3
        return made
    yield "table8", sweeps(True), sweeps(False)
    setting = grid(method=("air",), rate=(0.6, 0.4), delta=(0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0))
    yield "fig3", rows(setting, lambda s: 100 + abs(s["delta"] - 2)), rows(setting, lambda s: 300 - s["delta"])
    setting = grid(method=("svdllm", "air"), samples=(4, 8, 16, 32, 64, 128))
    yield "fig5", rows(setting, lambda s: (100 if s["method"] == "svdllm" else 80) + 100 / s["samples"]), \
        rows(setting, lambda s: (100 if s["method"] == "svdllm" else 120) + 100 / s["samples"])
    setting = grid(method=("svdllm", "air"), calib=("A", "B"))
    yield "a6", rows(setting, lambda s: 80 if s["method"] == "air" else 100), rows(setting, lambda s: 100)
    variants = ("default", "reversed", "random", "energy", "symmetric", "wxg", "profiled", "max100")
    setting = grid(variant=variants, rate=(0.6, 0.4))
    yield "open_questions", rows(setting, lambda s: {"symmetric": 90, "profiled": 90}.get(s["variant"], 100)), \
        rows(setting, lambda s: dict(reversed=110, symmetric=110, profiled=110, max100=90).get(s["variant"], 100))
    def curve(infl, act, rise):
        return {name: {"rank": 2, "updates": [0, 1, 2], "infl": infl, "act": act, "rise": rise} for name in LAYERS}
    more = {"block": 1, "layer": LAYERS[0]}
    yield "fig1", BASE | more | {"curves": [curve([1, 0.8, 0.7], [1, 1.1, 1.2], -0.1)] * 3}, \
        BASE | more | {"curves": [curve([1, 0.98, 0.7], [1, 0.9, 0.8], 1e-3)] * 3}
    kinds = ("weights random", "weights outliers", "activations random", "activations outliers")
    yield "fig2", BASE | {"spearman": dict(zip(kinds, ([0.4] * 3, [0.1] * 3, [0.1] * 3, [-0.1] * 3)))}, \
        BASE | {"spearman": dict(zip(kinds, ([0.9] * 3, [0.5] * 3, [0.3] * 3, [-0.3] * 3)))}

    def maps(influence, mlp, rho):
        kinds = {"weight": 0.1, "weight influence": influence, "activation": 0.1, "activation influence": 1.0}
        spread = {row: dict.fromkeys(LAYERS, value) for row, value in kinds.items()}
        for name in LAYERS:
            spread["weight influence"][name] *= mlp if name.startswith("mlp") else 1
        return BASE | {"block": 2, "cell": 8, "variation": spread,
                       "spearman": {row: dict.fromkeys(LAYERS, rho) for row in ("weight", "activation")}}
    yield "fig6", maps(0.3, 2.0, 0.2), maps(0.09, 0.5, 0.9)


@pytest.mark.parametrize("name,true,false", list(cases()), ids=lambda x: x if isinstance(x, str) else "")
def test_verdicts_tell_true_from_false(name, true, false):
    module = importlib.import_module(f"experiments.{name}")
    assert [v["claim"] for v in module.verdicts(true) if v["holds"] is not True] == []
    assert [v["claim"] for v in module.verdicts(false) if v["holds"] is not False] == []
    for result in (true, false):                                            # and the block says so in words
        text = report.block(module, result)
        assert ("does not hold" in text) == (result is false) and "| " in text


@pytest.mark.parametrize("name,true,false", [case for case in cases() if "rows" in case[1]], ids=lambda x: str(x)[:14])
def test_one_seed_decides_nothing(name, true, false):
    module = importlib.import_module(f"experiments.{name}")
    for result in copy.deepcopy((true, false)):
        for row in result["rows"]:
            for what in ("ppl", "js"):
                row[what] = {text: values[:1] for text, values in row[what].items()}
        # That a sweep lowers the loss is Proposition 3.1, whatever the seed.
        assert {v["holds"] for v in module.verdicts(result) if "lowering L_act" not in v["claim"]} <= {None}, name


def test_what_was_not_measured_decides_nothing():
    from experiments import fig5
    result = next(true for name, true, _ in cases() if name == "fig5")
    assert fig5.saves_data(result)["holds"] is True
    find(result["rows"], method="svdllm", samples=128)["ppl"]["text"][1] = None
    found = fig5.saves_data(result)
    assert found["holds"] is None and "not measured" in found["measured"]


def test_the_crossing_is_interpolated_in_the_logarithm():
    from experiments.fig5 import crossing
    level = {("svdllm", 16): 50, ("svdllm", 64): 40, ("air", 16): 45, ("air", 64): 35}
    setting = grid(method=("svdllm", "air"), samples=(16, 64))
    n, fewest = crossing(rows(setting, lambda s: level[s["method"], s["samples"]]))
    assert n == pytest.approx(32) and not fewest                            # halfway from 45 to 35, and from 16 to 64
    assert crossing(rows(setting, lambda s: 100 - s["samples"] + 80 * (s["method"] == "air"))) is None


def test_a_further_method_is_a_further_line_of_table2(monkeypatch):
    """One line of ROWS brings a method that the paper does not have into every part of the report."""
    module = importlib.import_module("experiments.table2")
    paper = dict(module.ROWS)
    monkeypatch.setitem(module.ROWS, "mine", module.Row("Mine", "green", "P", None))
    setting = grid(method=tuple(module.ROWS), rate=module.RATES)
    result = rows(setting, lambda s: 100 + 10 * list(module.ROWS).index(s["method"]) / s["rate"])
    for text in (module.markdown(result), module.short(result)):
        assert all(f"| {row.name} |" in text for row in module.ROWS.values())
    mine = [line for line in module.markdown(result).splitlines() if "| Mine |" in line]
    assert len(mine) == len(module.RATES) and all(line.endswith("| – | – | – | – |") for line in mine)
    assert [v["claim"] for v in module.verdicts(result)] and "Mine" in report.block(module, result)
    # The table of a result that was measured before the method was added stays what it was.
    before = result | {"rows": [row for row in result["rows"] if row["method"] != "mine"]}
    assert "Mine" not in module.markdown(before) + module.short(before)
    pytest.importorskip("matplotlib")
    figure = module.picture(report.pyplot(), result)
    ours, theirs = ([curve.get_label() for curve in ax.containers] for ax in figure.axes)
    assert ours == [row.name for row in module.ROWS.values()] and theirs == [row.name for row in paper.values()]
    colours = {curve.lines[0].get_color() for curve in figure.axes[0].containers}
    assert len(colours) == len(module.ROWS)


# -------------------------------------------------------------------------------- in memory, and again
@pytest.fixture
def lab(tmp_path):
    write_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    np.save(tmp_path / "ids.npy", np.random.RandomState(0).randint(0, 64, size=2000))
    usual = {"ckpt": str(tmp_path / "tiny"), "calib": str(tmp_path / "ids.npy"), "samples": 6, "seqlen": 16,
             "windows": 5, "seeds": "3,4", "work": tmp_path / "work", "results": tmp_path}
    return lambda **more: Lab("test", Setup(**usual | more))


@pytest.mark.parametrize("method", ("air", "svdllm", "fwsvd", "asvd", "svd"))
def test_in_memory_equals_what_air_writes(lab, tmp_path, method, monkeypatch):
    """The same perplexity and divergence from air.py's folder by eval_ppl.evaluate."""
    here = lab(device="cpu")
    row, = here.measure([{"method": method, "rate": 0.5}], js=True)
    # The kept statistics: for methods without a signal air.py would take ΣXXᵀ from a forward sweep, last digits apart.
    stats = [] if method == "svd" else ["--stats", *here.work.glob(f"stats-{digest(here.calibration(3))[:16]}-*")]
    monkeypatch.setattr(sys, "argv", ["air.py", *map(str, (
        "--ckpt", tmp_path / "tiny", "--calib", tmp_path / "ids.npy", "--samples", 6, "--seqlen", 16, "--rate", 0.5,
        "--method", method, "--text", "none", "--out", tmp_path / "out", "--quiet", "--device", "cpu", "--ridge", 0,
        *stats))])
    air.main()
    windows = here.evaluation("text")
    dense = last_states(here.ckpt, windows, CPU, FP32)
    there = evaluate(Checkpoint(tmp_path / "out"), windows, CPU, FP32, dense)
    assert row["ppl"]["text"][0] == pytest.approx(there["ppl"], rel=1e-6)
    assert row["js"]["text"][0] == pytest.approx(there["js"], rel=1e-4)
    assert here.dense("text") == pytest.approx(evaluate(here.ckpt, windows, CPU, FP32)["ppl"], rel=1e-6)


def test_biases_and_tied_embeddings_survive_in_memory(tmp_path, windows):
    ckpt = Checkpoint(write_checkpoint(tmp_path / "q", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True))
    blocks = range(ckpt.cfg.n_layers)
    ranks = pick_ranks(ckpt, blocks, 0.5)
    small, _ = compress(ckpt, ((l, {}) for l in blocks), ranks, Options(method="svd"), CPU)
    logits = small.model(CPU, FP32)(windows)[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert evaluate(small, windows, CPU, FP32)["ppl"] == pytest.approx(nll.exp().item(), rel=1e-5)
    bias = "model.layers.0.self_attn.q_proj.U.bias"
    assert torch.equal(small.tensor(bias), ckpt.tensor(bias.replace(".U", "")))


def test_a_finished_cell_is_not_computed_again_but_a_changed_checkpoint_is(lab, tmp_path, monkeypatch):
    settings = [{"method": "air", "rate": 0.5}, {"method": "svd", "rate": 0.5}]
    first, calls = lab().measure(settings), []
    monkeypatch.setattr(common, "compress", lambda *args: calls.append(args[2]) or compress(*args))
    assert lab().measure(settings) == first and calls == []
    with open(lab().cells.path, "a") as f:
        f.write('["half a li')                                              # killed while it wrote
    assert len(first[0]["ppl"]["text"]) == 2 and len(first[1]["ppl"]["text"]) == 1
    assert find(lab().measure([*settings, {"method": "air", "rate": 0.6}]), rate=0.6)
    assert calls == 2 * [pick_ranks(lab().ckpt, range(2), 0.6)]
    # The divergence was not measured yet.
    again = lab().measure([*settings, {"method": "air", "rate": 0.6}], js=True)
    assert len(calls) == 2 + 5 and [row["ppl"] for row in again[:2]] == [row["ppl"] for row in first]
    calls.clear()
    write_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16, seed=1)
    changed = lab().measure(settings)
    assert len(calls) == 3 and changed[0]["ppl"] != first[0]["ppl"]


def test_a_cell_of_an_edited_rule_is_computed_again_one_of_an_edited_comment_is_not(lab, tmp_path, monkeypatch):
    """Rules in a copy of the repository: a cell is known by the code that computes it."""
    copied, calls = tmp_path / "copy", []
    for name in (*common.CODE, "experiments/open_questions.py"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copied / name)
    monkeypatch.setattr("support.script.ROOT", copied)
    monkeypatch.setattr(common, "compress", lambda *args: calls.append(args[3].method) or compress(*args))
    importlib.import_module("experiments.open_questions")                   # "reversed" is one of its methods
    settings = [{"method": method, "rate": 0.5} for method in ("air", "reversed")]

    def measured_after(name=None, old=None, new=None):
        """The methods that are computed once `old` in a file has become `new`."""
        if name:
            text = (copied / name).read_text("utf-8")
            assert old in text
            (copied / name).write_text(text.replace(old, new, 1), "utf-8")
        calls.clear()
        here = lab(seeds="3")
        dense = here.cell({"some": "cell"}, lambda: len(calls)), here.measure(settings)
        return calls.copy(), len(here.cells), dense

    assert measured_after()[:2] == (["air", "reversed"], 3)
    assert measured_after()[:2] == ([], 3)
    # What is said in comments and docstrings, or below "the command", computes nothing.
    assert measured_after("air.py", '"""Eq. 1: S =', '"""S =')[0] == []
    assert measured_after("influence.py", "# ----", "# another comment\n# ----")[0] == []
    assert measured_after("air.py", "def main(", "def run_it(")[0] == []
    # A rule of the sweep that every cell has, of the solve, of the evaluation; then one variant's own.
    assert measured_after("influence.py", "uniform(product):", "halved(product):")[:2] == (["air", "reversed"], 6)
    assert measured_after("air.py", "P = 1 + delta * I", "P = 2 + delta * I")[:2] == (["air", "reversed"], 9)
    assert measured_after("eval_ppl.py", "- math.log(2)", "- math.log(3)")[:2] == (["air", "reversed"], 12)
    assert measured_after("experiments/open_questions.py", "len(S) - 1, -1, -1", "len(S) - 1, -1, -2")[:2] == (
        ["reversed"], 13)
    # What ranks are measured by; how config.json is read.
    assert measured_after("air.py", "sigma.double().square()", "sigma.double()")[:2] == (["air", "reversed"], 16)
    assert measured_after("support/config.py", "norm_eps=", "norm_eps=2 * ")[:2] == (["air", "reversed"], 19)


@pytest.mark.parametrize("name", ("fig1", "fig2", "open_questions"))
def test_what_a_script_computes_stands_above_its_marker(name, tmp_path, monkeypatch):
    """The digest of fig1, fig2 and the variants covers their computing functions, not their tables."""
    from support.script import COMMAND, code_digest
    source = (ROOT / "experiments" / f"{name}.py").read_text("utf-8")
    above, marker, below = source.partition(COMMAND)
    computing = {"fig1": ("curves", "measure"), "fig2": ("activations", "sample", "spearman", "measure"),
                 "open_questions": ("reordered", "symmetric", "profiled")}[name]
    assert marker and all(f"def {function}(" in above for function in computing)
    assert all(f"def {function}(" in below for function in ("markdown", "verdicts", "main"))
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr("support.script.ROOT", tmp_path)

    def digest_of(text):
        (tmp_path / "experiments" / f"{name}.py").write_text(text, "utf-8")
        return code_digest(f"experiments/{name}.py")
    was = digest_of(source)
    assert digest_of(source.replace("def markdown(", "def table_of(")) == was
    assert digest_of(source.replace(f"def {computing[0]}(", "def renamed(")) != was


def test_the_cells_of_fig1_know_its_own_code(tmp_path, lab):
    here = lab(seeds="3")
    here.cell({"fig1": 0}, lambda: 1)
    assert here.cell({"fig1": 0}, lambda: 2) == 1 and here.cell({"fig1": 0}, lambda: 2, "experiments/fig1.py") == 2


@pytest.mark.parametrize("name", ("stack", "table4"))
def test_cells_of_what_is_stacked_know_the_code_beside_the_commands(lab, monkeypatch, name):
    from experiments import stack, table4
    asked = []
    monkeypatch.setattr(Lab, "cell", lambda self, facts, compute, *files, what="": asked.append(files))
    here = lab(seeds="3")
    if name == "stack":
        stack.chain(here, {"method": "air", "rate": 0.5, "form": "AIR"}, [("refine", {})], 3)
        with pytest.raises(AttributeError):
            stack.measure_acip(here, [0.5])
    else:
        table4.closed(here, "AIR", 3, 0.5)
        table4.peer(here, "SliceGPT", 3, [0.5], 2)
    assert len(asked) == 2 and all(f"experiments/{name}.py" in files for files in asked)


def test_results_of_another_model_of_the_same_name_are_left_alone(lab, tmp_path):
    here = lab()
    (tmp_path / "test-tiny.json").write_text(json.dumps({"fingerprint": here.facts["fingerprint"]}))
    lab()
    (tmp_path / "test-tiny.json").write_text(json.dumps({"fingerprint": "other"}))
    with pytest.raises(InputError, match="another model of this name"):
        lab()


def test_windows_of_an_array_are_one_measurement(lab, tmp_path):
    """The seed draws windows from a text; an array holds them."""
    np.save(tmp_path / "w.npy", np.random.RandomState(0).randint(0, 64, size=(6, 16)))
    with pytest.raises(InputError, match="give --seeds 3"):
        lab(calib=str(tmp_path / "w.npy"))
    assert lab(calib=str(tmp_path / "w.npy"), seeds="4").seeds == [4]


def test_evaluation_windows_are_evenly_spaced_and_all_of_them_for_0(lab):
    every, some = lab(windows=0).evaluation("text"), lab().evaluation("text")
    assert len(every) == 125 and torch.equal(some, every[[0, 31, 62, 93, 124]])


def test_the_second_text_is_held_out_by_file(tmp_path):
    train, test = (Path(common.torch_nn(split, tmp_path)).read_text("utf-8") for split in ("train", "test"))
    files = [path.read_text("utf-8") for path in Path(torch.nn.__file__).parent.rglob("*.py")]
    files = [text for text in files if len(text) > 200]
    assert all((text in train) != (text in test) for text in files) and 0.02 < len(test) / len(train) < 0.3


# -------------------------------------------------------------------------------- variants of the open questions
def test_reordered_inputs_change_nothing_without_influence():
    """With I = 1 any order of inputs, and a symmetric root, reach SVD-LLM(W)'s optimum."""
    from experiments.open_questions import reordered, symmetric
    g = torch.Generator().manual_seed(0)
    X, W = torch.randn(12, 40, generator=g, dtype=torch.float64), torch.randn(9, 12, generator=g, dtype=torch.float64)
    S, I = profile(X @ X.T)[0], torch.ones(9, 12, dtype=torch.float64)
    Ub, s, Vb = torch.linalg.svd(W @ S)
    best = (Ub[:, :4] * s[:4]) @ Vb[:4] @ torch.linalg.inv(S)
    for U, V, _ in (reordered(W, S, I, 4, torch.randperm(12, generator=g)), symmetric(W, S, I, 4)):
        assert distance(U @ V, best) < 1e-9


def test_profiled_influence_is_the_gradient_of_the_profiled_weight(lab):
    """Against autograd through W = W' S⁻¹, one layer at a time."""
    from experiments.open_questions import profiled
    here = lab()
    windows = here.calibration(3)[:2]
    stats, model, name = dict(profiled(here, windows)), here.ckpt.model(CPU, FP32), "mlp.up_proj"
    S = profile(stats[1]["mlp.gate_proj.gram"])[0].float()
    layer, wanted = model.get_submodule(f"model.layers.1.{name}"), 0
    profiled_weight = (layer.weight @ S).detach().requires_grad_()
    for ids in windows.split(1):
        weights = {f"model.layers.1.{name}.weight": profiled_weight @ torch.linalg.inv(S)}
        logits = torch.func.functional_call(model, weights, (ids,))
        grad, = torch.autograd.grad(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]), profiled_weight)
        wanted = wanted + (grad * profiled_weight.detach()).abs()
    assert distance(stats[1][f"{name}.profiled"], wanted) < 1e-3


def test_relevance_of_activations_is_output_times_gradient(lab):
    """R = z ⊙ g of a layer's output, against a hook that sees z before the ε-rule's factor z / (z + ε·sign z)."""
    from experiments.fig2 import activations
    here = lab()
    ids, name = here.calibration(3)[:1], "model.layers.1.mlp.down_proj"
    model, ops, kept = here.ckpt.model(CPU, FP32), attn_lrp(), {}
    model.get_submodule(name).register_forward_hook(lambda m, x, y: kept.setdefault("z", y.requires_grad_()))
    target = model(ids, ops)[0, -1].max()
    g, = torch.autograd.grad(target, kept["z"])
    z = kept["z"]
    scale = z / (z + 1e-6 * z.sign())
    A, R = activations(here.ckpt, ids, CPU, FP32)[name]
    assert distance(A, z.detach().abs()) < 1e-6 and distance(R * scale.detach().abs(), (z * g).detach().abs()) < 1e-4


def test_fig1_curves_end_where_one_sweep_ends():
    from experiments.fig1 import curves
    g = torch.Generator().manual_seed(0)
    W = torch.randn(10, 8, generator=g, dtype=torch.float64)
    I = normalise(torch.rand(10, 8, generator=g, dtype=torch.float64) ** 4)
    S = torch.linalg.cholesky(torch.cov(torch.randn(8, 50, generator=g, dtype=torch.float64)))
    c = curves(W, S, I, 5)
    P, (U, s, V) = 1 + 2 * I, torch.linalg.svd(W @ S, full_matrices=False)
    start = (P * (W @ S - (U[:, :5] * s[:5]) @ V[:5]) ** 2).sum()
    U, s, V = als_sweep(W @ S, P, U[:, :5], s[:5], V[:5], range(4, -1, -1))
    end = (P * (W @ S - (U * s) @ V) ** 2).sum()
    assert c["infl"][-1] == pytest.approx((end / start).item(), abs=1e-6)
    assert c["updates"] == [0, 1, 2, 3, 4, 5] and c["rise"] < 0


# -------------------------------------------------------------------------------- README and committed results
def test_markers_are_refreshed_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    rest = "b\n<!-- fig5 -->\nkept\n<!-- /fig5 -->\n"
    readme.write_text(f"a\n<!-- fig3 -->\nold\nold\n<!-- /fig3 -->\n{rest}", "utf-8")
    refresh("fig3", "| new \\1 |", tmp_path)
    assert readme.read_text("utf-8") == f"a\n<!-- fig3 -->\n| new \\1 |\n<!-- /fig3 -->\n{rest}"
    # A block that a README does not have (any more) is not replaced, and nothing is added.
    before = readme.read_text("utf-8")
    refresh("fig6", "| never |", tmp_path)
    assert readme.read_text("utf-8") == before
    # A checkpoint's folder may be called anything.
    refresh("fig3-llama(1", "| never |", tmp_path)
    assert readme.read_text("utf-8") == before


REPORTED = sorted(path.stem for path in RESULTS.glob("*.json") if '"verdicts"' in path.read_text("utf-8"))


@pytest.mark.parametrize("stem", sorted({*REPORTED, *(f"{name}-demo" for name in SCRIPTS)}))
def test_readme_and_committed_results_agree(stem):
    """The block between a script's markers, wherever they are, is made from its committed JSON; so are its verdicts."""
    result = json.loads((RESULTS / f"{stem}.json").read_text("utf-8"))
    module = importlib.import_module(f"experiments.{result['script']}")
    assert result["verdicts"] == module.verdicts(result) and stem == f"{result['script']}-{result['checkpoint']}"
    mark = stem.removesuffix("-demo")
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *(ROOT / "experiments").glob("*.md"))]
    blocks = [block for text in texts for block in re.findall(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", text, re.S)]
    assert blocks and all(each == report.block(module, result) for each in blocks)


def test_the_readmes_have_every_claim_and_the_short_table_where_they_show_it():
    table2 = importlib.import_module("experiments.table2")
    result = json.loads((RESULTS / "table2-demo.json").read_text("utf-8"))
    wanted = {"claims": report.claims(RESULTS), "table2-short": table2.short(result)}
    texts = [(ROOT / path).read_text("utf-8") for path in ("README.md", "experiments/README.md")]
    found = {name: [each for text in texts for each in re.findall(
        rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.S)] for name in wanted}
    assert found["claims"] and all(each == wanted[name] for name, blocks in found.items() for each in blocks)


def test_the_closed_forms_in_the_readme_are_the_committed_results():
    table = importlib.import_module("experiments.closed").side_by_side(RESULTS)
    assert f"<!-- models -->\n{table}\n<!-- /models -->" in (ROOT / "README.md").read_text("utf-8")


def test_committed_results_are_of_one_checkpoint_the_bundled_one():
    prints = {json.loads((RESULTS / f"{name}-demo.json").read_text("utf-8"))["fingerprint"] for name in SCRIPTS}
    assert prints == {Checkpoint(ROOT / "demo").fingerprint()}


def test_a_script_runs_alone_and_says_what_is_wrong(tmp_path):
    done = script("experiments/a6", "--ckpt", ROOT / "demo", "--seeds", "three", "--work", tmp_path,
                  "--results", tmp_path)
    assert done.returncode == 2 and "--seeds is three" in done.stderr and "Traceback" not in done.stderr


def test_measured_ranks_are_searched_once_for_all_methods_and_are_the_commands(lab, tmp_path, monkeypatch):
    calls = []
    search = common.find_ranks
    monkeypatch.setattr(common, "find_ranks", lambda *args: calls.append(1) or search(*args))
    settings = [{"method": method, "rate": 0.5, "ranks": "auto", "ridge": None} for method in ("kfac", "air")]
    here = lab()
    rows = here.measure(settings)
    assert len(calls) == len(here.seeds)
    assert lab().measure(settings) == rows and len(calls) == len(here.seeds)
    job = here.job(settings[0], here.seeds[0])
    found = here.ranks(job, common.options_of(settings[0]))
    uniform = pick_ranks(here.ckpt, range(2), 0.5)
    assert found.keys() == uniform.keys() and len(calls) == len(here.seeds)


# -------------------------------------------------------------------------------- beyond the paper's tables
def test_a_claim_stands_once_with_its_verdict_on_every_model(tmp_path):
    def write(model, *verdicts):
        made = [report.verdict(claim, holds, "…") for claim, holds in verdicts]
        (tmp_path / f"table8-{model}.json").write_text(json.dumps({"verdicts": made}), "utf-8")
    write("demo", ("A.", True), ("B.", False))
    write("smollm2", ("B.", None))
    lines = report.claims(tmp_path).splitlines()
    assert lines[2:] == ["| `table8` | A. | holds | – | – |", "| `table8` | B. | **does not hold** | – | undecided |"]


@pytest.fixture
def result_of(tmp_path, monkeypatch, lab):
    """What a script writes for the tiny model."""
    def run(name, *more, **edits):
        module = importlib.import_module(f"experiments.{name}")
        for key, value in edits.items():
            monkeypatch.setattr(module, key, value)
        setup = lab().setup
        argv = [name, *more, "--ckpt", setup.ckpt, "--calib", setup.calib, "--seeds", "3", "--windows", "5"]
        argv += ["--samples", "6", "--seqlen", "16", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", argv)
        module.main()
        written = json.loads((tmp_path / f"{name}-tiny.json").read_text("utf-8"))
        assert module.markdown(written) in report.block(module, written)
        assert written["verdicts"] == module.verdicts(written)
        return module, written
    return run


def ppl_of(lab, **setting):
    row, = lab(seeds="3").measure([{"rate": 0.6} | setting])
    return row["ppl"]["text"]


def test_one_kind_by_air_is_that_kinds_factors_and_all_the_others(result_of, lab):
    module, result = result_of("kinds")
    assert find(result["rows"], method="air", delta=0.5)["ppl"]["text"] == ppl_of(lab, method="air", delta=0.5)
    values = [find(result["rows"], method=row, delta=2.0)["ppl"]["text"] for row in module.MIXED]
    assert len(module.MIXED) == len({tuple(each) for each in values}) == 7 + 2
    assert find(result["rows"], method="svdllm", delta=2.0)["ppl"]["text"] == ppl_of(lab, method="svdllm")
    # By hand: one kind's factors of AIR, everything else SVD-LLM(W)'s.
    here = lab(seeds="3")
    jobs = (here.job({"method": method, "rate": 0.6}, 3) for method in ("svdllm", "air"))
    base, other = (here.compressed(job)[0] for job in jobs)
    mixed = {name: (other if "up_proj" in name else base).tensors[name] for name in base.names}
    base.tensors = mixed
    wanted = evaluate(base, here.evaluation("text"), here.device, here.dtype)["ppl"]
    assert find(result["rows"], method="up_proj", delta=2.0)["ppl"]["text"] == [wanted]
    base.tensors = {name: (other if "v_proj" not in name else base).tensors[name] for name in base.names}
    svdllm = here.compressed(here.job({"method": "svdllm", "rate": 0.6}, 3))[0]
    base.tensors |= {name: svdllm.tensors[name] for name in base.names if "v_proj" in name}
    wanted = evaluate(base, here.evaluation("text"), here.device, here.dtype)["ppl"]
    assert find(result["rows"], method="all but v_proj", delta=2.0)["ppl"]["text"] == [wanted]


def test_a_row_depends_on_what_was_asked_not_on_what_ran_before(lab):
    setting = [{"method": "svdllm", "rate": 0.6}]
    before = lab(seeds="3").measure(setting)
    assert "js" in lab(seeds="3").measure(setting, js=True)[0]
    assert lab(seeds="3").measure(setting) == before and "js" not in before[0]


def test_one_seed_twice_is_no_spread(lab):
    with pytest.raises(InputError, match="different numbers"):
        lab(seeds="3,3")
    with pytest.raises(InputError, match="different numbers"):
        lab(seeds="3,03")


def test_what_is_stacked_is_evaluated_on_the_windows_that_are_asked_for(lab):
    """Not on those of an earlier run in the same folder."""
    stack = importlib.import_module("experiments.stack")
    settings = [{"method": "svdllm", "rate": 0.6, "form": "SVD-LLM(W)"}]
    for windows in (2, 5):
        here = lab(seeds="3", windows=windows)
        row, = stack.measure(here, settings, {"alone": []})
        small, _ = here.compressed(here.job(settings[0], 3))
        assert row["ppl"]["text"] == [evaluate(small, here.evaluation("text"), here.device, here.dtype)["ppl"]]


def test_a_method_that_reads_no_text_reads_some_for_measured_ranks(lab):
    rows = lab(seeds="3").measure([{"method": "svd", "rate": 0.5, "ranks": ranks} for ranks in ("uniform", "auto")])
    uniform, measured = (row["ppl"]["text"] for row in rows)
    assert len(uniform) == len(measured) == 1 and all(map(math.isfinite, uniform + measured))


def test_a_weight_of_zeros_is_measured(tmp_path, lab):
    """Identity-initialised blocks have them; nothing is there to be approximated."""
    ckpt = Checkpoint(str(tmp_path / "tiny"))
    state = {name: ckpt.tensor(name).clone() for name in ckpt.names}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.1.{name}.weight"].zero_()
    save_file(state, tmp_path / "tiny" / "model.safetensors")
    rows = lab(seeds="3").measure([{"method": "air", "rate": 0.5}, {"method": "kfac", "rate": 0.5, "ranks": "auto"}])
    assert 0 < rows[0]["descent"][0] < 1 and all(math.isfinite(row["ppl"]["text"][0]) for row in rows)


def test_cells_of_another_version_or_device_are_others(lab, monkeypatch):
    here = lab(seeds="3")
    key = here.key({"a": 1})
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert here.key({"a": 1}) != key


def test_roots_and_ridges_are_what_they_are_called(result_of, lab):
    module, result = result_of("roots")
    none = "none, the paper's"
    assert module.ppl(result, none, "start") == ppl_of(lab, method="svdllm")
    assert module.ppl(result, none, "triangle", 2.0) == ppl_of(lab, method="air")
    own = "3 % of each input's own"
    assert module.ppl(result, own, "triangle", 0.5) == ppl_of(lab, method="air", delta=0.5, ridge=0.03)
    # The mean's share is what --ridge adds where all inputs have the same energy.
    x = air.Layer("q", torch.randn(6, 5), 2, air.Inputs("", None, None, 0.03), {})
    x.inputs.gram = torch.full((5, 5), 0.25, dtype=torch.float64).fill_diagonal_(1.0)
    assert distance(module.factor(x, True), module.factor(x, False)) < 1e-12
    x.inputs.gram[0, 0] = 100.0
    assert distance(module.factor(x, True), module.factor(x, False)) > 1e-3
    # With δ = 0 a root changes nothing.
    W, I = torch.randn(6, 5), torch.rand(6, 5)
    one = module.symmetric(W, x.S, I, 3, 0.0)
    other = air.air(W, x.S, I, 3, 0.0)
    assert distance(one[0] @ one[1], other[0] @ other[1]) < 1e-5


def test_the_heat_map_compares_with_the_same_ridge_and_tokens(result_of, lab):
    module, result = result_of("delta", TOKENS=(1, 4), RIDGES=(0.0, None), DELTAS=(0.5, 2.0))
    samples = {tokens: max(1, round(tokens * Checkpoint(lab().setup.ckpt).cfg.hidden / 16)) for tokens in (1, 4)}
    same = {"delta": 0.5, "ridge": None, "samples": samples[4]}
    (one,), (other,) = (ppl_of(lab, method=method, **same) for method in ("air", "svdllm"))
    assert math.isclose(module.gap(result, 4, None, 0.5)[0], 100 * (one / other - 1), rel_tol=1e-9)


def test_closed_forms_and_a_training_run_on_a_tiny_model(result_of, lab, tmp_path):
    module, result = result_of("closed", RATES=(0.6,))
    for name in ("SVD", "GFWSVD", "two-sided"):
        assert module.ppl(result, name, 0.6) == ppl_of(lab, **module.FORMS[name][0], ridge=None)
    for at in ("2M", "10M", "0.5M"):
        shutil.copytree(tmp_path / "tiny", tmp_path / "tiny" / at, ignore=shutil.ignore_patterns("*M"))
    module, result = result_of("training", str(tmp_path / "tiny"), RATES=(0.6,))
    assert list(result["checkpoints"]) == ["0.5M", "2M", "10M", "best"]
    assert len({json.dumps(each["rows"]) for each in result["checkpoints"].values()}) == 1


def test_stacks_are_what_the_files_of_enhance_write(result_of, lab, tmp_path, monkeypatch):
    stack = importlib.import_module("experiments.stack")
    importlib.import_module("experiments.table6")           # which reads table5's forms before they are changed here
    refine = importlib.import_module("enhance.refine")
    quantize = importlib.import_module("enhance.quantize")
    recipes = {"refine": {"epochs": 1}, "lora": {"epochs": 4}, "retrain": {"epochs": 4}, "quantize": {}}
    recipes["acip"] = {"lr": 4e-3, "weight": 0.05, "adapter_steps": 1, "rank": 2}
    monkeypatch.setattr(stack, "RECIPES", {name: stack.RECIPES[name] | more for name, more in recipes.items()})
    # Of a random text nothing is learnt that holds on other windows: these two are judged by those they learn from.
    apart = stack.apart
    monkeypatch.setattr(stack, "apart", lambda lab, name, windows, seed: (
        (windows, windows) if name in ("lora", "retrain") else apart(lab, name, windows, seed)))
    svdllm = {"method": "svdllm", "form": "SVD-LLM(W)"}
    module, result = result_of("table5", RATES=(0.6,), FORMS={"SVD-LLM(W)": svdllm, "AIR": {"method": "air"}})
    assert module.ppl(result, "SVD-LLM(W)", "alone", 0.6) == ppl_of(lab, method="svdllm")
    assert len({module.ppl(result, "SVD-LLM(W)", name, 0.6)[0] for name in module.STACKS}) == len(module.STACKS)
    module, result = result_of("table6", FORMS={"AIR": {"method": "air"}})
    # By the commands: air.py, then a file of enhance/, then evaluation.
    setup = lab().setup
    usual = ["--calib", setup.calib, "--samples", "6", "--seqlen", "16", "--text", "none", "--seed", "3", "--quiet"]

    def command(file, *arguments):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments), *usual])
        file.main()
    start, out = tmp_path / "start", tmp_path / "after"
    command(air, "--ckpt", setup.ckpt, "--method", "svdllm", "--rate", "0.6", "--ridge", "0", "--out", start)
    command(refine, "--ckpt", start, "--out", out, "--epochs", "1", "--lr", "1e-3", "--batch", "4")
    here = lab(seeds="3")

    def measured(folder):
        return [evaluate(Checkpoint(folder), here.evaluation("text"), here.device, here.dtype)["ppl"]]
    found = json.loads((tmp_path / "table5-tiny.json").read_text("utf-8"))
    # To rounding: ΣXXᵀ is collected by another sweep.
    refined = find(found["rows"], form="SVD-LLM(W)", stack="+ refinement")["ppl"]["text"]
    assert np.allclose(refined, measured(out), rtol=1e-3)
    command(air, "--ckpt", setup.ckpt, "--rate", "0.6", "--ridge", "0", "--out", tmp_path / "air")
    command(quantize, "--ckpt", tmp_path / "air", "--out", tmp_path / "q", "--bits", "2", "--group", "32")
    assert np.allclose(module.ppl(result, "AIR", module.stack_of("gptq", 2, 32)), measured(tmp_path / "q"), rtol=1e-3)
    # The sizes are those of what lies in the files.
    for folder, at in (("air", "16 0"), ("q", "2 32")):
        took, whole = (sum(w.numel() * w.element_size() for w in load_file(path / "model.safetensors").values())
                       for path in (tmp_path / folder, Path(setup.ckpt)))
        assert result["sizes"][at] == pytest.approx(100 * took / whole)


def test_peers_get_no_more_bytes_than_air_and_score_as_their_commands_do(result_of, lab, tmp_path, monkeypatch):
    module, result = result_of("table4", "--rates", "0.4", "0.6", "--pruned-by", "2")
    assert module.ppl(result, "AIR", 0.6) == ppl_of(lab, method="air")
    for rate in (0.6, 0.4):
        size = {name: find(result["rows"], method=name, rate=rate)["parameters"][0]
                for name in (*module.FORMS, *module.PEERS)}
        assert size["AIR"] == size["SVD-LLM(W)"] == module.budget(lab(), rate)
        assert size["SliceGPT"] <= size["AIR"] and size["BlockPruner"] <= size["AIR"]
    # The smaller budget goes on where the larger ended.
    cell, = (value for key, value in lab(seeds="3").cells.items() if "BlockPruner" in key)
    assert set(cell["0.6"]["removed"]) < set(cell["0.4"]["removed"])
    slicegpt = importlib.import_module("peers.slicegpt")
    assert module.width_within(lab().ckpt.cfg, 10**9) == lab().ckpt.cfg.dim
    monkeypatch.setattr(slicegpt, "width_at", lambda d, slicing: 8)
    setup = lab().setup
    monkeypatch.setattr(sys, "argv", [
        "x", "--ckpt", setup.ckpt, "--calib", setup.calib, "--samples", "6", "--seqlen", "16", "--text", "none",
        "--out", str(tmp_path / "sliced"), "--quiet"])
    slicegpt.main()
    here = lab(seeds="3")
    wanted = evaluate(Checkpoint(tmp_path / "sliced"), here.evaluation("text"), here.device, here.dtype)["ppl"]
    width = module.width_within(here.ckpt.cfg, module.budget(here, 0.6))
    if width == 8:
        assert module.ppl(result, "SliceGPT", 0.6) == pytest.approx([wanted], rel=1e-4)


def test_acip_is_cut_from_one_training_to_the_rates_that_it_reaches(lab, monkeypatch):
    stack = importlib.import_module("experiments.stack")
    few = {"lr": 4e-3, "weight": 0.05, "adapter_steps": 1, "rank": 2}
    monkeypatch.setitem(stack.RECIPES, "acip", stack.RECIPES["acip"] | few)
    rows = stack.measure_acip(lab(seeds="3"), (0.8, 0.6, 0.2))
    assert [row["ppl"]["text"][0] is None for row in rows] == [False, False, True]
    assert rows[0]["ppl"] != rows[1]["ppl"]
    cells = lab().cells
    assert stack.measure_acip(lab(seeds="3"), (0.8, 0.6, 0.2)) == rows and lab().cells == cells


def test_samples_are_the_same_for_one_seed_and_name_their_prompt(lab, tmp_path, monkeypatch):
    module = importlib.import_module("experiments.samples")
    refined = ("refine", {"epochs": 1})
    forms = {"SVD-LLM(W)": ({"method": "svdllm"}, []), "AIR": ({"method": "air"}, [refined])}
    monkeypatch.setattr(module, "FORMS", forms)
    monkeypatch.setattr(module, "RATES", (0.5,))
    monkeypatch.setattr(module, "Tokenizer", lambda ckpt: type("T", (), {
        "bos": [1], "eos": {2}, "encode": staticmethod(lambda text: [ord(each) % 60 for each in text]),
        "decode": staticmethod(lambda ids: " ".join(map(str, ids)))}))
    setup = lab().setup
    argv = ["samples", "--ckpt", setup.ckpt, "--calib", setup.calib, "--seeds", "3", "--samples", "6", "--seqlen", "16",
            "--work", str(tmp_path / "work"), "--results", str(tmp_path), "--prompts", "abc", "x", "--tokens", "7"]
    found = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", argv)
        module.main()
        found.append(json.loads((tmp_path / "samples-tiny.json").read_text("utf-8"))["rows"])
    assert found[0] == found[1] and [row["model"] for row in found[0]] == ["dense", *module.FORMS]
    assert all(len(text.split()) <= 7 for row in found[0] for text in row["texts"])
    text = (tmp_path / "samples-tiny.md").read_text("utf-8")
    assert "**'abc'**" in text and repr(found[0][0]["texts"][1]) in text


def test_the_table_of_contents_has_all_of_the_paper_and_names_what_exists():
    module = importlib.import_module("experiments.contents")
    wanted = {f"Table {i}" for i in range(1, 15)} | {f"Figure {i}" for i in range(1, 9)} | {"A.6", "A.9"}
    assert set(module.CONTENTS) == wanted
    for _, name, *_ in module.CONTENTS.values():
        assert name is None or (ROOT / "experiments" / f"{name}.py").exists()
    paper = ROOT.parent / "shared" / "paper" / "air.md"
    if paper.exists():
        named = set(re.findall(r"(?:Table|Figure) [0-9]+", paper.read_text("utf-8")))
        assert named <= wanted
    shown = (ROOT / "experiments" / "README.md").read_text("utf-8")
    assert module.contents(RESULTS) in shown
    reasoning = importlib.import_module("experiments.reasoning")
    found = json.loads((RESULTS / "reasoning-smollm2.json").read_text("utf-8"))
    for what in ("acc", "acc_norm"):
        assert reasoning.markdown(found, what) in shown


def test_outcomes_are_counted_from_the_results(tmp_path):
    module = importlib.import_module("experiments.contents")
    held = {"verdicts": [{"holds": True}, {"holds": False}, {"holds": None}]}
    (tmp_path / "table2-demo-muon.json").write_text(json.dumps(held))
    (tmp_path / "fig4-demo-cpu-float32.json").write_text("[]")
    assert module.outcome(tmp_path, "table2", "demo") == "–"
    assert module.outcome(tmp_path, "table2", "demo-muon") == "1 of 2 hold"
    assert module.outcome(tmp_path, "fig4", "demo") == "measured" and module.outcome(tmp_path, None, "demo") == "–"
