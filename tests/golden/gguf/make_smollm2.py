"""Make smollm2.npz beside this file: SmolLM2-135M as transformers reads the GGUF file itself (5.24, with gguf).

    python tests/golden/gguf/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

Of each prompt the ids and every 64th logit of every token; of ../make_tokens.py's texts the ids.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_tokens import TEXTS               # noqa: E402

PROMPTS = ["The capital of France is", "def mean(values):\n    return", "In 1969 , the first men walked on the Moon ."]
EVERY = 64


def main():
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    arrays = {}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        arrays[f"logits{i}"] = logits[:, ::EVERY].numpy()
    texts = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in [*PROMPTS, *TEXTS]}
    arrays["texts"] = np.array(json.dumps(texts))
    np.savez_compressed(Path(__file__).with_name("smollm2.npz"), **arrays)


if __name__ == "__main__":
    main()
