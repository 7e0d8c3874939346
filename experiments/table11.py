"""Table 11 of the paper: what each optimisation of generate.py does to memory and time.

    python experiments/table11.py                   # the demo's shape, two minutes on 2 cores
    python experiments/table11.py --shape llama-7b --batch 64 --new-tokens 496
                                                    # the paper's setting; a GPU with 40 GB
    python experiments/table11.py --shape tinyllama --bandwidth
                                                    # decoding against a copy, one process

Random weights of the shape (--ckpt: of a compressed checkpoint's config.json, with its
ranks), random prompts, greedy, no end-of-text token: every row makes all its tokens. A
row on a CPU is a process of its own; all rows run in turn, --rounds times, and ratios are
medians of the rounds' ratios. The time is that of the steps after the first token, without
those in which a graph is captured (their time is in the JSON). Peak memory: CUDA's own count
of allocated bytes; on a CPU the highest resident set less mapped files and less what the
process held before the model, so it includes what malloc keeps.
Writes experiments/results/table11-SHAPE-DEVICE-DTYPE.json (--out: another name).
"""
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.shapes import SHAPES, at_rate, random_model
from generate import Decoder, estimate, generate
from model import Llama
from support.config import parse_config
from support.fast import Matrix
from support.script import (ROOT, InputError, Parser, TooLarge, check_results, free_bytes,
                            pick_device, read_json, run, write_json)

SWITCHES = ("o1", "o2", "o3", "fuse", "graph")


def only(*switches):
    """A Decoder's arguments that switch these on and all others off."""
    return {name: name in switches for name in SWITCHES}


ALL = only(*SWITCHES)
ROWS = [    # what, compressed, switches
    # The paper's 100 %, as most libraries decode.
    ("dense, growing cache", False, only("o1")),
    ("dense, static cache", False, only("o1", "o3")),
    ("dense, static, fused", False, only("o1", "o3", "fuse")),
    ("dense, static, fused, graph", False, only("o1", "o3", "fuse", "graph")),
    ("compressed, none", True, only()),
    ("O1", True, only("o1")),
    ("O1+O3", True, only("o1", "o3")),
    ("O1+O2", True, only("o1", "o2")),
    ("O1+O2+O3", True, only("o1", "o2", "o3")),
    ("O1+O2+O3, fused", True, only("o1", "o2", "o3", "fuse")),
    ("O1+O2+O3, fused, graph", True, ALL),
]
GROWING, STATIC = (what for what, _, _ in ROWS[:2])


