"""LoRA (Hu et al., arXiv 2106.09685) on a DiT, by peft."""

import importlib.util
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sana_lab.config.ranges import Positive, Share, Width
from sana_lab.config.specs import SpecError
from sana_lab.config.validation import nearest
from sana_lab.systems.adapters import Adapter, Factors

FACTOR = re.compile(r"^(.+)\.lora_([AB])\.default\.weight$")
"""Name of a tensor of peft's: the layer, and A or B."""


class Lora(Adapter):
    """Linear layers W become W + alpha / rank B A. Needs the extra `lora`."""

    def __init__(
        self,
        rank: Width = 16,  # of the change of each layer
        alpha: Positive | None = None,  # scale of the change times the rank; null is the rank, a scale of 1
        # Ends of names of the linear layers that are adapted; ffn.expand and ffn.project are those of Mix-FFN.
        targets: Sequence[str] = ("attention.qkv", "attention.proj", "cross.q", "cross.kv", "cross.proj"),
        dropout: Share = 0.0,  # of a layer's input before A
    ) -> None:
        self.rank, self.targets, self.dropout = rank, list(targets), dropout
        self.alpha = float(rank) if alpha is None else alpha

    def check(self, dit: nn.Module) -> None:
        if importlib.util.find_spec("peft") is None:
            raise ImportError("adapter 'lora' needs peft: pip install 'sana_lab[lora]'")
        layers = [name for name, module in dit.named_modules() if type(module) is nn.Linear]
        for target in self.targets:
            if not any(f".{name}".endswith(f".{target}") for name in layers):
                ends = {name.split(".", 2)[-1] for name in layers if name.startswith("blocks.")}
                raise SpecError(f"adapter 'lora': no linear layer's name ends in {target!r}; {nearest(target, ends)}")

    def inject(self, dit: nn.Module) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.check(dit)
        dit.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number works
            target_modules=self.targets,
            lora_dropout=self.dropout,
            bias="none",
        )
        inject_adapter_in_model(config, dit)

    def injected(self, dit: nn.Module) -> bool:
        return any(FACTOR.match(name) for name, _ in dit.named_parameters())

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        plain = {name.replace(".base_layer.", "."): v for name, v in state.items() if not FACTOR.match(name)}
        for layer, (down, up) in self.factors(state).items():
            weight = plain[f"{layer}.weight"]
            plain[f"{layer}.weight"] = (weight.double() + up.double() @ down.double()).to(weight.dtype)
        return plain

    def factors(self, state: Mapping[str, Tensor]) -> Factors:
        scale = self.alpha / self.rank
        layers = [match[1] for name in state if (match := FACTOR.match(name)) and match[2] == "A"]
        down, up = (f"{{}}.lora_{side}.default.weight" for side in "AB")
        return {layer: (state[down.format(layer)], scale * state[up.format(layer)]) for layer in layers}
