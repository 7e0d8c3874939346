"""How closely this repository agrees with the authors' released code and with transformers.

    python experiments/agreement.py ../shared/oracles/official_a

The folder holds a small checkpoint and official.npz, the numbers of the authors' code for
it; the golden logits of the transformers package are in tests/golden. Writes
experiments/results/agreement.json: the largest distance over all layers, relative in
Frobenius norm, of logits absolute.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import distance, write_checkpoint
from model import LAYERS, READS
from support.checkpoint import Checkpoint
from support.script import ROOT, InputError, Parser, run, write_json

RUNS = {        # name in official.npz, or here alone: options of air.py
    "air_unit": (),
    "air_max100": ("--scale", "max100"),
    "svd_llm_w": ("--method", "svdllm"),
    "wxg": ("--signal", "wxg"),
    "fisher": ("--signal", "fisher"),
}
SIGNALS = {"lrp": "lrp", "wxg": "weightxgrad", "fisher": "fisher"}      # here: there


def compress(folder, windows, out):
    """Every run, from the authors' windows, and the statistics of all of them, in `out`."""
    np.save(f"{out}/w.npy", windows)
    for name, options in RUNS.items():
        command = [sys.executable, ROOT / "air.py", "--ckpt", folder,
                   "--calib", f"{out}/w.npy", "--text", "none", *options, "--ridge", "0",
                   "--stats", f"{out}/stats", "--out", f"{out}/{name}",
                   "--quiet", "--device", "cpu"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def layer_distances(out, numbers, blocks):
    """Yield (what, distance) for every layer: its statistics and its reconstructions."""
    weights = {name: load_file(f"{out}/{name}/model.safetensors")
               for name in ("svd_llm_w", "air_unit", "air_max100")}
    for l in range(blocks):
        stats = {}
        for kind in ("gram", *SIGNALS):
            stats |= load_file(f"{out}/stats/block_{l:03}.{kind}.safetensors")
        for name in LAYERS:
            layer = f"model.layers.{l}.{name}"
            yield "gram", distance(stats[f"{READS[name]}.gram"], numbers[f"gram/{layer}"])
            for ours, theirs in SIGNALS.items():
                influence = numbers[f"{theirs}/{layer}"]
                yield ours, distance(stats[f"{name}.{ours}"], influence)
            for name_of_run, w in weights.items():
                product = w[layer + ".U.weight"] @ w[layer + ".V.weight"]
                yield name_of_run, distance(product, numbers[f"{name_of_run}/{layer}"])


def golden_distances(out):
    """Yield (what, distance) of the logits of every golden model."""
    for path in sorted((ROOT / "tests" / "golden").glob("*.npz")):
        golden = np.load(path)
        config = json.loads(str(golden["config"]))
        ckpt = Checkpoint(write_checkpoint(Path(out) / path.stem, config))
        logits = ckpt.model()(torch.from_numpy(golden["ids"].astype(np.int64)))
        yield f"golden {path.stem}", np.abs(logits.numpy() - golden["logits"]).max()


def distances(folder):
    """Yield (what, distance) of all that is compared."""
    numbers = np.load(folder / "official.npz")
    ckpt = Checkpoint(folder)
    with tempfile.TemporaryDirectory() as out:
        compress(folder, numbers["windows"], out)
        yield from layer_distances(out, numbers, ckpt.cfg.n_layers)
        logits = ckpt.model()(torch.from_numpy(numbers["windows"][:1]).long())[0]
        yield "logits", np.abs(logits.numpy() - numbers["logits_window0"]).max()
        yield from golden_distances(out)


def main():
    p = Parser(__doc__)
    p.add_argument("folder", metavar="FOLDER", type=Path)
    folder = p.parse_args().folder
    if not (folder / "official.npz").is_file():
        raise InputError(f"{folder} has no official.npz; expected a folder with a checkpoint and "
                         "the authors' numbers for it, which are not part of this repository")
    worst = {}
    for what, value in distances(folder):
        worst[what] = max(worst.get(what, 0.0), float(value))
    write_json(ROOT / "experiments" / "results" / "agreement.json", worst)
    for what, value in worst.items():
        print(f"{what:<36} {value:.1e}")


if __name__ == "__main__":
    run(main)
