"""Two examples of each verb, for its `--help`."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "sana-lab train shapes trainer.max_steps=500",
        "sana-lab train shapes system.dit.attention=my_attention:Mine --dry-run",
    ),
    "cache": (
        "sana-lab cache my_images --processes 4",
        "sana-lab cache my_images data.source.root=/data/tars --verify",
    ),
    "sample": (
        'sana-lab sample "a red circle" "three green triangles" --out pictures',
        "sana-lab sample --prompts prompts.txt --out pictures --seed 1 --set sampling.steps=50 sampling.solver=heun",
    ),
    "edit": (
        'sana-lab edit circle.png --from "a red circle" --to "a blue circle" --out blue.png',
        'sana-lab edit circle.png --from "a red circle" --to "a red square" --out square.png --inject 0.3',
    ),
    "eval": (
        "sana-lab eval shapes_sana eval.prompts_per_task=5 --json result.json",
        "sana-lab eval pictures/ --json result.json",
    ),
    "bench": ("sana-lab bench shapes_sana --size 128", "sana-lab bench sana_600m_1024 --memory"),
    "profile": ("sana-lab profile shapes --steps 10", "sana-lab profile shapes --sampling --trace trace.json"),
    "ablate": ("sana-lab ablate quickstart --dry-run", "sana-lab ablate attention trainer.max_steps=200 --workers 2"),
    "table": ("sana-lab table quickstart", "sana-lab table attention --out tables"),
    "ship": ("sana-lab ship quickstart", "sana-lab ship attention --out weights"),
    "pack": ("sana-lab pack quickstart", "sana-lab pack attention --out attention.tar.gz"),
    "compare": ("sana-lab compare before.json after.json", "sana-lab compare softmax.json linear.json"),
    "stats": (
        "sana-lab stats photos --extractor shapes --out photos.safetensors",
        "sana-lab stats photos --extractor '{name: inception, weights: inception.pth}' --out fid.safetensors",
    ),
    "fid": (
        "sana-lab fid samples photos --weights inception.pth",
        "sana-lab fid samples photos.safetensors --extractor shapes --metrics fid kid precision recall",
    ),
    "import": ("sana-lab import SANA.pth --out sana.safetensors", "sana-lab import folder --part dit"),
    "export": ("sana-lab export shapes_sana folder", "sana-lab export weights.safetensors folder --part autoencoder"),
    "parts": ("sana-lab parts attention", "sana-lab parts attention linear"),
    "list": ("sana-lab list", "sana-lab list experiments"),
    "new": ("sana-lab new part my_attention --kind attention", "sana-lab new ablation my_ablation"),
    "check": ("sana-lab check my_attention:MyAttention", "sana-lab check my_solver:my_solver at=0.4"),
    "doctor": ("sana-lab doctor", "cd project && sana-lab doctor"),
    "completion": (
        'eval "$(sana-lab completion bash)"',
        "sana-lab completion fish > ~/.config/fish/completions/sana-lab.fish",
    ),
    "du": ("sana-lab du", "cd project && sana-lab du"),
    "rm": ("sana-lab rm attention --superseded", "sana-lab rm --models"),
    "ui": ("sana-lab ui", "sana-lab ui --port 5001"),
}


def epilog(verb: str) -> str:
    """The examples of a verb as the end of its help; "" where there are none."""
    return "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES[verb])]) if verb in EXAMPLES else ""
