"""Table 11 of the paper: what each optimisation of generate.py does to peak memory and to the time a token takes.

    python experiments/table11.py                                              # the demo's shape, two minutes on 2 cores
    python experiments/table11.py --shape llama-7b --batch 64 --new-tokens 496    # the paper's setting; a GPU with 40 GB
    python experiments/table11.py --shape tinyllama --bandwidth                # decoding against a plain copy, one process

Random weights of the shape (--ckpt: of a compressed checkpoint's config.json, with its ranks), random prompts, greedy, no
end-of-text token: every row makes all its tokens. A row is a process of its own; all rows run in turn, --rounds times, and
ratios are medians of the rounds' ratios. The time is that of the steps after the first token, without those in which a
graph is captured (their time is in the JSON). Peak memory: CUDA's own count of allocated bytes; on a CPU the highest
resident set less mapped files and less what the process held before the model, so it includes what malloc keeps.
Writes experiments/results/table11-SHAPE-DEVICE-DTYPE.json (--out: another name).
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from shapes import SHAPES, at_rate, random_model, ROOT

from generate import Decoder, estimate, generate
from support.fast import Matrix
from support.script import free_bytes
from support.script import InputError, pick_device, read_json, run
from model import Llama
from support.checkpoint import parse_config

NONE = dict(o1=False, o2=False, o3=False, fuse=False, graph=False)
ROWS = [    # what, compressed, switches
    ("dense, growing cache", False, NONE | dict(o1=True)),                         # the paper's 100 %, as most libraries decode
    ("dense, static cache", False, NONE | dict(o1=True, o3=True)),
    ("dense, static, fused", False, NONE | dict(o1=True, o3=True, fuse=True)),
    ("dense, static, fused, graph", False, NONE | dict(o1=True, o3=True, fuse=True, graph=True)),
    ("compressed, none", True, NONE),
    ("O1", True, NONE | dict(o1=True)),
    ("O1+O3", True, NONE | dict(o1=True, o3=True)),
    ("O1+O2", True, NONE | dict(o1=True, o2=True)),
    ("O1+O2+O3", True, NONE | dict(o1=True, o2=True, o3=True)),
    ("O1+O2+O3, fused", True, NONE | dict(o1=True, o2=True, o3=True, fuse=True)),
    ("O1+O2+O3, fused, graph", True, NONE | dict(o1=True, o2=True, o3=True, fuse=True, graph=True)),
]
GROWING, STATIC = ROWS[0][0], ROWS[1][0]


# ---------------------------------------------------------------------------------------------- one row, in its own process
def status(key):
    """A line of /proc/self/status in bytes (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":"))


def timed(decoder, prompts, new_tokens):
    """Generate -> (seconds of the prefill and first token, [(seconds, whether a graph was captured)] of every later step)."""
    log, mark, graphs = [], time.perf_counter(), 0
    for _ in generate(decoder, prompts, new_tokens, temperature=0):
        log.append((time.perf_counter() - mark, len(decoder.graphs) > graphs))
        mark, graphs = time.perf_counter(), len(decoder.graphs)
    return log[0][0], log[1:]


def measure(spec):
    """A row of the table: a dict of what to run -> a dict of what was measured; {"oom": True} beyond the budget (CUDA)."""
    device, dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec["budget_gb"] * 1e9 / torch.cuda.mem_get_info()[1]))
    held = 0 if device.type == "cuda" else status("RssAnon")
    try:
        decoder = Decoder(random_model(spec["config"], device, dtype), **spec["switches"])
        shape, g = (spec["batch"], spec["prompt"]), torch.Generator().manual_seed(0)
        prompts = torch.randint(decoder.cfg.vocab, shape, generator=g).tolist()
        timed(decoder, prompts, min(4, spec["new_tokens"]))                        # loads and tunes what libraries load late
        first, steps = timed(decoder, prompts, spec["new_tokens"])
    except torch.OutOfMemoryError:
        return {"oom": True}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM") - status("RssFile") - held
    plain = [seconds for seconds, captured in steps if not captured]
    return {"oom": peak > spec["budget_gb"] * 1e9, "peak_bytes": peak, "cache_bytes": decoder.cache.bytes(),
            "us_per_token": 1e6 * statistics.mean(plain) / spec["batch"], "step_ms": 1e3 * statistics.median(plain),
            "first_token_s": first, "capture_s": sum(seconds for seconds, captured in steps if captured)}


