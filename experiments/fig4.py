"""Figures 4 and 7 of the paper: peak memory and time a token over batch and length, compressed against dense.

    python experiments/fig4.py                                      # the demo's shape, a few minutes on 2 cores
    python experiments/fig4.py --shape llama-7b --batches 1 16 32 64 128 256 --lengths 256 512 1024 2048     # a GPU

Measured as table11.py measures (see there). Three models a cell: dense with a growing cache (the paper's base), dense with the
same static cache as the compressed one, and compressed with every optimisation. A length is prompt and new tokens together.
OOM: beyond the budget; B-OOM: only the dense model is. Writes experiments/results/fig4-SHAPE-DEVICE-DTYPE.json and .png.
"""
import sys
from pathlib import Path

from table11 import NONE, ROWS, arguments, caption, middle, run_row, save, setting, target

from support.script import run

ALL = {switch: True for switch in NONE}
MODELS = (("growing", False, ROWS[0][2]), ("static", False, ALL), ("compressed", True, ALL))
BLUE, ORANGE, GREY, YELLOW = "#0072B2", "#D55E00", "#BBBBBB", "#F0E442"           # Okabe-Ito


def ratio(rows, batch, length, key, base):
    """compressed / base in one cell, "B-OOM" where only the base does not fit, "OOM" where both do not."""
    here = [row for row in rows if row["batch"] == batch and row["length"] == length]
    if middle(here, "compressed", key) is None:
        return "OOM"
    return middle(here, "compressed", key, base) or "B-OOM"


def table(rows, batches, lengths):
    lines = []
    for key, title in (("peak_bytes", "peak memory"), ("us_per_token", "time a token")):
        for base in ("growing", "static"):
            lines += [f"\n{title}, compressed / dense with a {base} cache\n", "| batch | " + " | ".join(map(str, lengths)) + " |",
                      "|---|" + "---:|" * len(lengths)]
            for batch in batches:
                cells = [ratio(rows, batch, length, key, base) for length in lengths]
                lines.append(f"| {batch} | " + " | ".join(c if isinstance(c, str) else f"{c:.0%}" for c in cells) + " |")
    return "\n".join(lines)


def picture(rows, batches, lengths, path):
    """The four ratios as grids: blue below 100 %, orange above."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.colors import LinearSegmentedColormap, to_rgb
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    scale = LinearSegmentedColormap.from_list("", [BLUE, "white", ORANGE])
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.2), layout="constrained")
    for axis, (key, title) in zip(axes, (("peak_bytes", "peak memory"), ("us_per_token", "time a token"))):
        for ax, base in zip(axis, ("growing", "static")):
            for y, batch in enumerate(batches):
                for x, length in enumerate(lengths):
                    value = ratio(rows, batch, length, key, base)
                    colour = {"OOM": to_rgb(GREY), "B-OOM": to_rgb(YELLOW)}.get(value) or scale(min(max(value / 2, 0), 1))[:3]
                    ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
                    dark = sum(colour) < 1.2
                    ax.text(x, y, value if isinstance(value, str) else f"{value:.0%}", ha="center", va="center",
                            color="white" if dark else "black")
            ax.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(-0.5, len(batches) - 0.5), xlabel="tokens", ylabel="batch",
                   title=f"{title}: compressed / dense, {base} cache")
            ax.set_xticks(range(len(lengths)), lengths), ax.set_yticks(range(len(batches)), batches)
    row = next(row for row in rows if row["what"] == "compressed")
    fig.suptitle(f"rate {row['rate']}, budget {row['budget_gb']:g} GB: {caption(rows)}", fontsize=9)
    fig.savefig(path, dpi=110)


def main():
    p = arguments(__doc__)
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    p.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512], help="prompt and new tokens together")
    args = p.parse_args()
    _, dense, compressed, common = setting(args)
    path, rows = target(args, "fig4", common), []
    cells = [(batch, length) for batch in args.batches for length in args.lengths]
    total = args.rounds * len(cells) * len(MODELS)
    for i in range(args.rounds):
        for batch, length in cells:
            for what, low, switches in MODELS:
                spec = common | dict(what=what, rate=args.rate if low else None, round=i, switches=switches,
                                     batch=batch, length=length, new_tokens=length - args.prompt, eos="off",
                                     config=compressed if low else dense)
                rows.append(run_row(spec, f"[{len(rows) + 1}/{total}] batch {batch:<4} length {length:<5} "))
    print(f"\n{caption(rows)}, budget {args.budget_gb:g} GB")
    print(table(rows, args.batches, args.lengths))
    save(path, rows)
    picture(rows, args.batches, args.lengths, Path(path).with_suffix(".png"))


if __name__ == "__main__":
    run(main)
