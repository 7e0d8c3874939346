"""The README's equation table against the code, its figures against the committed JSON."""
import ast
import json
import re

import pytest
from conftest import ROOT

from experiments.report import compare, find

README = (ROOT / "README.md").read_text("utf-8")
NOTEBOOK = (ROOT / "experiments" / "README.md").read_text("utf-8")
RESULTS = ROOT / "experiments" / "results"
ROWS = re.findall(r"^\| (.*?) \| `(\w+\.py)` `(\w+)` \| `(\w+\.py)::(\w+)` \|$", README, flags=re.M)


def source(file, name):
    """The source text of a function, or of what is assigned to a name, of a file's top level."""
    text = (ROOT / file).read_text("utf-8")
    for node in ast.parse(text).body:
        names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in getattr(node, "targets", ()))]
        if name in names:
            return ast.get_source_segment(text, node)
    raise AssertionError(f"{file} has no {name}")


@pytest.mark.parametrize("equation, file, name, test_file, test", ROWS, ids=lambda x: x[:12])
def test_an_equations_tag_stands_inside_the_function_named(equation, file, name, test_file, test):
    tag = re.match(r"Eq\. \d+|Algorithm 1, lines [\d-]+|Proposition [A\d.]+\d|Section 3\.1|AttnLRP", equation)[0]
    words = "rule" if tag == "AttnLRP" else tag
    assert re.search(rf"{re.escape(words)}(?!\d)", source(file, name)), (tag, file, name)
    assert f"def {test}(" in (ROOT / "tests" / test_file).read_text("utf-8")


def test_the_table_has_the_equations_and_algorithm_1_all_its_lines():
    assert len(ROWS) >= 18
    text = source("air.py", "als_sweep") + source("air.py", "native_factors") + source("air.py", "air")
    assert all(re.search(rf"lines? (\d+-)?{line}(?!\d)", text) for line in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11))


def test_the_five_equations_name_functions_that_exist():
    block = README.split("```")[1]
    named = re.findall(r"(\w+)\.(\w+)(?:,|$)", block, flags=re.M)
    assert len(named) == 6 and all(source(f"{module}.py", name) for module, name in named)


def test_it_is_short_and_has_no_placeholder():
    assert len(README.splitlines()) <= 180
    assert not any("@@" in text for text in (README, NOTEBOOK, (ROOT / "demo" / "README.md").read_text("utf-8")))


def test_links_lead_somewhere():
    for text, folder in ((README, ROOT), (NOTEBOOK, ROOT / "experiments")):
        for path, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", text):
            target = (folder / path) if path else folder / "README.md"
            assert target.exists(), path
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), flags=re.M)
                slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, anchor


def test_speed_figures_are_the_committed_json():
    speed = json.loads((RESULTS / "speed.json").read_text())
    section = NOTEBOOK.split("## Speed")[1].split("\n## ")[0]
    for row in [speed["sweep"]["result"], *speed["als"]["result"]]:
        assert f"{row['ratio']:.2f}" in section
    assert f"{speed['demo']['result']['wall_s']:.0f} s" in section


def test_agreement_figures_are_the_committed_json():
    found = json.loads((RESULTS / "agreement.json").read_text())
    section = NOTEBOOK.split("## Agreement")[1].split("\n## ")[0]
    for key in ("logits", "gram", "lrp", "wxg", "fisher", "svd_llm_w", "air_unit", "air_max100"):
        assert f"{found[key]:.0e}" in section, key
    said = README.split("## Does it reproduce")[1].split("\n- ")[1]
    for key in ("gram", "lrp", "svd_llm_w", "air_unit"):
        assert f"{found[key]:.0e}".replace("e-0", "e-") in said, key


def gaps(stem, rates, a, b):
    """How the README and the notebook say a against b: '−1.7 ± 0.1, +0.5 ± 0.2'; over the first seeds, where a was
    measured at these alone."""
    found = json.loads((RESULTS / f"{stem}.json").read_text("utf-8"))
    found = found["checkpoints"]["best"]["rows"] if "checkpoints" in found else found["rows"]
    pairs = [[find(found, rate=rate, **each)["ppl"]["text"] for each in (a, b)] for rate in rates]
    compared = [compare(ours, base[:len(ours)]) for ours, base in pairs]
    return ", ".join(f"{mean:+.1f} ± {spread:.1f}" for mean, spread, _ in compared).replace("-", "−")


def test_what_is_said_of_delta_is_the_committed_json():
    said = README.split("## Does it reproduce")[1].split("## ")[0]
    base = {"variant": "SVD-LLM(W)"}
    real = [gaps("closed-smollm2", (0.8, 0.6, 0.4), {"variant": variant}, base)
            for variant in ("AIR by Fisher, δ = 2", "AIR, δ = 2", "AIR, δ = 0.5")]
    here = {"tokens": 64, "ridge": 0.0}
    more = [gaps("delta-smollm2", (0.6,), here | {"method": "air", "delta": delta}, here | {"method": "svdllm"})
            for delta in (2.0, 0.5)]
    ours, muon = ([gaps(f"fig3-{model}", (0.6, 0.4), {"delta": delta}, {"delta": 0.0}) for delta in (2.0, 0.5)]
                  for model in ("demo", "demo-muon"))
    longer = [gaps("training-demo-32M", (0.6, 0.4), {"variant": f"AIR, δ = {delta}"}, base) for delta in ("2", "0.5")]
    told = re.findall(r"[−+]\d+\.\d ± \d+\.\d(?:, [−+]\d+\.\d ± \d+\.\d)*", said)
    assert told == [*real, *more, *ours, *muon, *longer]


def test_the_number_of_claims_that_hold_is_the_committed_json():
    verdicts = []
    for path in sorted(RESULTS.glob("*-demo.json")):
        verdicts += json.loads(path.read_text("utf-8")).get("verdicts", [])
    papers = [each["holds"] for each in verdicts if not each["claim"].startswith("(Not in the paper.)")]
    decided = [holds for holds in papers if holds is not None]
    assert f"{sum(decided)} of the paper's {len(decided)} decided claims hold" in README
