"""What the files of enhance/ and peers/ begin with: their arguments, and what these ask for."""
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calibrate import add_calibration_arguments, calibration_windows
from eval_ppl import evaluation
from support.checkpoint import Checkpoint
from support.config import quantized_of
from support.script import (InputError, check_apart, check_results, check_seed, check_spared,
                            code_digest, parser, pick_device)
from support.texts import digest, own_windows, with_defaults

# {option: (the least, the most)} of what enhance/ takes.
BOUNDS = {"epochs": (0, 10**6), "batch": (1, 10**6), "every": (1, 10**6),
          "patience": (0, 10**6), "rank": (1, 10**5), "group": (0, 10**6), "lr": (1e-12, 1),
          "weight_decay": (0, 1), "weight": (0, 1), "dropout": (0, 0.99), "alpha": (0, 1e6),
          "adapter_steps": (0, 10**6)}
# What decides what is computed: of every file, and {file: what it reads besides}.
SHARED_CODE = ("model.py", "calibrate.py", "support/task.py", "support/learning.py",
               "support/result.py")
CODE = {"lora": ("enhance/retrain.py",),
        "quantize": ("support/packed.py", "support/even.py", "support/anchored.py"),
        "acip": ("enhance/lora.py", "enhance/retrain.py")}
# Files that learn by steps; the others go through all windows once.
LEARN = ("refine", "lora", "retrain", "acip")
HELD = 8        # windows learnt from for one that is held out: what is kept is best there
SPARE = 4       # windows drawn for each held out, in case some overlap what is learnt from
SHARED = 32     # tokens in a row that windows which overlap have in common


# ------------------------------------------------------------ arguments
def arguments(doc):
    """The parser of a file in enhance/."""
    p = parser(doc)
    for action in p._actions:
        if action.dest == "ckpt":
            action.default = None
            action.required = True
            action.help = "the result to start from, a folder that air.py or enhance/ wrote"
    p.add_argument("--dense", help="the dense checkpoint that it was made of, where that is "
                   "read (default: where the result says it was)")
    return add_result_arguments(p)


def add_result_arguments(p):
    """What is calibrated and evaluated on, where the result goes."""
    add_calibration_arguments(p)
    p.add_argument("--text", help="evaluation text, or none (default: the test part of the "
                   "--calib text)")
    p.add_argument("--windows", type=int, metavar="N", help="evaluate on N evenly spaced "
                   "windows of the text's (default: all)")
    p.add_argument("--out", required=True, help="output folder")
    p.add_argument("--overwrite", action="store_true",
                   help="replace an existing output folder once the new one is whole")
    p.add_argument("--json", metavar="FILE", help="write the results to FILE")
    return p


def source_of(ckpt):
    """What a result's config.json says of the dense checkpoint that it was made of."""
    return ckpt.raw.get("air", {}).get("source", {})


def dense_of(ckpt, given):
    """The dense Checkpoint that a result was made of.

    `given`, or where the result's config.json says it was. Raises InputError where that is
    not there or is another model.
    """
    source = source_of(ckpt)
    path = given or source.get("path")
    if path is None:
        raise InputError(f"{ckpt.folder} does not say of which checkpoint it was made; "
                         "name that with --dense")
    if not given and not Path(path).exists():
        raise InputError(f"{ckpt.folder} was made of {path}, which is not there any more; "
                         "name it with --dense")
    dense = Checkpoint(path)
    if dense.cfg.compressed:
        raise InputError(f"{path} is compressed itself; name the dense model of {ckpt.folder} "
                         "with --dense")
    if dense.cfg != replace(ckpt.cfg, ranks={}):
        raise InputError(f"{path} is not the dense model of {ckpt.folder}: their config.json "
                         "differ beyond the ranks; name the right one with --dense")
    if source.get("fingerprint", dense.fingerprint()) != dense.fingerprint():
        raise InputError(f"{path} is not the checkpoint that {ckpt.folder} was made of: its "
                         "weights or its config.json are others; name the right one with "
                         "--dense")
    return dense


