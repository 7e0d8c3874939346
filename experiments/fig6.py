"""Figures 6 and 8 of the paper: heatmaps of one block's seven layers, weights and
activations, magnitude and influence.

    python experiments/fig6.py      # the demo's block 2 of 6 (the paper: 10 of 32)
    python experiments/fig6.py --block 5

Elements are averaged over square cells, 1/32 of the model's width on a side (the paper:
1/16 and 1/8), and divided by their mean over the matrix, so that all panels share one
colour scale. Activations are a layer's outputs over one calibration window. Writes
experiments/results/fig6-NAME.json (the measures, not the maps) and, with matplotlib,
fig6-NAME.png.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F

from experiments.common import Lab, Setup, arguments
from experiments.fig2 import activations, spearman
from experiments.report import table, verdict
from model import LAYERS
from support.script import InputError, run

ROWS = {
    "weight": "weight |W|",
    "weight influence": "influence of weights",
    "activation": "activation |A|",
    "activation influence": "influence of activations",
}


@dataclass
class Panel:
    """A matrix as its picture shows it."""

    cells: torch.Tensor         # means over square cells, over the mean of all
    shape: tuple                # of the matrix


def panel(x, side):
    """A matrix in side × side cells; an incomplete last cell averages what it has."""
    cells = F.avg_pool2d(x.double()[None, None], side, ceil_mode=True)[0, 0]
    return Panel(cells / cells.mean().clamp_min(1e-300), tuple(x.shape))


def panels_of(lab, l, side):
    """{row: {layer: Panel}} of block l, at the first calibration seed."""
    windows = lab.calibration(lab.seeds[0])
    stats = dict(lab.statistics(windows))[l]
    outputs = activations(lab.ckpt, windows[:1], lab.device, lab.dtype)
    panels = {row: {} for row in ROWS}
    for name in LAYERS:
        # A weight and its influence, one window's output and its relevance, as in ROWS.
        layer = f"model.layers.{l}.{name}"
        W = lab.ckpt.tensor(layer + ".weight", dtype=torch.float32)
        A, R = outputs[layer]
        matrices = (W.abs(), stats[f"{name}.lrp"].cpu(), A[0], R[0])
        for row, x in zip(ROWS, matrices):
            panels[row][name] = panel(x, side)
    return panels


def variation(x):
    """The standard deviation of the cells over their mean."""
    return (x.std() / x.mean()).item()


def measure(panels):
    """Of each panel the variation of its cells; their rank correlation with influence."""
    measured = {"variation": {}, "spearman": {}}
    for row in ROWS:
        measured["variation"][row] = {
            name: variation(each.cells) for name, each in panels[row].items()}
    for row in ("weight", "activation"):
        influence = panels[f"{row} influence"]
        measured["spearman"][row] = {}
        for name, each in panels[row].items():
            cells = influence[name].cells.flatten()
            some = cells > 0            # in the last block, of the last token's alone
            measured["spearman"][row][name] = spearman(each.cells.flatten()[some], cells[some])
    return measured


def markdown(result):
    """Both measures for the seven layers."""
    lines = []
    for row, values in result["variation"].items():
        shown = [f"{values[name]:.2f}" for name in LAYERS]
        lines.append([f"variation over cells, {row}", *shown])
    for row, values in result["spearman"].items():
        shown = [f"{values[name]:.2f}" for name in LAYERS]
        lines.append([f"rank correlation over cells, {row} and influence", *shown])
    layers = [name.split(".")[1] for name in LAYERS]
    return table([f"block {result['block']}", *layers], lines)


def mean_of(ratio, part):
    """The mean over the layers of "self_attn" or "mlp"."""
    values = [value for name, value in ratio.items() if name.startswith(part)]
    return sum(values) / len(values)


def verdicts(result):
    """The claims of Appendices A.3 and A.10."""
    spread = result["variation"]
    rho = result["spearman"]
    ratio = {name: spread["weight influence"][name] / spread["weight"][name]
             for name in LAYERS}
    least = min(ratio.values())
    most = max(ratio.values())
    attention = mean_of(ratio, "self_attn")
    mlp = mean_of(ratio, "mlp")
    made = [
        verdict(
            "Weight magnitudes are spread rather uniformly, influence is concentrated.",
            least > 1,
            f"over the cells influence varies {least:.1f} to {most:.1f} times as much "
            "as |W|.",
            "a small model's weights are less uniform. To tell: other blocks (--block)."),
        verdict(
            "The concentration is most evident in the MLP layers.",
            mlp > attention,
            f"that ratio is {mlp:.1f} on average in the MLP's layers, {attention:.1f} in "
            "attention's.",
            "on a small model few heads share attention, each a band of cells of its "
            "own. To tell: cells as wide as a head."),
    ]
    for row in ("weight", "activation"):
        apart = sum(abs(x) < 0.5 for x in rho[row].values())
        made.append(verdict(
            f"Regions of high influence often do not coincide with those of high {row} "
            "magnitude (rank correlation below 0.5 in most layers).",
            apart > len(LAYERS) / 2,
            f"below 0.5 in {apart} of {len(LAYERS)} layers.",
            "an input or output that is strong throughout makes both high in its column "
            "or row. To tell: the correlation after dividing rows and columns by their "
            "means."))
    return made


def show_panel(ax, each, across, norm):
    """One matrix on the axes `ax`; the image, for the colour bar."""
    high, width = each.shape
    shown = ax.imshow(each.cells.clamp_min(1e-9), norm=norm, cmap="cividis",
                      aspect="auto", extent=(0, width, high, 0), interpolation="nearest")
    ax.grid(False)
    ax.set_xticks([0, width])
    ax.set_yticks([0, high])
    ax.tick_params(labelsize=8)
    ax.set_xlabel(across, fontsize=9, labelpad=-8)
    return shown


def picture(plt, panels, result):
    """Four rows of seven panels, one logarithmic colour scale."""
    from matplotlib.colors import LogNorm
    fig, axes = plt.subplots(4, 7, figsize=(13, 8.4), layout="constrained")
    for line, (row, title) in zip(axes, ROWS.items()):
        # What the axes count: a weight's rows are outputs, an activation's are tokens.
        of_weight = row.startswith("weight")
        across, down = ("input n", "output m") if of_weight else ("output m", "token")
        # All panels share one scale, so that any one's image makes the colour bar.
        for ax, name in zip(line, LAYERS):
            shown = show_panel(ax, panels[row][name], across, LogNorm(0.2, 5))
            if row == "weight":
                ax.set_title(name.split(".")[1])
        line[0].set_ylabel(f"{title}\n{down}", fontsize=9)
    bar = fig.colorbar(shown, ax=axes, shrink=0.5, aspect=40, extend="both")
    bar.set_ticks([0.2, 0.5, 1, 2, 5], labels=["0.2", "0.5", "1", "2", "5"])
    bar.ax.minorticks_off()
    bar.set_label("cell, times the panel's mean (log scale)")
    side = result["cell"]
    fig.suptitle(f"Figures 6 and 8: {result['checkpoint']}, block {result['block']}, "
                 f"cells of {side} × {side}")
    return fig


def main():
    p = arguments(__doc__)
    p.add_argument("--block", type=int, help="the block (default: a third of the way up)")
    args = vars(p.parse_args())
    block = args.pop("block")
    lab = Lab("fig6", Setup(**args))
    cfg = lab.ckpt.cfg
    l = cfg.n_layers // 3 if block is None else block
    if not 0 <= l < cfg.n_layers:
        raise InputError(f"--block is {block}; expected 0 to {cfg.n_layers - 1}")
    lab.facts["calibration"]["seeds"] = lab.seeds[:1]   # a picture of one, as the paper's
    side = max(1, cfg.dim // 32)
    panels = panels_of(lab, l, side)
    result = {"block": l, "cell": side} | measure(panels)
    lab.finish(sys.modules[__name__], result,
               lambda plt, result: picture(plt, panels, result))


if __name__ == "__main__":
    run(main)
