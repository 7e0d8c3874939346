"""What a model larger than memory, or several processes, need.

Statistics kept, spilled and divided, a division of the work, a plan.
"""
import math
import os
import re
import shutil
import sys
import timeit
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from calibrate import embed, forward_sweep
from influence import SIGNALS, backward_sweep, start_gradient
from support import fast
from support.checkpoint import TensorFolder
from support.script import InputError, check_space, code_digest, free_bytes
from support.texts import digest

# What computes statistics.
SWEEPS = ("model.py", "calibrate.py", "influence.py", "support/config.py",
          "support/checkpoint.py")


# ------------------------------------------------------------ several processes
def number(name, least, most, default=None):
    """A whole number that torchrun puts in the environment. Raises InputError."""
    found = os.environ.get(name) or default
    if found is None or not re.fullmatch("[0-9]+", found) or not least <= int(found) <= most:
        world = os.environ["WORLD_SIZE"]
        beside = "" if name == "WORLD_SIZE" else f", and WORLD_SIZE is {world}"
        raise InputError(f"{name} is {found or 'not set'}{beside}; expected a whole "
                         f"number, {least} to {most}: start with torchrun, which sets "
                         "them, or unset WORLD_SIZE")
    return int(found)


def start_processes(device):
    """Join the other processes of a torchrun; returns this one's device.

    They talk through gloo on CPUs, nccl on GPUs. Alone, nothing happens. Raises
    InputError for what is amiss in the environment, and where they cannot be joined.
    """
    world = number("WORLD_SIZE", 1, 2**16, "1")
    if world == 1:
        return device
    number("RANK", 0, world - 1)
    port = number("MASTER_PORT", 1, 2**16 - 1)
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise InputError(f"WORLD_SIZE is {world} and MASTER_ADDR is not set; start with "
                         "torchrun, which sets it, or unset WORLD_SIZE")
    if device.type == "cuda":
        local = number("LOCAL_RANK", 0, torch.cuda.device_count() - 1)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    print(f"process {os.environ['RANK']} of {world} joins the others at {address}, port "
          f"{port}", file=sys.stderr)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError, OSError) as e:
        reason = str(e).strip().split("\n")[0][:200]
        raise InputError(f"the {world} processes could not be joined at {address}, port "
                         f"{port} ({reason}); expected a free port that all of them "
                         "reach: give torchrun another --master_port, check "
                         "GLOO_SOCKET_IFNAME and that all were started") from None
    return device


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def processes():
    """(rank of this process, number of processes)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(stats, share):
    """Sum every statistic over the processes, in place.

    This one saw `share` of the tokens.
    """
    if not dist.is_initialized():
        return
    for key in sorted(stats):
        if key.endswith(".mean_abs"):
            stats[key] *= share                     # a mean of this process's tokens
        dist.all_reduce(stats[key])


def divide(sweep):
    """This process's (l, stats) of every `world` blocks of a sweep: all solve at once.

    (None, None) where there is none left for it.
    """
    rank, world = processes()
    mine = None, None
    count = 0
    for l, stats in sweep:
        if count % world == rank:
            mine = l, stats
        del stats                                   # its only holder is `mine`
        count += 1
        if count % world == 0:
            yield mine
            mine = None, None
    if count % world:
        yield mine


def gather(part):
    """Every process's part that is not None, in process 0; [] in the others."""
    rank, world = processes()
    parts = [part]
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(part, parts)
    return [each for each in parts or [] if each is not None]


