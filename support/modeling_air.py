"""A compressed checkpoint for transformers, and what builds on it: W as U and V.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A copy lies in every result; config.json names its classes under "auto_map". They are
transformers' own, whose layers named in config.json's "air" section are replaced. Nothing
here reads the repository it comes from, and nothing there imports this file.
"""
import transformers
from torch import nn

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


class LowRank(nn.Module):
    """y = U(Vx) + b for a layer Wx + b: V (k, n) and U (m, k), W = UV being (m, n)."""

    def __init__(self, dense, k):
        super().__init__()
        self.V = nn.Linear(dense.in_features, k, bias=False)
        self.U = nn.Linear(k, dense.out_features, bias=dense.bias is not None)

    def forward(self, x):
        return self.U(self.V(x))


class Base:
    """What makes a family's Model low-rank: vLLM builds it alone, without its head."""

    def __init__(self, config):
        super().__init__(config)
        for layer, k in config.air["ranks"].items():
            name = layer.removeprefix("model.")
            self.set_submodule(name, LowRank(self.get_submodule(name), k))
        self.post_init()


class Causal:
    """What makes a family's ForCausalLM hold the low-rank Model."""

    def __init__(self, config):
        super().__init__(config)
        self.model = self.base(config)
        self.post_init()


for family in FAMILIES:
    config, model, causal = [getattr(transformers, family + kind)
                             for kind in ("Config", "Model", "ForCausalLM")]
    # A plan to divide layers among GPUs names dense ones: without one, tools refuse to.
    config = type(f"Air{family}Config", (config,), {
        "model_type": "air_" + family.lower(), "base_model_tp_plan": None})
    model = type(f"Air{family}Model", (Base, model), {"config_class": config})
    causal = type(f"Air{family}ForCausalLM", (Causal, causal), {
        "config_class": config, "base": model})
    globals().update({each.__name__: each for each in (config, model, causal)})
