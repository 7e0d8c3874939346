"""What the files of peers/ share: arguments, and the checkpoint they write."""
from support.checkpoint import Writer, part_of
from support.config import MODELING, compressed_config
from support.progress import Progress, Stopwatch
from support.result import end, make_plan
from support.script import parser
from support.task import add_result_arguments, prepare


def arguments(doc):
    """The parser of a file in peers/."""
    return add_result_arguments(parser(doc))


def peer_task(name, args, options):
    """Arguments -> Task of a file in peers/. Raises InputError."""
    return prepare(name, args, options, folder="peers")


def peer_config(task, changes, section):
    """config.json of the dense checkpoint with `changes`, and what was done in `section`.

    No tool but this project's reads a model of another form than air.py's: there is no
    class for it in modeling_air.py.
    """
    did = {"by": task.name, **task.options, "seed": task.seed, "dtype": str(task.dtype)[6:],
           "calibration": task.calibration(),
           "source": {"path": str(task.ckpt.path), "fingerprint": task.ckpt.fingerprint()}}
    raw = compressed_config(task.ckpt.raw | changes, did | section)
    if "ranks" not in section:
        del raw["auto_map"]
    return raw


def write_peer(task, args, cost, blocks, changes=(), section=()):
    """Write what `blocks` yields, (l, {name: tensor}) of every block and, under the number
    after the last, of what belongs to none; then evaluate both.

    cost: (FLOPs, bytes of the host's memory, of the device's, on disk as make_plan has them,
    by default those of the dense model). changes: of config.json;
    section: what stands in it of the result, with the ranks of factors. Both are read once
    all blocks are there.
    """
    ranks = {}
    progress = Progress(args.quiet).listen()
    watch = Stopwatch()
    plan = make_plan(task, *cost)
    with Writer(task.out, plan.need, args.overwrite, task.facts()) as writer:
        progress.say(task.header())
        progress.say(plan.line)
        for l, tensors in blocks:
            writer.add(part_of(l), tensors)
            ranks |= {name.removesuffix(".V.weight"): len(w) for name, w in tensors.items()
                      if name.endswith(".V.weight")}
        section = dict(section) | ({"ranks": ranks} if ranks else {})
        raw = peer_config(task, dict(changes), section)
        copies = [MODELING] if "auto_map" in raw else []
        writer.finish(raw, task.ckpt.extras() + copies)
    watch.lap(task.name)
    end(task, section, args, progress, watch)
