"""Which layers gain by AIR's sweep, and which lose? One layer kind at a time.

    python experiments/kinds.py                   # the demo; continues where it stopped

Every weight by SVD-LLM(W), but one kind, in all blocks, by AIR; against SVD-LLM(W) for
all. Writes experiments/results/kinds-NAME.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from air import METHODS, Method, air, normalise, svdllm
from experiments.common import Lab, setup_of
from experiments.report import compare, find, percent, show, table
from model import LAYERS
from support.script import run

RATES = (0.6,)
DELTAS = (0.5, 2.0)
KINDS = tuple(layer.split(".")[1] for layer in LAYERS)


def one_kind(kind):
    """The Method: AIR where a layer is of this kind, SVD-LLM(W) elsewhere."""
    def factors(x, o):
        if not x.name.endswith(kind):
            return svdllm(x.W, x.S, x.k)
        return air(x.W, x.S, normalise(x.influence("lrp")), x.k, o.delta)[:2]
    return Method(factors, "influence")


METHODS.update({kind: one_kind(kind) for kind in KINDS})


def gap(result, method, delta, rate):
    """Against SVD-LLM(W) for every weight."""
    base = find(result["rows"], method="svdllm", rate=rate)["ppl"]["text"]
    row = find(result["rows"], method=method, delta=delta, rate=rate)
    return compare(row["ppl"]["text"], base)


def markdown(result):
    base = [show(find(result["rows"], method="svdllm", rate=rate)["ppl"]["text"])
            for rate in RATES]
    lines = [["SVD-LLM(W) for all", *(each for each in base for _ in DELTAS)]]
    for method in (*KINDS, "air"):
        gaps = [percent(gap(result, method, delta, rate))
                for rate in RATES for delta in DELTAS]
        lines.append(["AIR for all" if method == "air" else f"AIR for {method}", *gaps])
    heads = [f"{rate:g}, δ = {delta:g}" for rate in RATES for delta in DELTAS]
    return table(["", *heads], lines)


def verdicts(result):
    """None: these are no claims of the paper."""
    return []


def main():
    lab = Lab("kinds", setup_of(__doc__))
    settings = [{"method": "svdllm", "rate": rate} for rate in RATES]
    settings += [{"method": method, "rate": rate, "delta": delta}
                 for rate in RATES for delta in DELTAS for method in (*KINDS, "air")]
    lab.finish(sys.modules[__name__], {"rows": lab.measure(settings)})


if __name__ == "__main__":
    run(main)
