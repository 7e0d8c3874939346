"""How fast and how small: every ratio is measured in one run, the two sides in turn.

    python experiments/speed.py                 # all of it, about ten minutes on 2 cores
    python experiments/speed.py als sweep       # some of it: sweep, als, demo, memory

Medians are printed, raw numbers kept in experiments/results/speed.json.
"""
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import air
from calibrate import calibration_windows, embed, forward_sweep
from experiments.shapes import shape
from influence import backward_sweep, start_gradient
from model import Llama
from support import fast
from support.checkpoint import Checkpoint
from support.config import parse_config
from support.script import ROOT, InputError, Parser, read_json, run, write_json

CPU = torch.device("cpu")


def in_turn(*sides, rounds=7):
    """Time callables A B A B … after one warm-up each.

    Returns (a list of seconds for each, what each returned in its warm-up).
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    results = [side() for side in sides]
    times = [[] for _ in sides]
    for _ in range(rounds):
        for side, log in zip(sides, times):
            wait()
            start = time.perf_counter()
            side()
            wait()
            log.append(time.perf_counter() - start)
    return times, results


def ratio(a, b):
    """Median of the ratios round by round."""
    return statistics.median(x / y for x, y in zip(a, b))


def apart(a, b):
    """‖a − b‖ / ‖b‖ in Frobenius norm."""
    return ((a - b).norm() / b.norm()).item()


# ------------------------------------------------------------ the sweep
def block_inputs(ckpt, windows):
    """{l: the input of block l}, and the last one's output under n_layers."""
    kept = {}
    for _ in forward_sweep(ckpt, embed(ckpt, windows, torch.float32), CPU, keep=kept):
        pass
    return kept


def backward(ckpt, windows, inputs, gram=False):
    """The backward sweep over what `block_inputs` kept, which is used up."""
    g = start_gradient(ckpt, windows, inputs.pop(ckpt.cfg.n_layers), CPU)
    for _ in backward_sweep(ckpt, inputs, g, CPU, gram=gram):
        pass


def sweep(samples=8, seqlen=256):
    """The backward sweep with lrp against an ordinary forward-backward of the whole model by
    autograd, a window at a time."""
    ckpt = Checkpoint(ROOT / "demo")
    windows = calibration_windows("stdlib", ckpt, samples, seqlen)
    kept = block_inputs(ckpt, windows)
    last = ckpt.cfg.n_layers
    model = ckpt.model(dtype=torch.float32).requires_grad_()

    def ours():
        # The gradient replaces the last output in place.
        backward(ckpt, windows, kept | {last: kept[last].clone()})

    def autograd():
        for ids in windows:
            model.zero_grad()
            F.cross_entropy(model(ids[None])[0, :-1], ids[1:]).backward()
    (a, b), _ = in_turn(ours, autograd)
    return {"what": f"backward sweep (lrp) / autograd forward-backward, demo, "
                    f"{samples} windows of {seqlen}, fp32",
            "ours_s_per_window": [t / samples for t in a],
            "autograd_s_per_window": [t / samples for t in b],
            "ratio": ratio(a, b)}


# ------------------------------------------------------------ the solve
def problem(size):
    """W' (size, size) whose singular values fall, and P = 1 + δI with δ = 2."""
    g = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=g)
    right = torch.randn(size, size, generator=g)
    Wp = (left * torch.linspace(1, 0.05, size)) @ right / size**0.5
    I = torch.rand(size, size, generator=g)**4
    return Wp, 1 + 2 * I / I.mean()


def compare_svd(size, k, rounds):
    """fast.truncated_svd against air's, which is torch.linalg.svd.

    Close singular values leave their vectors open, so what they make together is compared.
    """
    Wp, _ = problem(size)
    (literal_s, ours_s), (literal, ours) = in_turn(
        lambda: air.truncated_svd(Wp, k), lambda: fast.truncated_svd(Wp, k), rounds=rounds)
    products = [(U * sigma) @ Vh for U, sigma, Vh in (ours, literal)]
    distances = {"sigma": apart(ours[1], literal[1]), "product": apart(*products)}
    what = f"torch.linalg.svd / fast.truncated_svd, {size} x {size}, rank {k}, fp32"
    return {"what": what, "literal_s": literal_s, "ours_s": ours_s,
            "ratio": ratio(literal_s, ours_s), "factors_apart": distances}


def compare_sweep(size, k, rounds):
    """fast.als_sweep against air's, Algorithm 1 line by line, from the same start."""
    Wp, P = problem(size)
    start = air.truncated_svd(Wp, k)
    ranks = range(k - 1, -1, -1)
    (literal_s, ours_s), (literal, ours) = in_turn(
        lambda: air.als_sweep(Wp, P, *start, ranks),
        lambda: fast.als_sweep(Wp, P, *start, ranks), rounds=rounds)
    factors = zip(("U", "sigma", "Vh"), ours, literal)
    distances = {name: apart(a, b) for name, a, b in factors}
    what = f"literal Algorithm 1 / fast.als_sweep, {size} x {size}, rank {k}, fp32"
    return {"what": what, "literal_s": literal_s, "ours_s": ours_s,
            "ratio": ratio(literal_s, ours_s), "factors_apart": distances}