def machine(device):
    """Where and with what a row was measured."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = open("/proc/cpuinfo").read().splitlines() if os.path.exists("/proc/cpuinfo") else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        name = f"{name}, {torch.get_num_threads()} threads"
    return {"device": device, "device_name": name, "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
            "torch": torch.__version__, "cuda": torch.version.cuda}


def run_row(spec, note=""):
    """`measure` in a process of its own, and beside it what was asked for. On a CPU a row estimated beyond the budget, or
    beyond the memory this machine has free, is not run: {"oom": True}."""
    cfg, S = parse_config(spec["config"]), spec["prompt"] + spec["new_tokens"]
    if S > cfg.context:
        raise InputError(f"{spec['prompt']} + {spec['new_tokens']} tokens are beyond the shape's context of {cfg.context}")
    if spec["new_tokens"] < 3:
        raise InputError(f"--new-tokens is {spec['new_tokens']}; expected 3 or more, to have steps to time")
    size = getattr(torch, spec["dtype"]).itemsize
    with torch.device("meta"):
        weights = size * sum(p.numel() for p in Llama(cfg).parameters())
    o1, o2, o3 = (spec["switches"][o] for o in ("o1", "o2", "o3"))
    need = weights + sum(estimate(cfg, spec["batch"], spec["prompt"], S, size, o1, o2, o3))
    limit = min(spec["budget_gb"] * 1e9, free_bytes(torch.device("cpu")) or math.inf)
    if spec["device"] == "cpu" and need > limit:
        result = {"oom": True}
    else:
        done = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--row"], input=json.dumps(spec), text=True,
                              stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(1)                                     # it has said why
        result = json.loads(done.stdout.splitlines()[-1])
    shown = "OOM" if result["oom"] else f"{result['us_per_token']:,.0f} us/token  {result['peak_bytes'] / 1e9:.3f} GB"
    print(f"{note}{spec['what']:<30}{shown}", file=sys.stderr, flush=True)
    return {key: value for key, value in spec.items() if key != "config"} | machine(spec["device"]) | result | {
        "estimated_bytes": need, "weight_bytes": weights}


# ---------------------------------------------------------------------------------------------- shared by table9 and fig4
def arguments(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, help="default: llama-7b on a GPU, demo on a CPU")
    p.add_argument("--ckpt", help="a compressed checkpoint: its shape and its ranks instead of --shape and --rate")
    p.add_argument("--rate", type=float, default=0.6, help="fraction of the decomposed layers' parameters kept (default 0.6)")
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (default 16, the paper's)")
    p.add_argument("--budget-gb", type=float, default=40.0, help="peak memory above which a row is OOM, in 1e9 bytes (40)")
    p.add_argument("--rounds", type=int, default=3, help="times each row is measured (default 3)")
    p.add_argument("--out", help="name of the JSON (default: in experiments/results)")
    return p


def setting(args, **more):
    """(name of the shape, its dense config, its compressed config, the fields all rows share) from parsed arguments."""
    device, dtype, _ = pick_device(args.device, args.dtype)
    name = args.shape or ("llama-7b" if device.type == "cuda" else "demo")
    dense, compressed = SHAPES[name], at_rate(SHAPES[name], args.rate)
    if args.ckpt:
        compressed = read_json(Path(args.ckpt) / "config.json")
        dense, name = at_rate(compressed, None), Path(args.ckpt).resolve().name
        args.rate = compressed.get("air", {}).get("rate")
        if not parse_config(compressed).ranks:
            raise InputError(f"{args.ckpt} is not a compressed checkpoint; give the folder air.py wrote, or --shape and --rate")
    if args.rounds < 1 or args.budget_gb <= 0 or args.prompt < 1:
        raise InputError("--rounds, --prompt and --budget-gb are to be above 0")
    return name, dense, compressed, dict(shape=name, device=device.type, dtype=str(dtype)[6:], prompt=args.prompt,
                                         budget_gb=args.budget_gb, **more)


def target(args, table, common):
    return Path(args.out) if args.out else ROOT / "experiments" / "results" / (
        f"{table}-{common['shape']}-{common['device']}-{common['dtype']}.json")


def save(path, rows):
    part = path.with_name(path.name + ".partial")
    part.write_text(json.dumps({"command": "python " + " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    os.replace(part, path)
    print(f"raw numbers: {path}", file=sys.stderr)


def middle(rows, what, key, base=None):
    """Median over the rounds of `key` of the rows `what`, or of its ratio to `base` in the same round; None where OOM."""
    own, other = ([row for row in rows if row["what"] == name] for name in (what, base or what))
    if not own or not other or any(row["oom"] for row in own + other):
        return None
    return statistics.median(a[key] / (b[key] if base else 1) for a, b in zip(own, other))


def cell(value, form):
    return "OOM" if value is None else form.format(value)


def caption(rows):
    row, rounds = rows[0], 1 + max(row["round"] for row in rows)
    return (f"{row['shape']}, {row['device_name']}, {row['dtype']}, prompt {row['prompt']}, "
            f"{rounds} round{'s' * (rounds > 1)}, torch {row['torch']}, {row['date']}")


def markdown(rows):
    lines = [f"| | peak GB | of {GROWING} | of {STATIC} | us/token | of {GROWING} | of {STATIC} |", "|---|" + "---:|" * 6]
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = [cell(None if (peak := middle(rows, what, "peak_bytes")) is None else peak / 1e9, "{:.3f}"),
                 *(cell(middle(rows, what, "peak_bytes", base), "{:.0%}") for base in (GROWING, STATIC)),
                 cell(middle(rows, what, "us_per_token"), "{:,.0f}"),
                 *(cell(middle(rows, what, "us_per_token", base), "{:.0%}") for base in (GROWING, STATIC))]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- against a plain copy
def in_turn(sides, rounds):
    """{name: (callable, bytes it moves)} -> {name: [bytes a second, one a round]}, A B C A B C …, after one warm-up each."""
    log = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, (side, size) in sides.items():
            start = time.perf_counter()
            side()
            if i:
                log[name].append(size / (time.perf_counter() - start))
    return log


def bandwidth(dense, compressed, common, rounds, tokens=2):
    """Bytes of weights read a second, in one process, in turn: decoding at batch 1 dense and compressed, and single products,
    against a copy of 256 MiB (bytes read + bytes written). Short turns and many rounds: a machine's bandwidth wanders."""
    if common["device"] != "cpu":
        raise InputError("--bandwidth measures a CPU; use --device cpu")
    dtype, sides = getattr(torch, common["dtype"]), {}
    source = torch.ones(2 ** 26)
    copy = torch.empty_like(source)
    sides["copy"] = lambda: copy.copy_(source), 2 * source.nbytes
    for name, config in (("dense", dense), ("compressed", compressed)):
        decoder = Decoder(random_model(config, dtype=dtype))
        decoder.prefill([[1] * common["prompt"]], tokens * (rounds + 1))
        matrices = [layer.weight for layer in decoder.model.modules() if isinstance(layer, torch.nn.Linear)]
        decode = lambda decoder=decoder: [decoder.step(torch.tensor([1])) for _ in range(tokens)]
        sides[name] = decode, tokens * sum(w.nbytes for w in matrices)
    w = torch.randn(20, 2048, 2048)
    x = torch.randn(1, 2048)
    for kind in (torch.float32, torch.bfloat16):
        ws, y = w.to(kind), x.to(kind)
        sides[f"F.linear, {str(kind)[6:]}"] = lambda ws=ws, y=y: [F.linear(y, part) for part in ws], ws.nbytes
        if kind == torch.float32:
            matrices = [Matrix(part) for part in ws]
            sides["Matrix, float32"] = lambda matrices=matrices, y=y: [matrix(y[None]) for matrix in matrices], ws.nbytes
        else:       # PyTorch's own private operators: generate.py does not use them
            packed = [torch.ops.mkldnn._reorder_linear_weight(part, 1) for part in ws]
            linear = lambda y, p: torch.ops.mkldnn._linear_pointwise(y, p, None, "none", [], "")
            sides["packed once, bfloat16"] = lambda packed=packed, y=y, f=linear: [f(y, p) for p in packed], ws.nbytes
    log = in_turn(sides, rounds)
    middle = {name: statistics.median(values) for name, values in log.items()}
    of_copy = {name: statistics.median(a / b for a, b in zip(values, log["copy"])) for name, values in log.items()}
    rate = lambda name, i: log[name][i] / (sides[name][1] / tokens)                # tokens a second in round i
    faster = [rate("compressed", i) / rate("dense", i) for i in range(rounds)]
    for name in log:
        print(f"{name:<24}{middle[name] / 1e9:6.1f} GB/s  {of_copy[name]:5.0%} of the copy", flush=True)
    print(f"compressed / dense, tokens a second: {statistics.median(faster):.2f}; limit by bytes "
          f"{sides['dense'][1] / sides['compressed'][1]:.2f}")
    return [common | machine("cpu") | {"what": name, "batch": 1, "tokens": tokens, "bytes": sides[name][1], "bytes_per_s": values,
                                       "of_copy": of_copy[name]} for name, values in log.items()] + [
        common | machine("cpu") | {"what": "compressed / dense, tokens a second", "batch": 1, "rounds": faster,
                                   "median": statistics.median(faster)}]


