"""What the experiments share: arguments, texts, compression in memory, and the
laboratory that keeps what it has measured, cell by cell.

A script hands Lab.measure a list of settings; what was measured before is read, the
rest is computed and kept at once, so a run continues where it stopped. Working files
lie in out/experiments/NAME-FINGERPRINT; deleting that folder starts afresh.
"""
import copy
import hashlib
import inspect
import json
import os
import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from air import METHODS, Options, compress_block, pick_ranks, wholes_of
from calibrate import calibration_windows, embed
from eval_ppl import evaluate, evaluation_windows, last_states, warn_nonfinite
from experiments.report import (RESULTS, block, claims, mean_spread, number, pyplot,
                                refresh)
from influence import check_signal
from support.anchored import anchored_sweep
from support.checkpoint import Checkpoint, in_memory
from support.config import own_defaults
from support.large import SWEEPS, Kept
from support.progress import Progress, say
from support.ranks import find_ranks, held_windows
from support.report import repair_line
from support.script import (ROOT, InputError, code_digest, finite, parser, pick_device,
                            read_json, write_json, write_whole)
from support.texts import digest, own_windows, with_defaults

CODE = (*SWEEPS, "air.py", "eval_ppl.py", "support/fast.py")        # what computes a cell


# ------------------------------------------------------------ arguments
@dataclass
class Setup:
    """What the command line says; `arguments` explains each field."""

    ckpt: str                           # the dense checkpoint
    text: str | None = None             # evaluation text; None: calib's held-out part
    text2: str | None = None            # the second one; None: as OTHER has it
    calib: str | None = None            # calibration text; None: the checkpoint's
    samples: int | None = None          # calibration windows; None: the checkpoint's
    seqlen: int | None = None           # tokens a window; None: the checkpoint's
    seeds: str = "3,4,5"                # of the calibration windows' starts
    windows: int = 120                  # evaluation windows, evenly spaced; 0: all
    work: str | Path = ROOT / "out" / "experiments"     # statistics and cells
    results: str | Path = RESULTS       # JSON and pictures
    device: str | None = None           # None: a GPU where there is one
    dtype: str | None = None            # None: bfloat16 on a GPU, else float32


# {calibration text: the second text}
OTHER = {"stdlib": "torch.nn", "wikitext2": "c4"}


def arguments(doc, rates=None):
    """A parser of Setup's fields; with `rates`, a script's own, also of --rates."""
    p = parser(doc)
    p.add_argument("--text", help="evaluation text "
                   "(default: the calibration text's held-out part)")
    p.add_argument("--text2", help="a second text, where the paper has C4 "
                   "(default: torch.nn for stdlib, c4 for wikitext2)")
    p.add_argument("--calib", help="calibration text "
                   "(default: the checkpoint's: stdlib for the demo, wikitext2 for "
                   "others)")
    p.add_argument("--samples", type=int,
                   help="calibration windows (default: the checkpoint's)")
    p.add_argument("--seqlen", type=int,
                   help="tokens a window (default: the checkpoint's)")
    p.add_argument("--seeds", default=Setup.seeds,
                   help="calibration seeds (default 3,4,5)")
    p.add_argument("--windows", type=int, default=Setup.windows, help="evaluate on this "
                   "many evenly spaced windows; 0: all (default 120)")
    p.add_argument("--work", default=str(Setup.work),
                   help="statistics and cells (default out/experiments)")
    p.add_argument("--results", default=str(Setup.results),
                   help="folder of the JSON and the picture")
    if rates:
        p.add_argument("--rates", type=float, nargs="+", default=rates,
                       help=f"(default {' '.join(map(str, rates))})")
    return p


def setup_of(doc):
    """The Setup of a script's command line that has no further arguments."""
    return Setup(**vars(arguments(doc).parse_args()))


# ------------------------------------------------------------ a second text
def torch_nn(split, folder):
    """The path of torch.nn's installed source, written to `folder` as a .txt file.

    One file in ten is held out ("test") by a hash of its path. The demo's second text:
    Python by other authors, and the same for everybody, since requirements.txt pins the
    package.
    """
    root = Path(torch.nn.__file__).parent
    rows = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
        if held_out == (split == "test"):
            rows.append(path.read_text("utf-8"))
    out = folder / f"torch.nn-{split}.txt"
    write_whole(out, "\n\n".join(row for row in rows if row.strip()))
    return str(out)


