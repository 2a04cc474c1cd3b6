"""Build recommenders from settings, and keep on disk only what the training changed."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthprobe.models.backbones import pretrained, pretrained_tokenizer
from depthprobe.models.blocks import find_blocks, refusal
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Backbone, SasRecSettings

WEIGHTS = "trained.safetensors"


def build_recommender(
    settings: Backbone,
    items: Tensor,
    *,
    kept: tuple[int, ...] | None = None,
    seed: int,
    random_init: bool = False,
    train_items: bool = False,
) -> Recommender:
    """A recommender before its training: backbone loaded, cut, made trainable; fresh adapters.

    Args:
        items: item table, (I + 1, d_item), row 0 padding.
        kept: blocks that stay; None keeps all.
        seed: initialises the adapters, and the backbone where that is random.
        random_init: the control: the same architecture without its pretraining.
        train_items: whether the item table is trained too.
    """
    backbone = pretrained(settings, random_init=seed if random_init else None)
    if kept is not None:
        keep_blocks(backbone, kept)
    return around(backbone, settings, items, seed=seed, train_items=train_items)


def build_sasrec(settings: SasRecSettings, *, items: int, longest: int) -> SASRec:
    """SASRec before its training, by torch's present seed, for a catalogue of so many items."""
    return SASRec(
        items,
        width=settings.width,
        blocks=settings.blocks,
        heads=settings.heads,
        drop=settings.dropout,
        longest=longest,
    )


def around(
    backbone: PreTrainedModel,
    settings: Backbone,
    items: Tensor,
    *,
    seed: int,
    train_items: bool = False,
) -> Recommender:
    """A recommender around a backbone, whose blocks it uses in place; fresh adapters.

    Arguments as for :func:`build_recommender`.
    """
    place, prompt, suffix = backbone.device, prompt_tokens(settings), suffix_tokens(settings)
    torch.manual_seed(seed)  # the adapters are drawn from the global generator
    with torch.device(place):  # quantised weights are on the GPU from the start
        model = Recommender(backbone, items.to(place), prompt, suffix=suffix, head=settings.head)
    make_trainable(model, settings)
    model.items.requires_grad_(train_items)
    model.checkpoint_blocks(settings.checkpointing)
    return model


def learned_table(items: int, width: int, *, seed: int) -> Tensor:
    """A random item table to train, (items + 1, width) float32 of unit length a row; row 0 is 0.

    A fresh output adapter turns rows of this length into scores of a spread near 1.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(items + 1, width, generator=generator).mul_(width**-0.5)
    table[0] = 0
    return table


def prompt_tokens(settings: Backbone) -> list[int]:
    """Token ids of the prompt, after the start token that a text of this tokenizer begins with."""
    if not settings.prompt:
        return []
    tokenizer = pretrained_tokenizer(settings)
    ids = list(tokenizer(settings.prompt)["input_ids"])
    start = tokenizer.bos_token_id
    # some tokenizers have a start token and leave it to the caller
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def suffix_tokens(settings: Backbone) -> list[int]:
    """Token ids of what follows the items; no start token, as nothing starts there."""
    if not settings.suffix:
        return []
    tokenizer = pretrained_tokenizer(settings)
    return list(tokenizer(settings.suffix, add_special_tokens=False)["input_ids"])


def make_trainable(model: Recommender, settings: Backbone) -> None:
    """Mark what is trained: the adapters, and of the backbone what ``tuning`` says.

    Token embeddings stay as they are: only prompt and suffix read them.
    """
    backbone: PreTrainedModel = model.backbone
    backbone.requires_grad_(False)
    if settings.tuning == "full":
        backbone.requires_grad_(True)
        backbone.get_input_embeddings().requires_grad_(False)
    elif settings.tuning == "lora":
        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_rank,
            lora_dropout=0.05,
            target_modules=_mlp_projections(backbone),
        )
        inject_adapter_in_model(lora, backbone)


def _mlp_projections(backbone: PreTrainedModel) -> list[str]:
    """Paths of the linear maps of the blocks outside attention (gate, up and down in Llama)."""
    blocks = set(map(id, find_blocks(backbone)))
    roots = [name for name, module in backbone.named_modules() if id(module) in blocks]
    paths = [
        f"{root}.{name}"
        for root in roots
        for name, module in backbone.get_submodule(root).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "att" not in name.lower()
    ]
    if not paths:
        raise refusal(backbone, "no linear map outside attention to put LoRA on; use tuning = full")
    return paths


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold low-rank updates into the weights and put the plain layers back, in place."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the weights that were trained; the rest comes from the backbone and the item table."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {
        n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad
    }
    save_file(trained, folder / WEIGHTS)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Read what ``save_trained`` wrote."""
    try:
        trained = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): delete its trial") from error
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained.keys() != weights.keys():
        odd = sorted(trained.keys() ^ weights.keys())
        raise ValueError(f"{folder / WEIGHTS} does not fit the model: {', '.join(odd[:3])}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(trained[name])
