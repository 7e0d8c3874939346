"""What the files of enhance/ share: arguments, the result they start from, the one they
write, learning rates."""
import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from calibrate import add_calibration_arguments, block_forward, calibration_windows
from eval_ppl import (bits_per_byte, evaluate, evaluation_windows, per_byte_line,
                      warn_nonfinite, windows_line)
from model import LAYERS, LowRank
from support.checkpoint import Checkpoint, Writer, part_of, result_bytes
from support.config import MODELING, compressed_config, dense_config
from support.large import machine_rates
from support.packed import PARTS, unpacked
from support.progress import Progress, Stopwatch, say, told
from support.script import (InputError, check_apart, check_seed, check_spared, check_writable,
                            code_digest, free_bytes, parser, peak_memory, pick_device, write_json)
from support.texts import digest, own_windows, with_defaults

ADAM = ("step", "exp_avg", "exp_avg_sq")        # what AdamW keeps of a parameter
# {option: (the least, the most)} of what enhance/ takes.
BOUNDS = {"epochs": (0, 10**6), "batch": (1, 10**6), "every": (1, 10**6),
          "patience": (0, 10**6), "rank": (1, 10**5), "group": (0, 10**6), "lr": (1e-12, 1),
          "weight_decay": (0, 1), "weight": (0, 1), "dropout": (0, 0.99), "alpha": (0, 1e6),
          "adapter_steps": (0, 10**6)}
# {file: what its result depends on beside it and this one}
CODE = {"lora": ("enhance/retrain.py",), "quantize": ("support/packed.py",),
        "acip": ("enhance/lora.py", "enhance/retrain.py")}
# Files that learn by steps; the others go through all windows once.
LEARN = ("refine", "lora", "retrain", "acip")
HELD = 8        # one window in so many is held out: what is kept is best on these
SPARE = 4       # windows drawn for each of them, in case some overlap what is learnt from
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


def dense_of(ckpt, given):
    """The dense Checkpoint that a result was made of.

    `given`, or where the result's config.json says it was. Raises InputError where that is
    not there or is another model.
    """
    source = ckpt.raw.get("air", {}).get("source", {})
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
    return ("model.py", "calibrate.py", "support/enhance.py", f"{folder}/{name}.py",
            *CODE.get(name, ()))


@dataclass
class Task:
    """What a run is to do, decided and checked before the first matrix product."""

    name: str                   # of the file in enhance/
    ckpt: Checkpoint            # the result it starts from
    options: dict               # its own arguments
    calib: str                  # calibration text
    windows: torch.Tensor       # (N, T) token ids to learn from
    held: torch.Tensor          # (N/8, T) by which it is told what is best
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

    def header(self):
        N, T = self.windows.shape
        held = len(self.held)
        count = f"{N} + {held} held out" if held else f"{N}"
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return (f"{self.name} of {self.ckpt.name}: {count} x {T} "
                f"tokens of {self.calib}, {options}\n"
                f"torch {torch.__version__}, {self.device} ({torch.get_num_threads()} "
                f"threads), {str(self.dtype)[6:]}, seed {self.seed}")


def stretches(windows):
    """A number (N, T − 31) for every 32 tokens in a row of windows (N, T), modulo 2⁶⁴."""
    N, T = windows.shape
    length = min(SHARED, T)
    found = torch.zeros(N, T - length + 1, dtype=torch.long)
    for i in range(length):
        found = found * 1_000_003 + windows[:, i:i + T - length + 1]
    return found


