"""How fast and how small: every ratio is measured in one run, the two sides in turn; medians are printed, raw numbers kept.

    python experiments/speed.py                       # all of it, about five minutes on 2 cores
    python experiments/speed.py als sweep             # some of it: sweep, als, demo, memory

Writes experiments/results/speed.json.
"""
import json
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import air                                                                        # noqa: E402
from air import als_sweep, truncated_svd                                          # noqa: E402
from calibrate import calibration_windows, embed, forward_sweep                   # noqa: E402
from influence import backward_sweep, start_gradient                                          # noqa: E402
from support.checkpoint import Checkpoint, parse_config                                 # noqa: E402
from model import Llama                                 # noqa: E402

CPU = torch.device("cpu")


def in_turn(*sides, rounds=7):
    """Time callables A B A B …, one warm-up each; returns a list of seconds for each."""
    for side in sides:
        side()
    times = [[] for _ in sides]
    for _ in range(rounds):
        for side, log in zip(sides, times):
            start = time.perf_counter()
            side()
            log.append(time.perf_counter() - start)
    return times


def ratio(a, b):
    """Median of the ratios round by round."""
    return statistics.median(x / y for x, y in zip(a, b))


def sweep(samples=8, seqlen=256):
    """The backward sweep with lrp against an ordinary forward-backward of the whole model by autograd, a window at a time."""
    ckpt = Checkpoint(ROOT / "demo")
    windows = calibration_windows("stdlib", ckpt, samples, seqlen)
    kept = {}
    for _ in forward_sweep(ckpt, embed(ckpt, windows, torch.float32), CPU, keep=kept):
        pass
    model = ckpt.model(dtype=torch.float32).requires_grad_()

    def ours():
        g = start_gradient(ckpt, windows, kept[ckpt.cfg.n_layers].clone(), CPU)
        for _ in backward_sweep(ckpt, dict(kept), g, CPU):
            pass

    def autograd():
        for ids in windows:
            model.zero_grad()
            F.cross_entropy(model(ids[None])[0, :-1], ids[1:]).backward()
    a, b = in_turn(ours, autograd)
    return {"what": f"backward sweep (lrp) / autograd forward-backward, demo, {samples} windows of {seqlen}, fp32",
            "ours_s_per_window": [t / samples for t in a], "autograd_s_per_window": [t / samples for t in b], "ratio": ratio(a, b)}


def algorithm_1(Wp, P, U, sigma, Vh, ranks):
    """The paper's Algorithm 1, lines 4-9, literally: W'_k is kept, the residual and the weighted residual formed for each rank."""
    U, sigma, Vh = U.clone(), sigma.clone(), Vh.clone()
    Wk = (U * sigma) @ Vh                                                         # line 3
    for r in ranks:
        old = sigma[r] * torch.outer(U[:, r], Vh[r])
        E = Wp - Wk + old                                                         # line 5
        PE = P * E
        Vh[r] = (U[:, r] @ PE) / (sigma[r] * (U[:, r].square() @ P))              # line 6, Eq. 21
        u = (PE @ Vh[r]) / (P @ Vh[r].square())                                   # line 7, Eq. 26
        sigma[r] = u.norm()
        U[:, r] = u / sigma[r]
        Wk += sigma[r] * torch.outer(U[:, r], Vh[r]) - old                        # line 8
    return U, sigma, Vh


def als():
    """air.py's plain als_sweep against the literal algorithm, fp32, same start; how far the factors are apart."""
    rows, air.FAST_FROM = [], float("inf")          # fast.py's is measured by scale.py
    for size, k, rounds in ((2048, 614, 3), (256, 76, 15)):
        g = torch.Generator().manual_seed(0)
        Wp = torch.randn(size, size, generator=g) @ torch.diag(torch.linspace(1, 0.05, size)) @ torch.randn(size, size, generator=g) / size ** 0.5
        I = torch.rand(size, size, generator=g) ** 4
        P, start, ranks = 1 + 2 * I / I.mean(), truncated_svd(Wp, k), range(k - 1, -1, -1)
        literal, ours = algorithm_1(Wp, P, *start, ranks), als_sweep(Wp, P, *start, ranks)
        apart = {name: ((a - b).norm() / a.norm()).item() for name, a, b in zip(("U", "sigma", "Vh"), literal, ours)}
        a, b = in_turn(lambda: algorithm_1(Wp, P, *start, ranks), lambda: als_sweep(Wp, P, *start, ranks), rounds=rounds)
        rows.append({"what": f"literal Algorithm 1 / als_sweep, {size} x {size}, rank {k}, fp32", "literal_s": a, "ours_s": b,
                     "ratio": ratio(a, b), "factors_apart": apart})
    return rows


