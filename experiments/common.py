"""What the experiments share: texts, statistics kept for every calibration seed, compression and evaluation in memory, results
kept cell by cell, means with their spread, verdicts on the paper's claims, and the README's blocks.

A script hands Lab.measure a list of settings; what was measured before is read, the rest is computed and kept at once, so a run
continues where it stopped. Working files lie in out/experiments/NAME-FINGERPRINT; deleting that folder starts afresh.
"""
import copy
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from air import air, asvd, fwsvd, normalise, profile, rank_at, statistics, svd, svdllm
from calibrate import calibration_windows, embed, forward_sweep
from support.texts import choose, digest
from eval_ppl import evaluation_windows
from eval_ppl import js_divergence
from influence import SIGNALS, check_signal
from model import LAYERS, READS, to_logits
from support.checkpoint import Checkpoint
from support.script import InputError, parser, pick_device

ROOT = Path(__file__).resolve().parents[1]
AIR = {"signal": "lrp", "scale": "mean", "delta": 2.0, "sweeps": 1, "order": "backward"}                # the paper's defaults
SCRIPTS = ("table2", "table7", "table8", "fig1", "fig2", "fig3", "fig5", "fig6", "a6", "open_questions")
COLOURS = {"orange": "#E69F00", "sky": "#56B4E9", "blue": "#0072B2", "red": "#D55E00", "grey": "#999999"}    # Okabe and Ito's


# ---------------------------------------------------------------------------------------------- means, spreads, verdicts
def mean_spread(values):
    """(mean, sample standard deviation) over seeds; the spread of one value is None, it is not known."""
    values = [math.nan if v is None else v for v in values]
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None


def compare(a, b):
    """a against b over the same seeds: (mean, spread, word) of the paired differences a_s/b_s − 1, in %.

    The seeds share their calibration and evaluation windows, so the spread is that of the paired differences (sample standard
    deviation). word: "lower" or "higher"; "no difference" for a mean not above its spread; "undecided" for one seed. A list
    of one stands for every seed: a method that sees no calibration text.
    """
    n = max(len(a), len(b))
    a, b = (list(each) * n if len(each) == 1 else each for each in (a, b))
    mean, spread = mean_spread([math.nan if None in (x, y) else 100 * (x / y - 1) for x, y in zip(a, b, strict=True)])
    if spread is None or math.isnan(mean):
        return mean, spread, "undecided"
    return mean, spread, "no difference" if abs(mean) <= spread else "lower" if mean < 0 else "higher"


