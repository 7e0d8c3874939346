"""A model larger than memory, with random weights of its real shape: time and peak memory of every stage, from the command line.

    python experiments/scale.py                                        # LLaMA-7B's shape, fp16 on disk (13.5 GB), 2 x 128 tokens
    python experiments/scale.py --blocks 2 8 32                        # the same with fewer blocks: memory does not grow with depth
    python experiments/scale.py --device cuda --samples 256 --seqlen 2048 --solve :          # the whole run, on a GPU
    python experiments/scale.py solve                                  # fast.py against LAPACK and a literal Algorithm 1, in turn

Needs the disk the checkpoint takes, in --folder; it is removed afterwards. Writes experiments/results/scale.json.
"""
import argparse
import json
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from support import fast                                                                       # noqa: E402
from common import refresh                                                        # noqa: E402
from air import rank_at                                                           # noqa: E402
from support.large import costs, machine_rates                                            # noqa: E402
from support.checkpoint import Checkpoint, parse_config            # noqa: E402
from model import Llama            # noqa: E402
from support.script import check_space            # noqa: E402
from shapes import SHAPES                                                         # noqa: E402
from speed import algorithm_1, in_turn, ratio                                     # noqa: E402


def write_checkpoint(folder, config):
    """Random fp16 weights (normal, 0.02; norms 1), one shard a block; returns the bytes written."""
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in Llama(parse_config(config)).state_dict().items()}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    check_space((folder, size))
    generator, shards, where = torch.Generator().manual_seed(0), {}, {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in shards.items():
        save_file({name: torch.empty(shapes[name]).normal_(0, 0.02, generator=generator).half() if len(shapes[name]) > 1
                   else torch.ones(shapes[name], dtype=torch.float16) for name in names}, Path(folder, file))
        where |= dict.fromkeys(names, file)
        print(f"\rwriting {len(where)} of {len(shapes)} tensors", end="", file=sys.stderr)
    print(file=sys.stderr)
    Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    Path(folder, "config.json").write_text(json.dumps(config))
    return size


def watched(command):
    """Run a command; returns (its highest anonymous resident memory in bytes, None where the system does not say; seconds).

    Anonymous memory is what the process allocated: the pages of the mapped checkpoint are the system's cache and do not count.
    """
    start, peak = time.time(), None
    process = subprocess.Popen(command, env=os.environ | {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "65536"})
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as f:
                peak = max(peak or 0, next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon")))
        except (OSError, StopIteration):
            pass
        time.sleep(0.01)
    if process.returncode:
        sys.exit(process.returncode)
    return peak, time.time() - start


def whole_run(config, args):
    """air.py on a random checkpoint of this shape -> a row of figures."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size = write_checkpoint(folder, config)
        np.save(f"{folder}/w.npy", np.random.RandomState(0).randint(config["vocab_size"], size=(args.samples, args.seqlen)))
        command = [sys.executable, ROOT / "air.py", "--ckpt", folder, "--calib", f"{folder}/w.npy", "--text", "none",
                   "--rate", args.rate, "--layers", args.solve, "--out", f"{folder}/out", "--json", f"{folder}/r.json",
                   *(["--device", args.device] if args.device else []), *(["--dtype", args.dtype] if args.dtype else []),
                   *(["--spill", f"{folder}/spill"] if args.spill else [])]
        peak, seconds = watched(list(map(str, command)))
        result = json.loads(Path(folder, "r.json").read_text())
        ckpt = Checkpoint(folder)
    cut = {layer: (*ckpt.tensors[layer + ".weight"][0], k) for layer, k in result["ranks"].items()}
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rates = machine_rates(device, dtype)
    stages, kept = costs(ckpt.cfg, cut, (args.samples, args.seqlen), dtype.itemsize, "lrp")
    return {"blocks": ckpt.cfg.n_layers, "checkpoint_bytes": size, "windows": [args.samples, args.seqlen], "dtype": str(dtype)[6:],
            "rate": args.rate, "solved": args.solve, "peak_anonymous_bytes": peak, "peak_gpu_bytes": result["peak_gpu_bytes"], "wall_s": seconds,
            "seconds": result["seconds"], "repairs": len(result["repairs"]),
            "costs": {stage: {"flop": a, "flop_fp32": b, "bytes": c, "implied_s": a / rates[0] + b / rates[1] + c / rates[2]}
                      for stage, (a, b, c) in stages.items()},
            "kept_bytes": kept, "rates": dict(zip(("flop_per_s", "flop_per_s_fp32", "copy_bytes_per_s"), rates))}


def solve(device, rounds):
    """The truncated SVD against torch.linalg.svd, the sweep against a literal Algorithm 1: LLaMA-7B's widths, rate 0.6."""
    rows = []
    for m, n in ((4096, 4096), (11008, 4096)):
        k = rank_at(0.6, m, n)
        W = torch.randn(m, n, device=device, generator=torch.Generator(device).manual_seed(0))
        W *= torch.logspace(1, -2, n, device=device)
        wait = torch.cuda.synchronize if device == "cuda" else int
        ours, theirs = in_turn(lambda: (fast.truncated_svd(W, k), wait()),
                               lambda: (torch.linalg.svd(W, full_matrices=False), wait()), rounds=rounds)
        least = torch.linalg.svdvals(W.double())[k:].square().sum()
        U, sigma, Vh = fast.truncated_svd(W, k)
        left = (W.double() - (U * sigma).double() @ Vh.double()).square().sum()
        rows.append({"what": f"truncated SVD / torch.linalg.svd, {m} x {n}, rank {k}", "ours_s": ours, "theirs_s": theirs,
                     "speedup": ratio(theirs, ours), "tail_energy_excess": ((left - least) / least).abs().item()})
        print(json.dumps({key: value for key, value in rows[-1].items() if not key.endswith("_s")}), flush=True)
    m = n = 4096
    k, some = rank_at(0.6, m, n), 96
    P = 1 + 2 * torch.rand(m, n, device=device, generator=torch.Generator(device).manual_seed(1)).pow(6) * 7
    Wp = torch.randn(m, n, device=device, generator=torch.Generator(device).manual_seed(0))
    start = fast.truncated_svd(Wp, k)
    ranks, out = range(k - 1, k - 1 - some, -1), {}

    def timed(name, sweep):
        def go():
            out[name] = sweep(Wp, P, *start, ranks)
            torch.cuda.synchronize() if device == "cuda" else None
        return go
    ours, theirs = in_turn(timed("ours", fast.als_sweep), timed("literal", algorithm_1), rounds=rounds)
    apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(out["ours"], out["literal"]))
    rows.append({"what": f"ALS sweep / literal Algorithm 1, {m} x {n}, rank {k}, its last {some} ranks", "ours_s": ours,
                 "theirs_s": theirs, "speedup": ratio(theirs, ours), "factors_apart": apart})
    print(json.dumps({key: value for key, value in rows[-1].items() if not key.endswith("_s")}), flush=True)
    return rows


def markdown(result):
    """The README's block: what each stage of the deepest run costs, what the measured rates make of it, what it took."""
    runs = [key for key in result if "solve" not in key]
    run = next((key for key in runs if key.startswith("cuda")), runs[0])
    row, machine = max(result[run]["rows"], key=lambda row: row["blocks"]), result[run]["machine"]
    rates, took = row["rates"], row["seconds"]
    lines = [f"*{run.split(' ')[1]}, {row['blocks']} blocks, {row['windows'][0]} × {row['windows'][1]} tokens, {row['dtype']}, "
             f"blocks {row['solved']} decomposed at rate {row['rate']:g}; {machine['device']}, {machine['date']}: "
             f"{rates['flop_per_s'] / 1e9:,.0f} GFLOP/s ({rates['flop_per_s_fp32'] / 1e9:,.0f} in fp32), "
             f"{rates['copy_bytes_per_s'] / 1e9:.0f} GB/s.*", "",
             "| stage | GFLOP | GB moved | implied | measured |", "|---|---:|---:|---:|---:|"]
    measured = {"ΣXXᵀ": f"{took['statistics']:.0f} s with the sweeps", "ALS": f"{took['solve']:.0f} s with Cholesky and SVD"}
    for stage, c in row["costs"].items():
        lines.append(f"| {stage} | {(c['flop'] + c['flop_fp32']) / 1e9:,.0f} | {c['bytes'] / 1e9:,.0f} | {c['implied_s']:.0f} s | "
                     f"{measured.get(stage, '')} |")
    lines += ["", "| blocks | checkpoint | peak anonymous memory | on the GPU | whole run |", "|---:|---:|---:|---:|---:|"]
    for each in result[run]["rows"]:
        gpu = f"{each['peak_gpu_bytes'] / 1e9:.2f} GB" if each["peak_gpu_bytes"] else "–"
        lines.append(f"| {each['blocks']} | {each['checkpoint_bytes'] / 1e9:.1f} GB | "
                     f"{(each['peak_anonymous_bytes'] or 0) / 1e9:.2f} GB | {gpu} | {each['wall_s']:.0f} s |")
    for key in result:
        if "solve" in key:
            lines += ["", f"| {result[key]['machine']['device']}, {result[key]['machine']['date']} | times as fast | apart |", "|---|---:|---:|"]
            lines += [f"| {r['what']} | {r['speedup']:.2f} | {r.get('factors_apart', r.get('tail_energy_excess')):.0e} |"
                      for r in result[key]["rows"]]
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=("run", "solve"), default="run")
    p.add_argument("--shape", choices=tuple(SHAPES), default="llama-7b")
    p.add_argument("--blocks", type=int, nargs="+", help="numbers of blocks to run with (default: the shape's)")
    p.add_argument("--samples", type=int, default=2)
    p.add_argument("--seqlen", type=int, default=128)
    p.add_argument("--rate", type=float, default=0.6)
    p.add_argument("--solve", default="0:1", metavar="A:B", help="blocks to decompose; the sweeps go over all (default 0:1)")
    p.add_argument("--spill", action="store_true", help="keep block inputs on disk")
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p.add_argument("--rounds", type=int, default=3, help="of the timings of `solve`")
    p.add_argument("--folder", default=tempfile.gettempdir(), help="where the checkpoint is written for the time of the run")
    args = p.parse_args()
    path = ROOT / "experiments" / "results" / "scale.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    machine = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
               "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores",
               "disk_free_bytes": shutil.disk_usage(args.folder).free}
    if args.what == "solve":
        rows = solve(device, args.rounds)
    else:
        rows = []
        for blocks in args.blocks or [SHAPES[args.shape]["num_hidden_layers"]]:
            rows.append(whole_run(SHAPES[args.shape] | {"num_hidden_layers": blocks}, args))
            row = rows[-1]
            print(f"{args.shape}, {blocks} blocks: {row['wall_s']:.0f} s, peak anonymous memory "
                  f"{(row['peak_anonymous_bytes'] or 0) / 1e9:.2f} GB, on the GPU {(row['peak_gpu_bytes'] or 0) / 1e9:.2f} GB", flush=True)
    key = "solve" if args.what == "solve" else f"{args.shape} {'spilled ' if args.spill else ''}{args.samples}x{args.seqlen}"
    result[f"{device} {key}"] = {"machine": machine, "rows": rows}
    path.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
    os.replace(path.with_suffix(".partial"), path)
    if any("solve" not in key for key in result):
        refresh("scale", markdown(result))


if __name__ == "__main__":
    main()
