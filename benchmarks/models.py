"""diffusers' SANA and ours with the same random weights: transformer, autoencoder, text encoder, whole pipeline."""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.utils import logging
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana_lab.checkpoints import architectures, formats
from sana_lab.diffusion.flow import Flow
from sana_lab.diffusion.guidance import prepare
from sana_lab.models.dit import SamplingDit
from sana_lab.models.text.instruction import read_instruction
from sana_lab.models.text.llm import Llm
from sana_lab.pretrained import loading, parts
from sana_lab.systems.text2image import TextToImage
from sana_lab.types import Text, Velocity

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
TEXT = 2304  # width of Gemma-2-2B


class Size(NamedTuple):
    """SANA's transformer by width, blocks, self- and cross-attention heads."""

    name: str
    dim: int
    depth: int
    heads: int
    cross_heads: int


SIZES = {"0.6B": Size("0.6B", 1152, 28, 36, 16), "1.6B": Size("1.6B", 2240, 20, 70, 20)}


def transformer(size: Size, depth: int | None = None) -> SanaTransformer2DModel:
    """diffusers' transformer of a size, optionally with fewer blocks."""
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        num_attention_heads=size.heads,
        num_layers=depth or size.depth,
        num_cross_attention_heads=size.cross_heads,
        cross_attention_head_dim=size.dim // size.cross_heads,
        cross_attention_dim=size.dim,
        caption_channels=TEXT,
        sample_size=16,
    )
    return model.eval()


def autoencoder(blocks: int = 3) -> AutoencoderDC:
    """SANA's DC-AE f32c32 with `blocks` blocks per decoder stage (3 in the released model)."""
    torch.manual_seed(1)
    stages = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    widths, scales = (128, 256, 512, 512, 1024, 1024), ((), (), (), (5,), (5,), (5,))
    model = AutoencoderDC(
        latent_channels=32,
        encoder_block_types=stages,
        decoder_block_types=stages,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(blocks,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    return model.eval()


def ours_of(theirs: Any) -> Any:
    """Our part with the weights of a diffusers model; memory is shared, except for merged tensors."""
    config = {"_class_name": type(theirs).__name__, **plain(theirs)}
    architecture, spec, supplied = architectures.read(config, "diffusers")
    kind, table = architecture.kind, architecture.table
    return parts.from_released(formats.ReleasedWeights(kind, spec, supplied, theirs.state_dict(), table, "diffusers"))


def plain(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.config.items() if not k.startswith("_")}


def gemma(layers: int) -> Gemma2Model:
    """Gemma-2-2B's decoder with `layers` layers (26 in the released model) and the benchmark's vocabulary."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=TEXT,
        intermediate_size=9216,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(2)
    return Gemma2Model(config).eval()


VOCABULARY = 1000


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair tokenizer trained on the released instruction and `PROMPTS`, whose words take one or two tokens, as in
    Gemma's tokenizer, which is not available offline. Gemma's token count of the instruction may differ."""
    core = Tokenizer(models.BPE(unk_token=PAD))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, EOS, BOS], initial_alphabet=alphabet)
    core.train_from_iterator([read_instruction("released"), *(prompt(i) for i in range(100))], learn)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, bos_token=BOS)


def prompt(i: int) -> str:
    """A caption of about forty words, unique for each i, so that no prompt is cached."""
    return (
        f"picture {i}: a wide photograph of {i % 7 + 2} old bicycles leaning against a brick wall in evening light, "
        "a sleeping cat on the window sill above them, wet cobblestones in front, and far behind a church tower in fog"
    )