# ------------------------------------------------------------ the task
def code_of(name, folder="enhance"):
    """The files that decide what a file of enhance/ or peers/ computes."""
    return (*SHARED_CODE, f"{folder}/{name}.py", *CODE.get(name, ()))


@dataclass
class Task:
    """What a run is to do, decided and checked before the first matrix product."""

    name: str                   # of the file in enhance/
    ckpt: Checkpoint            # the result it starts from
    options: dict               # its own arguments
    calib: str                  # calibration text
    windows: torch.Tensor       # (N, T) token ids to learn from
    held: torch.Tensor          # (N/8, T) further ones, by which what learns tells the best
    text: str                   # evaluation text, or "none"
    evaluation: tuple | None    # (windows, tokens in the text, tokens a byte)
    device: torch.device
    dtype: torch.dtype
    seed: int
    out: str
    folder: str = "enhance"     # of the file: enhance or peers

    def facts(self):
        """What the result depends on: a run that goes on must have the same."""
        windows = digest(torch.cat((self.windows, self.held)))
        code = code_digest(*code_of(self.name, self.folder))
        return {"by": self.name, "checkpoint": self.ckpt.fingerprint(), "windows": windows,
                "dtype": str(self.dtype), "code": code, "seed": self.seed, **self.options}

    @property
    def steps(self):
        """Of a training by `batch` windows a step: `epochs` times through all of them."""
        return self.options["epochs"] * -(-len(self.windows) // self.options["batch"])

    def calibration(self):
        """What a result says of it: text, windows learnt from and held out, their tokens."""
        N, T = self.windows.shape
        return {"text": self.calib, "samples": N, "held_out": len(self.held), "seqlen": T}

    def header(self):
        N, T = self.windows.shape
        held = len(self.held)
        count = f"{N} + {held} held out" if held else f"{N}"
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return (f"{self.name} of {self.ckpt.name}: {count} x {T} "
                f"tokens of {self.calib}, {options}\n"
                f"torch {torch.__version__}, {self.device} ({torch.get_num_threads()} "
                f"threads), {str(self.dtype)[6:]}, seed {self.seed}")


# ------------------------------------------------------------ windows
def stretches(windows):
    """A number (N, T − 31) for every 32 tokens in a row of windows (N, T), modulo 2⁶⁴."""
    N, T = windows.shape
    length = min(SHARED, T)
    found = torch.zeros(N, T - length + 1, dtype=torch.long)
    for i in range(length):
        found = found * 1_000_003 + windows[:, i:i + T - length + 1]
    return found


def spare_windows(text, ckpt, windows, seed):
    """Further windows (M, T) of the text that `windows` (N, T) are of; None for an array that
    holds these alone.

    Drawn by seed + 2 or, where what made `ckpt` was fitted to that number's, the next: by its
    seed the closed form was calibrated, maybe on more of them than are learnt from, by that
    + 1 its ranks were measured. Steps of one seed in a row hold out the same windows, which
    choose among what each has learnt. Raises InputError.
    """
    if own_windows(text, ckpt) is not None:
        return None
    section = ckpt.raw.get("air", {})
    before = [each.get("seed", seed) for each in (section, *section.get("enhanced", []))]
    used = {number for each in before for number in (each, each + 1)}
    free = next(number for number in itertools.count(seed + 2) if number not in used)
    count = SPARE * max(1, len(windows) // HELD)
    return calibration_windows(text, ckpt, count, windows.shape[1], free)


def split(windows, spare):
    """Windows (N, T) -> (those to learn from, those held out): all, and of `spare` (M, T) an
    eighth as many that share no text with them. spare None: all but the last eighth, and it.

    On text that was learnt, or that a closed form was calibrated on, nothing gets worse.
    """
    n = max(1, len(windows) // HELD)
    if spare is None:
        return windows[:-n], windows[-n:]
    apart = ~torch.isin(stretches(spare), stretches(windows)).any(1)
    if not apart.any():
        print("warning: every held-out window overlaps what is learnt from, and cannot tell "
              "what is best; give a longer text, or fewer or shorter windows", file=sys.stderr)
        return windows, spare[:n]
    return windows, spare[apart][:n]


def learnt_from(args, ckpt, instructions, learns):
    """(Token ids (N, T), held-out ones, the text they are of, the evaluation's text and its
    tokens a window), instructions as `prepare` has them. What does not learn holds none out;
    of an array of windows, and of rows of instructions, which have their template in common,
    the last eighth is. Raises InputError."""
    check_seed(args.seed)
    calib, samples, seqlen = with_defaults(ckpt, args.calib, args.samples, args.seqlen)
    spare = None
    if instructions and calib.lower().endswith(".json"):
        usual, _, length = with_defaults(ckpt, None, None, args.seqlen)
        windows = instructions(calib, ckpt, args.seqlen)[:args.samples]
        what = f"instructions of {calib} with an answer"
    else:
        usual = calib
        windows = calibration_windows(calib, ckpt, samples, seqlen, args.seed)
        if learns:
            spare = spare_windows(calib, ckpt, windows, args.seed)
        length = windows.shape[1]
        what = "calibration windows"
    held = windows[:0]
    if learns and spare is None and len(windows) < 2:
        raise InputError(f"{len(windows)} {what}; expected 2 or more, since one in {HELD} is "
                         "held out: give more of them")
    if learns:
        windows, held = split(windows, spare)
    return windows, held, calib, args.text or usual, length


# ------------------------------------------------------------ the checks
def prepare(name, args, options, instructions=None, folder="enhance"):
    """Arguments -> Task. Whatever can be wrong with them raises InputError here.

    instructions(path, ckpt, T or None) -> (N, T) reads --calib where that is a .json file.
    What is in `folder` enhance/ starts from a result, in peers/ from a dense checkpoint.
    """
    check_results(args.json)
    for key, (least, most) in BOUNDS.items():
        if not least <= options.get(key, least) <= most:
            raise InputError(f"--{key.replace('_', '-')} is {options[key]}; expected {least:g} "
                             f"to {most:g}")
    ckpt = Checkpoint(args.ckpt)
    if folder == "enhance" and not ckpt.cfg.ranks:
        kind = "has no low-rank layers" if ckpt.cfg.compressed else "is dense"
        raise InputError(f"{args.ckpt} {kind}; point --ckpt at a result of air.py")
    if folder == "peers" and ckpt.cfg.compressed:
        raise InputError(f"{args.ckpt} is already compressed; point --ckpt at the dense "
                         "checkpoint")
    ckpt.extras()
    device, dtype, _ = pick_device(args.device, args.dtype)
    learns = name in LEARN
    if learns and dtype == torch.float16:
        raise InputError(f"--dtype is float16, in which gradients vanish; {name} expects "
                         "bfloat16 or float32")
    if learns and quantized_of(ckpt.raw):
        print(f"warning: {args.ckpt} is quantized, what {name} writes is not: quantize last",
              file=sys.stderr)
    windows, held, calib, text, length = learnt_from(args, ckpt, instructions, learns)
    evaluated = evaluation(text, ckpt, length, args)
    check_apart(args.out, json=args.json)
    given = vars(args)
    check_spared(args.out, **{key: given.get(key) for key in
                              ("ckpt", "teacher", "calib", "text")})
    check_spared(args.out, dense=given.get("dense") or source_of(ckpt).get("path"))
    if given.get("dense"):
        dense_of(ckpt, args.dense)              # where it is not read it is checked all the same
    return Task(name, ckpt, options, calib, windows, held, text, evaluated, device, dtype,
                args.seed, args.out, folder)