def find(rows, **wanted):
    """The one row with these settings."""
    return next(row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def against(rows, key, values, a, b, text="text", what="ppl"):
    """compare(a, b) at every value of the setting `key`; a and b are the settings that tell the two rows."""
    return [compare(*(find(rows, **{key: value}, **each)[what][text] for each in (a, b))) for value in values]


def every(compared, *words):
    """True when the word of every comparison is one of `words`, None when one is undecided, else False."""
    found = {word for *_, word in compared}
    return None if "undecided" in found else found <= set(words)


def verdict(claim, holds, measured, otherwise=""):
    """A claim as measured: holds True, False or None. `otherwise`: what may explain a failure, and the smallest test of it."""
    return {"claim": claim, "holds": holds, "measured": measured, "otherwise": otherwise}


def verdict_line(v):
    words = {True: "holds", False: "does not hold", None: "undecided (one seed)"}[v["holds"]]
    tail = f" May explain it: {v['otherwise']}" if v["holds"] is False and v["otherwise"] else ""
    return f"**{words}**: {v['claim']} Measured: {v['measured']}{tail}"


def number(x):
    return "–" if x is None or math.isnan(x) else f"{x:.2f}" if abs(x) < 100 else f"{x:.1f}" if abs(x) < 1000 else f"{x:,.0f}"


def show(values):
    """'22.73 ± 0.12', or '22.73' for one seed."""
    mean, spread = mean_spread(values)
    return number(mean) + (f" ± {number(spread)}" if spread is not None else "")


def percent(compared):
    """'-9.1 ± 0.8 %', with 'no difference' in brackets where that is the word."""
    mean, spread, word = compared
    known = "" if spread is None else f" ± {spread:.1f}"
    return f"{mean:+.1f}{known} %" + (" (no difference)" if word == "no difference" else "")


def listed(values, compared):
    """'0.6: -9.1 ± 0.8 %; 0.4: …'."""
    return "; ".join(f"{value:g}: {percent(each)}" for value, each in zip(values, compared))


def table(head, rows, left=1):
    """A markdown table; the first `left` columns are words, the others figures."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, rule, *rows])


# ---------------------------------------------------------------------------------------------- files
def write_whole(path, text):
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def clean(value):
    """Numbers that are not finite become null, which JSON can hold."""
    if isinstance(value, dict):
        return {key: clean(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def caption(result, calibrated=None):
    """How a result was measured, from its own JSON; `calibrated`: what it was calibrated on where that varies."""
    c = result["calibration"]
    texts = [f"{t['windows']} of {t['of']} windows of {t['seqlen']} tokens of {t['name']} (evenly spaced)"
             for t in result["texts"].values()]
    said = [result["checkpoint"], *(["perplexity on " + " and ".join(texts)] if texts else []),
            f"calibration on {calibrated or '{samples} × {seqlen} tokens of {text}'.format(**c)}, "
            f"seed{'s' * (len(c['seeds']) > 1)} "
            + ", ".join(map(str, c["seeds"])) + (" (± their standard deviation)" if len(c["seeds"]) > 1 else "")]
    return f"*{'; '.join(said)}.*"


def block(module, result):
    """What the README shows of a script: its table, how it was measured, its verdicts."""
    lines = [f"- {verdict_line(v)}" for v in module.verdicts(result)]
    return "\n".join([module.markdown(result), "", caption(result, getattr(module, "CALIBRATED", None)), "", *lines])


def claims(results):
    """The README's table of the paper's claims, from the verdicts in the committed results of the demo."""
    words, rows = {True: "holds", False: "**does not hold**", None: "undecided"}, []
    for name in SCRIPTS:
        path = results / f"{name}-demo.json"
        rows += [[f"`{name}`", v["claim"], words[v["holds"]]] for v in
                 (json.loads(path.read_text("utf-8"))["verdicts"] if path.exists() else ())]
    return table(["script", "claim", "on the demo"], rows, left=3)


def refresh(name, text, root=ROOT):
    """Replace what stands between <!-- name --> and <!-- /name --> in README.md and experiments/README.md of `root`."""
    for path in (path for path in (root / "README.md", root / "experiments" / "README.md") if path.exists()):
        old = path.read_text("utf-8")
        new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + text + "\n" + m[2], old, flags=re.S)
        if new != old:
            write_whole(path, new)


def pyplot():
    """matplotlib.pyplot without a screen, or None after saying what is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib); the JSON has its numbers", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110, "axes.spines.top": False,
                         "axes.spines.right": False})
    return plt


def torch_nn(split, folder):
    """The source of the installed torch.nn as a .txt file in `folder`, one file in ten held out ("test") by a hash of its path.

    The demo's second text: Python by other authors, and the same for everybody, since requirements.txt pins the package.
    """
    root, out = Path(torch.nn.__file__).parent, folder / f"torch.nn-{split}.txt"
    files = {path: hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest() for path in sorted(root.rglob("*.py"))}
    rows = [path.read_text("utf-8") for path, name in files.items() if (int(name, 16) % 10 == 0) == (split == "test")]
    write_whole(out, "\n\n".join(row for row in rows if row.strip()))
    return str(out)


