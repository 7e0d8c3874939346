"""Tables 5 and 14 of the paper, and block refinement: what is stacked on a closed form.

    python experiments/table5.py                  # the demo; continues where it stopped

SVD-LLM(W), AIR and closed forms beyond it alone, with LoRA, with retraining, with both, with
block refinement. All learn from the calibration windows alone. Writes
experiments/results/table5-NAME.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from enhance.refine import ERRORS
from experiments.closed import SHARE
from experiments.common import Lab, Setup, arguments
from experiments.report import compare, every, listed, rates_of, show, table, verdict
from experiments.stack import RECIPES, measure, measure_acip
from support.script import run

RATES = (0.8, 0.6, 0.4, 0.2)
FORMS = {
    "SVD-LLM(W)": {"method": "svdllm"},
    "AIR": {"method": "air"},
    "two-sided, measured ranks": {"method": "kfac", "ranks": "auto", "ridge": None},
    "two-sided, anchored, measured ranks": {
        "method": "kfac", "ranks": "auto", "ridge": None, "anchor": SHARE},
    "two-sided, mixed ranks": {"method": "kfac", "ranks": "mixed", "ridge": None},
    "two-sided, anchored, mixed ranks": {
        "method": "kfac", "ranks": "mixed", "ridge": None, "anchor": SHARE},
}
OURS = tuple(FORMS)[2:]
STACKS = {
    "alone": [],
    "+ refinement": [("refine", {})],
    "+ LoRA": [("lora", {})],
    "+ retraining": [("retrain", {})],
    "+ retraining, LoRA": [("retrain", {}), ("lora", {})],
}
# What is stacked on each form: on the paper's two everything, on ours what is strongest.
STACKED = dict.fromkeys(FORMS, tuple(STACKS)) | dict.fromkeys(OURS, ("alone", "+ refinement"))
# {(form, stack): LLaMA-7B's WikiText-2 perplexity at the rates}, Tables 2, 5 and 14. There
# LoRA learns from Alpaca, retraining from the calibration windows.
PAPER = {
    ("SVD-LLM(W)", "alone"): "7.87, 13.81, 63.83, 854",
    ("SVD-LLM(W)", "+ LoRA"): "7.31, 9.41, 16.82, 114",
    ("SVD-LLM(W)", "+ retraining"): "–, –, 13.59, 98.9",
    ("SVD-LLM(W)", "+ retraining, LoRA"): "–, –, 13.22, 94.76",
    ("ACIP", "its adapters"): "8.64, 12.57, 25, 3378",
    ("AIR", "alone"): "7.51, 11.27, 42.52, 472",
    ("AIR", "+ LoRA"): "7.24, 9.09, 14.49, 46.86",
    ("AIR", "+ retraining"): "–, –, 12.77, 47.4",
    ("AIR", "+ retraining, LoRA"): "–, –, 12.25, 38.35",
}


def ppl(result, form, stack, rate):
    """One figure a seed; None where it was not measured."""
    for row in result["rows"]:
        if (row["form"], row["stack"], row["rate"]) == (form, stack, rate):
            return row["ppl"]["text"]
    return [None]


def markdown(result):
    """A row a form and what is stacked on it, where it was measured, here or in the paper."""
    rates = rates_of(result)
    lines = [["dense", "", f"{result['dense']:.2f}", *[""] * len(rates)]]
    for form in FORMS:
        for stack in STACKED[form]:
            cells = [show(ppl(result, form, stack, rate)) for rate in rates]
            paper = PAPER.get((form, stack), "–")
            if {*cells, paper} != {"–"}:
                lines.append([form, stack, *cells, paper])
    # Below the share at which its masks stop, ACIP's scores say nothing.
    cells = [show(ppl(result, "ACIP", "its adapters", rate)) for rate in rates]
    lines.append(["ACIP", "its adapters", *cells, PAPER["ACIP", "its adapters"]])
    heads = [f"{rate:g}" for rate in rates]
    found = table(["", "", *heads, "paper: LLaMA-7B"], lines, left=2)
    return f"{found}\n\nLearnt with {learnt(result)}."


def learnt(result):
    """The options of what is stacked; few windows want other ones than the files' defaults,
    which are their sources'."""
    return "; ".join(f"{name}: " + ", ".join(f"{key} {value}" for key, value in options.items())
                     for name, options in result["recipes"].items())


def below(result, stack):
    """AIR against SVD-LLM(W), both with `stack`."""
    rates = rates_of(result)
    gaps = [compare(ppl(result, "AIR", stack, rate), ppl(result, "SVD-LLM(W)", stack, rate))
            for rate in rates]
    return verdict(f"AIR {stack} is below SVD-LLM(W) {stack} at every rate.",
                   every(gaps, "lower"), f"AIR against SVD-LLM(W), {listed(rates, gaps)}.",
                   "what is learnt makes up for much of what a closed form lost, on both "
                   "sides. To tell: more windows.")


def verdicts(result):
    return [below(result, stack) for stack in STACKS if "LoRA" in stack or "retr" in stack]


def main():
    p = arguments(__doc__, RATES)
    p.add_argument("--error", choices=ERRORS, default="squared", help="that refinement "
                   "minimises (default AA-SVD's; relative for a model with massive activations)")
    args = vars(p.parse_args())
    rates = args.pop("rates")
    error = {"error": args.pop("error")}
    stacks = STACKS | {"+ refinement": [("refine", error)]}
    lab = Lab("table5", Setup(**args))
    rows = []
    for name, form in FORMS.items():
        settings = [form | {"rate": rate, "form": name} for rate in rates]
        rows += measure(lab, settings, {stack: stacks[stack] for stack in STACKED[name]})
    rows += measure_acip(lab, rates)
    recipes = {name: RECIPES[name] for name in ("refine", "lora", "retrain", "acip")}
    recipes["refine"] = recipes["refine"] | error
    found = {"dense": lab.dense("text"), "recipes": recipes, "rows": rows}
    lab.finish(sys.modules[__name__], found)


if __name__ == "__main__":
    run(main)
