"""What air.py says while it runs and writes at its end; `job` is air.Job throughout."""
import math
from dataclasses import asdict

import numpy
import torch

from eval_ppl import (bits_per_byte, evaluate, per_byte_line, warn_nonfinite,
                      windows_line)
from support.checkpoint import part_of
from support.config import MODELING, compressed_config
from support.large import processes
from support.script import peak_memory
from support.texts import digest


def header(job, seed):
    """The first two lines of a run."""
    versions = f"torch {torch.__version__}, numpy {numpy.__version__}"
    where = f"{job.device} ({torch.get_num_threads()} threads)"
    world = processes()[1]
    together = f", {world} processes" if world > 1 else ""
    N, T = job.windows.shape
    widest = max(n for _, n in job.shapes.values())
    blocks = f"{len(job.blocks)} of {job.ckpt.cfg.n_layers} blocks of {job.ckpt.name}"
    tokens = f"{N} x {T} = {N * T:,} tokens of {job.calib}"
    dtype = f"{str(job.dtype)[6:]} ({job.why})"
    shares = [f"{share:.2g}" for share in job.ridges.values()]
    ridge = f", ridge {' to '.join(dict.fromkeys(shares))}" if shares else ""
    share = job.options.share
    how = "" if share is None else f", anchored by {share:g}"
    how += {"auto": ", measured ranks", "mixed": ", mixed ranks"}.get(job.options.ranks, "")
    return (f"{versions}, {where}, {dtype}, seed {seed}{together}\n"
            f"{job.options.method} at rate {job.rate:g}{how}: {blocks}; {tokens} "
            f"for inputs up to {widest:,} wide{ridge}")


def layer_line(solved):
    """A line of progress: layer, shape, rank, losses over the zero matrix's, seconds."""
    m, n = solved.shape
    act, before, after, zero = solved.losses
    shown = [act] if after is None else [before, after]
    dB = [f"{10 * math.log10(max(loss, 1e-30) / zero):.2f} dB" for loss in shown if zero]
    return (f"{solved.layer:<34} {m:>5} x {n:<5} k {solved.k:<5} {' -> '.join(dB):<22} "
            f"{solved.seconds:6.2f} s")


def repair_line(layer, shift):
    """What is said of a layer's ΣXXᵀ that had no Cholesky factor."""
    return (f"{layer}: ΣXXᵀ is not positive definite; {shift:.0e} of its own diagonal was added "
            "to it")


def add(writer, parts, progress):
    """Write blocks as air.solve_block returns them, of all processes; say what was repaired."""
    for name, tensors, note in parts:
        for layer, shift in note["repairs"].items():
            progress.say(repair_line(layer, shift))
        writer.add(name, tensors, note)


def finish(job, writer, seed):
    """Add what is not decomposed and the configuration, move all into place -> report."""
    report = {"ranks": {}, "loss": {}, "repairs": {}}
    for l in range(job.ckpt.cfg.n_layers + 1):
        if part_of(l) not in writer.done:
            writer.add(part_of(l), job.ckpt.rest(l))
        for key, values in (writer.done[part_of(l)] or {}).items():
            report[key] |= values
    N, T = job.windows.shape
    signal, delta = job.options.weights()               # None: the method reads none
    section = asdict(job.options) | {
        "signal": signal,
        "delta": delta,
        "rate": job.rate,
        "ridge": {str(n): share for n, share in job.ridges.items()},
        "allocation": job.options.ranks,
        "ranks": report["ranks"],
        "source": {"path": str(job.ckpt.path), "fingerprint": job.ckpt.fingerprint()},
        "seed": seed,
        "dtype": str(job.dtype)[6:],
        "calibration": {"text": job.calib, "samples": N, "seqlen": T,
                        "sha256": digest(job.windows)},
        "versions": {"torch": torch.__version__, "numpy": numpy.__version__},
    }
    config = compressed_config(job.ckpt.raw, section)
    writer.finish(config, [*job.ckpt.extras(), MODELING])
    return report


def count(job, written):
    """Print and return the parameters of both checkpoints, counted in their files."""
    dense = job.ckpt.parameters()
    small = written.parameters()
    decomposed = sum(map(math.prod, job.shapes.values()))
    of_layers = 1 - (dense - small) / decomposed
    of_file = small / dense
    print(f"{job.options.method}: {dense:,} -> {small:,} parameters ({of_layers:.2%} of "
          f"the decomposed layers, {of_file:.2%} of the file): {job.out}")
    return {"params_dense": dense, "params_compressed": small,
            "rate_decomposed": of_layers, "rate_file": of_file}


def score(job, written, progress, watch):
    """Evaluate both checkpoints, print and return their perplexities."""
    if job.evaluation is None:
        return {"ppl_dense": None, "ppl_compressed": None, "text": None,
                "seqlen": job.windows.shape[1], "windows": 0, "windows_in_text": 0}
    windows, tokens, tokens_per_byte = job.evaluation
    N, T = windows.shape
    scores = []
    for which, ckpt in (("dense", job.ckpt), ("compressed", written)):
        progress.say(f"perplexity of the {which} model …")
        scores.append(evaluate(ckpt, windows, job.device, job.dtype))
        warn_nonfinite(scores[-1], windows)
        watch.lap(f"evaluate_{which}")
    dense, small = (each["ppl"] for each in scores)
    print(f"perplexity {dense:.3f} -> {small:.3f}   {job.text}, "
          f"{windows_line(windows, tokens)}")
    if tokens_per_byte:
        print(per_byte_line(*(bits_per_byte(each, tokens_per_byte) for each in scores)))
    return {"ppl_dense": dense, "ppl_compressed": small, "text": job.text,
            "seqlen": T, "windows": N, "windows_in_text": tokens // T}


def summary(job, results, watch):
    """What --json writes."""
    on_gpu = job.device.type == "cuda"
    signal, delta = job.options.weights()
    return {
        "method": job.options.method,
        "rate": job.rate,
        "allocation": job.options.ranks,
        "signal": signal,
        "delta": delta,
        "ridge": job.ridges,
        **results,
        "seconds": watch.seconds,
        "peak_rss_bytes": peak_memory(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
