"""Kill the demo run with SIGKILL at 20 random moments; every rerun must end in an undisturbed run's file, bit by bit.

python tests/kills.py [KILLS]         # about eight minutes on 2 cores; a short version is in test_large.py
"""
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_large import finish, killed_and_run_again     # noqa: E402


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        arguments = ("--text", "none", "--device", "cpu", "--stats", tmp / "stats", "--spill", tmp / "spill")
        code, _, err = finish(*arguments[:4], "--out", tmp / "undisturbed")
        assert code == 0, err
        for moment, err in killed_and_run_again(arguments, tmp / "out", tmp / "undisturbed", kills, earliest=0.1):
            went_on = next(
                (line for line in err.splitlines() if line.startswith("going on")),
                "from the statistics, or the beginning",
            )
            if moment is not None:
                print(f"killed after {moment:5.1f} s; the rerun: {went_on}", flush=True)
            shutil.rmtree(tmp / "stats", ignore_errors=True)
            shutil.rmtree(tmp / "spill", ignore_errors=True)
    print(f"{kills} of {kills} reruns ended in the same file")


if __name__ == "__main__":
    main()
