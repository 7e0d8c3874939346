"""A model larger than memory: time and peak memory of every stage, from the command line.

    python experiments/scale.py             # LLaMA-7B's shape, 2 x 128 tokens
    python experiments/scale.py --blocks 2 8 32
                                            # fewer blocks: memory does not grow with depth
    python experiments/scale.py --device cuda --samples 256 --seqlen 2048 --solve :
                                            # the whole run, on a GPU
    python experiments/scale.py solve       # fast.py against LAPACK and the literal Algorithm 1
    python experiments/scale.py refine --blocks 1
                                            # enhance/refine.py, one epoch

Random weights of the model's real shape, fp16 on disk: 13.5 GB for LLaMA-7B's, in --folder;
they are removed afterwards. Writes experiments/results/scale.json.
"""
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import air
from enhance.refine import MICRO_BATCH
from experiments.report import refresh
from experiments.shapes import SHAPES, at_rate
from experiments.speed import TRIMMED, anonymous, apart, in_turn, ratio
from model import Llama
from support import fast
from support.checkpoint import Checkpoint
from support.config import parse_config
from support.large import costs, machine_rates
from support.result import device_bytes, weights_of
from support.script import ROOT, InputError, Parser, check_space, read_json, run, write_json


# ------------------------------------------------------------ a whole run
def random_weights(shape, generator):
    """fp16: normal, 0.02; norms 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    return torch.empty(shape).normal_(0, 0.02, generator=generator).half()


def write_checkpoint(folder, config):
    """Random fp16 weights, one shard a block; returns the bytes written."""
    with torch.device("meta"):
        model = Llama(parse_config(config)).state_dict()
    shapes = {name: w.shape for name, w in model.items()}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    check_space((folder, size))
    shards = {}                                                 # {file: names}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    where = {}                                                  # {name: file}
    for file, names in shards.items():
        state = {name: random_weights(shapes[name], generator) for name in names}
        save_file(state, Path(folder, file))
        where |= dict.fromkeys(names, file)
        print(f"\rwriting {len(where)} of {len(shapes)} tensors", end="", file=sys.stderr)
    print(file=sys.stderr)
    write_json(Path(folder, "model.safetensors.index.json"), {"weight_map": where})
    write_json(Path(folder, "config.json"), config)
    return size


def watched(command):
    """Run a command; returns (its highest anonymous resident memory in bytes, seconds).

    None for the memory where the system does not say.
    """
    start = time.time()
    peak = None
    process = subprocess.Popen(command, env=TRIMMED)
    while process.poll() is None:
        try:
            peak = max(peak or 0, anonymous(process.pid))
        except (OSError, StopIteration):
            pass                            # no such file here, or the process has ended
        time.sleep(0.01)
    if process.returncode:
        sys.exit(process.returncode)
    return peak, time.time() - start


def arguments_of(args, folder):
    """air.py's command line."""
    command = [sys.executable, ROOT / "air.py", "--ckpt", folder,
               "--calib", f"{folder}/w.npy", "--text", "none",
               "--rate", args.rate, "--layers", args.solve,
               "--out", f"{folder}/out", "--json", f"{folder}/r.json"]
    if args.device:
        command += ["--device", args.device]
    if args.dtype:
        command += ["--dtype", args.dtype]
    if args.spill:
        command += ["--spill", f"{folder}/spill"]
    return list(map(str, command))


