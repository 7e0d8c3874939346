"""Table 9 of the paper: parameters, arithmetic, bytes, peak memory, latency at four rates.

    python experiments/table9.py                    # the demo's shape
    python experiments/table9.py --shape llama-7b --batch 64 --new-tokens 496
                                                    # the paper's setting; a GPU with 40 GB

Against the dense model. Measured as table11.py measures (see there), with every
optimisation on; latency and peak memory are shown against both dense baselines, the
growing cache (the paper's) and the same static cache.
Writes experiments/results/table9-SHAPE-DEVICE-DTYPE.json.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.shapes import at_rate
from experiments.table11 import (ALL, GROWING, ROWS, STATIC, add_batch_arguments, arguments,
                                 caption, cell, middle, one_batch, parameters, run_rows, save,
                                 setting, target)
from generate import value_shape
from model import Llama
from support.config import parse_config
from support.script import run

RATES = (0.8, 0.6, 0.4, 0.2)
# What, rate, switches.
MODELS = [(GROWING, None, ROWS[0][2]), (STATIC, None, ALL)]
MODELS += [(f"{rate:.0%}", rate, ALL) for rate in RATES]


def flops(config, context):
    """Floating-point operations of one row's decoding step that attends to `context` columns.

    2 for every multiplication and addition of the matrices (lm_head included), the scores,
    and the sums over the values, Eq. 28 where they are low-rank.
    """
    cfg = parse_config(config)
    with torch.device("meta"):
        modules = Llama(cfg).modules()
    total = sum(2 * m.weight.numel() for m in modules if isinstance(m, torch.nn.Linear))
    for l in range(cfg.n_layers):
        heads, width = value_shape(cfg, l)
        total += 2 * context * cfg.n_heads * (cfg.head_dim + width)
        # U_k is applied for every query head, not once a kv head.
        if (heads, width) != (cfg.n_kv_heads, cfg.head_dim):
            total += 2 * (cfg.n_heads - cfg.n_kv_heads) * cfg.head_dim * width
    return total


def line(title, cells):
    return f"| {title} | " + " | ".join(cells) + " |"


def markdown(rows, names):
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    # What follows from the shape: the same in every round.
    for title, key, unit, form in (
            ("parameters, M", "parameters", 1e6, "{:,.1f}"),
            ("MFLOP a token", "flops_per_token", 1e6, "{:,.1f}"),
            ("bytes of weights, GB", "weight_bytes", 1e9, "{:.3f}")):
        values = {row["what"]: row[key] for row in rows}
        lines.append(line(title, [form.format(values[what] / unit) for what in names]))
        lines.append(line("", [f"{values[what] / values[STATIC]:.0%}" for what in names]))
    # What was measured.
    for title, key, unit, form in (
            ("peak memory, GB", "peak_bytes", 1e9, "{:.3f}"),
            ("us/token", "us_per_token", 1, "{:,.1f}")):
        values = [middle(rows, what, key) for what in names]
        lines.append(line(title, [cell(value, form, unit) for value in values]))
        for base in (GROWING, STATIC):
            ratios = [middle(rows, what, key, base) for what in names]
            lines.append(line(f"of {base}", [cell(ratio, "{:.0%}") for ratio in ratios]))
    return "\n".join(lines)


def main():
    p = arguments(__doc__)
    add_batch_arguments(p)
    args = p.parse_args()
    dense, _, common = setting(args)
    path = target(args, "table9", common)
    common = one_batch(args, common)
    specs = []
    for i in range(args.rounds):
        for what, rate, switches in MODELS:
            config = at_rate(dense, rate)
            specs.append(common | {"what": what, "rate": rate, "round": i,
                                   "switches": switches, "config": config})
    rows = run_rows(specs)
    context = common["prompt"] + common["new_tokens"] / 2
    for row, spec in zip(rows, specs):
        row["parameters"] = parameters(spec["config"])
        row["flops_per_token"] = flops(spec["config"], context)
    print(f"\n{caption(rows)}, batch {common['batch']}, "
          f"{common['new_tokens']} new tokens\n")
    print(markdown(rows, [what for what, _, _ in MODELS]))
    save(path, rows)


if __name__ == "__main__":
    run(main)
