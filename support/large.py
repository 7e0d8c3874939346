"""What a model larger than memory, or several processes, add to air.py: block inputs on disk, a plan, a division of the work."""
import math
import os
import shutil
import timeit

import torch
import torch.distributed as dist

from support.checkpoint import Folder
from support.script import InputError, check_space, free_bytes


# ---------------------------------------------------------------------------------------------- block inputs on disk
class Spill:
    """The dict {l: input of block l (N, T, dim)} that the sweeps pass on, kept in a folder; a killed run finds it again."""

    def __init__(self, path, facts):
        self.folder, self.file = Folder(path, facts), "input_{:03}.safetensors".format

    def __contains__(self, l):
        return self.file(l) in self.folder.files

    def __setitem__(self, l, h):
        if l not in self:
            self.folder.save(self.file(l), {"h": h})

    def pop(self, l):
        return self.folder.load(self.file(l))["h"]

    def remove(self):
        self.folder.manifest.unlink(missing_ok=True)    # first: what a kill leaves behind is then no spill
        shutil.rmtree(self.folder.path)


# ---------------------------------------------------------------------------------------------- several processes
def start_processes(device):
    """Join the other processes of a torchrun (gloo on CPUs, nccl on GPUs); returns this one's device. Alone, nothing happens."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def end_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def processes():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(stats):
    """Sum every statistic over the processes, in place."""
    if dist.is_initialized():
        for key in sorted(stats):
            dist.all_reduce(stats[key])


def divide(sweep):
    """Of every `world` blocks a sweep yields, this process's (l, stats), or (None, None): so that all processes solve at once."""
    (rank, world), mine, i = processes(), (None, None), 0
    for i, (l, stats) in enumerate(sweep, 1):
        if (i - 1) % world == rank:
            mine = l, stats
        del stats
        if i % world == 0:
            yield mine
            mine = (None, None)
    if i % world:
        yield mine


def gather(part):
    """Every process's part, in process 0; an empty list in the others."""
    (rank, world), parts = processes(), [part]
    if world > 1:
        parts = [None] * world if rank == 0 else []
        dist.gather_object(part, parts or None)
    return parts


def from_first(value):
    """Process 0's value, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


# ---------------------------------------------------------------------------------------------- the plan
def machine_rates(device, dtype):
    """What this machine does now: FLOP/s of a matrix product in dtype, and in fp32; bytes/s of a copy, read and written."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    seconds = lambda work: min(timeit.repeat(lambda: (work(), wait()), number=1, repeat=4))             # noqa: E731
    n = 8192 if device.type == "cuda" else 1024
    a, b, x = (torch.ones(size, device=device, dtype=t) for size, t in (((n, n), dtype), ((n, n), torch.float32), (2**25, dtype)))
    y = torch.empty_like(x)
    return 2 * n**3 / seconds(lambda: a @ a), 2 * n**3 / seconds(lambda: b @ b), 2 * x.nbytes / seconds(lambda: y.copy_(x))


def costs(cfg, cut, windows, itemsize, signal):
    """({stage: (FLOP in the model's dtype, FLOP in fp32, bytes moved)}, {what: bytes held}) as README.md, "Cost", derives them.

    cut {layer: (m, n, rank)} of the layers to be decomposed; windows (how many, tokens each); every block is swept.
    """
    tokens, L, q, kv = math.prod(windows), cfg.n_layers, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    widths, weights = (cfg.dim, q, cfg.dim, cfg.hidden), cfg.dim * (2 * q + 2 * kv + 3 * cfg.hidden)        # of one block
    squares, passes = sum(n * n for n in widths), 4 if signal else 1
    influence, largest = 4 * weights if signal else 0, 8 * max(widths) ** 2                 # fp32; the widest ΣXXᵀ in fp64
    passed = sum(k * m * n for m, n, k in cut.values())
    stages = {
        "sweeps": (2 * tokens * weights * L * passes, 0, passes * weights * itemsize * L + 6 * windows[0] * influence * L),
        "ΣXXᵀ": (0, 2 * tokens * squares * L, 24 * windows[0] * squares * L),
        "Cholesky and SVD": (0, sum(n**3 / 3 + m * n * (2 * n + 1.1 * min(m, n) + 2 * k) + 12 * min(m, n)**3
                                    for m, n, k in cut.values()), 0),
        "ALS": (0, 34 * passed, 15 * passed)}
    return stages, {
        "inputs": tokens * cfg.dim * itemsize * (L + 1 if signal else 1), "statistics": len(cut) // 7 * (influence + 8 * squares),
        "block": influence + 8 * squares + max(weights * itemsize * (2 if signal else 1) + largest, 3 * largest)}


def plan(ckpt, cut, windows, dtype, device, signal, need, out, stats, spill):
    """Memory, disk and time of a run, as one line; `need`: bytes of the result. Raises InputError for what does not fit."""
    stages, held = costs(ckpt.cfg, cut, windows, dtype.itemsize, signal)
    rates, world = machine_rates(device, dtype), processes()[1]
    minutes = sum(work / rate for stage in stages.values() for work, rate in zip(stage, rates)) / world / 60
    inputs = 2 * math.prod(windows) * ckpt.cfg.dim * dtype.itemsize if spill else held["inputs"]
    host = inputs + (held["block"] * world if device.type == "cpu" else 0)
    for need, where, way in ((host, torch.device("cpu"), "--spill DIR keeps block inputs on disk, fewer --samples shrink them"),
                             (held["block"], device, "--device cpu works in the host's memory")):
        if (free := free_bytes(where)) is not None and need > free:
            raise InputError(f"the run needs {need / 1e9:.1f} GB of {where.type} memory, {inputs / 1e9:.1f} GB of the host's "
                             f"for block inputs, and {free / 1e9:.1f} GB are free; {way}")
    disk = {"result": (f"{out}.partial", need)} | {what: (where, held[what]) for what, where in (
        ("inputs", spill), ("statistics", stats)) if where}
    check_space(*disk.values())
    return (f"plan: about {minutes:.1f} min to the factors, {host / 1e9:.2f} GB of memory"
            + (f", {held['block'] / 1e9:.2f} GB on the GPU" if device.type == "cuda" else "")
            + "".join(f", {what} {size / 1e9:.2f} GB" for what, (_, size) in disk.items())
            + f" (measured: {rates[0] / 1e9:,.0f} GFLOP/s, {rates[2] / 1e9:.0f} GB/s)")
