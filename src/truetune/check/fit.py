"""Does the run fit, and how long will it take? With error bars, and what to change if not.

input   config and plan; no weights
does    counts what is exact (weights, gradients, optimiser); runs the model on the meta device,
        where tensors have shapes and no memory, and adds up what autograd keeps; times one matrix
        product on the device
output  Fit: bytes by part, seconds, ways to make it smaller, the cheapest first
who     `truetune check MODEL DATA`
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truetune.findings import Finding
from truetune.model.architecture import causal_config, linear_layers, meta_model
from truetune.model.source import locate
from truetune.model.tokenizer import locate_base
from truetune.plan import Plan
from truetune.recipe import Recipe

if TYPE_CHECKING:
    import torch

# Measured peaks against the sum (docs/log.md): kernels of the loop keep less than autograd does
# on the meta device, allocators and workspaces add.
_MEMORY_ERROR = (0.6, 1.3)
# Share of one large product's speed that a whole step reaches.
_SPEED = (0.25, 0.9)
# Logits exist for one chunk of positions: in float32, with their gradient and a copy.
_HEAD = 3 * 64 * 2**20
_PROBE = (64, 128)
# Most tokens of a forward pass where nobody says, as the loop takes them.
_CPU_TOKENS, _DEVICE_TOKENS = 1024, 16_384


@dataclass(frozen=True)
class Shape:
    """What a run is made of, as far as memory and time go.

    Attributes:
        parameters: of the model; `trainable` of them, or of the adapter, have gradients.
        weight_bytes: a frozen or trained weight takes.
        kept_bytes: autograd keeps for each token of a forward pass.
        layer_bytes: of those, of one layer and of the input of every layer, as checkpointing
            keeps them.
        tokens: most tokens of a forward pass.
        optimiser_bytes: a trained weight takes beside its gradient.
    """

    parameters: int
    trainable: int
    weight_bytes: float
    kept_bytes: float
    layer_bytes: float
    tokens: int
    optimiser_bytes: int
    checkpointing: bool
    lora: bool

    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        kept = self.layer_bytes if self.checkpointing else self.kept_bytes
        adapter = self.trainable * 4 if self.lora else 0
        return {
            "weights": int(self.parameters * self.weight_bytes) + adapter,
            "gradients": self.trainable * 4,
            "optimiser": self.trainable * self.optimiser_bytes,
            "activations": int(kept * self.tokens),
            "logits": _HEAD,
        }

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def operations(self, tokens: int) -> float:
        """Multiplications and additions of training on so many tokens: 2 a weight forward, 2 for
        the gradient of inputs, 2 for that of trained weights; a second forward pass where
        activations are computed again (Kaplan et al. 2020, without attention)."""
        passes = 2 + 2 + (0 if self.lora else 2) + (2 if self.checkpointing else 0)
        return float(passes) * self.parameters * tokens


@dataclass(frozen=True)
class Fit:
    """The estimate.

    Attributes:
        device: where the run would be.
        available: bytes free there; None where it cannot be known.
        parts: bytes by part, the estimate itself.
        low, high: bytes, with the error bars.
        seconds: shortest and longest time of the run; None where it was not timed.
        ways: (option, bytes it would leave, what it costs), the cheapest first.
        trainable: weights that have gradients.
    """

    device: str
    available: int | None
    parts: dict[str, int]
    low: int
    high: int
    seconds: tuple[float, float] | None
    ways: tuple[tuple[str, int, str], ...]
    trainable: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def findings(self) -> Iterator[Finding]:
        """What surely does not fit; what may not is in the summary, since free memory comes and
        goes."""
        if self.available is None or self.low <= self.available:
            return
        enough = next((w for w in self.ways if w[1] * _MEMORY_ERROR[1] <= self.available), None)
        ways = "; ".join(f"{w[0]} ({gib(w[1])}, {w[2]})" for w in self.ways[:4])
        yield Finding(
            "memory-short",
            "warning",
            f"the run takes {gib(self.low)} to {gib(self.high)} of memory, "
            f"{gib(self.available)} are free on {self.device}",
            why=", ".join(f"{name} {gib(n)}" for name, n in self.parts.items() if n),
            fix=(f"{enough[0]} is enough and costs least; " if enough else "")
            + f"in the order of cost: {ways}",
        )


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def estimate(plan: Plan, *, tokens: int, p99: int = 0) -> Fit:
    """Estimate a run.

    Args:
        plan: its recipe is complete.
        tokens: that are trained on, over all epochs.
        p99: the length that keeps 99 % of the rows.
    """
    import torch

    device = plan.recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = run_shape(plan, device)
    speed = product_speed(device, shape)
    operations = shape.operations(tokens)
    return Fit(
        device=device,
        available=available_bytes(device),
        parts=shape.parts(),
        low=int(shape.total * _MEMORY_ERROR[0]),
        high=int(shape.total * _MEMORY_ERROR[1]),
        seconds=(operations / (speed * _SPEED[1]), operations / (speed * _SPEED[0])),
        ways=tuple(_ways(shape, plan, p99)),
        trainable=shape.trainable,
    )


def run_shape(plan: Plan, device: str) -> Shape:
    """The shape of a planned run."""
    import torch

    recipe = plan.recipe
    assert recipe.model
    files = locate(recipe.model, recipe.revision, weights=False)
    base = locate_base(files, weights=False) if files.is_adapter else files
    config = causal_config(base)
    model = meta_model(config)
    lora = recipe.lora or files.is_adapter
    split = recipe.optim == "adamw_bf16"
    halved = split or recipe.dtype == "bfloat16" or (recipe.dtype == "auto" and device == "cuda")
    parameters = sum(p.numel() for p in model.parameters())
    # Before the model is given an adapter, whose layers are linear too.
    targets = recipe.target_modules
    trainable = _lora_size(model, recipe.lora_r, targets) if lora else parameters
    with torch.device("meta"):
        trained = model.to(torch.bfloat16 if halved else torch.float32)
        kept, layer = _kept(trained, config, lora, recipe.lora_dropout)
    most = plan.max_length
    # Packed rows fill a pass to its limit; padded ones are as long as the longest may be.
    usual = _DEVICE_TOKENS if device == "cuda" else _CPU_TOKENS
    packed = max(recipe.micro_batch_tokens or usual, most)
    forward = packed if recipe.packing else (plan.micro_batch_size or 1) * most
    return Shape(
        parameters=parameters,
        trainable=trainable,
        # Trained weights are float32, frozen ones of the type they compute in, or fewer bits.
        weight_bytes=_weight_bytes(recipe, split or (lora and halved)),
        kept_bytes=kept,
        layer_bytes=layer,
        tokens=forward,
        optimiser_bytes=_OPTIMISER.get(recipe.optim, 2),
        checkpointing=recipe.gradient_checkpointing,
        lora=lora,
    )


# Bytes of a trained weight beside its gradient; the 8-bit ones take two.
_OPTIMISER = {"adamw": 8, "adamw_bf16": 10, "sgd": 0}


def _weight_bytes(recipe: Recipe, halved: bool) -> float:
    """Of the model; 4 bits have their scales beside them (Dettmers et al. 2023)."""
    if recipe.qlora:
        return 0.55
    if recipe.load_in_8bit:
        return 1.05
    return 2 if halved else 4


def _lora_size(model: Any, rank: int, targets: list[str] | None) -> int:
    """Parameters of the two matrices of every adapted layer."""
    total = 0
    for path, module in linear_layers(model):
        weight: Any = module.weight
        rows, columns = weight.shape
        if targets is None or path.rpartition(".")[2] in targets:
            total += rank * (int(rows) + int(columns))
    return total


def _kept(model: Any, config: Any, lora: bool, dropout: float) -> tuple[float, float]:
    """Bytes that autograd keeps for a token: of all layers, and of one layer and all inputs."""
    text = config.get_text_config(decoder=True)
    layers, hidden = text.num_hidden_layers, text.hidden_size
    size = next(model.parameters()).element_size()
    if lora:
        model = _with_lora(model, dropout)
    try:
        short, long = (_saved(model, tokens) for tokens in _PROBE)
        kept = (long - short) / (_PROBE[1] - _PROBE[0])
    except Exception:  # a model that cannot run without data: the usual count
        kept = layers * size * (16 * hidden + 6 * getattr(text, "intermediate_size", 4 * hidden))
    return kept, kept / layers + layers * hidden * size


def _with_lora(model: Any, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    names = sorted({path.rpartition(".")[2] for path, _ in linear_layers(model)})
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = LoraConfig(r=8, lora_dropout=dropout, target_modules=names)
        return get_peft_model(model, settings, low_cpu_mem_usage=True)


def _saved(model: Any, tokens: int) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, weights left out."""
    import torch

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            # Held, so that no later storage is given the same place.
            kept[storage._cdata] = storage
        return value

    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # A mask of four dimensions is taken as it is, so none is built from values that are not there.
    mask = torch.zeros(1, 1, 1, 1, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def _ways(shape: Shape, plan: Plan, p99: int) -> Iterator[tuple[str, int, str]]:
    """Ways to a smaller run, the cheapest first; each alone."""
    half = max(shape.tokens // 2, plan.max_length)
    if half < shape.tokens:
        option = (
            f"--micro-batch-tokens {half}"
            if plan.recipe.packing
            else f"--micro-batch-size {max((plan.micro_batch_size or 1) // 2, 1)}"
        )
        yield option, dataclasses.replace(shape, tokens=half).total, "the same result, more passes"
    if not shape.checkpointing:
        smaller = dataclasses.replace(shape, checkpointing=True)
        yield "--gradient-checkpointing", smaller.total, "the same result, about a third slower"
    if p99 and p99 < plan.max_length:
        tokens = max(shape.tokens * p99 // plan.max_length, p99)
        smaller = dataclasses.replace(shape, tokens=tokens)
        yield f"--max-length {p99}", smaller.total, "drops the longest 1 % of the rows"
    if not shape.lora:
        trainable = shape.parameters // 100
        smaller = dataclasses.replace(shape, lora=True, trainable=trainable)
        yield "--lora", smaller.total, "an adapter in place of all weights"
    if not plan.recipe.qlora:
        trainable = shape.trainable if shape.lora else shape.parameters // 100
        smaller = dataclasses.replace(shape, lora=True, trainable=trainable, weight_bytes=0.55)
        yield "--qlora", smaller.total, "the base in 4 bits, with its rounding"


def available_bytes(device: str) -> int | None:
    """Free memory of a device."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    path = Path("/proc/meminfo")
    if device != "cpu" or not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def product_speed(device: str, shape: Shape) -> float:
    """Operations a second of a matrix product of a step's size on a device, the best of three."""
    import torch

    where = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    rows, width = (8192, 4096) if where == "cuda" else (512, 1024)
    a = torch.zeros(rows, width, dtype=dtype, device=where)
    b = torch.zeros(width, width, dtype=dtype, device=where)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ b
        if where == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * width * width / best
