"""Figures 6 and 8 of the paper: heatmaps of one block's seven layers, weights and activations, magnitude and influence.

    python experiments/fig6.py                        # the demo: block 2 of 6 (the paper: 10 of 32); --block N for another

Elements are averaged over square cells, 1/32 of the model's width on a side (the paper: 1/16 and 1/8), and divided by their mean
over the matrix, so that all panels share one colour scale. Activations are a layer's outputs over one calibration window. Writes
experiments/results/fig6-NAME.json (the measures, not the maps) and, with matplotlib, fig6-NAME.png.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from experiments.common import Lab, arguments, table, verdict
from experiments.fig2 import activations, spearman
from model import LAYERS
from support.script import InputError, run

ROWS = {"weight": "weight |W|", "weight influence": "influence of weights", "activation": "activation |A|",
        "activation influence": "influence of activations"}


def cells(x, side):
    """(rows, columns) -> means over side × side cells, over the mean of all; an incomplete last cell averages what it has."""
    x = F.avg_pool2d(x.double()[None, None], side, ceil_mode=True)[0, 0]
    return x / x.mean().clamp_min(1e-300)


def measure(maps):
    """Of each panel the coefficient of variation of its cells; of weights and activations the rank correlation with influence."""
    return {"variation": {row: {name: (x.std() / x.mean()).item() for name, x in maps[row].items()} for row in ROWS},
            "spearman": {row: {name: spearman(x.flatten(), maps[f"{row} influence"][name].flatten())
                               for name, x in maps[row].items()} for row in ("weight", "activation")}}


def markdown(result):
    """Both measures for the seven layers."""
    v, rho = result["variation"], result["spearman"]
    rows = [[f"variation over cells, {row}", *(f"{v[row][name]:.2f}" for name in LAYERS)] for row in ROWS]
    rows += [[f"rank correlation over cells, {row} and influence", *(f"{rho[row][name]:.2f}" for name in LAYERS)] for row in rho]
    return table([f"block {result['block']}", *(name.split(".")[1] for name in LAYERS)], rows)


def verdicts(result):
    """The claims of Appendices A.3 and A.10; variation is the standard deviation of the cells over their mean."""
    v, rho = result["variation"], result["spearman"]
    ratio = {name: v["weight influence"][name] / v["weight"][name] for name in LAYERS}
    attention, mlp = ([ratio[name] for name in LAYERS if name.startswith(part)] for part in ("self_attn", "mlp"))
    attention, mlp = (sum(each) / len(each) for each in (attention, mlp))
    apart = {row: sum(abs(x) < 0.5 for x in rho[row].values()) for row in ("weight", "activation")}
    return [
        verdict("Weight magnitudes are spread rather uniformly, influence is concentrated.", min(ratio.values()) > 1,
                f"over the cells influence varies {min(ratio.values()):.1f} to {max(ratio.values()):.1f} times as much as |W|.",
                "a small model's weights are less uniform. To tell: other blocks (--block)."),
        verdict("The concentration is most evident in the MLP layers.", mlp > attention,
                f"that ratio is {mlp:.1f} on average in the MLP's layers, {attention:.1f} in attention's.",
                "on a small model few heads share attention, each a band of cells of its own. To tell: cells as wide as a head."),
        *(verdict(f"Regions of high influence often do not coincide with those of high {row} magnitude (rank correlation below "
                  "0.5 in most layers).", apart[row] > len(LAYERS) / 2, f"below 0.5 in {apart[row]} of {len(LAYERS)} layers.",
                  "an input or output that is strong throughout makes both high in its column or row. To tell: the "
                  "correlation after dividing rows and columns by their means.") for row in apart)]


def picture(plt, maps, sizes, result):
    """Four rows of seven panels, one logarithmic colour scale."""
    from matplotlib.colors import LogNorm
    fig, axes = plt.subplots(4, 7, figsize=(13, 8.4), layout="constrained")
    for panels, (row, title) in zip(axes, ROWS.items()):
        across, down = ("input n", "output m") if row.startswith("weight") else ("output m", "token")
        for ax, layer in zip(panels, LAYERS):
            high, width = sizes[row][layer]
            shown = ax.imshow(maps[row][layer].clamp_min(1e-9), norm=LogNorm(0.2, 5), cmap="cividis", aspect="auto",
                              extent=(0, width, high, 0), interpolation="nearest")
            ax.grid(False)
            ax.set_xticks([0, width])
            ax.set_yticks([0, high])
            ax.tick_params(labelsize=8)
            ax.set_xlabel(across, fontsize=9, labelpad=-8)
            if row == "weight":
                ax.set_title(layer.split(".")[1])
        panels[0].set_ylabel(f"{title}\n{down}", fontsize=9)
    bar = fig.colorbar(shown, ax=axes, shrink=0.5, aspect=40, extend="both")
    bar.set_ticks([0.2, 0.5, 1, 2, 5], labels=["0.2", "0.5", "1", "2", "5"])
    bar.ax.minorticks_off()
    bar.set_label("cell, times the panel's mean (log scale)")
    side = result["cell"]
    fig.suptitle(f"Figures 6 and 8: {result['checkpoint']}, block {result['block']}, cells of {side} × {side}")
    return fig


def main():
    p = arguments(__doc__)
    p.add_argument("--block", type=int, help="the block (default: a third of the way up)")
    args = vars(p.parse_args())
    block, lab = args.pop("block"), Lab("fig6", **args)
    l = lab.ckpt.cfg.n_layers // 3 if block is None else block
    if not 0 <= l < lab.ckpt.cfg.n_layers:
        raise InputError(f"--block is {block}; expected 0 to {lab.ckpt.cfg.n_layers - 1}")
    lab.facts["calibration"]["seeds"] = lab.seeds[:1]                               # a picture of one, as in the paper
    windows, side, maps, sizes = lab.calibration(lab.seeds[0]), max(1, lab.ckpt.cfg.dim // 32), {}, {}
    stats, outputs = dict(lab.statistics(windows))[l], activations(lab.ckpt, windows[:1], lab.device, lab.dtype)
    for name in LAYERS:
        layer = f"model.layers.{l}.{name}"
        W, I = lab.ckpt.tensor(layer + ".weight", dtype=torch.float32), stats[f"{name}.lrp"].cpu()
        for row, x in zip(ROWS, (W.abs(), I, *(x[0] for x in outputs[layer]))):
            maps.setdefault(row, {})[name], sizes.setdefault(row, {})[name] = cells(x, side), tuple(x.shape)
    result = {"block": l, "cell": side} | measure(maps)
    lab.finish(sys.modules[__name__], result, lambda plt, result: picture(plt, maps, sizes, result))


if __name__ == "__main__":
    run(main)