# ------------------------------------------------------------ a setting
# A setting is a dict: "rate", any fields of air.Options, "calib" and "samples" where they
# are not the lab's, and whatever is to tell its row from others ("variant").
def options_of(setting):
    """air's Options of a setting: the paper's but for the fields it has."""
    names = [each.name for each in fields(Options)]
    given = {name: setting[name] for name in names if name in setting}
    return Options(**{"ridge": 0.0} | given)


def source_of(options):
    """The file in which the method is written, relative to the repository."""
    path = inspect.getsourcefile(METHODS[options.method].factors)
    return os.path.relpath(os.path.realpath(path), ROOT)


def compress(ckpt, sweep, ranks, options, device):
    """Every layer in `ranks` {layer: k} decomposed, in memory; `sweep` yields (block,
    statistics).

    Returns (a Checkpoint whose tensors are those air.py would write, so rounded to the
    checkpoint's dtype; the Losses of each layer, of methods that have L_act,infl).
    """
    losses = []
    made = {}                                           # {name: tensor} of the factors
    for l, stats in sweep:
        for solved in compress_block(ckpt, l, stats, ranks, options, device):
            made |= solved.tensors
            if solved.repair:
                say(repair_line(solved.layer, solved.repair))
            if solved.losses.after is not None:
                losses.append(solved.losses)
    kept = [name for name in ckpt.names if name.rpartition(".")[0] not in ranks]
    small = copy.copy(ckpt)
    small.tensors = {name: ckpt.tensors[name] for name in kept} | in_memory(made)
    small.names = list(small.tensors)
    small.cfg = replace(ckpt.cfg, ranks=ranks)
    return small, losses


# ------------------------------------------------------------ what was measured
class Cells(dict):
    """{key: value} of what was measured so far, kept in a .jsonl file as soon as it is."""

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text("utf-8").split("\n") if self.path.exists() else []
        for line in lines:
            try:
                key, value = json.loads(line)
            except ValueError:                      # the line a killed run was writing
                continue
            self[key] = value

    def keep(self, key, value):
        """Append a finished one, on its own line even after a torn one."""
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        self[key] = json.loads(json.dumps(finite(value)))
        with open(self.path, "a", encoding="utf-8") as f:
            f.write("\n" * torn + json.dumps([key, self[key]]) + "\n")


