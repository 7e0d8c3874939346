"""What the files of enhance/ and peers/ end with: a plan, the result they write, its score."""
import math
from typing import NamedTuple

import torch

from eval_ppl import bits_per_byte, evaluate, per_byte_line, warn_nonfinite, windows_line
from support.checkpoint import Checkpoint, Writer, part_of, result_bytes, written_bytes
from support.config import MODELING, compressed_config, dense_config
from support.large import machine_rates
from support.learning import model_to_learn
from support.packed import PARTS, unpacked
from support.progress import Progress, Stopwatch
from support.script import InputError, free_bytes, peak_memory, write_json


# ------------------------------------------------------------ the plan
def weights_of(ckpt, l):
    """Numbers in block l of a checkpoint."""
    at = f"model.layers.{l}."
    return sum(math.prod(ckpt.tensors[name].shape) for name in ckpt.names
               if name.startswith(at))


def device_bytes(cfg, weights, tokens, dtype):
    """Of a block that learns beside the dense one: weights (small, whole) of a block
    each, a micro-batch of `tokens`."""
    small, whole = weights
    # Parameters, gradients, Adam's two moments, a copy; the micro-batch's graph.
    graph = 4 * tokens * (12 * cfg.dim + 6 * cfg.hidden)
    return 20 * small + whole * dtype.itemsize + graph


class Plan(NamedTuple):
    """What a run takes."""

    line: str                   # said before it begins
    need: float                 # bytes on disk, at most


def make_plan(task, flops, host, block, disk=None, less="fewer --samples take less"):
    """The Plan: `flops` in all, bytes of the `host`'s memory and of a `block` and what
    belongs to it, on the device; `disk` {what: bytes}, the result first, by default of the
    same shapes; `less`: what takes less of the host's memory. Raises InputError for what does not
    fit in memory."""
    disk = disk or {"result": result_bytes(task.ckpt, {})}
    if task.device.type == "cpu":
        host += block
        block = 0
    needs = ((torch.device("cpu"), host, less),
             (task.device, block, "--device cpu works in the host's memory"))
    for memory, need, advice in needs:
        free = free_bytes(memory)
        if free is not None and need > free:
            raise InputError(f"the run needs {need / 1e9:.1f} GB of {memory.type} memory and "
                             f"{free / 1e9:.1f} GB are free; {advice}")
    rate, _, _ = machine_rates(task.device, task.dtype)
    gpu = f", {block / 1e9:.2f} GB on the GPU" if block else ""
    kept = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in disk.items())
    line = (f"plan: about {flops / rate / 60:.1f} min, {host / 1e9:.2f} GB of memory{gpu}, "
            f"{kept} (measured: {rate / 1e9:,.0f} GFLOP/s)")
    result, *states = disk.values()
    return Plan(line, written_bytes(result, sum(states)))


# ------------------------------------------------------------ what is written
def with_packed(ckpt, l, packed, scales):
    """{name: tensor} of block l as it is written: `packed` {part of a parameter: tensor}, and
    what is not packed as it is, but for `scales` {parameter: scale}."""
    at = f"model.layers.{l}."
    rest = {name.removeprefix(at): w for name, w in ckpt.rest(l).items()}
    for name in rest.keys() & scales.keys():
        rest[name] = rest[name] * scales[name].to(rest[name])
    found = {at + name: w for name, w in rest.items() if name + PARTS[0] not in packed}
    return found | {at + name: tensor.cpu() for name, tensor in packed.items()}


def block_state(ckpt, l, tensors, packed):
    """The state dict of block l, from its file's tensors; packed: as for `finish`."""
    at = f"model.layers.{l}."
    shapes = {name: ckpt.tensors[name].shape for name in ckpt.names if name.startswith(at)}
    state = {}
    for name, (*_, columns) in shapes.items():
        if name in tensors:
            state[name.removeprefix(at)] = tensors[name]
        else:
            parts = [tensors[name + part] for part in PARTS]
            state[name.removeprefix(at)] = unpacked(parts, **packed["quantized"], columns=columns)
    return state


def dtypes_of(ckpt, l):
    """{parameter of block l: the dtype it is stored in}."""
    at = f"model.layers.{l}."
    return {name.removeprefix(at): ckpt.tensors[name].dtype for name in ckpt.names
            if name.startswith(at)}


def open_writer(task, plan, overwrite):
    """The Writer of a task's result, which keeps what is finished."""
    return Writer(task.out, plan.need, overwrite, task.facts(), keep=True)