# ---------------------------------------------------------------------------------------------- compress and evaluate in memory
def signal_of(setting):
    """The backward signal a setting's statistics need; lrp's for a method without one, None for plain SVD."""
    signal = {"air": (AIR | setting)["signal"], "fwsvd": "fisher"}.get(setting["method"])
    return None if setting["method"] == "svd" else signal if signal in SIGNALS else "lrp"


def solver(setting):
    """A setting {"method": …, options} -> the function (W, stats, name, k, S) -> U (m, k), V (k, n), and for air its losses."""
    method, s = setting["method"], AIR | setting

    def solve(W, stats, name, k, S):
        if method == "air":
            I = (torch.ones_like(W) if s["signal"] == "ones" else W.abs() if s["signal"] == "magnitude" else
                 stats[f"{name}.{s['signal']}"].to(W.dtype))
            return air(W, S, normalise(I, s["scale"]), k, s["delta"], s["sweeps"], s["order"])
        if method == "fwsvd":
            return fwsvd(W, stats[f"{name}.fisher"].to(W.dtype), k)
        if method == "asvd":
            return asvd(W, stats[f"{READS[name]}.mean_abs"].to(W.dtype), k)
        return svdllm(W, S, k) if method == "svdllm" else svd(W, k)
    return solve


def compress(ckpt, sweep, rate, solve, device):
    """Every layer's weight replaced by the factors of solve(W, stats, name, k, S) -> U, V[, losses], in memory.

    `sweep` yields (block, statistics). Returns (a Checkpoint whose tensors are those air.py would write, so rounded to the
    checkpoint's dtype; [losses of each layer]). Raises InputError for a rate that leaves a layer rank 0.
    """
    small, ranks, losses, made = copy.copy(ckpt), {}, [], {}
    for l, stats in sweep:
        S = {reads: profile(stats[f"{reads}.gram"])[0] for reads in sorted(set(READS.values())) if f"{reads}.gram" in stats}
        for name in LAYERS:
            layer = f"model.layers.{l}.{name}"
            W = ckpt.tensor(layer + ".weight", device, torch.float32)
            k = ranks[layer] = rank_at(rate, *W.shape)
            if k < 1:
                raise InputError(f"rate {rate} leaves {layer} {tuple(W.shape)} rank 0; this experiment needs wider layers")
            U, V, *rest = solve(W, stats, name, k, S.get(READS[name]))
            losses += rest
            made |= {layer + ".U.weight": U.to(ckpt.dtype).cpu(), layer + ".V.weight": V.to(ckpt.dtype).cpu()}
            if layer + ".bias" in ckpt.tensors:
                made[layer + ".U.bias"] = ckpt.tensor(layer + ".bias")
    kept = {name: ckpt.tensors[name] for name in ckpt.names if name.rpartition(".")[0] not in ranks}
    small.tensors = kept | {name: (tuple(w.shape), w.dtype, lambda w=w: w) for name, w in made.items()}
    small.cfg, small.names = SimpleNamespace(**vars(ckpt.cfg) | {"ranks": ranks}), list(small.tensors)
    return small, losses


@torch.no_grad()
def hidden(ckpt, windows, device, dtype):
    """The last block's output (N, T, dim), in host memory."""
    h = embed(ckpt, windows, dtype)
    for _ in forward_sweep(ckpt, h, device):
        pass
    return h