def from_first(value):
    """Process 0's value, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


# ------------------------------------------------------------ statistics
# What a run writes into its folder of a spill.
SPILLED = r"(input_\d+\.safetensors|manifest\.json)(\.partial)?"


class Spill:
    """The dict {l: input of block l (N, T, dim)} of the sweeps, in a folder.

    A run that was killed finds it again. Raises InputError for a folder of somebody's, or of
    another run.
    """

    def __init__(self, path, facts):
        others = [each.name for each in Path(path).glob("*")
                  if not re.fullmatch(SPILLED, each.name)]
        if others:
            raise InputError(f"{path} holds {min(others)}, which no run wrote, and is removed at "
                             "the end; name another --spill")
        self.folder = TensorFolder(path, facts)
        self.folder.keep_others_out()
        self.blocks = {int(name.split("_")[1][:3]) for name in self.folder.files}

    def file(self, l):
        return f"input_{l:03}.safetensors"

    def limit(self, last):
        """Pass over what lies there beyond block `last`."""
        self.blocks = {l for l in self.blocks if l <= last}

    def __iter__(self):
        return iter(self.blocks)

    def __contains__(self, l):
        return l in self.blocks

    def __setitem__(self, l, h):
        if self.file(l) not in self.folder.files:
            self.folder.save(self.file(l), {"h": h})
        self.blocks.add(l)

    def __delitem__(self, l):
        self.blocks.discard(l)

    def pop(self, l):
        self.blocks.discard(l)
        return self.folder.load(self.file(l))["h"]

    def remove(self):
        # First: what a kill leaves is then no spill.
        self.folder.manifest.unlink(missing_ok=True)
        shutil.rmtree(self.folder.path)
        self.folder.release()


class Kept:
    """air.statistics, kept in a folder, spilled to another, divided, continued.

    folder (--stats): statistics are kept there, with the gradient between two blocks, and
    a later run of the same checkpoint, text, dtype and code goes on from them, whatever
    its rate, method, signal or δ. spill (--spill): block inputs go there instead of to
    memory. Several processes divide the windows. In one process the numbers are those of
    air.statistics bit by bit; of several, to rounding. An object serves one sweep.
    """

    def __init__(self, folder=None, spill=None):
        self.folder = folder
        self.spill = spill
        self.kinds = None               # files of a block, once the folders are open

    def statistics(self, ckpt, windows, device, dtype, blocks, signal=None):
        """Yield (l, stats) of each of `blocks`, in any order, as air.statistics does."""
        rank, world = processes()
        if self.kinds is None:
            self.open(ckpt, windows, dtype, blocks, signal)
        todo = [l for l in blocks if not self.complete(l)]
        # What an earlier run has finished.
        for l in blocks:
            if l not in todo:
                yield l, self.load(l, self.kinds, device)
        mine = windows[rank::world]
        share = len(mine) / max(1, len(windows))
        for l, stats in self.sweep(ckpt, mine, device, dtype, todo):
            # The sums of all processes, which one of them keeps.
            add_up(stats, share)
            if self.stored and rank == 0:
                self.keep(l, stats, todo, world)
            if l in todo:
                # Another method's ΣXXᵀ: the same to rounding, and what later runs read.
                if self.file(l, "gram") in self.had:
                    stats.update(self.load(l, ["gram"], device))
                yield l, stats
            del stats                           # before the next block's are collected
        if signal and self.spill:
            self.inputs.remove()
            if rank == 0:
                self.clear_spills(world)
        if self.stored:
            if rank == 0:
                self.clear_gradients()
            self.stored.release()

    def open(self, ckpt, windows, dtype, blocks, signal):
        """The folders as they are found, for `statistics` of the same arguments.

        Raises InputError where they were made from other facts, or another run writes.
        """
        rank, world = processes()
        self.signal = signal
        self.kinds = ["gram", signal] if signal else ["gram"]
        self.stored = None
        self.inputs = {}
        self.had = {}
        facts = {}
        if self.folder or self.spill:
            facts = {"checkpoint": ckpt.fingerprint(), "windows": digest(windows),
                     "dtype": str(dtype), "code": code_digest(*SWEEPS)}
        if self.folder:
            self.stored = TensorFolder(self.folder, facts)
            self.had = dict(self.stored.files)
            # Statistics that are whole are only read, by any number of runs.
            if rank == 0 and not all(self.complete(l) for l in blocks):
                self.stored.keep_others_out()
                self.had = dict(self.stored.files)
        if signal and self.spill:
            folder = Path(self.spill) / f"{rank}of{world}"
            self.inputs = Spill(folder, facts)

    def file(self, l, kind):
        return f"block_{l:03}.{kind}.safetensors"

    def gradient(self, l):
        """The file of the gradient at block l's output."""
        return f"gradient_{l:03}.{self.signal}.safetensors"

    def clear_spills(self, world):
        """Remove what killed runs of the same left that were another number of processes; what
        else lies in the folder is somebody's."""
        for path in Path(self.spill).glob("*of*"):
            of = re.fullmatch(r"\d+of(\d+)", path.name)
            if of and of[1] != str(world):
                try:
                    Spill(path, self.inputs.folder.facts).remove()
                except InputError:                      # of another run
                    pass

    def clear_gradients(self):
        """Remove gradients that a killed run left above blocks that are all complete now."""
        done = 0
        while all(self.file(done, kind) in self.stored.files for kind in self.kinds):
            done += 1
        left = [self.gradient(l) for l in range(done)
                if self.gradient(l) in self.stored.files
                or (self.stored.path / self.gradient(l)).exists()]
        try:
            if left and not self.stored.hold:
                self.stored.keep_others_out()
        except InputError:                              # another run is at work
            return
        if left:
            self.stored.forget(left)

    def complete(self, l):
        return all(self.file(l, kind) in self.had for kind in self.kinds)

    def load(self, l, kinds, device):
        stats = {}
        for kind in kinds:
            stats |= self.stored.load(self.file(l, kind), device)
        return stats

    def sweep(self, ckpt, windows, device, dtype, todo):
        """The sweep that passes all blocks of `todo`, from where an earlier run was."""
        last = ckpt.cfg.n_layers
        if not todo:
            return ()
        if self.signal is None:
            h = embed(ckpt, windows, dtype)
            return forward_sweep(ckpt, h, device, gram=True, blocks=range(max(todo) + 1))
        # A gradient kept at the output of a block above all of them. Several processes
        # keep none.
        kept = [l for l in range(max(todo), last) if self.gradient(l) in self.had]
        _, world = processes()
        top = kept[0] if kept and world == 1 else None
        self.forward(ckpt, windows, device, dtype, stop=last if top is None else top)
        # Backward. The gradient is changed in place as the sweep proceeds.
        if top is None:
            self.g = start_gradient(
                ckpt, windows, self.inputs.pop(last), device, self.signal)
        else:
            self.g = self.stored.load(self.gradient(top))["g"].clone()
        # Below the last block wanted the gradient is of no use.
        for l in [l for l in self.inputs if l < min(todo)]:
            del self.inputs[l]
        return backward_sweep(ckpt, self.inputs, self.g, device, self.signal, gram=True)

    def forward(self, ckpt, windows, device, dtype, stop):
        """Collect the inputs up to block `stop`'s, from the last one that was spilled."""
        if self.spill:
            self.inputs.limit(stop)
        start = max(self.inputs, default=0)
        if start in self.inputs:
            h = self.inputs.pop(start)
        else:
            h = embed(ckpt, windows, dtype)
        blocks = range(start, stop)
        for _ in forward_sweep(ckpt, h, device, keep=self.inputs, blocks=blocks):
            pass

    def keep(self, l, stats, todo, world):
        """Put block l's statistics and the gradient below it on disk; older ones go."""
        if l in todo:
            for kind in self.kinds:
                # Influence is one file; ΣXXᵀ and the means another, which other signals
                # share.
                own = {key: x for key, x in stats.items()
                       if key.endswith(f".{self.signal}") == (kind == self.signal)}
                if self.file(l, kind) not in self.stored.files:
                    self.stored.save(self.file(l, kind), own)
        if self.signal:
            old = [name for name in self.stored.files
                   if name.startswith("gradient") and self.signal in name.split(".")]
            if world == 1 and l > min(todo):
                self.stored.save(self.gradient(l - 1), {"g": self.g})
            self.stored.forget(old)