# ------------------------------------------------------------ one row, in its own process
def status(key, process="self"):
    """A line of /proc/self/status, or of another process's, in bytes (Linux)."""
    with open(f"/proc/{process}/status") as f:
        line = next(line for line in f if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


def timed(decoder, prompts, new_tokens):
    """Generate -> (seconds of the prefill and first token,
    [(seconds, whether a graph was captured)] of every later step)."""
    log = []
    captured = 0
    mark = time.perf_counter()
    for _ in generate(decoder, prompts, new_tokens, temperature=0):
        seconds = time.perf_counter() - mark
        graphs = len(decoder.graphs or ())              # no Graphs on a CPU
        log.append((seconds, graphs > captured))
        captured = graphs
        mark = time.perf_counter()
    return log[0][0], log[1:]


def generated(spec, device):
    """A row's Decoder, and what `timed` says of it once it is warm."""
    dtype = getattr(torch, spec["dtype"])
    decoder = Decoder(random_model(spec["config"], device, dtype), **spec["switches"])
    generator = torch.Generator().manual_seed(0)
    shape = spec["batch"], spec["prompt"]
    prompts = torch.randint(decoder.cfg.vocab, shape, generator=generator).tolist()
    timed(decoder, prompts, min(4, spec["new_tokens"]))     # libraries load and tune late
    return decoder, timed(decoder, prompts, spec["new_tokens"])


def emptied(budget):
    """A GPU that the row before has left, with `budget` bytes to be had; returns the bytes
    that are still allocated."""
    gc.collect()                                        # a Decoder and its graph hold each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
    return torch.cuda.memory_allocated()


def measure(spec):
    """A row: a dict of what to run -> a dict of what was measured.

    {"oom": True} where it does not fit, by what is allocated or by the Decoder's estimate.
    """
    device = torch.device(spec["device"])
    budget = spec["budget_gb"] * 1e9
    gpu = device.type == "cuda"
    held = emptied(budget) if gpu else status("RssAnon")
    try:
        decoder, (first, steps) = generated(spec, device)
    except (torch.OutOfMemoryError, TooLarge):
        return {"oom": True}
    if gpu:
        peak = torch.cuda.max_memory_allocated() - held
    else:
        peak = status("VmHWM") - status("RssFile") - held
    plain = [seconds for seconds, captured in steps if not captured]
    return {
        "oom": peak > budget,
        "peak_bytes": peak,
        "cache_bytes": decoder.cache_bytes(),
        "us_per_token": 1e6 * statistics.mean(plain) / spec["batch"],
        "step_ms": 1e3 * statistics.median(plain),
        "first_token_s": first,
        "capture_s": sum(seconds for seconds, captured in steps if captured),
    }


# ------------------------------------------------------------ rows
def processor():
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def machine(device):
    """Where and with what a row was measured."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return {"device": device, "device_name": name, "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda}


def needs(spec):
    """(bytes of the weights, bytes of all that a row is estimated to need).

    Raises InputError for a row that cannot be timed.
    """
    cfg = parse_config(spec["config"])
    prompt = spec["prompt"]
    new_tokens = spec["new_tokens"]
    if prompt + new_tokens > cfg.context:
        raise InputError(f"{prompt} + {new_tokens} tokens are beyond the shape's context "
                         f"of {cfg.context}")
    if spec["batch"] < 1:
        raise InputError(f"a batch of {spec['batch']}; expected 1 or more")
    if new_tokens < 3:
        raise InputError(f"--new-tokens is {new_tokens}; expected 3 or more, "
                         "to have steps to time")
    dtype = getattr(torch, spec["dtype"])
    weights = dtype.itemsize * parameters(spec["config"])
    switches = [spec["switches"][name] for name in ("o1", "o2", "o3")]
    shape = spec["batch"], prompt, prompt + new_tokens
    return weights, weights + sum(estimate(cfg, shape, dtype, *switches))


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(parse_config(config)).parameters())


def in_a_process(spec):
    """`measure` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row"]
    asked = json.dumps(spec)
    done = subprocess.run(command, input=asked, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(1)                                     # it has said why
    return json.loads(done.stdout.splitlines()[-1])


def run_row(spec):
    """`measure`, on a CPU in a process of its own, and beside it what was asked for.

    There a row estimated beyond the budget, or beyond the memory this machine has free,
    is not run: {"oom": True}.
    """
    weights, need = needs(spec)
    free = free_bytes(torch.device("cpu")) or math.inf
    limit = min(spec["budget_gb"] * 1e9, free)
    too_large = spec["device"] == "cpu" and need > limit
    measured = measure if spec["device"] == "cuda" else in_a_process
    result = {"oom": True} if too_large else measured(spec)
    asked = {key: value for key, value in spec.items() if key != "config"}
    estimated = {"estimated_bytes": need, "weight_bytes": weights}
    return asked | machine(spec["device"]) | result | estimated


def run_rows(specs):
    """run_row of all of them in turn, a line of progress each. Raises InputError, before the
    first, where one of them cannot be timed."""
    for spec in specs:
        needs(spec)
    rows = []
    for spec in specs:
        row = run_row(spec)
        rows.append(row)
        shown = "OOM"
        if not row["oom"]:
            peak = row["peak_bytes"] / 1e9
            shown = f"{row['us_per_token']:,.0f} us/token  {peak:.3f} GB"
        # Cells of a figure are told by their batch and length.
        where = ""
        if "length" in row:
            where = f"batch {row['batch']:<4} length {row['length']:<5} "
        print(f"[{len(rows)}/{len(specs)}] {where}{row['what']:<30}{shown}",
              file=sys.stderr, flush=True)
    return rows


# ------------------------------------------------------------ shared by table9 and fig4
def arguments(doc):
    p = Parser(doc)
    p.add_argument("--shape", choices=SHAPES,
                   help="default: llama-7b on a GPU, demo on a CPU")
    p.add_argument("--ckpt", help="a compressed checkpoint: its shape and its ranks instead "
                   "of --shape and --rate")
    p.add_argument("--rate", type=float, default=0.6,
                   help="fraction of the decomposed layers' parameters kept "
                   "(default 0.6)")
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--prompt", type=int, default=16,
                   help="tokens of a prompt (default 16, the paper's)")
    p.add_argument("--budget-gb", type=float, default=40.0,
                   help="peak memory above which a row is OOM, in 1e9 bytes (40)")
    p.add_argument("--rounds", type=int, default=3,
                   help="times each row is measured (default 3)")
    p.add_argument("--out", help="name of the JSON (default: in experiments/results)")
    return p


def add_batch_arguments(p):
    p.add_argument("--batch", type=int, help="default: 64 on a GPU, 8 on a CPU")
    p.add_argument("--new-tokens", type=int, help="default: 496 on a GPU, 112 on a CPU")


def setting(args):
    """(dense config, compressed config, the fields all rows share) of parsed arguments."""
    device, dtype, _ = pick_device(args.device, args.dtype)
    name = args.shape or ("llama-7b" if device.type == "cuda" else "demo")
    dense = SHAPES[name]
    compressed = at_rate(dense, args.rate)
    if args.ckpt:
        compressed = read_json(Path(args.ckpt) / "config.json")
        dense = at_rate(compressed, None)
        name = Path(args.ckpt).resolve().name
        args.rate = compressed.get("air", {}).get("rate")
        if not parse_config(compressed).ranks:
            raise InputError(f"{args.ckpt} is not a compressed checkpoint; give the folder "
                             "air.py wrote, or --shape and --rate")
    if args.rounds < 1 or args.budget_gb <= 0 or args.prompt < 1:
        raise InputError("--rounds, --prompt and --budget-gb are to be above 0")
    common = {"shape": name, "device": device.type, "dtype": str(dtype)[6:],
              "prompt": args.prompt, "budget_gb": args.budget_gb}
    return dense, compressed, common


def one_batch(args, common):
    """The fields all rows share where --batch and --new-tokens are arguments."""
    batch, new_tokens = (64, 496) if common["device"] == "cuda" else (8, 112)
    asked = {"batch": args.batch, "new_tokens": args.new_tokens}
    asked = {name: number for name, number in asked.items() if number is not None}
    return common | {"batch": batch, "new_tokens": new_tokens, "eos": "off"} | asked


def target(args, table, common):
    name = f"{table}-{common['shape']}-{common['device']}-{common['dtype']}.json"
    path = Path(args.out) if args.out else ROOT / "experiments" / "results" / name
    if path.suffix == ".png":
        raise InputError(f"--out is {path}; expected the JSON's name, beside which the "
                         "picture lies")
    check_results(path, "rows")
    return path


def save(path, rows, say=True):
    write_json(path, {"command": "python " + " ".join(sys.argv), "rows": rows})
    if say:
        print(f"raw numbers: {path}", file=sys.stderr)


def middle(rows, what, key, base=None):
    """Median over the rounds of `key` of the rows `what`, or of its ratio to `base`'s in the
    same round; None where OOM."""
    own = [row for row in rows if row["what"] == what]
    other = [row for row in rows if row["what"] == (base or what)]
    if not own or not other or any(row["oom"] for row in own + other):
        return None
    if base is None:
        return statistics.median(row[key] for row in own)
    return statistics.median(a[key] / b[key] for a, b in zip(own, other))


def cell(value, form, unit=1):
    return "OOM" if value is None else form.format(value / unit)


def caption(rows):
    row = rows[0]
    rounds = 1 + max(each["round"] for each in rows)
    plural = "s" * (rounds > 1)
    return (f"{row['shape']}, {row['device_name']}, {row['dtype']}, prompt {row['prompt']}, "
            f"{rounds} round{plural}, torch {row['torch']}, {row['date']}")


def markdown(rows):
    of = f"of {GROWING} | of {STATIC}"
    lines = [f"| | peak GB | {of} | us/token | {of} |", "|---|" + "---:|" * 6]
    columns = ("peak_bytes", "{:.3f}", 1e9), ("us_per_token", "{:,.0f}", 1)
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = []
        for key, form, unit in columns:
            cells.append(cell(middle(rows, what, key), form, unit))
            for base in (GROWING, STATIC):
                cells.append(cell(middle(rows, what, key, base), "{:.0%}"))
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------ against a plain copy
def in_turn(sides, rounds):
    """{name: (callable, bytes it moves)} -> {name: [bytes a second, one a round]}.

    A B C A B C …, after one warm-up each.
    """
    log = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, (side, size) in sides.items():
            start = time.perf_counter()
            side()
            seconds = time.perf_counter() - start
            if i:
                log[name].append(size / seconds)
    return log


def copying():
    """A copy of 256 MiB; bytes read and bytes written count."""
    source = torch.ones(2**26)
    copy = torch.empty_like(source)
    return lambda: copy.copy_(source), 2 * source.nbytes


def decoding(config, common, tokens, turns):
    """`tokens` steps of a model at batch 1, taken `turns` times; bytes of weights count."""
    decoder = Decoder(random_model(config, dtype=getattr(torch, common["dtype"])))
    decoder.prefill([[1] * common["prompt"]], tokens * turns)
    modules = decoder.model.modules()
    layers = [layer for layer in modules if isinstance(layer, torch.nn.Linear)]

    def decode():
        for _ in range(tokens):
            decoder.step(torch.tensor([1]))
    return decode, tokens * sum(layer.weight.nbytes for layer in layers)


def products(dtype):
    """{name: side}: a row times 20 matrices, by F.linear and with them arranged once.

    bf16 is arranged only where oneDNN computes in it.
    """
    ws = torch.randn(20, 2048, 2048).to(dtype)
    x = torch.randn(1, 2048).to(dtype)

    def linear():
        for w in ws:
            F.linear(x, w)
    sides = {f"F.linear, {str(dtype)[6:]}": (linear, ws.nbytes)}
    if dtype == torch.float32:
        matrices = [Matrix(w) for w in ws]

        def sliced():
            for matrix in matrices:
                matrix(x[None])
        sides["Matrix, float32"] = sliced, ws.nbytes
    elif torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # PyTorch's own private operators: generate.py does not use them.
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, 1) for w in ws]

        def packed_once():
            for w in packed:
                torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        sides["packed once, bfloat16"] = packed_once, ws.nbytes
    return sides


