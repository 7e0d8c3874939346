"""Which layers gain by AIR's sweep, and which lose? One layer kind at a time.

    python experiments/kinds.py                   # the demo; continues where it stopped

Every weight by SVD-LLM(W), but one kind (or two, or all but one), in all blocks, by AIR;
against SVD-LLM(W) for all. Writes experiments/results/kinds-NAME.json and .png.
"""
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_ppl import evaluate
from experiments.common import Lab, setup_of
from experiments.report import COLOURS, compare, find, percent, show, table
from model import LAYERS
from support.script import run
from support.texts import digest

RATES = (0.6,)
DELTAS = (0.5, 2.0)
KINDS = tuple(layer.split(".")[1] for layer in LAYERS)
# {row: the kinds that AIR decomposes in it}: each alone, what gains, all but what loses most.
MIXED = {kind: (kind,) for kind in KINDS} | {
    "gate_proj and up_proj": ("gate_proj", "up_proj"),
    "all but v_proj": tuple(kind for kind in KINDS if kind != "v_proj"),
}


# ------------------------------------------------------------ cells
def mixture(base, other, kinds):
    """The Checkpoint `base` with every layer of these kinds as it is in `other`."""
    mixed = copy.copy(base)
    mixed.tensors = base.tensors | {name: w for name, w in other.tensors.items()
                                    if any(f".{kind}." in name for kind in kinds)}
    return mixed


def cell(lab, rate, delta, seed):
    """{method or row: perplexity} at a seed: both models are made once, then mixed."""
    base = lab.job({"method": "svdllm", "rate": rate}, seed)
    other = lab.job({"method": "air", "rate": rate, "delta": delta}, seed)

    def compute():
        made = {"svdllm": lab.compressed(base)[0], "air": lab.compressed(other)[0]}
        made |= {row: mixture(made["svdllm"], made["air"], kinds)
                 for row, kinds in MIXED.items()}
        return {name: evaluate(small, lab.evaluation("text"), lab.device, lab.dtype)["ppl"]
                for name, small in made.items()}
    facts = {"kinds": MIXED, "base": base.key, "other": other.key,
             "text": digest(lab.evaluation("text"))}
    what = f"one kind at a time, {rate:g}, δ = {delta:g}, seed {seed}"
    return lab.cell(facts, compute, "experiments/kinds.py", what=what)


def measure(lab):
    """A row a method or mixture, rate and δ; SVD-LLM(W) knows no δ."""
    rows = []
    for rate in RATES:
        for delta in DELTAS:
            cells = [cell(lab, rate, delta, seed) for seed in lab.seeds]
            for name in cells[0]:
                ppl = {"text": [each[name] for each in cells]}
                rows.append({"method": name, "rate": rate, "delta": delta, "ppl": ppl})
    return rows


# ------------------------------------------------------------ the table
def gap(result, method, delta, rate):
    """Against SVD-LLM(W) for every weight."""
    base = find(result["rows"], method="svdllm", rate=rate)["ppl"]["text"]
    row = find(result["rows"], method=method, delta=delta, rate=rate)
    return compare(row["ppl"]["text"], base)


def markdown(result):
    base = [show(find(result["rows"], method="svdllm", rate=rate)["ppl"]["text"])
            for rate in RATES]
    lines = [["SVD-LLM(W) for all", *(each for each in base for _ in DELTAS)]]
    for method in (*MIXED, "air"):
        gaps = [percent(gap(result, method, delta, rate))
                for rate in RATES for delta in DELTAS]
        lines.append(["AIR for all" if method == "air" else f"AIR for {method}", *gaps])
    heads = [f"{rate:g}, δ = {delta:g}" for rate in RATES for delta in DELTAS]
    return table(["", *heads], lines)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def picture(plt, result):
    """A bar a row and δ, leftwards where AIR gains; a panel a rate."""
    figure, axes = plt.subplots(1, len(RATES), figsize=(7, 4.5), squeeze=False,
                                layout="constrained")
    names = [*MIXED, "air"]
    for ax, rate in zip(axes[0], RATES):
        for i, (delta, colour) in enumerate(zip(DELTAS, ("sky", "red"))):
            means, spreads, _ = zip(*(gap(result, name, delta, rate) for name in names))
            places = [y + 0.4 * i for y in range(len(names))]
            ax.barh(places, means, 0.4, xerr=[each or 0 for each in spreads],
                    color=COLOURS[colour], label=f"δ = {delta:g}")
        ax.axvline(0, color="black", linewidth=1)
        ax.set(title=f"{result['checkpoint']}, rate {rate:g}", xlabel="against SVD-LLM(W), %")
        ax.set_yticks([y + 0.2 for y in range(len(names))],
                      ["all" if name == "air" else name for name in names])
        ax.invert_yaxis()
        ax.legend()
    axes[0][0].set_ylabel("by AIR")
    return figure


def main():
    lab = Lab("kinds", setup_of(__doc__))
    lab.finish(sys.modules[__name__], {"rows": measure(lab)}, picture)


if __name__ == "__main__":
    run(main)