def demo(runs=3):
    """`python air.py`, what `make demo` runs, as whole processes."""
    rows = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "air.py", "--out", f"{folder}/out", "--json", f"{folder}/r.json", "--quiet"],
                           check=True, stdout=subprocess.DEVNULL)
            wall, result = time.perf_counter() - start, json.loads(Path(folder, "r.json").read_text())
            rows.append({"wall_s": wall, "peak_rss_bytes": result["peak_rss_bytes"], "seconds": result["seconds"]})
    return {"what": "python air.py (the demo)", "wall_s": statistics.median(row["wall_s"] for row in rows),
            "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows), "runs": rows}


def peak_anonymous(ckpt_path):
    """Both sweeps over 2 windows of 128 in this process; prints the peak of its anonymous memory above the start's, in bytes.

    The mapped checkpoint is page cache and does not count. Linux only: it reads /proc/self/status.
    """
    def anonymous():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))
    peak, running = [0], True

    def watch():
        while running:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)
    ckpt, base = Checkpoint(ckpt_path), anonymous()
    threading.Thread(target=watch, daemon=True).start()
    windows, kept = torch.randint(ckpt.cfg.vocab, (2, 128)), {}
    for _ in forward_sweep(ckpt, embed(ckpt, windows, torch.float32), CPU, keep=kept):
        pass
    g = start_gradient(ckpt, windows, kept.pop(ckpt.cfg.n_layers), CPU)
    for _ in backward_sweep(ckpt, kept, g, CPU, gram=True):
        pass
    running = False
    print(peak[0] - base)


def memory():
    """Peak memory of both sweeps for 4, 8 and 16 layers of one shape (dim 1024, hidden 2816, bf16 on disk, fp32 in memory)."""
    rows = []
    for layers in (4, 8, 16):
        config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2816,
                  "num_hidden_layers": layers, "num_attention_heads": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
        with tempfile.TemporaryDirectory() as folder:
            with torch.device("meta"):
                shapes = {name: w.shape for name, w in Llama(parse_config(config)).state_dict().items()}
            save_file({name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shapes.items()}, f"{folder}/model.safetensors")
            Path(folder, "config.json").write_text(json.dumps(config))
            done = subprocess.run([sys.executable, __file__, "--peak", folder], check=True, capture_output=True, text=True,
                                  env=os.environ | {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": "65536"})
        blocks = sum(shape.numel() for name, shape in shapes.items() if ".layers." in name)
        rows.append({"layers": layers, "block_weights_bytes_fp32": 4 * blocks, "kept_inputs_bytes": 4 * (layers + 1) * 2 * 128 * 1024,
                     "peak_anonymous_bytes": int(done.stdout)})
    return rows


def main():
    if sys.argv[1:2] == ["--peak"]:
        return peak_anonymous(sys.argv[2])
    wanted = sys.argv[1:] or ["sweep", "als", "demo", "memory"]
    path = ROOT / "experiments" / "results" / "speed.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    machine = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__,
               "threads": torch.get_num_threads(), "cores": os.cpu_count(), "machine": platform.machine()}
    for name in wanted:
        result[name] = {"machine": machine, "result": {"sweep": sweep, "als": als, "demo": demo, "memory": memory}[name]()}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        rows = result[name]["result"]
        for row in rows if isinstance(rows, list) else [rows]:
            shown = {k: (float(f"{v:.4g}") if isinstance(v, float) else v) for k, v in row.items() if not isinstance(v, list)}
            print(name, json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
