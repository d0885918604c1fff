"""The backbones of the matrix: which models, and random weights under which errors show.

A freshly initialised network hides what goes wrong inside it: heads and LayerScales of 0 or
1e-6 let nothing of the blocks through to the logits, and small weights let biases drown what
comes from the image. ``randomise`` gives every norm, bias and scale a spread of its own, and
no layer a gain below 1. Left out: video models, whose input is no image.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import calib
from vitcompress.evaluate import logits_of
from vitcompress.models import create_architecture
from vitcompress.numerics.metrics import sqnr_db

#: A parameter with less spread than this lets nothing through.
LEAST_STD = 1e-3
CLASSES = 1000
#: Least gains of a weight that are tried, the liveliest first; 0 leaves gains as they are.
GAINS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.0)
#: What must be left of the logits when every weight is disturbed by a hundredth (40 dB).
LEAST_CALM_DB = 26.0


@dataclass(frozen=True)
class Backbone:
    """One model of the matrix.

    Attributes:
        name: As the library registers it.
        library: ``timm``, ``torchvision`` or ``transformers``.
        tier: 0 are tiny test models, 1 must pass every column, 2 is the rest.
        samples: Calibration images.
        layers: Depth, where the default configuration is deep without being different.
        refused: What the message of its refusal must name; empty where it must work.
    """

    name: str
    library: str
    tier: int
    samples: int = 4
    layers: int | None = None
    refused: str = ""

    @property
    def key(self) -> str:
        """The name with its library, unique in the matrix."""
        return f"{self.library}/{self.name}"


def _named(library: str, tier: int, names: str) -> list[Backbone]:
    return [Backbone(name, library, tier) for name in names.split()]


TIER_0 = _named(
    "timm",
    0,
    "test_vit test_vit_relpos test_convnext test_maxvit test_coatnet test_mambaout",
)
PLAIN = [
    *_named(
        "timm",
        1,
        "vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224"
        " deit3_small_patch16_224 beit_base_patch16_224 cait_xxs24_224 crossvit_9_240",
    ),
    *_named("torchvision", 1, "vit_b_16"),
    # 1369 tokens: every attention matrix has 11 million entries for an image.
    Backbone("vit_small_patch14_dinov2", "timm", 2, samples=2),
    Backbone("vit_small_patch14_reg4_dinov2", "timm", 2, samples=2),
    *_named(
        "timm",
        2,
        "vit_xsmall_patch16_clip_224 convit_tiny tnt_s_patch16_224 flexivit_small"
        " vit_tiny_r_s16_p8_224 vit_base_patch16_siglip_224",
    ),
    *(Backbone(n, "transformers", 2, layers=4) for n in ("vit", "deit", "dinov2")),
]
WINDOWED = [
    *_named(
        "timm",
        1,
        "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 gcvit_xxtiny twins_svt_small"
        " pvt_v2_b0 volo_d1_224 tiny_vit_5m_224 levit_128s",
    ),
    *_named("torchvision", 1, "swin_t"),
    *_named(
        "timm",
        2,
        "swinv2_cr_tiny_224 twins_pcpvt_small coat_lite_tiny xcit_nano_12_p16_224 davit_tiny"
        " mvitv2_tiny nest_tiny hiera_tiny_224 pit_ti_224",
    ),
    *_named("torchvision", 2, "swin_v2_t maxvit_t"),
    *_named("transformers", 2, "swin swinv2 pvt"),
    Backbone("dinat", "transformers", 2, refused="natten"),
]
HYBRID = [
    *_named(
        "timm",
        1,
        "mobilevit_xxs mobilevitv2_050 efficientformer_l1 efficientformerv2_s0 nextvit_small"
        " vitamin_small_224 fastvit_t8 poolformer_s12 convnext_atto",
    ),
    *_named(
        "timm",
        2,
        "fastvit_mci0 repvit_m0_9 edgenext_xx_small swiftformer_xs efficientvit_b0"
        " caformer_s18 inception_next_atto mambaout_femto focalnet_tiny_srf mixer_s16_224"
        " visformer_tiny",
    ),
    *_named("torchvision", 2, "convnext_tiny"),
    *_named("transformers", 2, "mobilevit poolformer"),
]
BACKBONES = {case.key: case for case in [*TIER_0, *PLAIN, *WINDOWED, *HYBRID]}


def select(names: Iterable[str], tier: int | None) -> list[Backbone]:
    """Return the cases of these names, with or without their library, and of this tier.

    Args:
        names: None at all means every case.
        tier: ``None`` for every tier.

    Raises:
        LookupError: No case, or more than one, has a name.
    """
    chosen = [_find(name) for name in names] or list(BACKBONES.values())
    return [case for case in chosen if tier is None or case.tier == tier]


def _find(name: str) -> Backbone:
    found = [case for case in BACKBONES.values() if name in (case.key, case.name)]
    if len(found) != 1:
        listed = ", ".join(case.key for case in found) or "nothing"
        raise LookupError(f"{name}: expected the name of one backbone, found {listed}")
    return found[0]


def build(case: Backbone, seed: int = 0) -> tuple[nn.Module, calib.Preprocessing]:
    """Return the model with random weights in evaluation mode, and its preprocessing."""
    torch.manual_seed(seed)
    if case.library == "transformers":
        module, preprocessing = _from_default_config(case)
    else:
        module, preprocessing, _ = create_architecture(case.key)
    return liven(module, preprocessing, seed), preprocessing


def _from_default_config(case: Backbone) -> tuple[nn.Module, calib.Preprocessing]:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    classifiers = CLASSIFIERS[case.name]
    depth = {} if case.layers is None else {"num_hidden_layers": case.layers}
    config = AutoConfig.for_model(case.name, num_labels=CLASSES, **depth)
    # As every saved configuration does; some types have several classifiers.
    config.architectures = [classifiers if isinstance(classifiers, str) else classifiers[0]]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        module, preprocessing, _ = create_architecture(f"hf/{Path(folder) / 'config.json'}")
    return module, preprocessing


# Weights


def liven(model: nn.Module, preprocessing: calib.Preprocessing, seed: int = 0) -> nn.Module:
    """Return ``model`` randomised with the largest gain under which it stays calm.

    At a small gain the biases drown the image, and no error shows. At a large one a deep
    network multiplies every disturbance until nothing else shows: no quantizer could pass,
    and float32 itself gives the logits to three digits. Which gain lies between is a property
    of the float network, measured before anything is quantized.
    """
    source = calib.open_source(
        "synthetic", samples=2, batch_size=2, preprocessing=preprocessing
    )
    images = next(iter(source)).images
    original = {name: value.clone() for name, value in model.state_dict().items()}
    for gain in GAINS:
        model.load_state_dict(original)
        randomise(model, seed, gain)
        if calm_db(model, images, logits_of(model)) >= LEAST_CALM_DB:
            break
    return model


@torch.no_grad()
def calm_db(model: nn.Module, images: Tensor, logits: Callable[[Tensor], Tensor]) -> float:
    """Return signal to noise of the logits when every weight is disturbed by a hundredth."""
    known = logits(images)
    generator = torch.Generator().manual_seed(2)
    weights = list(_product_weights(model))
    originals = [weight.clone() for weight in weights]
    for weight in weights:
        weight.add_(0.01 * weight.std() * torch.randn(weight.shape, generator=generator))
    noise = logits(images) - known
    for weight, kept in zip(weights, originals, strict=True):
        weight.copy_(kept)
    return sqnr_db(float(known.square().sum()), float(noise.square().sum()))


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Return ``model`` in evaluation mode, changed so that each of its parameters matters.

    By structure: norms with statistics, norms without, weights of small gain, biases, then
    what is constant (LayerScales, temperatures, gates) or next to zero (tables, tokens).

    Args:
        model: Changed in place.
        seed: Of the values drawn.
        gain: Weights of less gain are raised to it.
    """
    draw = _Draw(seed)
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if is_norm(module):
            _randomise_norm(module, draw)
            own = {name: p for name, p in own.items() if name not in ("weight", "bias")}
        for name, parameter in own.items():
            _randomise_parameter(name, parameter, draw, gain)
    return model.eval()


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module normalises by stored statistics."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module itself normalises, of whatever class it is."""
    if is_batch_norm(module) or isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return True
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, Tensor) and weight.dim() == 1


