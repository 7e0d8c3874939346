"""Appendix A.9 of the paper: how compressed models go on with a prompt.

    python experiments/samples.py                 # the demo

The paper's two prompts (a demo that knows Python alone gets two of its own kind), the same
seed for every model. Writes experiments/results/samples-NAME.json and .md.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments.common import Lab, Setup, arguments
from experiments.stack import after
from generate import Decoder, generate
from support.config import own_defaults
from support.script import run, write_json, write_whole
from support.texts import typed
from support.tokenizer import Tokenizer

RATES = (0.8, 0.6, 0.4, 0.2)
PAPER_PROMPTS = ("The capital of France is", "The universe is")
PYTHON_PROMPTS = ("def parse_arguments(", "import os\nimport sys\n\n")
REFINE = ("refine", {})
# {name: (setting, what is done to its result)}; the paper shows both with LoRA.
FORMS = {
    "SVD-LLM(W)": ({"method": "svdllm"}, []),
    "AIR": ({"method": "air"}, []),
    "AIR, refined": ({"method": "air"}, [REFINE]),
}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 3}


def continued(ckpt, prompts, tokens, lab):
    """The texts a Checkpoint writes behind the prompts, token ids, each alone."""
    tokenizer = Tokenizer(lab.ckpt)
    decoder = Decoder(ckpt.model(lab.device, lab.dtype))
    texts = []
    for prompt in prompts:
        ids = tokenizer.bos + tokenizer.encode(prompt)
        drawn = [row[0] for row in generate(decoder, [ids], tokens, tokenizer.eos, **SAMPLING)
                 if row[0] is not None]
        texts.append(tokenizer.decode([id for id in drawn if id not in tokenizer.eos]))
    return texts


def small_model(lab, form, rate, seed):
    """The Checkpoint of a form at a rate, in memory."""
    setting, steps = FORMS[form]
    return after(lab, setting | {"rate": rate}, steps, seed)


def measure(lab, prompts, tokens):
    """[{"model", "rate", "texts"}], the dense model first."""
    rows = [{"model": "dense", "rate": 1.0, "texts": continued(lab.ckpt, prompts, tokens, lab)}]
    for rate in RATES:
        for form in FORMS:
            small = small_model(lab, form, rate, lab.seeds[0])
            texts = continued(small, prompts, tokens, lab)
            rows.append({"model": form, "rate": rate, "texts": texts})
            lab.progress.say(f"samples  {form} {rate:g}: {texts[0][:60]!r}")
    return rows


def markdown(prompts, rows):
    """A code block a prompt: what each model writes behind it, on one line."""
    lines = []
    for i, prompt in enumerate(prompts):
        lines += [f"**{prompt!r}**", "", "```"]
        for row in rows:
            lines.append(f"{row['rate']:<4g}{row['model']:<14}{row['texts'][i]!r}")
        lines += ["```", ""]
    return "\n".join(lines).rstrip() + "\n"


def main():
    p = arguments(__doc__)
    p.add_argument("--prompts", type=typed, nargs="+", help="(default: the paper's)")
    p.add_argument("--tokens", type=int, default=40, help="of each text (default 40)")
    args = vars(p.parse_args())
    prompts = args.pop("prompts")
    tokens = args.pop("tokens")
    lab = Lab("samples", Setup(**args))
    python = own_defaults(lab.ckpt.raw).get("text") == "stdlib"
    prompts = prompts or (PYTHON_PROMPTS if python else PAPER_PROMPTS)
    rows = measure(lab, prompts, tokens)
    lab.facts["calibration"]["seeds"] = lab.seeds[:1]
    stem = str(lab.results / f"samples-{lab.ckpt.name}")
    write_json(stem + ".json", lab.facts | {"prompts": prompts, "sampling": SAMPLING, "rows": rows})
    text = markdown(prompts, rows)
    write_whole(stem + ".md", text)
    print(text)


if __name__ == "__main__":
    run(main)