def als():
    """support/fast.py against the lines of air.py by width: what FAST_FROM rests on."""
    air.FAST_FROM = math.inf                # air.py's own lines, whatever the width
    rows = [compare_sweep(size, k, rounds) for size, k, rounds in
            ((2048, 614, 3), (1024, 307, 5), (512, 153, 9), (256, 76, 15))]
    return rows + [compare_svd(1024, 307, 7), compare_svd(512, 153, 15)]


# ------------------------------------------------------------ whole processes
def demo(runs=3):
    """`python air.py`, what `make demo` runs, as whole processes."""
    rows = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / "air.py", "--quiet",
                       "--out", f"{folder}/out", "--json", f"{folder}/r.json"]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            wall = time.perf_counter() - start
            result = read_json(Path(folder, "r.json"))
        kept = "peak_rss_bytes", "seconds"
        rows.append({"wall_s": wall} | {key: result[key] for key in kept})
    return {"what": "python air.py (the demo)",
            "wall_s": statistics.median(row["wall_s"] for row in rows),
            "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows), "runs": rows}


def anonymous(process="self"):
    """Bytes of a process's resident memory that are no file's, as a mapped checkpoint's are.

    Linux only.
    """
    with open(f"/proc/{process}/status") as f:
        line = next(line for line in f if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


# Memory that is freed goes back to the system, so that a peak is what was in use.
TRIMMED = os.environ | {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_anonymous(folder):
    """Both sweeps over 2 windows of 128 in this process -> the peak of its anonymous memory
    above the start's, in bytes."""
    ckpt = Checkpoint(folder)
    base = anonymous()
    peak = [base]
    done = threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    threading.Thread(target=watch, daemon=True).start()
    windows = torch.randint(ckpt.cfg.vocab, (2, 128))
    backward(ckpt, windows, block_inputs(ckpt, windows), gram=True)
    done.set()
    return peak[0] - base


def write_random(folder, config):
    """A random bf16 checkpoint; returns the parameters of its blocks."""
    with torch.device("meta"):
        dense = Llama(parse_config(config)).state_dict()
    shapes = {name: w.shape for name, w in dense.items()}
    state = {name: 0.02 * torch.randn(shape, dtype=torch.bfloat16)
             for name, shape in shapes.items()}
    save_file(state, Path(folder, "model.safetensors"))
    write_json(Path(folder, "config.json"), config)
    return sum(w.numel() for name, w in state.items() if ".layers." in name)


def memory():
    """Peak memory of both sweeps for 4, 8 and 16 layers of one shape: dim 1024, hidden 2816,
    bf16 on disk, fp32 in memory."""
    rows = []
    for layers in (4, 8, 16):
        config = shape(1024, 2816, layers, 16, 16, vocab_size=1024, max_position_embeddings=256)
        with tempfile.TemporaryDirectory() as folder:
            parameters = write_random(folder, config)
            command = [sys.executable, Path(__file__).resolve(), "--peak", folder]
            run = subprocess.run(command, check=True, capture_output=True, text=True,
                                 env=TRIMMED)
        rows.append({"layers": layers, "block_weights_bytes_fp32": 4 * parameters,
                     "kept_inputs_bytes": 4 * (layers + 1) * 2 * 128 * 1024,
                     "peak_anonymous_bytes": int(run.stdout)})
    return rows


def shown(row):
    """A row without its lists, numbers to four digits."""
    short = {key: x for key, x in row.items() if not isinstance(x, list)}
    digits = {key: float(f"{x:.4g}") for key, x in short.items() if isinstance(x, float)}
    return json.dumps(short | digits)


def main():
    if sys.argv[1:2] == ["--peak"]:
        print(peak_anonymous(sys.argv[2]))
        return
    parts = {"sweep": sweep, "als": als, "demo": demo, "memory": memory}
    path = ROOT / "experiments" / "results" / "speed.json"
    result = read_json(path) if path.exists() else {}
    machine = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
               "torch": torch.__version__, "threads": torch.get_num_threads(),
               "cores": os.cpu_count(), "machine": platform.machine()}
    p = Parser(__doc__)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    asked = p.parse_args().parts
    unknown = [name for name in asked if name not in parts]
    if unknown:
        raise InputError(f"there is no part {unknown[0]}; expected some of {', '.join(parts)}")
    for name in asked or parts:
        rows = parts[name]()
        result[name] = {"machine": machine, "result": rows}
        write_json(path, result)
        listed = rows if isinstance(rows, list) else [rows]
        for row in listed:
            print(name, shown(row), flush=True)


if __name__ == "__main__":
    run(main)
