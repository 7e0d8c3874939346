"""Does AIR's advantage come with training? AIR against SVD-LLM(W) along one run.

    python experiments/training.py RUN            # demo/train.py --out RUN --keep 2e6,4e6

Every folder RUN/…M that `--keep` made, and RUN itself, its best checkpoint. Writes
experiments/results/training-NAME.json and .png.
"""
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, Setup, arguments
from experiments.report import (compare, drawn, find, number, percent, show, table)
from support.script import InputError, run

RATES = (0.8, 0.6, 0.4)
FORMS = {
    "SVD-LLM(W)": {"method": "svdllm"},
    "AIR, δ = 2": {"method": "air", "delta": 2.0},
    "AIR, δ = 0.5": {"method": "air", "delta": 0.5},
}


def checkpoints(folder):
    """{name: path}, by tokens; the best one last."""
    named = [path for path in folder.glob("*M")
             if re.fullmatch(r"\d+(\.\d+)?M", path.name)]
    kept = sorted(named, key=lambda path: float(path.name[:-1]))
    if not kept:
        raise InputError(f"{folder} holds no checkpoint such as 2M; expected the --out of "
                         "demo/train.py with --keep 2e6,4e6")
    return {path.name: path for path in kept} | {"best": folder}


def measured(setup, path):
    """(perplexity, rows) of one checkpoint; the lab that measured them."""
    lab = Lab("training", replace(setup, ckpt=str(path)))
    settings = [form | {"rate": rate, "variant": name}
                for name, form in FORMS.items() for rate in RATES]
    return {"dense": lab.dense("text"), "rows": lab.measure(settings)}, lab


def ppl(of, name, rate):
    return find(of["rows"], variant=name, rate=rate)["ppl"]["text"]


def gap(of, name, rate):
    return compare(ppl(of, name, rate), ppl(of, "SVD-LLM(W)", rate))


def markdown(result):
    lines = []
    for tokens, of in result["checkpoints"].items():
        line = [tokens, number(of["dense"])]
        for rate in RATES:
            line.append(show(ppl(of, "SVD-LLM(W)", rate)))
            line += [percent(gap(of, name, rate)) for name in FORMS if "AIR" in name]
        lines.append(line)
    heads = [head for rate in RATES
             for head in (f"SVD-LLM(W) {rate:g}", "AIR δ = 2", "AIR δ = 0.5")]
    return table(["tokens", "dense", *heads], lines)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def picture(plt, result):
    """The gap at every checkpoint, a curve a rate, a panel a δ."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    names = list(result["checkpoints"])
    for ax, name in zip(axes, [name for name in FORMS if "AIR" in name]):
        for rate, colour in zip(RATES, ("blue", "red", "green")):
            points = [gap(of, name, rate)[:2] for of in result["checkpoints"].values()]
            drawn(ax, range(len(names)), points, colour, marker="o", label=f"rate {rate:g}")
        ax.axhline(0, color="black", linewidth=1)
        ax.set(xticks=range(len(names)), xticklabels=names, xlabel="training tokens",
               title=name)
    axes[0].set_ylabel("against SVD-LLM(W), %")
    axes[0].legend()
    figure.tight_layout()
    return figure


def main():
    p = arguments(__doc__)
    p.add_argument("run", metavar="RUN", help="the --out of demo/train.py")
    args = vars(p.parse_args())
    folder = Path(args.pop("run"))
    setup = Setup(**args)
    found = {}
    for name, path in checkpoints(folder).items():
        found[name], lab = measured(setup, path)
    # The last lab is the run's own: its facts are all labs', but for the fingerprint.
    lab.finish(sys.modules[__name__], {"checkpoints": found}, picture)


if __name__ == "__main__":
    run(main)
