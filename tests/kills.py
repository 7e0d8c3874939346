"""Kill the demo run with SIGKILL at 20 random moments; every rerun must end in an undisturbed run's file, bit by bit.

python tests/kills.py [MOMENTS]         # about eight minutes on 2 cores; a short version is in test_large.py
"""
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_large import finish, killed_and_run_again     # noqa: E402


def main():
    moments, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 20, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        tmp, begin = Path(folder), time.time()
        arguments = ("--text", "none", "--device", "cpu", "--stats", tmp / "stats", "--spill", tmp / "spill")
        code, _, err = finish(*arguments[:4], "--out", tmp / "undisturbed")
        assert code == 0, err
        length = time.time() - begin
        at = [rng.uniform(0.1, 1.0) * length for _ in range(moments)]
        for moment, err in zip(at, killed_and_run_again(arguments, tmp / "out", at, tmp / "undisturbed")):
            went_on = next(
                (line for line in err.splitlines() if line.startswith("going on")),
                "from the statistics, or the beginning",
            )
            print(f"killed after {moment:5.1f} s of {length:.1f}; the rerun: {went_on}", flush=True)
            shutil.rmtree(tmp / "stats", ignore_errors=True)
            shutil.rmtree(tmp / "spill", ignore_errors=True)
    print(f"{moments} of {moments} reruns ended in the same file")


if __name__ == "__main__":
    main()