@torch.no_grad()
def score(ckpt, windows, device, dtype, dense=None):
    """{"ppl", "js"} of a checkpoint over windows (N, T), eval_ppl.evaluate's figures (NaN where its are).

    `dense` = (hidden states, checkpoint): for js, bits a token, the dense model's states are read, not computed for every method.
    """
    runs = [(hidden(ckpt, windows, device, dtype), (*ckpt.head(device, dtype), ckpt.cfg))]
    if dense:
        runs.append((dense[0], (*dense[1].head(device, dtype), dense[1].cfg)))
    nll = js = torch.zeros((), dtype=torch.float64, device=device)
    batch = max(1, 2**22 // (windows.shape[1] * ckpt.cfg.vocab))
    for i in range(0, len(windows), batch):
        logits = [to_logits(h[i:i + batch, :-1].to(device), *head) for h, head in runs]
        targets = windows[i:i + batch, 1:].to(device)
        nll = nll + F.cross_entropy(logits[0].flatten(0, 1).float(), targets.flatten(), reduction="sum")
        js = js + js_divergence(*logits).sum() if dense else js
    nll, js = (each.item() / windows[:, 1:].numel() for each in (nll, js))
    return {"ppl": math.exp(min(nll, 700)) if math.isfinite(nll) else math.nan, "js": js if dense else None}


# ---------------------------------------------------------------------------------------------- the laboratory
def arguments(doc):
    p = parser(doc)
    p.add_argument("--text", help="evaluation text (default: the calibration text's held-out part)")
    p.add_argument("--text2", help="a second text, where the paper has C4 (default: torch.nn for stdlib, c4 for wikitext2)")
    p.add_argument("--calib", help="calibration text (default: the checkpoint's: stdlib for the demo, wikitext2 for others)")
    p.add_argument("--samples", type=int, help="calibration windows (default: the checkpoint's)")
    p.add_argument("--seqlen", type=int, help="tokens a window (default: the checkpoint's)")
    p.add_argument("--seeds", default="3,4,5", help="calibration seeds (default 3,4,5)")
    p.add_argument("--windows", type=int, default=120, help="evaluate on this many evenly spaced windows; 0: all (default 120)")
    p.add_argument("--work", default=str(ROOT / "out" / "experiments"), help="statistics and cells (default out/experiments)")
    p.add_argument("--results", default=str(ROOT / "experiments" / "results"), help="folder of the JSON and the picture")
    return p


class Lab:
    """A checkpoint with its texts, its statistics for every calibration seed, and every cell measured on it so far.

    Arguments as `arguments` has them. Raises InputError for a compressed checkpoint or arguments that make no sense.
    """

    def __init__(self, script, ckpt, text=None, text2=None, calib=None, samples=None, seqlen=None, seeds="3,4,5", windows=120,
                 work=ROOT / "out" / "experiments", results=ROOT / "experiments" / "results", device=None, dtype=None):
        self.script, self.ckpt, self.want = script, Checkpoint(ckpt), windows
        if self.ckpt.cfg.ranks:
            raise InputError(f"{ckpt} is already compressed; point --ckpt at the dense checkpoint")
        if not re.fullmatch(r"\d+(,\d+)*", seeds) or windows < 0:
            raise InputError(f"--seeds is {seeds} and --windows {windows}; expected numbers such as 3,4,5, and 0 or more")
        self.seeds = [int(seed) for seed in seeds.split(",")]
        self.device, self.dtype, _ = pick_device(device, dtype)
        check_signal("lrp", self.dtype)
        fingerprint = self.ckpt.fingerprint()
        self.work, self.results = Path(work) / f"{self.ckpt.name}-{fingerprint[:12]}", Path(results)
        for folder in (self.work, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.calib = calib or (self.ckpt.raw.get("defaults") or {}).get("text", "wikitext2")
        _, self.samples, self.seqlen = choose(self.ckpt, self.resolve(self.calib, "train"), samples, seqlen)
        other = text2 or {"stdlib": "torch.nn", "wikitext2": "c4"}.get(self.calib)
        self.texts = {"text": text or self.calib} | ({"text2": other} if other else {})
        self.memo, self.cells, self.path = {}, {}, self.work / "cells.jsonl"
        for line in self.path.read_text("utf-8").split("\n") if self.path.exists() else ():
            try:
                key, value = json.loads(line)
                self.cells[key] = value
            except ValueError:                      # the line a killed run was writing
                pass
        self.facts = {
            "script": script, "checkpoint": self.ckpt.name, "fingerprint": fingerprint, "texts": {},
            "calibration": {"text": Path(self.calib).name, "samples": self.samples, "seqlen": self.seqlen, "seeds": self.seeds},
            "machine": {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
                        "device": str(self.device), "dtype": str(self.dtype)[6:], "threads": torch.get_num_threads()}}

    def resolve(self, text, split):
        return torch_nn(split, self.work) if text == "torch.nn" else text

    def once(self, key, compute):
        """compute(), kept in memory for this run."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def evaluation(self, which):
        """Evaluation windows of "text" or "text2": `--windows` of them, evenly spaced, the same for every method and seed."""
        def compute():
            every, _, _ = evaluation_windows(self.resolve(self.texts[which], "test"), self.ckpt, self.seqlen)
            n = min(self.want or len(every), len(every))
            picked = every[torch.linspace(0, len(every) - 1, n, dtype=torch.float64).round().long()]
            self.facts["texts"][which] = {"name": Path(self.texts[which]).name, "windows": n, "of": len(every),
                                          "seqlen": picked.shape[1], "sha256": digest(picked)}
            return picked
        if which not in self.texts:
            raise InputError(f"{self.script} evaluates on two texts; name the second with --text2")
        return self.once(("evaluation", which), compute)

    def calibration(self, seed, text=None, samples=None):
        """Calibration windows (samples, T) of a seed; of another text or number where named."""
        def compute():
            windows = calibration_windows(self.resolve(text, "train"), self.ckpt, samples, self.seqlen, seed)
            if len(windows) < samples:
                raise InputError(f"{text} holds {len(windows)} windows, {samples} are needed; give a text or 1-D tokens")
            return windows[:samples]
        text, samples = text or self.calib, samples or self.samples
        return self.once((seed, text, samples), compute)

    def statistics(self, windows, signal="lrp"):
        """air.statistics of every block, kept in a folder: yields (block, {ΣXXᵀ, mean |x|, the signal's influence}).

        One folder a signal, so that no Gram matrix depends on which script ran first.
        """
        blocks = range(self.ckpt.cfg.n_layers)
        if signal is None:
            return ((l, {}) for l in blocks)
        folder = self.work / f"stats-{digest(windows)[:16]}-{signal}"
        return statistics(self.ckpt, windows, self.device, self.dtype, blocks, signal, folder)

    def forget(self, windows):
        """Delete the statistics of windows that no other script reads."""
        for folder in self.work.glob(f"stats-{digest(windows)[:16]}-*"):
            shutil.rmtree(folder)

    def keep(self, key, value):
        """Append one finished cell to cells.jsonl, on a line of its own even after a torn one."""
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        self.cells[key] = json.loads(json.dumps(clean(value)))
        with open(self.path, "a", encoding="utf-8") as f:
            f.write("\n" * torn + json.dumps([key, self.cells[key]]) + "\n")

    def cell(self, key, compute):
        """compute() -> a JSON value, or what an earlier run on this checkpoint kept under the same key."""
        key, start = json.dumps(key | {"dtype": str(self.dtype)}, sort_keys=True), time.time()
        if key not in self.cells:
            self.keep(key, compute())
            print(f"{self.script}  {key[:80]} …   {time.time() - start:.1f} s", file=sys.stderr, flush=True)
        return self.cells[key]

    def dense(self, which):
        """Perplexity of the dense checkpoint on a text."""
        windows = self.evaluation(which)
        return self.cell({"dense": digest(windows)}, lambda: score(self.ckpt, windows, self.device, self.dtype))["ppl"]

    def dense_states(self, which):
        """(Last hidden states of the dense checkpoint on a text, the checkpoint): what `score` takes as `dense`."""
        windows = self.evaluation(which)
        return self.once(("dense", which), lambda: (hidden(self.ckpt, windows, self.device, self.dtype), self.ckpt))

    def measure(self, settings, texts=("text",), js=False, solve=solver, sweep=None):
        """Settings {"method", "rate", AIR's options; "calib", "samples"}, each at every seed -> rows: the setting with "ppl"
        and "js" {text: [one a seed]} and "descent" [L_act,infl after over before the sweeps, mean of layers; one a seed].

        `solve(setting)` gives the solver of one weight; `sweep(setting, windows)` statistics other than the method's own.
        """
        jobs, began, done = {}, time.time(), 0
        for seed in (None, *self.seeds):
            for i, setting in enumerate(settings):
                if (seed is None) == (setting["method"] == "svd"):              # plain SVD sees no calibration text
                    windows = None if seed is None else self.calibration(seed, setting.get("calib"), setting.get("samples"))
                    how = {key: value for key, value in setting.items() if key not in ("calib", "samples")}
                    jobs[i, seed] = windows, json.dumps({
                        "how": (AIR if how["method"] == "air" else {}) | how, "dtype": str(self.dtype),
                        "calibration": None if seed is None else digest(windows)}, sort_keys=True)
        where, what = {which: digest(self.evaluation(which)) for which in texts}, "js" if js else "ppl"

        def lacking(key):
            return [which for which, windows in where.items() if windows not in self.cells.get(key, {}).get(what, {})]
        todo = sum(bool(lacking(key)) for _, key in jobs.values())
        for (i, seed), (windows, key) in jobs.items():
            if missing := lacking(key):
                setting, start = settings[i], time.time()
                stats = sweep(setting, windows) if sweep else self.statistics(windows, signal_of(setting))
                small, losses = compress(self.ckpt, stats, setting["rate"], solve(setting), self.device)
                descent = mean_spread([loss[2] / loss[1] for loss in losses])[0] if losses else None
                cell = self.cells.get(key) or {"ppl": {}, "js": {}, "descent": descent}
                for which in missing:
                    dense = self.dense_states(which) if js else None
                    scores = score(small, self.evaluation(which), self.device, self.dtype, dense)
                    cell["ppl"][where[which]] = scores["ppl"]
                    cell["js"] |= {where[which]: scores["js"]} if js else {}
                self.keep(key, cell)
                done += 1
                left = (time.time() - began) / done * (todo - done)
                named = " ".join(map(str, setting.values())) + (f", seed {seed}" if seed is not None else "")
                print(f"{self.script} {done}/{todo}  {named}: {number(cell['ppl'][where[texts[0]]])}   "
                      f"{time.time() - start:.1f} s, {left:.0f} s left", file=sys.stderr, flush=True)
        rows = []
        for i, setting in enumerate(settings):
            cells = [self.cells[key] for (j, _), (_, key) in jobs.items() if i == j]
            rows.append(setting | {each: {which: [cell[each].get(windows) for cell in cells] for which, windows in where.items()}
                                   for each in ("ppl", "js")} | {"descent": [cell["descent"] for cell in cells]})
        return rows

    def finish(self, module, result, picture=None):
        """Verdicts, JSON, picture, what is printed, and for the bundled demo the README's block."""
        result = json.loads(json.dumps(clean(self.facts | result)))
        result["verdicts"] = module.verdicts(result)
        stem = str(self.results / f"{self.script}-{self.ckpt.name}")
        write_whole(Path(stem + ".json"), json.dumps(result, indent=1) + "\n")
        if picture and (plt := pyplot()):
            figure = picture(plt, result)
            figure.savefig(stem + ".partial", format="png")
            os.replace(stem + ".partial", stem + ".png")
            plt.close(figure)
        print(block(module, result).replace("**", ""), flush=True)
        if self.ckpt.folder.resolve() == ROOT / "demo" and self.results.resolve() == ROOT / "experiments" / "results":
            refresh(self.script, block(module, result))
            refresh("claims", claims(self.results))
            if hasattr(module, "short"):
                refresh(f"{self.script}-short", module.short(result))