def bandwidth(dense, compressed, common, rounds, tokens=2):
    """Bytes of weights read a second, in one process, in turn: decoding at batch 1 dense
    and compressed, and single products, against a copy.

    Short turns and many rounds: a machine's bandwidth wanders. The last row is the ratio of
    both models' tokens a second.
    """
    if common["device"] != "cpu":
        raise InputError("--bandwidth measures a CPU; use --device cpu")
    sides = {
        "copy": copying(),
        "dense": decoding(dense, common, tokens, rounds + 1),
        "compressed": decoding(compressed, common, tokens, rounds + 1),
        **products(torch.float32),
        **products(torch.bfloat16),
    }
    log = in_turn(sides, rounds)
    common = common | machine("cpu") | {"batch": 1}
    rows = []
    for name, (_, size) in sides.items():
        of_copy = statistics.median(a / b for a, b in zip(log[name], log["copy"]))
        rows.append(common | {"what": name, "tokens": tokens, "bytes": size,
                              "bytes_per_s": log[name], "of_copy": of_copy})
    # Both make `tokens` tokens a turn: the more bytes one reads for them, the fewer it makes.
    fewer = sides["dense"][1] / sides["compressed"][1]
    faster = [a / b * fewer for a, b in zip(log["compressed"], log["dense"])]
    rows.append(common | {"what": "compressed / dense, tokens a second", "rounds": faster,
                          "median": statistics.median(faster)})
    return rows