class _Draw:
    """Seeded values for a tensor."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, tensor: Tensor, std: float) -> None:
        tensor.copy_(std * torch.randn(tensor.shape, generator=self.generator))

    def shift(self, tensor: Tensor, std: float) -> None:
        tensor.add_(std * torch.randn(tensor.shape, generator=self.generator))

    def uniform(self, tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=self.generator))


def _randomise_norm(module: nn.Module, draw: _Draw) -> None:
    spreads: dict[str, Callable[[Tensor], None]] = {
        "weight": lambda tensor: draw.uniform(tensor, 0.5, 1.5),
        "bias": lambda tensor: draw.normal(tensor, 0.3),
        "running_mean": lambda tensor: draw.normal(tensor, 0.3),
        "running_var": lambda tensor: draw.uniform(tensor, 0.5, 2.0),
    }
    for name, spread in spreads.items():
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            spread(tensor)


def _randomise_parameter(name: str, parameter: Tensor, draw: _Draw, gain: float) -> None:
    vector = parameter.numel() == max(parameter.shape, default=1)
    low, high = float(parameter.min()), float(parameter.max())
    if parameter.dim() > 1 and name.endswith("weight"):
        _raise_gain(parameter, draw, gain)
    elif not vector:
        if float(parameter.std()) < LEAST_STD:
            draw.normal(parameter, 0.3)  # tables of positions, or of biases of attention
    elif name.endswith("bias"):
        draw.shift(parameter, 0.1)
    elif low <= 0.0 and max(abs(low), abs(high)) < LEAST_STD:
        draw.normal(parameter, 0.1)  # tokens, and biases under another name
    elif low == high and 0.0 < high <= 1.0:
        draw.uniform(parameter, 0.3, 1.0)  # LayerScale, temperatures, gates
    elif low == high:
        draw.uniform(parameter, 0.8 * high, 1.2 * high)  # logarithms of a scale


def _raise_gain(weight: Tensor, draw: _Draw, least: float) -> None:
    """Bring the rows of a weight to norm ``least`` in the mean if they are below.

    At a usual initialisation (0.02 whatever the width) every layer loses most of what comes
    from the image, while the biases after it stay: the logits of a deep network then vary by
    less than 1e-7 of their size, and its signal-to-noise ratio says nothing.
    """
    gain = float(weight.square().mean().sqrt()) * weight[0].numel() ** 0.5
    if gain < LEAST_STD:
        draw.normal(weight, max(least * weight[0].numel() ** -0.5, 0.02))  # heads of zeros
    elif gain < least:
        weight.mul_(least / gain)


# Do errors show?


@dataclass(frozen=True)
class Liveliness:
    """How much of what happens inside a model reaches its logits.

    Attributes:
        spread: Standard deviation of a logit between images, relative to the largest logit.
        block_effect: Largest change of a logit, relative likewise, when the weight in the
            middle of the model is disturbed by a tenth of its spread.
    """

    spread: float
    block_effect: float


@torch.no_grad()
def liveliness(
    model: nn.Module, images: Tensor, logits: Callable[[Tensor], Tensor]
) -> Liveliness:
    """Return how lively a model is.

    Args:
        model: Its weights are changed and put back.
        images: At least two, preprocessed.
        logits: From images to the model's logits.
    """
    known = logits(images)
    largest = known.abs().max().clamp(min=1e-30)
    weights = list(_product_weights(model))
    middle = weights[len(weights) // 2]
    original = middle.clone()
    noise = torch.randn(middle.shape, generator=torch.Generator().manual_seed(1))
    middle.add_(0.1 * original.std() * noise)
    disturbed = logits(images)
    middle.copy_(original)
    return Liveliness(
        spread=float(known.std(dim=0).mean() / largest),
        block_effect=float((disturbed - known).abs().max() / largest),
    )


def _product_weights(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield module.weight
