"""Every table and figure of the paper: the command that makes it, and what came of it here.

    python experiments/contents.py                # refreshes the notebook's first table

From the JSON in experiments/results; nothing is measured.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.report import MODELS, RESULTS, refresh, table
from support.script import Parser, run

MODEL = "--ckpt FOLDER"
# {of the paper: (what it shows, script, arguments, name of its results where that is not the
# script's)}; no script: there is nothing to measure.
CONTENTS = {
    "Table 1": ("methods and their features, in words", None, ""),
    "Table 2": ("perplexity by method and rate", "table2", ""),
    "Table 3": ("other models at 0.6", "closed", MODEL),
    "Table 4": ("structured pruning at matched bytes", "table4", ""),
    "Table 5": ("with LoRA, beside ACIP", "table5", ""),
    "Table 6": ("quantized factors", "table6", ""),
    "Table 7": ("what fills the influence matrix", "table7", ""),
    "Table 8": ("order and number of sweeps", "table8", ""),
    "Table 9": ("rate, memory and latency", "table9", ""),
    "Table 10": ("kinds of influence, in words; Table 7 measures them", None, ""),
    "Table 11": ("the forward pass, switch by switch", "table11", ""),
    "Table 12": ("Table 2 with divergence (`table2`) and six reasoning tasks", "reasoning",
                 "--ckpt DENSE RESULT … --data DIR"),
    "Table 13": ("reasoning after LoRA: the same on results of enhance/lora.py", "reasoning",
                 "--ckpt DENSE RESULT … --data DIR --json …/reasoning-lora-NAME.json",
                 "reasoning-lora"),
    "Table 14": ("retraining, with and without LoRA; beside Table 5", "table5", ""),
    "Figure 1": ("the losses along one sweep", "fig1", ""),
    "Figure 2": ("magnitude against influence", "fig2", ""),
    "Figure 3": ("influence weighting strength δ", "fig3", ""),
    "Figure 4": ("memory and latency by batch and length", "fig4", ""),
    "Figure 5": ("calibration windows", "fig5", ""),
    "Figure 6": ("where influence lies", "fig6", ""),
    "Figure 7": ("Figure 4 in absolute numbers", "fig4", ""),
    "Figure 8": ("Figure 6 for all kinds of layers", "fig6", ""),
    "A.6": ("C4-calibrated, here another text", "a6", ""),
    "A.9": ("samples of text", "samples", ""),
}
# {of the paper: (a word, is it in the claims that are its own?)}, of two that share a script.
OWN = {"Table 5": ("retraining", False), "Table 14": ("retraining", True)}
# What needs what was not at hand, and the command that would make it.
ELSEWHERE = {
    "LLaMA-7B itself, all tables":
        "python experiments/NAME.py --ckpt llama7b.safetensors --windows 0",
    "LLaMA-30B (Table 3)": "python air.py --ckpt llama30b --rate 0.6 --spill DIR --stats DIR",
    "Tables 9 and 11, Figures 4 and 7 on an A100":
        "python experiments/table11.py --shape llama-7b (and table9.py, fig4.py)",
}


def outcome(results, stem, model, own=None):
    """'3 of 5 hold', 'measured', or '–' for a script's results on a model; own: as OWN has it."""
    paths = sorted(results.glob(f"{stem}-{model}*.json"))
    paths = [path for path in paths if model != "demo" or "demo-muon" not in path.name]
    if stem is None or not paths:
        return "–"
    found = json.loads(paths[0].read_text("utf-8"))
    verdicts = found.get("verdicts", ()) if isinstance(found, dict) else ()
    known = [v["holds"] for v in verdicts if v["holds"] is not None
             and (own is None or (own[0] in v["claim"]) == own[1])]
    return f"{sum(known)} of {len(known)} hold" if known else "measured"


def contents(results):
    """The table, a row an item of the paper."""
    lines = []
    for item, (what, script, arguments, *named) in CONTENTS.items():
        stem = named[0] if named else script
        command = f"`python experiments/{script}.py {arguments}`".replace(" `", "`")
        lines.append([item, what, command if script else "–",
                      *(outcome(results, stem, model, OWN.get(item)) for model in MODELS)])
    for what, elsewhere in ELSEWHERE.items():
        lines.append([what, "not at hand here", f"`{elsewhere}`", *["–"] * len(MODELS)])
    return table(["of the paper", "shows", "command", *MODELS.values()], lines,
                 left=3 + len(MODELS))


def main():
    p = Parser(__doc__)
    p.parse_args()
    text = contents(RESULTS)
    refresh("contents", text)
    print(text)


if __name__ == "__main__":
    run(main)