def bandwidth_text(rows):
    *sides, ratio = rows
    size = {row["what"]: row["bytes"] for row in sides}
    lines = []
    for row in sides:
        rate = statistics.median(row["bytes_per_s"]) / 1e9
        share = row["of_copy"]
        lines.append(f"{row['what']:<24}{rate:6.1f} GB/s  {share:5.0%} of the copy")
    lines.append(f"{ratio['what']}: {ratio['median']:.2f}; limit by bytes "
                 f"{size['dense'] / size['compressed']:.2f}")
    return "\n".join(lines)


def main():
    if sys.argv[1:] == ["--row"]:
        print(json.dumps(measure(json.load(sys.stdin))))
        return
    p = arguments(__doc__)
    add_batch_arguments(p)
    p.add_argument("--bandwidth", action="store_true",
                   help="batch 1, bytes of weights read a second against a plain copy, "
                   "on a CPU; 5 short turns a round")
    args = p.parse_args()
    dense, compressed, common = setting(args)
    if args.bandwidth:
        path = target(args, "table11-bandwidth", common)
        rows = bandwidth(dense, compressed, common, 5 * args.rounds)
        print(bandwidth_text(rows))
        save(path, rows)
        return
    path = target(args, "table11", common)
    common = one_batch(args, common)
    specs = []
    for i in range(args.rounds):
        for what, low, switches in ROWS:
            if switches["graph"] and common["device"] == "cpu":
                continue
            specs.append(common | {
                "what": what, "rate": args.rate if low else None, "round": i,
                "switches": switches, "config": compressed if low else dense})
    rows = run_rows(specs)
    print(f"\n{caption(rows)}, rate {args.rate}, batch {common['batch']}, "
          f"{common['new_tokens']} new tokens\n")
    print(markdown(rows))
    save(path, rows)


if __name__ == "__main__":
    run(main)
