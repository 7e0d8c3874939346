"""What a run says while it goes on: lines that stay, and where its loops are."""
import math
import os
import shutil
import sys
import time

# Seconds between two signs of life: on a terminal one line is rewritten in place; a log
# gets a line only when nothing else was said for as long.
ON_TERMINAL = 0.2
IN_LOG = 30
# Slower than predicted by more than this, after more seconds than that, is said. Small
# layers are up to three times slower than their FLOP and byte counts say.
MUCH_SLOWER = 8
AT_LEAST = 10
ENOUGH_STEPS = 3


def duration(seconds):
    """'412 s', '34 min' or '7.3 h'."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def told(name, steps):
    """The items of a sequence, which the running Progress shows as they are done.

    A range of starts counts what lies between them. Loops nest: the outermost is named
    first, "forward sweep: block" before "windows". Where nothing listens, nothing happens.
    """
    progress = Progress.running
    if progress is None:
        yield from steps
        return
    loop = progress.enter(Loop(name, steps))
    try:
        for step in steps:
            yield step
            progress.tick(loop)
    finally:
        progress.leave(loop)


def say(line):
    """A line that stays, by the running Progress; nothing where none listens."""
    if Progress.running:
        Progress.running.say(line)


class Loop:
    """A loop that goes on: how much of it is done, in how many seconds."""

    def __init__(self, name, steps):
        self.name = name
        self.size = 1                   # of a step
        self.total = len(steps)
        if isinstance(steps, range):
            self.size = steps.step
            self.total = steps.stop - steps.start
        self.done = 0
        self.inside = 0.0               # how much of the current step is done, 0 … 1
        self.seconds = 0.0              # spent in it, but not in what reads its results
        self.innermost = True

    @property
    def share(self):
        """How much is done, 0 … 1."""
        return min(1.0, (self.done + self.size * self.inside) / max(1, self.total))

    def left(self):
        """The seconds that it still takes; 0 before anything is known."""
        return self.seconds * (1 - self.share) / self.share if self.share else 0.0

    def place(self):
        """The step it is in; of the innermost loop, what is done."""
        count = self.done if self.innermost else min(self.total, self.done + self.size)
        return f"{self.name} {count:,} of {self.total:,}"


class Progress:
    """Lines on stderr while a run goes on, from the first process only.

    None when `quiet`. The one that listens also shows the loops of `told`.
    """

    running = None                      # the one that listens

    def __init__(self, quiet=False):
        # A RANK that a finished torchrun left behind counts as little as none.
        alone = os.environ.get("WORLD_SIZE", "") in ("", "1")
        self.first = alone or os.environ.get("RANK", "0") == "0"
        self.silent = quiet or not self.first
        self.terminal = sys.stderr.isatty()
        self.spoke = time.time()
        self.shown = False              # whether a line stands that is to be rewritten
        self.loops = []                 # those that go on, the outermost first
        self.looped = 0.0               # seconds spent in loops
        self.expected = {}              # {stage: seconds it should take}

    def listen(self):
        """From now on loops are shown by this one; returns it."""
        Progress.running = None if self.silent else self
        return self

    # -------------------------------------------------------- lines that stay
    def say(self, line):
        if not self.silent:
            self.erase()
            print(line, file=sys.stderr, flush=True)
            self.spoke = time.time()

    def warn(self, line):
        """A line that comes when `quiet`, too; none for ''."""
        if self.first and line:
            self.erase()
            print(line, file=sys.stderr, flush=True)

    def begin(self, total, expected=None):
        """From now on `total` steps are to be done, in stages of `expected` seconds."""
        self.total = total
        self.done = 0
        self.began = time.time()
        self.looped = 0.0
        self.expected = (expected or {}) if total else {}

    def step(self, line, steps=1):
        """`line` with the time left, now that `steps` more are done."""
        self.done += steps
        # A loop whose results the steps read goes on, and knows what it still takes.
        worked = time.time() - self.began - self.looped
        left = worked / self.done * max(0, self.total - self.done)
        left += sum(loop.left() for loop in self.loops[:1])
        self.say(f"{line}  {duration(left):>7} left")
        # One slow layer among many is not yet a slow run.
        if self.done >= min(self.total, ENOUGH_STEPS):
            self.compare("solve", worked, self.done / self.total)
        if self.done >= self.total:
            self.expected = {}

    def compare(self, stage, seconds, share):
        """Say, once, that `share` of a stage took far longer than was expected."""
        expected = (self.expected.get(stage) or math.inf) * share
        if seconds > max(AT_LEAST, MUCH_SLOWER * expected):
            self.expected = {}
            self.say(f"the {stage} takes {seconds / expected:.0f} x as long as this "
                     "machine's rates predict; threads that wait for each other or for "
                     "other work do that: try OMP_NUM_THREADS=1, or fewer than now")

    # -------------------------------------------------------- loops
    def enter(self, loop):
        for outer in self.loops:
            outer.innermost = False
        self.loops.append(loop)
        self.mark = time.time()
        return loop

    def tick(self, loop):
        """One more step of `loop` is done."""
        now = time.time()
        # What passed between two steps of an outer loop is others' time.
        if loop.innermost:
            self.looped += now - self.mark
            for each in self.loops:
                each.seconds += now - self.mark
        self.mark = now
        loop.done = min(loop.total, loop.done + loop.size)
        loop.inside = 0.0
        at = self.loops.index(loop)
        for i in range(at, 0, -1):
            self.loops[i - 1].inside = self.loops[i].share
        outermost = self.loops[0]
        self.compare(outermost.name.split(":")[0], outermost.seconds, outermost.share)
        if loop.innermost and now - self.spoke >= (ON_TERMINAL if self.terminal else IN_LOG):
            self.show()

    def leave(self, loop):
        """`loop` has ended, and with it those inside."""
        if loop in self.loops:
            del self.loops[self.loops.index(loop):]
        self.erase()

    def show(self):
        """The line of the loops that go on."""
        left = self.loops[0].left()
        line = ", ".join(loop.place() for loop in self.loops) + f", {duration(left)} left"
        self.spoke = time.time()
        if self.terminal:
            columns = shutil.get_terminal_size().columns
            print(f"\r\033[K{line[:columns - 1]}", end="", file=sys.stderr, flush=True)
            self.shown = True
        else:
            print(line, file=sys.stderr, flush=True)

    def erase(self):
        """Take away a line that was to be rewritten, before another is printed."""
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self.shown = False


class Stopwatch:
    """Seconds a stage: lap(stage) counts the time since the last lap for it."""

    def __init__(self):
        self.seconds = {}
        self.mark = time.time()

    def lap(self, stage):
        now = time.time()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.mark
        self.mark = now