def pipeline(text_layers: int, depth: int, blocks: int) -> SanaPipeline:
    """A SanaPipeline at SANA-0.6B's widths, with given depths of text encoder, transformer and decoder stages."""
    pipe = SanaPipeline(
        tokenizer=tokenizer(),
        text_encoder=gemma(text_layers),
        vae=autoencoder(blocks),
        transformer=transformer(SIZES["0.6B"], depth),
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def system_of(theirs: SanaPipeline) -> TextToImage:
    """Our system from a diffusers pipeline, by saving and loading a folder."""
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return loading.load(folder)


def encoder_of(theirs: SanaPipeline) -> Llm:
    """Our text encoder around the network and tokenizer of a diffusers pipeline."""
    encoder = Llm(instruction="released", lowercase=True)
    encoder.network, encoder.tokenizer, encoder.pretrained = theirs.text_encoder, theirs.tokenizer, True
    encoder.dim = theirs.text_encoder.config.hidden_size
    return encoder.requires_grad_(False).eval()


def peer_step(model: Callable[..., Any], x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """diffusers' transformer at t = 0.5."""
    t = torch.full((len(x),), 500.0, device=x.device)
    keep = mask.to(tokens.dtype)
    return model(x, tokens, timestep=t, encoder_attention_mask=keep, return_dict=False)[0]


def captions(real: int, padded: int, device: torch.device | str = "cpu") -> Text:
    """Random features of a caption of `real` tokens and of the empty prompt (one token), both padded."""
    lengths = torch.tensor([real, 1], device=device)
    tokens = torch.randn(2, padded, TEXT, device=device)
    return Text(tokens, torch.arange(padded, device=device) < lengths[:, None])


def prepared(dit: Any, text: Text, times: Tensor) -> SamplingDit:
    """Prepared denoiser of a caption and the empty prompt, as in `guided`."""
    caption, null = (Text(text.tokens[i : i + 1], text.mask[i : i + 1]) for i in range(2))
    return prepare(dit, caption, times).beside(prepare(dit, null))


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


FLOW = Flow()


def peer_velocity(model: Any, prompt: Text, null: Text, padded: int, scale: float) -> Velocity:
    """Guidance as in diffusers' pipeline: both captions padded, and projected in every step."""
    both = prompt.padded(padded).beside(null.padded(padded))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        x2, t2 = torch.cat([x, x]).to(both.tokens.dtype), 1000 * torch.cat([t, t]).to(x.device)
        keep = both.mask.to(both.tokens.dtype)
        out = model(x2, both.tokens, timestep=t2, encoder_attention_mask=keep, return_dict=False)[0]
        with_text, without = out.to(x.dtype).chunk(2)
        return without + scale * (with_text - without)

    return velocity


def compiled_peer(model: Any, mode: str | None, backend: str = "inductor") -> Any:
    """diffusers' transformer with each block compiled for fixed shapes, as recommended in its documentation.

    `compile_repeated_blocks` does not know SANA's blocks in diffusers 0.42, so they are compiled one by one.
    """
    copy = type(model).from_config(model.config).to(next(model.parameters()))
    copy.load_state_dict(model.state_dict())
    options = {"mode": mode} if backend == "inductor" else {}
    for block in copy.eval().transformer_blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend, **options)
    return copy


def compiled_decoder(model: AutoencoderDC) -> AutoencoderDC:
    """diffusers' autoencoder with its decoder's blocks compiled for fixed shapes, in its own memory format."""
    copy = AutoencoderDC.from_config(model.config).to(next(model.parameters()))
    copy.load_state_dict(model.state_dict())
    for block in channels_last(copy.eval()).decoder.up_blocks:
        block.compile(fullgraph=True, dynamic=False)
    return copy


class Graphed:
    """A denoiser whose calls of one shape are replayed from a CUDA graph; elsewhere it is called as it is.

    The inputs are copied into the graph's own; captions and mask are those of the first call.
    """

    def __init__(self, model: Any, capture: Callable[[Callable[[], Tensor]], tuple[Any, Tensor]]) -> None:
        self.model, self.capture = model, capture
        self.inputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, tokens: Tensor, *, timestep: Tensor, **options: Any) -> tuple[Tensor]:
        if x.device.type != "cuda":
            return self.model(x, tokens, timestep=timestep, **options)
        if self.inputs is None:
            static_x, static_t = x.clone(), timestep.clone()
            self.inputs = (static_x, static_t)
            call = lambda: self.model(static_x, tokens, timestep=static_t, **options)[0]  # noqa: E731
            self.graph, self.out = self.capture(call)
        self.inputs[0].copy_(x)
        self.inputs[1].copy_(timestep)
        self.graph.replay()
        return (self.out,)
