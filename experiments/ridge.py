"""Not in the paper: few calibration tokens, and the ridge, a share of ΣXXᵀ's own
diagonal that is added to it (`--ridge`): perplexity at 0.5 to 64 tokens an input.

    python experiments/ridge.py                   # the demo; continues where it stopped
    python experiments/ridge.py --ckpt data/smollm2 --calib odd.raw --text even.raw

Chooses air.py's default. Writes experiments/results/ridge-NAME.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, setup_of
from experiments.report import find, show, table
from support.script import run

TOKENS = (0.5, 1, 4, 16, 64)            # calibration tokens for each of the widest inputs
RIDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, None)        # None: air.py's default
METHODS = {"svdllm": "SVD-LLM(W)", "air": "AIR"}
RATE = 0.6
CALIBRATED = "as many windows as a row says"


def widest(lab):
    return max(lab.ckpt.cfg.dim, lab.ckpt.cfg.hidden)


def samples_at(lab, tokens):
    """Windows that hold about `tokens` for each input of the widest layer."""
    return max(1, round(tokens * widest(lab) / lab.seqlen))


def held(result, tokens):
    """Tokens an input that whole windows hold of the `tokens` asked for."""
    samples = find(result["rows"], tokens=tokens)["samples"]
    return f"{samples * result['calibration']['seqlen'] / result['widest']:.2g}"


def cell(rows, **wanted):
    """A perplexity as it is shown; '–' where it was not measured."""
    try:
        return show(find(rows, **wanted)["ppl"]["text"])
    except StopIteration:
        return "–"


def markdown(result):
    """Perplexity, a row for each number of tokens an input, a column for each ridge."""
    lines = []
    for method, name in METHODS.items():
        for tokens in TOKENS:
            shown = [cell(result["rows"], method=method, tokens=tokens, ridge=ridge)
                     for ridge in RIDGES]
            lines.append([name, held(result, tokens), *shown])
    heads = ["0, the paper's" if ridge == 0 else f"{ridge:g}" for ridge in RIDGES[:-1]]
    return table(["", "tokens an input", *heads, "default"], lines)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def main():
    lab = Lab("ridge", setup_of(__doc__))
    settings = [{"method": method, "rate": RATE, "tokens": tokens, "ridge": ridge,
                 "samples": samples_at(lab, tokens)}
                for tokens in TOKENS for ridge in RIDGES for method in METHODS]
    found = {"widest": widest(lab), "rows": lab.measure(settings)}
    lab.finish(sys.modules[__name__], found)


if __name__ == "__main__":
    run(main)
