"""Table 9 of the paper: parameters, arithmetic, bytes, peak memory and latency at four rates, against the dense model.

    python experiments/table9.py                                               # the demo's shape
    python experiments/table9.py --shape llama-7b --batch 64 --new-tokens 496  # the paper's setting; a GPU with 40 GB

Measured as table11.py measures (see there), with every optimisation on; latency and peak memory are shown against both dense
baselines, the growing cache (the paper's) and the same static cache. Writes experiments/results/table9-SHAPE-DEVICE-DTYPE.json.
"""
import torch

from shapes import at_rate
from table11 import NONE, ROWS, arguments, caption, cell, middle, run_row, save, setting, target

from generate import value_shape
from model import Llama
from support.checkpoint import parse_config
from support.script import run

RATES = (0.8, 0.6, 0.4, 0.2)
ALL = {switch: True for switch in NONE}
GROWING, STATIC = "dense, growing cache", "dense, static cache"


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(parse_config(config)).parameters())


def flops(config, context):
    """Floating-point operations of one decoding step of one row that attends to `context` columns: 2 for every multiplication and
    addition of the matrices (lm_head included), the scores, and the sums over the values, Eq. 28 where they are low-rank."""
    cfg = parse_config(config)
    H, D = cfg.n_heads, cfg.head_dim
    with torch.device("meta"):
        layers = {name: m for name, m in Llama(cfg).named_modules() if isinstance(m, torch.nn.Linear)}
    total = sum(2 * m.weight.numel() for m in layers.values())
    for l in range(cfg.n_layers):
        heads, width = value_shape(cfg, l)
        total += 2 * context * H * (D + width)
        if (heads, width) != (cfg.n_kv_heads, D):           # U_k is applied for every query head, not once a kv head
            total += 2 * (H - cfg.n_kv_heads) * D * width
    return total


def markdown(rows, names):
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    add = lambda title, cells: lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for title, key, unit, form in (("parameters, M", "parameters", 1e6, "{:,.1f}"),
                                   ("MFLOP a token", "flops_per_token", 1e6, "{:,.1f}"),
                                   ("bytes of weights, GB", "weight_bytes", 1e9, "{:.3f}")):
        values = {row["what"]: row[key] for row in rows}                                # the same in every round
        add(title, [form.format(values[what] / unit) for what in names])
        add("", [f"{values[what] / values[STATIC]:.0%}" for what in names])
    for title, key, unit, form in (("peak memory, GB", "peak_bytes", 1e9, "{:.3f}"), ("us/token", "us_per_token", 1, "{:,.1f}")):
        values = [middle(rows, what, key) for what in names]
        add(title, [cell(value and value / unit, form) for value in values])
        for base in (GROWING, STATIC):
            add(f"of {base}", [cell(middle(rows, what, key, base), "{:.0%}") for what in names])
    return "\n".join(lines)


def main():
    p = arguments(__doc__)
    p.add_argument("--batch", type=int, help="default: 64 on a GPU, 8 on a CPU")
    p.add_argument("--new-tokens", type=int, help="default: 496 on a GPU, 112 on a CPU")
    args = p.parse_args()
    _, dense, _, common = setting(args)
    gpu, path = common["device"] == "cuda", target(args, "table9", common)
    common |= dict(batch=args.batch or (64 if gpu else 8), new_tokens=args.new_tokens or (496 if gpu else 112), eos="off")
    wanted = [(GROWING, None, ROWS[0][2]), (STATIC, None, ALL)] + [(f"{rate:.0%}", rate, ALL) for rate in RATES]
    rows, context = [], common["prompt"] + common["new_tokens"] / 2
    for i in range(args.rounds):
        for j, (what, rate, switches) in enumerate(wanted):
            config = at_rate(dense, rate)
            spec = common | dict(what=what, rate=rate, round=i, switches=switches, config=config)
            row = run_row(spec, f"[{i * len(wanted) + j + 1}/{args.rounds * len(wanted)}] ")
            rows.append(row | {"parameters": parameters(config), "flops_per_token": flops(config, context)})
    print(f"\n{caption(rows)}, batch {common['batch']}, {common['new_tokens']} new tokens\n")
    print(markdown(rows, [what for what, _, _ in wanted]))
    save(path, rows)


if __name__ == "__main__":
    run(main)