def write_blocks(task, args, plan, blocks, line, packed=None):
    """Write, block by block, what a file of enhance/ makes, then finish.

    `blocks(finished)` yields (l, {name: tensor}, note) of each block that is not finished;
    finished(l) is the state dict of one that an earlier run finished, or None. line(note):
    what is said of a block. packed: as for `finish`.
    """
    progress = Progress(args.quiet).listen()
    watch = Stopwatch()
    L = task.ckpt.cfg.n_layers
    with open_writer(task, plan, args.overwrite) as writer:
        progress.say(task.header())
        progress.say(plan.line)
        left = [l for l in range(L) if part_of(l) not in writer.done]
        if len(left) < L:
            progress.say(f"going on: {L - len(left)} of {L} blocks are finished in "
                         f"{task.out}.partial")

        def finished(l):
            if part_of(l) not in writer.done:
                return None
            return block_state(task.ckpt, l, writer.folder.load(part_of(l)), packed)

        progress.begin(len(left))
        for l, tensors, note in blocks(finished):
            writer.add(part_of(l), tensors, note)
            progress.step(f"block {l}: {line(note)}")
        notes = [writer.done[part_of(l)] for l in range(L)]
        writer.add(part_of(L), task.ckpt.rest(L))
        finish(task, writer, packed)
    watch.lap(task.name)
    end(task, {"blocks": notes}, args, progress, watch)


def write_model(task, args, plan, train):
    """Write what a file of enhance/ makes of the whole model at once, then finish.

    train(model, folder) trains `model`, in memory, in place and yields lines to be said;
    `folder`, a TensorFolder, keeps its states. Only low-rank factors may change.
    """
    progress = Progress(args.quiet).listen()
    watch = Stopwatch()
    L = task.ckpt.cfg.n_layers
    with open_writer(task, plan, args.overwrite) as writer:
        progress.say(task.header())
        progress.say(plan.line)
        parts = [part_of(l) for l in range(L + 1)]
        # A run that was killed while it moved them into place had all of them.
        if not writer.done.keys() >= set(parts):
            model = model_to_learn(task.ckpt, task.device, task.dtype)
            for each in train(model, writer.folder):
                progress.say(each)
            state = model.state_dict()
            factors = {name: w.detach().to(task.ckpt.tensors[name].dtype).cpu()
                       for name, w in state.items()
                       if name.endswith((".U.weight", ".V.weight"))}
            for l, part in enumerate(parts):
                rest = task.ckpt.rest(l)
                writer.add(part, {name: factors.get(name, w) for name, w in rest.items()})
        # The states were for a run that goes on.
        writer.folder.forget(set(writer.folder.files) - set(parts))
        writer.done = {part: writer.done[part] for part in parts}
        finish(task, writer)
    watch.lap(task.name)
    end(task, {}, args, progress, watch)


def finish(task, writer, packed=None):
    """Add to the configuration what was done, move all into place.

    packed: {"quantized": {"bits", "group"}} of factors that were written as codes.
    """
    raw = task.ckpt.raw
    did = {"by": task.name, **task.options, "seed": task.seed,
           "dtype": str(task.dtype)[6:], "calibration": task.calibration()}
    section = {key: raw["air"][key] for key in raw["air"] if key != "quantized"}
    section["enhanced"] = [*section.get("enhanced", []), did]
    raw = compressed_config(dense_config(raw), section | (packed or {}))
    copies = task.ckpt.extras()
    if packed:                              # which transformers' classes do not unpack
        del raw["auto_map"]
    else:
        copies.append(MODELING)
    writer.finish(raw, copies)


# ------------------------------------------------------------ the end
def score(task, progress, watch):
    """Evaluate the start and what was written; print and return their perplexities."""
    if task.evaluation is None:
        return {"ppl_before": None, "ppl_after": None}
    windows, tokens, tokens_per_byte = task.evaluation
    scores = []
    for which, ckpt in (("before", task.ckpt), ("after", Checkpoint(task.out))):
        progress.say(f"perplexity {which} …")
        scores.append(evaluate(ckpt, windows, task.device, task.dtype))
        warn_nonfinite(scores[-1], windows)
        watch.lap(f"evaluate_{which}")
    before, after = (each["ppl"] for each in scores)
    print(f"perplexity {before:.3f} -> {after:.3f}   {task.text}, "
          f"{windows_line(windows, tokens)}: {task.out}")
    if tokens_per_byte:
        print(per_byte_line(*(bits_per_byte(each, tokens_per_byte) for each in scores)))
    return {"ppl_before": before, "ppl_after": after, "text": task.text,
            "seqlen": windows.shape[1], "windows": len(windows)}


def end(task, results, args, progress, watch):
    """Evaluate, say how long it took, write --json."""
    results = results | score(task, progress, watch)
    stages = ", ".join(f"{stage} {s:.1f}" for stage, s in watch.seconds.items())
    progress.say(f"{sum(watch.seconds.values()):.0f} s ({stages}), "
                 f"peak memory {peak_memory() / 1e9:.2f} GB")
    on_gpu = task.device.type == "cuda"
    write_json(args.json, results | {
        "by": task.name, **task.options, "seconds": watch.seconds,
        "peak_rss_bytes": peak_memory(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None})
