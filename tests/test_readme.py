"""README.md: its references point at the lines they name, its table is the committed JSON."""
import json
import re

from conftest import ROOT
from experiments.common import against

README = (ROOT / "README.md").read_text("utf-8")


def test_equation_table_points_at_its_lines():
    rows, equation = re.findall(r"^\| (.*?) \| `(\w+\.py):(\d+)` \| `(\w+\.py)::(\w+)` \|$", README, flags=re.M), ""
    assert len(rows) > 12
    for named, file, line, test_file, test in rows:
        equation = named.strip() or equation
        text = (ROOT / file).read_text("utf-8").split("\n")[int(line) - 1]
        tag = re.match(r"Eq\. \d+|Algorithm 1|Proposition [A\d.]+\d|Section 3\.1|AttnLRP", equation)[0]
        assert tag in text or (tag, "rule" in text) == ("AttnLRP", True) or (tag, "|Ĩ|" in text) == ("Section 3.1", True), (file, line)
        assert f"def {test}(" in (ROOT / "tests" / test_file).read_text("utf-8")


def test_speed_figures_are_the_committed_json():
    speed = json.loads((ROOT / "experiments" / "results" / "speed.json").read_text())
    section = README.split("## Speed")[1].split("## Conventions")[0]
    for row in [speed["sweep"]["result"], *speed["als"]["result"]]:
        assert f"{row['ratio']:.2f}" in section
    assert f"{speed['demo']['result']['wall_s']:.0f} s" in section


def test_what_the_demo_says_of_delta_and_the_square_root_is_the_committed_json():
    rows = {name: json.loads((ROOT / "experiments" / "results" / f"{name}-demo.json").read_text("utf-8"))["rows"]
            for name in ("fig3", "open_questions")}
    section = README.split("**The paper's δ = 2")[1].split("- **How a model")[0]
    named = re.findall(r"(\d\.\d) ± (\d\.\d) %", section)
    compared = against(rows["fig3"], "rate", (0.6, 0.4), {"delta": 0.5}, {"delta": 0.0})
    compared += against(rows["open_questions"], "rate", (0.6, 0.4), {"variant": "symmetric"}, {"variant": "default"})
    assert [(f"{-mean:.1f}", f"{spread:.1f}") for mean, spread, _ in compared] == named


def test_no_placeholder_is_left():
    assert "@@" not in README and "@@" not in (ROOT / "demo" / "README.md").read_text("utf-8")