def implied(ckpt, ranks, args):
    """What the stages cost by support/large.py, and their time at this machine's rates."""
    shapes = {layer: ckpt.tensors[layer + ".weight"].shape for layer in ranks}
    cut = {layer: (*shapes[layer], k) for layer, k in ranks.items()}
    gpu = (args.device or default_device()) == "cuda"
    device = torch.device("cuda" if gpu else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    rates = machine_rates(device, dtype)
    windows = args.samples, args.seqlen
    stages, kept = costs(ckpt.cfg, cut, windows, dtype.itemsize, "lrp")
    rows = {}
    for stage, (flop, flop_fp32, moved) in stages.items():
        seconds = flop / rates[0] + flop_fp32 / rates[1] + moved / rates[2]
        rows[stage] = {"flop": flop, "flop_fp32": flop_fp32, "bytes": moved,
                       "implied_s": seconds}
    names = "flop_per_s", "flop_per_s_fp32", "copy_bytes_per_s"
    return {"dtype": str(dtype)[6:], "costs": rows, "kept_bytes": kept,
            "rates": dict(zip(names, rates))}


def whole_run(config, args):
    """air.py on a random checkpoint of this shape -> a row of figures."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write_checkpoint(folder, config)
        shape = args.samples, args.seqlen
        windows = np.random.RandomState(0).randint(config["vocab_size"], size=shape)
        np.save(f"{folder}/w.npy", windows)
        peak, seconds = watched(arguments_of(args, folder))
        result = read_json(Path(folder, "r.json"))
        ckpt = Checkpoint(folder)
    return {
        "blocks": ckpt.cfg.n_layers,
        "checkpoint_bytes": size,
        "windows": list(shape),
        "rate": args.rate,
        "solved": args.solve,
        "peak_anonymous_bytes": peak,
        "peak_gpu_bytes": result["peak_gpu_bytes"],
        "wall_s": seconds,
        "seconds": result["seconds"],
        "repairs": len(result["repairs"]),
        **implied(ckpt, result["ranks"], args),
    }


# ------------------------------------------------------------ what follows
def refinement(config, args):
    """enhance/refine.py, an epoch on a random result of this shape -> a row of figures.

    "implied" is what refine.py's plan counts for the device and the streams, here and at
    the method's own 256 windows of 2048 tokens in bf16.
    """
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        dense = Path(folder, "dense")
        start = Path(folder, "start")
        for path, shape in ((dense, config), (start, at_rate(config, args.rate))):
            path.mkdir()
            write_checkpoint(path, shape)
        windows = args.samples, args.seqlen
        numbers = np.random.RandomState(0).randint(config["vocab_size"], size=windows)
        np.save(f"{folder}/w.npy", numbers)
        options = {"--ckpt": start, "--dense": dense, "--calib": f"{folder}/w.npy",
                   "--text": "none", "--epochs": 1, "--out": f"{folder}/out",
                   "--json": f"{folder}/r.json", "--device": args.device,
                   "--dtype": args.dtype}
        given = [str(x) for pair in options.items() if pair[1] is not None for x in pair]
        peak, seconds = watched([sys.executable, str(ROOT / "enhance" / "refine.py"), *given])
        result = read_json(Path(folder, "r.json"))
        small, whole = (Checkpoint(path) for path in (start, dense))
        weights = weights_of(small, 0), weights_of(whole, 0)
    dim = config["hidden_size"]
    counts = {"own": (*windows, torch.float32), "256 x 2048": (256, 2048, torch.bfloat16)}
    implied = {name: {"device_bytes": device_bytes(small.cfg, weights, max(MICRO_BATCH, T), dtype),
                      "streams_bytes": 2 * N * T * dim * dtype.itemsize}
               for name, (N, T, dtype) in counts.items()}
    return {"blocks": small.cfg.n_layers, "windows": list(windows), "rate": args.rate,
            "peak_anonymous_bytes": peak, "peak_gpu_bytes": result["peak_gpu_bytes"],
            "wall_s": seconds, "seconds": result["seconds"], "implied": implied}


# ------------------------------------------------------------ the solve
def normal(m, n, device):
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(m, n, device=device, generator=generator)


def compare_svd(m, n, device, rounds):
    """The truncated SVD against torch.linalg.svd, rate 0.6."""
    k = air.rank_at(0.6, m, n)
    W = normal(m, n, device) * torch.logspace(1, -2, n, device=device)
    (ours, theirs), ((U, sigma, Vh), _) = in_turn(
        lambda: fast.truncated_svd(W, k),
        lambda: torch.linalg.svd(W, full_matrices=False), rounds=rounds)
    least = torch.linalg.svdvals(W.double())[k:].square().sum()
    left = (W.double() - (U * sigma).double() @ Vh.double()).square().sum()
    return {"what": f"truncated SVD / torch.linalg.svd, {m} x {n}, rank {k}",
            "ours_s": ours, "theirs_s": theirs, "speedup": ratio(theirs, ours),
            "tail_energy_excess": ((left - least) / least).abs().item()}


def compare_sweep(m, n, device, rounds, some=96):
    """The sweep against the literal Algorithm 1, rate 0.6, over the last `some` ranks."""
    air.FAST_FROM = math.inf                # air.py's own lines, whatever the width
    k = air.rank_at(0.6, m, n)
    generator = torch.Generator(device).manual_seed(1)
    I = torch.rand(m, n, device=device, generator=generator)**6 * 7
    P = 1 + 2 * I
    Wp = normal(m, n, device)
    start = fast.truncated_svd(Wp, k)
    ranks = range(k - 1, k - 1 - some, -1)
    (ours, theirs), factors = in_turn(
        lambda: fast.als_sweep(Wp, P, *start, ranks),
        lambda: air.als_sweep(Wp, P, *start, ranks), rounds=rounds)
    what = f"ALS sweep / literal Algorithm 1, {m} x {n}, rank {k}, its last {some} ranks"
    return {"what": what, "ours_s": ours, "theirs_s": theirs, "speedup": ratio(theirs, ours),
            "factors_apart": max(apart(a, b) for a, b in zip(*factors))}


def solve(device, rounds):
    """support/fast.py at LLaMA-7B's widths, row by row."""
    yield compare_svd(4096, 4096, device, rounds)
    yield compare_svd(11008, 4096, device, rounds)
    yield compare_sweep(4096, 4096, device, rounds)


# ------------------------------------------------------------ the README
def stage_lines(run, row, machine):
    """What each stage costs, what the measured rates make of it, what it took."""
    rates = row["rates"]
    took = row["seconds"]
    lines = [f"*{run.split(' ')[1]}, {row['blocks']} blocks, {row['windows'][0]} × "
             f"{row['windows'][1]} tokens, {row['dtype']}, blocks {row['solved']} "
             f"decomposed at rate {row['rate']:g}; {machine['device']}, {machine['date']}: "
             f"{rates['flop_per_s'] / 1e9:,.0f} GFLOP/s "
             f"({rates['flop_per_s_fp32'] / 1e9:,.0f} in fp32), "
             f"{rates['copy_bytes_per_s'] / 1e9:.0f} GB/s.*", "",
             "| stage | GFLOP | GB moved | implied | measured |",
             "|---|---:|---:|---:|---:|"]
    measured = {"ΣXXᵀ": f"{took['statistics']:.0f} s with the sweeps",
                "ALS": f"{took['solve']:.0f} s with Cholesky and SVD"}
    for stage, c in row["costs"].items():
        lines.append(f"| {stage} | {(c['flop'] + c['flop_fp32']) / 1e9:,.0f} | "
                     f"{c['bytes'] / 1e9:,.0f} | {c['implied_s']:.0f} s | "
                     f"{measured.get(stage, '')} |")
    return lines


def run_lines(rows):
    lines = ["| blocks | checkpoint | peak anonymous memory | on the GPU | whole run |",
             "|---:|---:|---:|---:|---:|"]
    for row in rows:
        gpu = f"{row['peak_gpu_bytes'] / 1e9:.2f} GB" if row["peak_gpu_bytes"] else "–"
        lines.append(f"| {row['blocks']} | {row['checkpoint_bytes'] / 1e9:.1f} GB | "
                     f"{(row['peak_anonymous_bytes'] or 0) / 1e9:.2f} GB | {gpu} | "
                     f"{row['wall_s']:.0f} s |")
    return lines


def refine_lines(machine, rows):
    lines = [f"| block refinement; {machine['device']}, {machine['date']} | peak anonymous "
             "memory | on the GPU | time | counted, 256 × 2048 in bf16: device, streams |",
             "|---|---:|---:|---:|---:|"]
    for row in rows:
        N, T = row["windows"]
        gpu = f"{row['peak_gpu_bytes'] / 1e9:.2f} GB" if row["peak_gpu_bytes"] else "–"
        whole = row["implied"]["256 x 2048"]
        lines.append(f"| {row['blocks']} block{'s' * (row['blocks'] > 1)}, {N} × {T} tokens, "
                     f"rate {row['rate']:g}, one epoch | "
                     f"{(row['peak_anonymous_bytes'] or 0) / 1e9:.2f} GB | {gpu} | "
                     f"{row['seconds']['refine']:.0f} s | {whole['device_bytes'] / 1e9:.1f} GB, "
                     f"{whole['streams_bytes'] / 1e9:.1f} GB |")
    return lines


def solve_lines(machine, rows):
    lines = [f"| {machine['device']}, {machine['date']} | times as fast | apart |",
             "|---|---:|---:|"]
    for row in rows:
        distance = row.get("factors_apart", row.get("tail_energy_excess"))
        lines.append(f"| {row['what']} | {row['speedup']:.2f} | {distance:.0e} |")
    return lines


def markdown(result):
    """The README's block: the stages of the deepest run, all its runs, the solve."""
    runs = [key for key in result if "solve" not in key and "refine" not in key]
    run = next((key for key in runs if key.startswith("cuda")), runs[0])
    rows = result[run]["rows"]
    deepest = max(rows, key=lambda row: row["blocks"])
    lines = stage_lines(run, deepest, result[run]["machine"]) + [""] + run_lines(rows)
    for key in result:
        if "refine" in key:
            lines += [""] + refine_lines(result[key]["machine"], result[key]["rows"])
        if "solve" in key:
            lines += [""] + solve_lines(result[key]["machine"], result[key]["rows"])
    return "\n".join(lines)


# ------------------------------------------------------------ the command
def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_arguments():
    p = Parser(__doc__)
    p.add_argument("what", nargs="?", choices=("run", "solve", "refine"), default="run")
    p.add_argument("--shape", choices=tuple(SHAPES), default="llama-7b")
    p.add_argument("--blocks", type=int, nargs="+",
                   help="numbers of blocks to run with (default: the shape's)")
    p.add_argument("--samples", type=int, default=2)
    p.add_argument("--seqlen", type=int, default=128)
    p.add_argument("--rate", type=float, default=0.6)
    p.add_argument("--solve", default="0:1", metavar="A:B",
                   help="blocks to decompose; the sweeps go over all (default 0:1)")
    p.add_argument("--spill", action="store_true", help="keep block inputs on disk")
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p.add_argument("--rounds", type=int, default=3, help="of the timings of `solve`")
    p.add_argument("--folder", default=tempfile.gettempdir(),
                   help="where the checkpoint is written for the time of the run")
    return p.parse_args()


def check_arguments(args):
    """Raise InputError before a checkpoint of gigabytes is written."""
    if not Path(args.folder).is_dir():
        raise InputError(f"--folder is {args.folder}, which is no folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda; no CUDA GPU is available here")
    if min(*(args.blocks or [1]), args.samples, args.seqlen - 1, args.rounds, 1) < 1:
        raise InputError("--blocks, --samples and --rounds are to be 1 or more, --seqlen 2")
    if not 0 < args.rate <= 1:
        raise InputError(f"--rate is {args.rate}; expected above 0, at most 1")


def runs(args):
    """A row for each of --blocks."""
    config = SHAPES[args.shape]
    measure = refinement if args.what == "refine" else whole_run
    for blocks in args.blocks or [config["num_hidden_layers"]]:
        yield measure(config | {"num_hidden_layers": blocks}, args)


def row_line(shape, row):
    """A row in one line; of the solve, all but the seconds of its rounds."""
    if "blocks" not in row:
        short = {key: value for key, value in row.items() if not key.endswith("_s")}
        return json.dumps(short)
    return (f"{shape}, {row['blocks']} blocks: {row['wall_s']:.0f} s, peak anonymous memory "
            f"{(row['peak_anonymous_bytes'] or 0) / 1e9:.2f} GB, on the GPU "
            f"{(row['peak_gpu_bytes'] or 0) / 1e9:.2f} GB")


def main():
    args = parse_arguments()
    check_arguments(args)
    path = ROOT / "experiments" / "results" / "scale.json"
    result = read_json(path) if path.exists() else {}
    device = args.device or default_device()
    name = f"{platform.machine()}, {os.cpu_count()} cores"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    machine = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
               "torch": torch.__version__, "device": name,
               "disk_free_bytes": shutil.disk_usage(args.folder).free}
    key = "solve"
    measured = solve(device, args.rounds)
    if args.what != "solve":
        measured = runs(args)
        how = "refine " * (args.what == "refine") + "spilled " * args.spill
        key = f"{args.shape} {how}{args.samples}x{args.seqlen}"
    rows = []
    for row in measured:
        rows.append(row)
        print(row_line(args.shape, row), flush=True)
    result[f"{device} {key}"] = {"machine": machine, "rows": rows}
    write_json(path, result)
    if any("solve" not in each for each in result):
        refresh("scale", markdown(result))


if __name__ == "__main__":
    run(main)
