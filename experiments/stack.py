"""What tables 4, 5, 6 and 14 share: a compressed model in memory, and what is done after.

A step is ("refine" | "lora" | "retrain" | "quantize", its options); a chain of them is
measured once and kept, as every other cell.
"""
import copy
import functools
import json

import torch

from enhance.lora import lora
from enhance.quantize import quantize
from enhance.refine import refine
from enhance.retrain import retrain
from eval_ppl import evaluate
from peers.acip import OPTIONS, Training, blocks_of, learn, put_on
from support.checkpoint import in_memory
from support.config import compressed_config, parse_config
from support.learning import model_to_learn, own
from support.packed import PARTS, unpacked
from support.task import LEARN, Task, code_of, spare_windows, split
from support.texts import digest

OWN = "experiments/stack.py"
# What each step runs with on few windows; the files' defaults are their sources'.
RECIPES = {
    "refine": {"epochs": 10, "lr": 1e-3, "weight_decay": 0.01, "batch": 4, "error": "squared"},
    "lora": {"epochs": 6, "lr": 1e-3, "batch": 8, "every": 7, "rank": 8, "alpha": 16,
             "dropout": 0.05},
    "retrain": {"epochs": 5, "lr": 1e-4, "batch": 4, "every": 7, "patience": 5, "weight": 0.0},
    "quantize": {"bits": 4, "group": 0, "rounding": "gptq", "smooth": False,
                 "rotate": False, "clip": False, "refit": False},
    # Few steps, so that a mask falls ten times as fast and λ begins at a tenth.
    "acip": OPTIONS | {"lr": 5e-4, "weight": 1e-4, "rank": 8, "adapter_steps": 60, "every": 20},
}


# ------------------------------------------------------------ a step, in memory
def block_tensors(start, l, tensors, options):
    """{name: weight} of block l that a step yielded; codes are turned back."""
    found = dict(tensors)
    for name in start.names:
        if name + PARTS[0] in tensors:
            parts = [found.pop(name + part) for part in PARTS]
            columns = start.tensors[name].shape[1]
            found[name] = unpacked(parts, options["bits"], options["group"], columns)
    return found


def by_block(task, blocks):
    """The Checkpoint after a step that yields blocks (l, {name: tensor}, note)."""
    made = {}
    for l, tensors, _ in blocks:
        made |= block_tensors(task.ckpt, l, tensors, task.options)
    return made


def whole_model(task, train):
    """The Checkpoint's factors after `train`(task, model), which yields losses."""
    model = model_to_learn(task.ckpt, task.device, task.dtype)
    for _ in train(task, model):
        pass
    state = model.state_dict()
    return {name: state[name].to(task.ckpt.dtype).cpu() for name in task.ckpt.names
            if ".U.weight" in name or ".V.weight" in name}


def apart(lab, name, windows, seed):
    """(Windows to learn from, those held out) of a step on a lab's calibration windows."""
    if name not in LEARN:
        return windows, windows[:0]
    text = lab.resolve(lab.calib, "train")
    return split(windows, spare_windows(text, lab.ckpt, windows, seed))


def stacked(lab, start, step, windows, seed):
    """The Checkpoint that `step` makes of `start`, which stay in memory."""
    name, options = step
    learnt, held = apart(lab, name, windows, seed)
    task = Task(name, start, RECIPES[name] | options, lab.calib, learnt, held, "none", None,
                lab.device, lab.dtype, seed, "")
    if name == "refine":
        made = by_block(task, refine(task, lab.ckpt, lambda l: None))
    elif name == "quantize":
        made = by_block(task, quantize(task, lambda l: None))
    else:
        made = whole_model(task, {"lora": lora, "retrain": retrain}[name])
    after = copy.copy(start)
    after.tensors = start.tensors | in_memory(made)
    return after


