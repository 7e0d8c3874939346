"""Figures 4 and 7 of the paper: peak memory and time a token over batch and length.

    python experiments/fig4.py              # the demo's shape, a few minutes on 2 cores
    python experiments/fig4.py --shape llama-7b --batches 1 16 32 64 128 256 \\
        --lengths 256 512 1024 2048         # a GPU

Compressed against dense, measured as table11.py measures (see there). Three models a
cell: dense with a growing cache (the paper's base), dense with the same static cache as
the compressed one, and compressed with every optimisation. A length is prompt and new
tokens together. OOM: beyond the budget; B-OOM: only the dense model is.
Writes experiments/results/fig4-SHAPE-DEVICE-DTYPE.json and .png.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.table11 import (ALL, ROWS, arguments, caption, middle, run_rows, save,
                                 setting, target)
from support.script import run

MODELS = (      # what, compressed, switches
    ("growing", False, ROWS[0][2]),
    ("static", False, ALL),
    ("compressed", True, ALL),
)
FIGURES = (("peak_bytes", "peak memory"), ("us_per_token", "time a token"))
BASES = ("growing", "static")
# Okabe and Ito's colours.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#BBBBBB"
YELLOW = "#F0E442"


def ratio(rows, batch, length, key, base):
    """compressed / base in one cell.

    "B-OOM" where only the base does not fit, "OOM" where both do not.
    """
    here = [row for row in rows if row["batch"] == batch and row["length"] == length]
    if middle(here, "compressed", key) is None:
        return "OOM"
    return middle(here, "compressed", key, base) or "B-OOM"


def shown(value):
    return value if isinstance(value, str) else f"{value:.0%}"


def table(rows, batches, lengths):
    lines = []
    for (key, title), base in itertools.product(FIGURES, BASES):
        lines += [f"\n{title}, compressed / dense with a {base} cache\n",
                  "| batch | " + " | ".join(map(str, lengths)) + " |",
                  "|---|" + "---:|" * len(lengths)]
        for batch in batches:
            cells = [shown(ratio(rows, batch, length, key, base)) for length in lengths]
            lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def colour_of(value):
    """Red, green, blue of a cell: blue below 100 %, white at it, orange above."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    named = {"OOM": GREY, "B-OOM": YELLOW}
    if value in named:
        return to_rgb(named[value])
    scale = LinearSegmentedColormap.from_list("", [BLUE, "white", ORANGE])
    return scale(min(max(value / 2, 0), 1))[:3]


def grid(ax, values, batches, lengths):
    """Paint {(batch, length): ratio} as cells."""
    for (batch, length), value in values.items():
        x = lengths.index(length)
        y = batches.index(batch)
        colour = colour_of(value)
        ax.bar(x, 1, width=1, bottom=y - 0.5, color=colour, edgecolor="white")
        ink = "white" if sum(colour) < 1.2 else "black"
        ax.text(x, y, shown(value), ha="center", va="center", color=ink)
    ax.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(-0.5, len(batches) - 0.5),
           xlabel="tokens", ylabel="batch")
    ax.set_xticks(range(len(lengths)), lengths)
    ax.set_yticks(range(len(batches)), batches)


def picture(rows, batches, lengths, path):
    """The four ratios as grids; raises ImportError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.2), layout="constrained")
    for ax, ((key, name), base) in zip(axes.flat, itertools.product(FIGURES, BASES)):
        values = {(batch, length): ratio(rows, batch, length, key, base)
                  for batch in batches for length in lengths}
        grid(ax, values, batches, lengths)
        ax.set_title(f"{name}: compressed / dense, {base} cache")
    row = next(row for row in rows if row["what"] == "compressed")
    title = f"rate {row['rate']}, budget {row['budget_gb']:g} GB: {caption(rows)}"
    fig.suptitle(title, fontsize=9)
    partial = path.with_name(path.name + ".partial")
    fig.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def main():
    p = arguments(__doc__)
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    p.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512],
                   help="prompt and new tokens together")
    args = p.parse_args()
    dense, compressed, common = setting(args)
    path = target(args, "fig4", common)
    cells = itertools.product(range(args.rounds), args.batches, args.lengths, MODELS)
    specs = []
    for i, batch, length, (what, low, switches) in cells:
        specs.append(common | {
            "what": what, "rate": args.rate if low else None, "round": i,
            "switches": switches, "config": compressed if low else dense,
            "batch": batch, "length": length, "new_tokens": length - args.prompt,
            "eos": "off"})
    rows = run_rows(specs)
    print(f"\n{caption(rows)}, budget {args.budget_gb:g} GB")
    print(table(rows, args.batches, args.lengths))
    save(path, rows)
    try:
        picture(rows, args.batches, args.lengths, path.with_suffix(".png"))
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