def machine_facts(device, dtype):
    """What results were computed on and when."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
        "dtype": str(dtype)[6:],
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------ the laboratory
class Job(NamedTuple):
    """A cell to measure: a setting at one seed."""

    setting: dict
    seed: int | None                    # None where the method reads no windows
    windows: torch.Tensor | None        # (samples, T) token ids to calibrate on
    key: str                            # of the cell


class Lab:
    """A checkpoint, its texts, every seed's statistics and every cell measured so far.

    Raises InputError for a compressed checkpoint or arguments that make no sense.
    """

    def __init__(self, script, setup):
        self.script = script
        self.setup = setup
        self.progress = Progress().listen()
        self.ckpt = Checkpoint(setup.ckpt)
        self.check()
        self.seeds = [int(seed) for seed in setup.seeds.split(",")]
        self.device, self.dtype, _ = pick_device(setup.device, setup.dtype)
        check_signal("lrp", self.dtype)
        fingerprint = self.ckpt.fingerprint()
        self.work = Path(setup.work) / f"{self.ckpt.name}-{fingerprint[:12]}"
        self.results = Path(setup.results)
        for folder in (self.work, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        path = self.results / f"{script}-{self.ckpt.name}.json"
        if path.exists() and read_json(path).get("fingerprint") not in (None, fingerprint):
            raise InputError(f"{path} is of another model of this name; name another --results, "
                             "or rename the checkpoint's folder")
        named = own_defaults(self.ckpt.raw).get("text", "wikitext2")
        self.calib = setup.calib or named
        resolved = self.resolve(self.calib, "train")
        if len(self.seeds) > 1 and own_windows(resolved, self.ckpt) is not None:
            raise InputError(f"{self.calib} holds its windows, the same at every seed; give "
                             f"--seeds {self.seeds[0]}")
        _, self.samples, self.seqlen = with_defaults(
            self.ckpt, resolved, setup.samples, setup.seqlen)
        self.texts = {"text": setup.text or self.calib}
        other = setup.text2 or OTHER.get(self.calib)
        if other:
            self.texts["text2"] = other
        self.memo = {}                                  # what `once` has computed
        self.cells = Cells(self.work / "cells.jsonl")
        self.facts = {
            "script": script, "checkpoint": self.ckpt.name, "fingerprint": fingerprint,
            "texts": {}, "calibration": self.calibrated(),
            "machine": machine_facts(self.device, self.dtype)}

    def check(self):
        if self.ckpt.cfg.compressed:
            raise InputError(f"{self.setup.ckpt} is already compressed; "
                             "point --ckpt at the dense checkpoint")
        numbers = re.fullmatch(r"\d+(,\d+)*", self.setup.seeds)
        each = [int(seed) for seed in self.setup.seeds.split(",")] if numbers else []
        if not each or len(each) > len(set(each)) or self.setup.windows < 0:
            raise InputError(f"--seeds is {self.setup.seeds} and --windows "
                             f"{self.setup.windows}; expected different numbers such as "
                             "3,4,5, and 0 or more")

    def calibrated(self):
        """How the lab calibrates, as results say it."""
        return {"text": Path(self.calib).name, "samples": self.samples,
                "seqlen": self.seqlen, "seeds": self.seeds}

    # -------------------------------------------------------- texts
    def resolve(self, text, split):
        """A text as calibrate.py and eval_ppl.py take it."""
        return torch_nn(split, self.work) if text == "torch.nn" else text

    def once(self, key, compute):
        """compute(), kept in memory for this run."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def evaluation(self, which):
        """Evaluation windows of "text" or "text2", the same for every method and seed."""
        if which not in self.texts:
            raise InputError(f"{self.script} evaluates on two texts; "
                             "name the second with --text2")
        return self.once(("evaluation", which), lambda: self.pick(which))

    def pick(self, which):
        """`--windows` windows of a text, evenly spaced; the results say which."""
        text = self.resolve(self.texts[which], "test")
        windows, _, _ = evaluation_windows(text, self.ckpt, self.seqlen)
        n = min(self.setup.windows or len(windows), len(windows))
        places = torch.linspace(0, len(windows) - 1, n, dtype=torch.float64)
        picked = windows[places.round().long()]
        self.facts["texts"][which] = {
            "name": Path(self.texts[which]).name, "windows": n, "of": len(windows),
            "seqlen": picked.shape[1], "sha256": digest(picked)}
        return picked

    def calibration(self, seed, text=None, samples=None):
        """Calibration windows (samples, T) of a seed; other text and number where
        named.
        """
        text = text or self.calib
        samples = samples or self.samples
        return self.once((seed, text, samples), lambda: self.draw(seed, text, samples))

    def draw(self, seed, text, samples):
        resolved = self.resolve(text, "train")
        windows = calibration_windows(resolved, self.ckpt, samples, self.seqlen, seed)
        if len(windows) < samples:
            raise InputError(f"{text} holds {len(windows)} windows, {samples} are "
                             "needed; give a text or 1-D tokens")
        return windows[:samples]

    # -------------------------------------------------------- statistics
    def statistics(self, windows, signal="lrp"):
        """air.statistics of every block, kept in a folder: yields (block, statistics).

        One folder a signal, so that no Gram matrix depends on which script ran first.
        """
        made = f"{digest(windows)[:16]}-{str(self.dtype)[6:]}-{code_digest(*SWEEPS)[:8]}"
        kept = Kept(self.work / f"stats-{made}-{signal}")
        every = range(self.ckpt.cfg.n_layers)
        return kept.statistics(self.ckpt, windows, self.device, self.dtype, every, signal)

    def sweep(self, options, windows):
        """What a method reads; one without a backward signal shares lrp's statistics."""
        every = range(self.ckpt.cfg.n_layers)
        if options.reads == "nothing":
            return ((l, {}) for l in every)
        signal = options.backward
        if options.share is None:
            return self.statistics(windows, signal or "lrp")
        first = self.statistics(windows, signal) if signal else ()
        h = embed(self.ckpt, windows, self.dtype)
        return anchored_sweep(self.ckpt, h, self.device, every, options.share, first)

    def forget(self, windows):
        """Delete the statistics of windows that no other script reads."""
        for folder in self.work.glob(f"stats-{digest(windows)[:16]}-*"):
            shutil.rmtree(folder)

    # -------------------------------------------------------- cells
    def key(self, facts, *files):
        """The key of a cell: its facts and its code, with `files` that are its own.

        An edited rule gives another key, so that no cell of the old one is read.
        """
        files = tuple(dict.fromkeys((*CODE, *files)))
        code = self.once(files, lambda: code_digest(*files))
        # Other versions and devices round otherwise: `machine` is true of every cell.
        facts = facts | {"dtype": str(self.dtype), "code": code, "device": self.device.type,
                         "torch": torch.__version__}
        return json.dumps(facts, sort_keys=True)

    def cell(self, facts, compute, *files, what=""):
        """compute() -> a JSON value, or what an earlier run kept under the same key.

        what: what it is, for the reader of a long run.
        """
        key = self.key(facts, *files)
        if key not in self.cells:
            start = time.time()
            self.cells.keep(key, compute())
            took = time.time() - start
            value = self.cells[key]
            ppl = f": {number(value)}" if isinstance(value, float) else ""
            self.progress.say(f"{self.script}  {what}{ppl}   {took:.1f} s")
        return self.cells[key]

    # -------------------------------------------------------- measurements
    def dense(self, which):
        """Perplexity of the dense checkpoint on a text."""
        windows = self.evaluation(which)

        def compute():
            return evaluate(self.ckpt, windows, self.device, self.dtype)
        return self.cell({"dense": digest(windows)}, compute, what="dense")["ppl"]

    def dense_states(self, which):
        """The dense checkpoint's last states on a text, computed once for all methods."""
        windows = self.evaluation(which)
        return self.once(("dense", which),
                         lambda: last_states(self.ckpt, windows, self.device, self.dtype))

    def job(self, setting, seed):
        options = options_of(setting)
        windows = None
        if seed is not None:
            windows = self.calibration(seed, setting.get("calib"), setting.get("samples"))
        # "variant" tells rows apart, not what is computed.
        facts = {"how": asdict(options) | {"rate": setting["rate"]},
                 "calibration": None if seed is None else digest(windows)}
        files = [source_of(options)]
        if options.measured:
            files.append("support/ranks.py")
        if options.share is not None:
            files.append("support/anchored.py")
        return Job(setting, seed, windows, self.key(facts, *files))

    def jobs(self, settings):
        """Every setting at every seed, or at None where the method sees no text."""
        jobs = []
        for seed in (None, *self.seeds):
            for setting in settings:
                if options_of(setting).calibrated == (seed is not None):
                    jobs.append(self.job(setting, seed))
        return jobs

    def lacking(self, key, texts, what):
        """Those of `texts` on which a cell has no figure yet."""
        found = self.cells.get(key, {}).get(what, {})
        return [which for which in texts if digest(self.evaluation(which)) not in found]

    def ranks(self, job, options):
        """{layer: rank} of a job; measured ones once for all methods and δ."""
        blocks = range(self.ckpt.cfg.n_layers)
        uniform = pick_ranks(self.ckpt, blocks, job.setting["rate"])
        if not options.measured:
            return uniform

        def search():
            sweep = self.statistics(job.windows, "kfac")
            wholes = wholes_of(self.ckpt, sweep, blocks, self.device, options)
            text = self.resolve(job.setting.get("calib", self.calib), "train")
            held = held_windows(text, self.ckpt, job.windows, job.seed)
            return find_ranks(self.ckpt, wholes, uniform, held, self.device, self.dtype)
        found = {"ranks": digest(job.windows), "rate": job.setting["rate"],
                 "ridge": options.ridge, "seed": job.seed, "which": options.ranks}
        what = f"{options.ranks} ranks, {job.setting['rate']:g}, seed {job.seed}"
        return self.cell(found, search, "support/ranks.py", what=what)

    def compressed(self, job, sweep=None):
        """(the Checkpoint that a job's method gives, its Losses), as `compress` has them."""
        options = options_of(job.setting)
        ranks = self.ranks(job, options)
        stats = (sweep or self.sweep)(options, job.windows)
        return compress(self.ckpt, stats, ranks, options, self.device)

    def compute(self, job, texts, js, sweep):
        """A job's cell, with figures of `texts` added to those it had."""
        small, losses = self.compressed(job, sweep)
        falls = [each.after / each.before for each in losses if each.before]
        descent = mean_spread(falls)[0] if falls else None
        cell = self.cells.get(job.key) or {"ppl": {}, "js": {}, "descent": descent}
        for which in texts:
            windows = self.evaluation(which)
            # The dense model's states serve every method; without them no divergence.
            dense = self.dense_states(which) if js else None
            score = evaluate(small, windows, self.device, self.dtype, dense)
            warn_nonfinite(score, windows)
            # A text is known by its windows, so that another --windows is another figure.
            cell["ppl"][digest(windows)] = score["ppl"]
            if js:
                cell["js"][digest(windows)] = score["js"]
        return cell

    def measure(self, settings, texts=("text",), js=False, sweep=None):
        """Settings, each at every seed -> rows.

        A row is the setting with "ppl" and, with `js`, "js" {text: [one a seed]}, and "descent"
        [L_act,infl after over before the sweeps, mean of layers; one a seed].
        `sweep(options, windows)`: statistics other than the method's own.
        """
        what = "js" if js else "ppl"
        jobs = self.jobs(settings)
        todo = {job.key: job for job in jobs if self.lacking(job.key, texts, what)}
        self.progress.begin(len(todo))
        for i, (key, job) in enumerate(todo.items(), 1):
            # Compute what the cell lacks; kept at once, a killed run has it.
            start = time.time()
            missing = self.lacking(key, texts, what)
            self.cells.keep(key, self.compute(job, missing, js, sweep))
            # Say what it was, its perplexity on the first text, the time it took.
            named = " ".join(map(str, job.setting.values()))
            if job.seed is not None:
                named += f", seed {job.seed}"
            ppl = self.cells[key]["ppl"][digest(self.evaluation(texts[0]))]
            self.progress.step(f"{self.script} {i}/{len(todo)}  {named}: {number(ppl)}   "
                               f"{time.time() - start:.1f} s,")
        return [self.row(setting, jobs, texts, js) for setting in settings]

    def row(self, setting, jobs, texts, js):
        """A setting with what was measured of it, one figure a seed."""
        cells = [self.cells[job.key] for job in jobs if job.setting is setting]
        row = dict(setting)
        for what in ("ppl", "js")[:1 + js]:
            row[what] = {}
            for which in texts:
                windows = digest(self.evaluation(which))
                row[what][which] = [cell[what].get(windows) for cell in cells]
        return row | {"descent": [cell["descent"] for cell in cells]}

    # -------------------------------------------------------- the end
    def finish(self, module, result, picture=None):
        """Verdicts, JSON, picture, what is printed, the READMEs' blocks: a script's is of
        the bundled demo, another model's has its name.

        module: the script's, with markdown, verdicts and, where there is one, short.
        """
        result = json.loads(json.dumps(finite(self.facts | result)))
        result["verdicts"] = module.verdicts(result)
        stem = str(self.results / f"{self.script}-{self.ckpt.name}")
        write_json(stem + ".json", result)
        plt = pyplot() if picture else None
        if plt:
            figure = picture(plt, result)
            figure.savefig(stem + ".partial", format="png")
            os.replace(stem + ".partial", stem + ".png")
            plt.close(figure)
        text = block(module, result)
        print(text.replace("**", ""), flush=True)
        if self.results.resolve() == RESULTS:
            bundled = self.facts["fingerprint"] == Checkpoint(ROOT / "demo").fingerprint()
            refresh(self.script if bundled else f"{self.script}-{self.ckpt.name}", text)
            refresh("claims", claims(self.results))
            if bundled and hasattr(module, "short"):
                refresh(f"{self.script}-short", module.short(result))