# ------------------------------------------------------------ the plan
# Calibration tokens for each input of the widest layer, and what fewer cost
# (experiments/ridge.py).
ENOUGH = 2
COST = ("with 1, perplexity was 36 to 65 % above that with 16 on three models "
        "(experiments/ridge.py)")


def machine_rates(device, dtype):
    """What this machine does now: (FLOP/s in dtype, FLOP/s in fp32, bytes/s).

    Of matrix products and a copy, whose bytes are read and written.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else int

    def seconds(work):
        return min(timeit.repeat(lambda: (work(), wait()), number=1, repeat=4))

    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    b = torch.ones(n, n, device=device)
    x = torch.ones(2**25, device=device, dtype=dtype)
    y = torch.empty_like(x)
    product = 2 * n**3
    in_dtype = product / seconds(lambda: a @ a)
    in_fp32 = product / seconds(lambda: b @ b)
    copied = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    return in_dtype, in_fp32, copied


def solve_costs(cut):
    """(FLOP of Cholesky, WS and truncated SVD, FLOP of an ALS sweep, its bytes), fp32."""
    factor = products = moved = 0
    for m, n, k in cut.values():
        cholesky = n**3 / 3
        profiled = 2 * m * n * n
        # fast.truncated_svd: WᵀW's triangle, eigenvectors, the product with k of them.
        svd = 1.1 * m * n * min(m, n) + 12 * min(m, n)**3 + 2 * m * n * k
        factor += cholesky + profiled + svd
        # 17 products with a vector a rank. Of m×n numbers of 4 bytes fast.als_sweep makes
        # 3.75 passes a rank, air.als_sweep 25.
        products += 34 * k * m * n
        moved += (15 if min(m, n) >= fast.FROM else 100) * k * m * n
    return factor, products, moved


def block_sizes(cfg):
    """(numbers of a block's weights, n of its four inputs)."""
    q = cfg.n_heads * cfg.head_dim
    kv = cfg.n_kv_heads * cfg.head_dim
    weights = cfg.dim * (2 * q + 2 * kv + 3 * cfg.hidden)
    return weights, (cfg.dim, q, cfg.dim, cfg.hidden)


def costs(cfg, cut, windows, itemsize, signal):
    """({stage: (FLOP in the model's dtype, in fp32, bytes moved)}, {what: bytes held}).

    cut {layer: (m, n, rank)} of the layers to be decomposed; windows (how many, tokens
    each); every block is swept. experiments/README.md, "Cost", derives them.
    """
    tokens = math.prod(windows)
    L = cfg.n_layers
    weights, widths = block_sizes(cfg)
    squares = sum(n * n for n in widths)
    # Forward; for a backward signal again, and twice that on the way back.
    passes = 4 if signal else 1
    influence = 4 * weights if signal else 0                # bytes, fp32
    # A block's weights; influence is read, the gradient added, and written for every
    # window.
    moved = (passes * weights * itemsize + 6 * windows[0] * influence) * L
    factor, als, als_moved = solve_costs(cut)
    stages = {
        "sweeps": (2 * tokens * weights * L * passes, 0, moved),
        "ΣXXᵀ": (0, 2 * tokens * squares * L, 24 * windows[0] * squares * L),
        "Cholesky and SVD": (0, factor, 0),
        "ALS": (0, als, als_moved),
    }
    return stages, held_bytes(cfg, cut, tokens, itemsize, signal)


def metric_numbers(cfg, signal):
    """Numbers in the matrices (fp64) that a signal's metric makes of a block's layers."""
    if not signal or not SIGNALS[signal].metric:
        return 0
    q = cfg.n_heads * cfg.head_dim
    kv = cfg.n_kv_heads * cfg.head_dim
    attention = [(q, cfg.dim), (kv, cfg.dim), (kv, cfg.dim), (cfg.dim, q)]
    mlp = [(cfg.hidden, cfg.dim), (cfg.hidden, cfg.dim), (cfg.dim, cfg.hidden)]
    made = 0
    with torch.device("meta"):
        for m, n in attention + mlp:
            matrices = SIGNALS[signal].metric(torch.empty(1, m), torch.empty(m, n))
            made += sum(x.numel() for x in matrices.values())
    return made


def held_bytes(cfg, cut, tokens, itemsize, signal):
    """{what: bytes held} of `costs`, in the sweeps over `tokens` and in the solve."""
    weights, widths = block_sizes(cfg)
    squares = sum(n * n for n in widths)
    gram = squares
    influence = 4 * weights if signal else 0                # fp32
    squares += metric_numbers(cfg, signal)
    # At its peak a block holds its statistics and either the sweep's weights (and
    # gradients) and one more ΣXXᵀ, or the solve's three n×n matrices, fp64.
    largest = 8 * max(widths)**2
    swept = weights * itemsize * (2 if signal else 1) + largest
    one_input = tokens * cfg.dim * itemsize
    return {
        "one input": one_input,
        "inputs": one_input * (cfg.n_layers + 1 if signal else 1),
        "gram": len(cut) // 7 * 8 * gram,
        "statistics": len(cut) // 7 * (influence + 8 * squares),
        "block": influence + 8 * squares + max(swept, 3 * largest),
    }


@dataclass
class Plan:
    """Memory, disk and time of a run up to the factors.

    Libraries and the evaluation come on top.
    """

    device: torch.device
    seconds: dict               # {"forward sweep", "backward sweep", "solve", …: seconds}
    als: float                  # seconds of an ALS sweep, which is in none of them
    rates: tuple                # what machine_rates measured
    held: dict                  # {what: bytes}, of `costs`
    inputs: float               # bytes of block inputs in the host's memory
    solving: float              # bytes of a block in the host's memory, of all processes
    windows: tuple              # (how many, tokens each)
    widest: int                 # inputs of the widest layer
    disk: dict = field(default_factory=dict)    # {what: (folder, bytes)}

    def place(self, result, inputs=None, statistics=None, kinds=None):
        """Place on disk the result (folder, bytes), inputs and statistics (folders), of which
        `kinds` are read."""
        self.disk["result"] = result
        if inputs:
            self.disk["inputs"] = inputs, self.held["inputs"]
            # One is read while the next is made.
            self.inputs = 2 * self.held["one input"]
        if statistics:
            self.disk["statistics"] = statistics, self.held["statistics"], kinds

    def add(self, other, same):
        """A sweep and solve that come before: their time, and their memory where that is
        more. Are their statistics the `same`? Otherwise both lie on disk, with one ΣXXᵀ.
        """
        kept = self.held["statistics"] + other.held["statistics"] - self.held["gram"]
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds
        self.held |= {what: max(size, other.held[what]) for what, size in self.held.items()}
        if not same:
            self.held["statistics"] = kept
        self.inputs = max(self.inputs, other.inputs)
        self.solving = max(self.solving, other.solving)

    def check(self):
        """Raise InputError for what does not fit."""
        host = torch.device("cpu")
        spare = ("--spill DIR keeps block inputs on disk, fewer --samples shrink them, at a "
                 f"price below {self.enough()}")
        other = "--device cpu works in the host's memory"
        needs = ((host, self.inputs + self.solving, spare),
                 (self.device, self.held["block"], other))
        for memory, size, advice in needs:
            free = free_bytes(memory)
            if free is not None and size > free:
                raise InputError(f"the run needs {size / 1e9:.1f} GB of {memory.type} "
                                 f"memory, {self.inputs / 1e9:.1f} GB of the host's for "
                                 f"block inputs, and {free / 1e9:.1f} GB are free; "
                                 f"{advice}")
        check_space(*self.disk.values())

    def enough(self):
        """The fewest --samples that hold ENOUGH tokens an input."""
        return math.ceil(ENOUGH * self.widest / self.windows[1])

    def warning(self):
        """A line about too few calibration tokens; '' where there are enough."""
        N, T = self.windows
        if not 0 < N < self.enough():
            return ""
        return (f"warning: {N * T:,} calibration tokens are {N * T / self.widest:.1f} for "
                f"each of the widest layer's {self.widest:,} inputs; {COST}: expected "
                f"--samples {self.enough()} or more")

    @property
    def pace(self):
        """{stage: seconds} to hold a run on a CPU against; a GPU waits for other things."""
        return self.seconds if self.device.type == "cpu" else {}

    def line(self):
        """The plan in one line."""
        parts = [f"{(self.inputs + self.solving) / 1e9:.2f} GB of memory"]
        if self.device.type == "cuda":
            parts.append(f"{self.held['block'] / 1e9:.2f} GB on the GPU")
        for what, (_, size, *_) in self.disk.items():
            parts.append(f"{what} {size / 1e9:.2f} GB")
        flops, _, moved = self.rates
        minutes = sum(self.seconds.values()) / 60
        return (f"plan: about {minutes:.1f} min to the factors, {', '.join(parts)} "
                f"(measured: {flops / 1e9:,.0f} GFLOP/s, {moved / 1e9:.0f} GB/s)")


def make_plan(cfg, cut, windows, device, dtype, signal):
    """The Plan of a run that keeps all in memory; cut and windows as `costs` has them."""
    stages, held = costs(cfg, cut, windows, dtype.itemsize, signal)
    rates = machine_rates(device, dtype)
    _, world = processes()
    takes = {}
    for stage, works in stages.items():
        takes[stage] = sum(work / rate for work, rate in zip(works, rates)) / world
    # The way back recomputes the forward pass and collects ΣXXᵀ.
    forward = takes["sweeps"] / (4 if signal else 1)
    backward = takes["sweeps"] - forward
    if signal:
        backward += takes["ΣXXᵀ"]
    else:
        forward += takes["ΣXXᵀ"]
    seconds = {"forward sweep": forward, "backward sweep": backward,
               "solve": takes["Cholesky and SVD"]}
    solving = held["block"] * world if device.type == "cpu" else 0
    widest = max(n for _, n, _ in cut.values())
    return Plan(device, seconds, takes["ALS"], rates, held, held["inputs"], solving, windows,
                widest)
