"""Appendix A.6 of the paper: another text for calibration (there C4 for WikiText-2), SVD-LLM(W) and AIR at rate 0.6.

    python experiments/a6.py                          # the demo: torch.nn's source for the standard library's

Both texts calibrate and both evaluate, so that the change of text is seen from both sides; only held-out files are evaluated.
Writes experiments/results/a6-NAME.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, against, arguments, every, find, percent, show, table, verdict
from support.script import run

CALIBRATED = "the text each row names"
RATE, PAPER = 0.6, {"svdllm": (13.81, 34.17), "air": (11.27, 19.47)}


def markdown(result):
    """A row a calibration text and method. The paper's column is WikiText-2 perplexity, calibrated on WikiText-2 and on C4."""
    rows = []
    for i, (calib, theirs) in enumerate(zip(result["calibs"], ("WikiText-2", "C4"))):
        for method, name in (("svdllm", "SVD-LLM(W)"), ("air", "AIR")):
            row = find(result["rows"], calib=calib, method=method)
            ours = [show(row["ppl"][t]) for t in ("text", "text2")]
            rows.append([Path(calib).name, name, *ours, f"{PAPER[method][i]} ({theirs})"])
    ours = [f"perplexity, {result['texts'][t]['name']}" for t in ("text", "text2")]
    return table(["calibrated on", "method", *ours, "paper (calibrated on)"], rows, left=2)


def verdicts(result):
    """The claim of Appendix A.6, on the first text as in the paper, and its counterpart on the second."""
    made, names = [], [Path(calib).name for calib in result["calibs"]]
    for text in ("text", "text2"):
        gaps = against(result["rows"], "calib", result["calibs"], {"method": "air"}, {"method": "svdllm"}, text=text)
        made.append(verdict(
            f"AIR is below SVD-LLM(W) also when calibrated on {names[1]} (perplexity on {result['texts'][text]['name']}).",
            every(gaps[1:], "lower"),
            "AIR against SVD-LLM(W), "
            + "; ".join(f"calibrated on {name}: {percent(gap)}" for name, gap in zip(names, gaps)) + ".",
            "influence of one text need not be that of the other, or AIR gains little on this text at all. To tell: AIR with "
            "ΣXXᵀ of one text and influence of the other."))
    return made


def main():
    lab = Lab("a6", **vars(arguments(__doc__).parse_args()))
    lab.evaluation("text"), lab.evaluation("text2")                                # refuses a missing second text
    calibs = (lab.calib, lab.texts["text2"])
    settings = [{"method": method, "rate": RATE, "calib": calib} for calib in calibs for method in ("svdllm", "air")]
    lab.finish(sys.modules[__name__], {"calibs": calibs, "rows": lab.measure(settings, ("text", "text2"))})


if __name__ == "__main__":
    run(main)