# ------------------------------------------------------------ peers, in memory
def compact(ckpt, blocks, changes, section):
    """The Checkpoint of what a file of peers/ yields, with `changes` and `section` in its
    config.json, and the ranks of its factors."""
    made = {name: w for _, tensors in blocks for name, w in tensors.items()}
    ranks = {name.removesuffix(".V.weight"): len(w) for name, w in made.items()
             if name.endswith(".V.weight")}
    small = copy.copy(ckpt)
    small.tensors = in_memory(made)
    small.names = list(made)
    small.raw = compressed_config(ckpt.raw | changes, section | {"ranks": ranks})
    small.cfg = parse_config(small.raw)
    return small


def acip(lab, seed, rates):
    """{rate: perplexity}: one training, cut to every rate that its scores reach."""
    options = RECIPES["acip"]
    learnt, held = apart(lab, "acip", lab.calibration(seed), seed)
    task = Task("acip", lab.ckpt, options, lab.calib, learnt, held, "none", None, lab.device,
                lab.dtype, seed, "", "peers")
    torch.manual_seed(seed)
    model = own(lab.ckpt.model(lab.device, torch.float32))
    training = Training(*put_on(model, options), options)
    for _ in learn(task, model, training):
        pass
    found = {}
    for rate in rates:
        if rate >= options["stop"]:
            small = compact(lab.ckpt, blocks_of(task, model, training, rate), {}, {})
            windows = lab.evaluation("text")
            found[f"{rate:g}"] = evaluate(small, windows, lab.device, lab.dtype)["ppl"]
    return found


# ------------------------------------------------------------ measurements
@functools.lru_cache(maxsize=2)
def kept(lab, setting, steps, seed):
    """`after` of JSON, whose last two results stay in memory."""
    job = lab.job(json.loads(setting), seed)
    *before, last = json.loads(steps) or [None]
    if last is None:
        return lab.compressed(job)[0]
    return stacked(lab, after(lab, job.setting, before, seed), last, job.windows, seed)


def after(lab, setting, steps, seed):
    """The Checkpoint after `steps` on a setting's result at a seed. A chain that begins as
    the one before it did goes on from there."""
    return kept(lab, json.dumps(setting), json.dumps(steps), seed)


def chain(lab, setting, steps, seed):
    """Perplexity on the first text after `steps` on a setting's result at a seed."""
    files = [OWN, *(file for name, _ in steps for file in code_of(name))]
    done = [[name, RECIPES[name] | options] for name, options in steps]

    def compute():
        small = after(lab, setting, steps, seed)
        return evaluate(small, lab.evaluation("text"), lab.device, lab.dtype)["ppl"]
    facts = {"job": lab.job(setting, seed).key, "steps": done, "seed": seed,
             "text": digest(lab.evaluation("text"))}
    named = " + ".join([setting["form"], *(name for name, _ in steps)])
    what = f"{named}, {setting['rate']:g}, seed {seed}"
    return lab.cell(facts, compute, *files, what=what)


def measure_acip(lab, rates):
    """A row a rate, as those of `measure`; None below the share at which masks stop."""
    cells = []
    for seed in lab.seeds:
        facts = {"acip": RECIPES["acip"], "rates": rates, "seed": seed,
                 "calibration": digest(lab.calibration(seed)),
                 "text": digest(lab.evaluation("text"))}
        cells.append(lab.cell(facts, lambda s=seed: acip(lab, s, rates),
                              OWN, *code_of("acip", "peers"), what=f"ACIP, seed {seed}"))
    return [{"form": "ACIP", "stack": "its adapters", "rate": rate,
             "ppl": {"text": [cell.get(f"{rate:g}") for cell in cells]}} for rate in rates]


def measure(lab, settings, stacks):
    """{name of a stack: rows}, a row a setting with "ppl" [one a seed]; stacks {name: steps}."""
    found = []
    for setting in settings:
        for name, steps in stacks.items():
            ppl = [chain(lab, setting, steps, seed) for seed in lab.seeds]
            found.append(setting | {"stack": name, "ppl": {"text": ppl}})
    return found
