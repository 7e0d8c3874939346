"""Appendix A.6 of the paper: another text for calibration (there C4 for WikiText-2),
SVD-LLM(W) and AIR at rate 0.6.

    python experiments/a6.py                  # the demo: torch.nn's source for stdlib's

Both texts calibrate and both evaluate, so that the change of text is seen from both
sides; only held-out files are evaluated. Writes experiments/results/a6-NAME.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, Setup, arguments
from experiments.report import (NAMED, against, every, find, percent, show, table,
                                verdict)
from support.script import run

CALIBRATED = "the text each row names"
RATE = 0.6
TEXTS = ("text", "text2")
# method: (name, the paper's WikiText-2 perplexity, calibrated on WikiText-2 and on C4)
ROWS = {"svdllm": ("SVD-LLM(W)", (13.81, 34.17)), "air": ("AIR", (11.27, 19.47))}


def markdown(result):
    """A row a calibration text and method."""
    lines = []
    for i, calib in enumerate(result["calibs"]):
        theirs = ("WikiText-2", "C4")[i]
        for method, (name, paper) in ROWS.items():
            row = find(result["rows"], calib=calib, method=method)
            ours = [show(row["ppl"][which]) for which in TEXTS]
            lines.append([Path(calib).name, name, *ours, f"{paper[i]} ({theirs})"])
    ours = [f"perplexity, {result['texts'][which]['name']}" for which in TEXTS]
    head = ["calibrated on", "method", *ours, "paper (calibrated on)"]
    return table(head, lines, left=2)


def below(result, which):
    """AIR is below SVD-LLM(W) on a text when both are calibrated on the second."""
    names = [Path(calib).name for calib in result["calibs"]]
    gaps = against(result["rows"], "calib", result["calibs"],
                   {"method": "air"}, {"method": "svdllm"}, ("ppl", which))
    said = [f"calibrated on {name}: {percent(gap)}" for name, gap in zip(names, gaps)]
    return verdict(
        f"AIR is below SVD-LLM(W) also when calibrated on the second text "
        f"(perplexity on the {NAMED[which]}).",
        every(gaps[1:], "lower"),
        f"AIR against SVD-LLM(W), {'; '.join(said)}.",
        "influence of one text need not be that of the other, or AIR gains little on "
        "this text at all. To tell: AIR with ΣXXᵀ of one text and influence of the "
        "other.")


def verdicts(result):
    """The claim of Appendix A.6, on the paper's text, the first, and on the other."""
    return [below(result, which) for which in TEXTS]


def main():
    p = arguments(__doc__)
    p.add_argument("--calib2", help="the second calibration text (default: the second text, "
                   "of which a file is not split in two)")
    args = vars(p.parse_args())
    second = args.pop("calib2")
    lab = Lab("a6", Setup(**args))
    for which in TEXTS:
        lab.evaluation(which)                           # refuses a missing second text
    calibs = (lab.calib, second or lab.texts["text2"])
    settings = [{"method": method, "rate": RATE, "calib": calib}
                for calib in calibs for method in ROWS]
    result = {"calibs": calibs, "rows": lab.measure(settings, TEXTS)}
    lab.finish(sys.modules[__name__], result)


if __name__ == "__main__":
    run(main)