def main():
    if sys.argv[1:] == ["--row"]:
        return print(json.dumps(measure(json.load(sys.stdin))))
    p = arguments(__doc__)
    p.add_argument("--batch", type=int, help="default: 64 on a GPU, 8 on a CPU")
    p.add_argument("--new-tokens", type=int, help="default: 496 on a GPU, 112 on a CPU")
    p.add_argument("--bandwidth", action="store_true",
                   help="batch 1, bytes of weights read a second against a plain copy, on a CPU; 5 short turns a round")
    args = p.parse_args()
    _, dense, compressed, common = setting(args)
    if args.bandwidth:
        path = target(args, "table11-bandwidth", common)
        return save(path, bandwidth(dense, compressed, common, 5 * args.rounds))
    path, gpu = target(args, "table11", common), common["device"] == "cuda"
    common |= dict(batch=args.batch or (64 if gpu else 8), new_tokens=args.new_tokens or (496 if gpu else 112), eos="off")
    wanted = [row for row in ROWS if gpu or not row[2]["graph"]]
    rows = []
    for i in range(args.rounds):
        for j, (what, low, switches) in enumerate(wanted):
            spec = common | dict(what=what, rate=args.rate if low else None, round=i, switches=switches,
                                 config=compressed if low else dense)
            rows.append(run_row(spec, f"[{i * len(wanted) + j + 1}/{args.rounds * len(wanted)}] "))
    print(f"\n{caption(rows)}, rate {args.rate}, batch {common['batch']}, {common['new_tokens']} new tokens\n")
    print(markdown(rows))
    save(path, rows)


if __name__ == "__main__":
    run(main)