def split(windows, spare=None):
    """Windows (N, T) -> (those to learn from, those held out): the last eighth, where one
    overlaps what is learnt from the next of `spare` (M, T) that does not; None: none do.

    Windows start anywhere in a text, and on text that was learnt nothing gets worse.
    """
    n = max(1, len(windows) // HELD)
    learnt = windows[:-n]
    held = windows[-n:]
    if spare is None:
        return learnt, held
    held = torch.cat((held, spare))
    apart = ~torch.isin(stretches(held), stretches(learnt)).any(1)
    if not apart.any():
        say("warning: every held-out window overlaps what is learnt from, and cannot tell what "
            "is best; give a longer text, or fewer or shorter windows")
        return learnt, held[:n]
    return learnt, held[apart][:n]


def learnt_from(args, ckpt, instructions, spares):
    """(Token ids (N, T), spare ones, the text they are of, the evaluation's text and its
    tokens a window), instructions as `prepare` has them. Rows of instructions have no
    `spares`, and their template in common. Raises InputError."""
    check_seed(args.seed)
    calib, samples, seqlen = with_defaults(ckpt, args.calib, args.samples, args.seqlen)
    spare = None
    if instructions and calib.lower().endswith(".json"):
        usual, _, length = with_defaults(ckpt, None, None, args.seqlen)
        windows = instructions(calib, ckpt, args.seqlen)[:args.samples]
        what = f"instructions of {calib} with an answer"
    else:
        usual = calib
        more = spares * max(1, samples // HELD)
        windows = calibration_windows(calib, ckpt, samples + more, seqlen, args.seed)
        # An array of windows is taken whole.
        drawn = own_windows(calib, ckpt) is None
        n = samples if drawn else len(windows)
        windows, spare = windows[:n], windows[n:]
        length = windows.shape[1]
        what = "calibration windows"
    if spares and len(windows) < 2:
        raise InputError(f"{len(windows)} {what}; expected 2 or more, since one in {HELD} is "
                         "held out: set --samples, or give a longer text")
    return windows, spare, calib, args.text or usual, length


def prepare(name, args, options, instructions=None, folder="enhance"):
    """Arguments -> Task. Whatever can be wrong with them raises InputError here.

    instructions(path, ckpt, T or None) -> (N, T) reads --calib where that is a .json file.
    What is in `folder` enhance/ starts from a result, in peers/ from a dense checkpoint.
    """
    check_writable(args.json)
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
    windows, spare, calib, text, length = learnt_from(args, ckpt, instructions, SPARE * learns)
    held = windows[:0]
    if learns:
        windows, held = split(windows, spare)
    evaluation = None
    if text != "none":
        evaluation = evaluation_windows(text, ckpt, length, args.windows)
    check_apart(args.out, json=args.json)
    given = vars(args)
    check_spared(args.out, **{key: given.get(key) for key in
                              ("ckpt", "dense", "teacher", "calib", "text")})
    if given.get("dense"):
        dense_of(ckpt, args.dense)              # where it is not read it is checked all the same
    return Task(name, ckpt, options, calib, windows, held, text, evaluation, device, dtype,
                args.seed, args.out, folder)


def weights_of(ckpt, l):
    """Numbers in block l of a checkpoint."""
    at = f"model.layers.{l}."
    return sum(math.prod(ckpt.tensors[name].shape) for name in ckpt.names
               if name.startswith(at))


def dtypes_of(ckpt, l):
    """{parameter of block l: the dtype it is stored in}."""
    at = f"model.layers.{l}."
    return {name.removeprefix(at): ckpt.tensors[name].dtype for name in ckpt.names
            if name.startswith(at)}


def device_bytes(cfg, weights, tokens, dtype):
    """Of a block that learns beside the dense one: weights (small, whole) of a block
    each, a micro-batch of `tokens`."""
    small, whole = weights
    # Parameters, gradients, Adam's two moments, a copy; the micro-batch's graph.
    graph = 4 * tokens * (12 * cfg.dim + 6 * cfg.hidden)
    return 20 * small + whole * dtype.itemsize + graph


class Plan(NamedTuple):
    """What a run takes."""

    line: str                   # said before it begins
    need: float                 # bytes on disk


def make_plan(task, flops, host, block, disk=None):
    """The Plan: `flops` in all, bytes of the `host`'s memory and of a `block` and what
    belongs to it, on the device; `disk` {what: bytes}, by default a result of the same
    shapes. Raises InputError for what does not fit in memory."""
    disk = disk or {"result": result_bytes(task.ckpt, {})}
    if task.device.type == "cpu":
        host += block
        block = 0
    needs = ((torch.device("cpu"), host, "fewer --samples take less"),
             (task.device, block, "--device cpu works in the host's memory"))
    for memory, need, advice in needs:
        free = free_bytes(memory)
        if free is not None and need > free:
            raise InputError(f"the run needs {need / 1e9:.1f} GB of {memory.type} memory and "
                             f"{free / 1e9:.1f} GB are free; {advice}")
    rate, _, _ = machine_rates(task.device, task.dtype)
    gpu = f", {block / 1e9:.2f} GB on the GPU" if block else ""
    kept = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in disk.items())
    line = (f"plan: about {flops / rate / 60:.1f} min, {host / 1e9:.2f} GB of memory{gpu}, "
            f"{kept} (measured: {rate / 1e9:,.0f} GFLOP/s)")
    return Plan(line, sum(disk.values()))


# ------------------------------------------------------------ learning
def check_finite(value, what):
    """Raise RuntimeError for a number or a tensor that is not finite."""
    if not torch.isfinite(torch.as_tensor(value)).all():
        raise RuntimeError(f"{what} is not finite: activations overflowed; use bfloat16 or "
                           "float32")


def own(module):
    """A copy to be changed: an fp32 checkpoint hands out its own memory."""
    return copy.deepcopy(module)


def model_to_learn(ckpt, device, dtype):
    """The whole model in memory, in `dtype`, but for its factors, which are in fp32: what
    learns starts from the numbers that are stored."""
    model = own(ckpt.model(device, dtype))
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            for which in ("V", "U"):
                w = ckpt.tensor(f"{name}.{which}.weight", device, torch.float32)
                getattr(layer, which).weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    return model


@torch.no_grad()
def balance(model):
    """Scale each rank's row of V and column of U to about one length, in place.

    Not in the papers: S⁻¹ leaves V's numbers thousands of times smaller than U's, and Adam
    moves both by as much. By powers of two, so that UV stays what it is bit by bit.
    """
    for layer in model.modules():
        if isinstance(layer, LowRank):
            U = layer.U.weight
            V = layer.V.weight
            ratio = V.norm(dim=1) / U.norm(dim=0).clamp_min(1e-30)              # (k,)
            scale = (ratio.clamp_min(1e-30).log2() / 2).round().exp2()
            U.mul_(scale)
            V.div_(scale[:, None])


def even_scale(weights):
    """Powers of two (n,), about each column's root mean square over `weights` [(…, n)], the
    geometric mean of all being 1; 1 for a column of zeros."""
    size = torch.cat([w.float() for w in weights]).square().mean(0).sqrt()
    alive = size > 0
    size = torch.where(alive, size, 1.0).log2()
    mean = size.sum() / alive.sum().clamp_min(1)
    return torch.where(alive, (size - mean).round().exp2(), 1.0)


def smooth(block, cfg):
    """Even out the columns of what reads an input, in place, while the block's output stays
    what it is. Returns {parameter: what it was multiplied by}, powers of two.

    Not in the paper: SmoothQuant's identity (Xiao et al., 2023), W diag(1/d) · diag(d) x, d
    put into what makes x: the norm, up's rows before down, v's before o, where the query
    heads of a kv head share theirs. S⁻¹ leaves V's columns small where an input is large;
    on a grid that serves a whole row they would be rounded away.
    """
    low_rank = {name for name, layer in block.named_modules() if isinstance(layer, LowRank)}
    weight = {name: name + (".V" if name in low_rank else "") + ".weight" for name in LAYERS}
    names = dict(block.named_parameters())
    found = {}

    def multiply(name, factor):
        if name in names:
            found[name] = found.get(name, 1.0) * factor

    # What makes an input, what reads it; columns (G, heads, …), of which all heads share d.
    kv = cfg.n_kv_heads
    inputs = (
        ("input_layernorm", [f"self_attn.{x}_proj" for x in "qkv"], 1, 1),
        ("self_attn.v_proj", ["self_attn.o_proj"], kv, cfg.n_heads // kv),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], 1, 1),
        ("mlp.up_proj", ["mlp.down_proj"], 1, 1),
    )
    for maker, readers, G, heads in inputs:
        if low_rank.isdisjoint(readers):                # of what is dense nothing is packed
            continue
        apart = [names[weight[name]].unflatten(1, (G, heads, -1)) for name in readers]
        d = even_scale([w.transpose(1, 2).flatten(0, 1).flatten(1) for w in apart])
        every = d.view(G, 1, -1).expand(-1, heads, -1).flatten()
        for name in readers:
            multiply(weight[name], 1 / every)
        made = f"{maker}.U" if maker in low_rank else maker
        multiply(f"{made}.weight", d if maker.endswith("norm") else d[:, None])
        multiply(f"{made}.bias", d)
    for name, scale in found.items():
        names[name].data.mul_(scale)
    return found


def with_packed(ckpt, l, packed, scales):
    """{name: tensor} of block l as it is written: `packed` {part of a parameter: tensor}, and
    what is not packed as it is, but for `scales` {parameter: scale}."""
    at = f"model.layers.{l}."
    rest = {name.removeprefix(at): w for name, w in ckpt.rest(l).items()}
    for name in rest.keys() & scales.keys():
        rest[name] = rest[name] * scales[name].to(rest[name])
    found = {at + name: w for name, w in rest.items() if name + PARTS[0] not in packed}
    return found | {at + name: tensor.cpu() for name, tensor in packed.items()}


def products(device, dtype):
    """Matrix products in `dtype`, where parameters that learn are in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def batch_at(task, step):
    """The windows of a step, (batch, T): each epoch in another order. The batch and what is
    drawn in it, such as dropout, are the same in a run that goes on."""
    torch.manual_seed(task.seed + step)
    N = len(task.windows)
    size = task.options["batch"]
    an_epoch = -(-N // size)
    order = torch.Generator().manual_seed(task.seed + step // an_epoch)
    return task.windows[torch.randperm(N, generator=order).split(size)[step % an_epoch]]


def training_tensors(params, optimizer):
    """{name: tensor} of parameters and what AdamW keeps of them, to go on from."""
    tensors = {}
    for key, w in params.items():
        moments = optimizer.state[w].items()
        tensors |= {f"{key}:now": w} | {f"{key}:{name}": moment for name, moment in moments}
    return tensors


@torch.no_grad()
def take_training(params, optimizer, tensors, step):
    """Give them back."""
    for key, w in params.items():
        w.copy_(tensors[f"{key}:now"])
        if step:
            state = {name: tensors[f"{key}:{name}"].clone() for name in ADAM}
            optimizer.state[w] = {name: each if name == "step" else each.to(w.device)
                                  for name, each in state.items()}


def rate_at(step, steps, warm_up, last):
    """Share of the peak learning rate at `step` of 0 … steps-1: linear warm-up over
    `warm_up` steps, then a cosine to `last`."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


def warm_up_of(steps, usual):
    """Steps of warm-up: the `usual` number, of a short course at most a fifth."""
    return min(usual, steps // 5)


def linear_at(step, steps, warm_up):
    """The same with a straight line to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return (steps - step) / max(1, steps - warm_up)


@torch.no_grad()
def advance(block, h, angles):
    """A stream (N, T, dim) in the host's memory through a block, in place."""
    block_forward(block, h, h, angles, gram=False)


class Course:
    """AdamW without weight decay on `params` {name: fp32 tensor}; what is best on held-out
    text is kept, rounded to the dtypes `stored` {name: dtype}.

    folder: a TensorFolder in which a killed run finds all of it again; None: none.
    """

    def __init__(self, params, options, stored, folder=None, name="training"):
        self.params = params
        self.lr = options["lr"]
        self.every = options["every"]           # steps between evaluations
        self.patience = options.get("patience", 0)      # of them without a better one; 0: any
        self.stored = stored
        self.folder = folder
        self.name = f"{name}.safetensors"
        self.optimizer = torch.optim.AdamW(params.values(), weight_decay=0.0)
        self.step = 0
        self.log = []                           # [step, held-out loss]
        self.best = None                        # {name: tensor}
        if folder and self.name in folder.files:
            self.load()

    def update(self, share):
        """One step by the gradient that was added, at `share` of the peak rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def give(self, values):
        for key, w in self.params.items():
            w.copy_(values[key])

    def judge(self, held_loss):
        """Note held_loss() of the parameters as they would be stored; a state is saved."""
        exact = {key: w.detach().clone() for key, w in self.params.items()}
        rounded = {key: w.to(self.stored[key]) for key, w in exact.items()}
        self.give(rounded)
        loss = held_loss()
        self.give(exact)
        if not self.log:
            check_finite(loss, "the held-out loss before the first step")
        if loss < min((each for _, each in self.log), default=math.inf):
            self.best = rounded
        self.log.append([self.step, loss])
        if self.folder:
            self.save()

    @property
    def since_best(self):
        """How many evaluations ago the best was."""
        losses = [loss for _, loss in self.log]
        return len(losses) - 1 - losses.index(min(losses))

    def save(self):
        tensors = training_tensors(self.params, self.optimizer)
        tensors |= {f"{key}:best": w for key, w in self.best.items()}
        self.folder.save(self.name, tensors, {"step": self.step, "log": self.log})

    def load(self):
        note = self.folder.files[self.name]["note"]
        self.step = note["step"]
        self.log = note["log"]
        tensors = self.folder.load(self.name)
        take_training(self.params, self.optimizer, tensors, self.step)
        self.best = {key: tensors[f"{key}:best"].clone() for key in self.params}


def learn(course, steps, gradient, held_loss, share):
    """Train a Course's parameters and give them their best values; yields [step, held-out
    loss].

    gradient(step) adds the gradient of a step's loss; share(step) is that of the peak rate.
    Ends after `steps`, or when the course's patience does.
    """
    if not course.log:
        course.judge(held_loss)
    yield course.log[-1]
    for step in told("steps", range(course.step, steps)):
        if 0 < course.patience <= course.since_best:
            break
        gradient(step)
        course.update(share(step))
        if course.step % course.every == 0 or course.step == steps:
            course.judge(held_loss)
            yield course.log[-1]
    course.give(course.best)


# ------------------------------------------------------------ the result
def open_writer(task, plan, overwrite):
    """The Writer of a task's result, which keeps what is finished."""
    return Writer(task.out, plan.need, overwrite, task.facts(), keep=True)


def block_state(ckpt, l, tensors, packed):
    """The state dict of block l, from its file's tensors; packed: as for `finish`."""
    at = f"model.layers.{l}."
    shapes = {name: ckpt.tensors[name].shape for name in ckpt.names if name.startswith(at)}
    state = {}
    for name, (*_, columns) in shapes.items():
        if name in tensors:
            state[name.removeprefix(at)] = tensors[name]
        else:
            parts = [tensors[name + part] for part in PARTS]
            state[name.removeprefix(at)] = unpacked(parts, **packed["quantized"], columns=columns)
    return state


def write_blocks(task, args, plan, blocks, line, packed=None):
    """Write, block by block, what a file of enhance/ makes, then finish.

    `blocks(finished)` yields (l, {name: tensor}, note) of each block that is not finished;
    finished(l) is the state dict of one that an earlier run finished, or None. line(note):
    what is said of a block. packed: as for `finish`.
    """
    progress = Progress(args.quiet).listen()
    watch = Stopwatch()
    L = task.ckpt.cfg.n_layers
    with open_writer(task, plan, args.overwrite) as writer:
        progress.say(task.header())
        progress.say(plan.line)
        left = [l for l in range(L) if part_of(l) not in writer.done]
        if len(left) < L:
            progress.say(f"going on: {L - len(left)} of {L} blocks are finished in "
                         f"{task.out}.partial")

        def finished(l):
            if part_of(l) not in writer.done:
                return None
            return block_state(task.ckpt, l, writer.folder.load(part_of(l)), packed)

        progress.begin(len(left))
        for l, tensors, note in blocks(finished):
            writer.add(part_of(l), tensors, note)
            progress.step(f"block {l}: {line(note)}")
        notes = [writer.done[part_of(l)] for l in range(L)]
        writer.add(part_of(L), task.ckpt.rest(L))
        finish(task, writer, packed)
    watch.lap(task.name)
    end(task, {"blocks": notes}, args, progress, watch)


def write_model(task, args, plan, train):
    """Write what a file of enhance/ makes of the whole model at once, then finish.

    train(model, folder) trains `model`, in memory, in place and yields lines to be said;
    `folder`, a TensorFolder, keeps its states. Only low-rank factors may change.
    """
    progress = Progress(args.quiet).listen()
    watch = Stopwatch()
    L = task.ckpt.cfg.n_layers
    with open_writer(task, plan, args.overwrite) as writer:
        progress.say(task.header())
        progress.say(plan.line)
        parts = [part_of(l) for l in range(L + 1)]
        # A run that was killed while it moved them into place had all of them.
        if not writer.done.keys() >= set(parts):
            model = model_to_learn(task.ckpt, task.device, task.dtype)
            for each in train(model, writer.folder):
                progress.say(each)
            state = model.state_dict()
            factors = {name: w.detach().to(task.ckpt.tensors[name].dtype).cpu()
                       for name, w in state.items() if ".U." in name or ".V." in name}
            for l, part in enumerate(parts):
                rest = task.ckpt.rest(l)
                writer.add(part, {name: factors.get(name, w) for name, w in rest.items()})
        # The states were for a run that goes on.
        writer.folder.forget(set(writer.folder.files) - set(parts))
        writer.done = {part: writer.done[part] for part in parts}
        finish(task, writer)
    watch.lap(task.name)
    end(task, {}, args, progress, watch)


def finish(task, writer, packed=None):
    """Add to the configuration what was done, move all into place.

    packed: {"quantized": {"bits", "group"}} of factors that were written as codes.
    """
    raw = task.ckpt.raw
    N, T = task.windows.shape
    did = {"by": task.name, **task.options, "seed": task.seed,
           "dtype": str(task.dtype)[6:],
           "calibration": {"text": task.calib, "samples": N + len(task.held), "seqlen": T}}
    section = {key: raw["air"][key] for key in raw["air"] if key != "quantized"}
    section["enhanced"] = [*section.get("enhanced", []), did]
    raw = compressed_config(dense_config(raw), section | (packed or {}))
    copies = task.ckpt.extras()
    if packed:                              # which transformers' classes do not unpack
        del raw["auto_map"]
    else:
        copies.append(MODELING)
    writer.finish(raw, copies)


# ------------------------------------------------------------ the end
def score(task, progress, watch):
    """Evaluate the start and what was written; print and return their perplexities."""
    if task.evaluation is None:
        return {"ppl_before": None, "ppl_after": None}
    windows, tokens, tokens_per_byte = task.evaluation
    scores = []
    for which, ckpt in (("before", task.ckpt), ("after", Checkpoint(task.out))):
        progress.say(f"perplexity {which} …")
        scores.append(evaluate(ckpt, windows, task.device, task.dtype))
        warn_nonfinite(scores[-1], windows)
        watch.lap(f"evaluate_{which}")
    before, after = (each["ppl"] for each in scores)
    print(f"perplexity {before:.3f} -> {after:.3f}   {task.text}, "
          f"{windows_line(windows, tokens)}: {task.out}")
    if tokens_per_byte:
        print(per_byte_line(*(bits_per_byte(each, tokens_per_byte) for each in scores)))
    return {"ppl_before": before, "ppl_after": after, "text": task.text,
            "seqlen": windows.shape[1], "windows": len(windows)}


def end(task, results, args, progress, watch):
    """Evaluate, say how long it took, write --json."""
    results = results | score(task, progress, watch)
    stages = ", ".join(f"{stage} {s:.1f}" for stage, s in watch.seconds.items())
    progress.say(f"{sum(watch.seconds.values()):.0f} s ({stages}), "
                 f"peak memory {peak_memory() / 1e9:.2f} GB")
    on_gpu = task.device.type == "cuda"
    write_json(args.json, results | {
        "by": task.name, **task.options, "seconds": watch.seconds,
        "peak_rss_bytes": peak_memory(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None})
