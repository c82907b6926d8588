"""Tensor names: the LLaVA layout's and older Transformers' names <-> the canonical ones, as tables.

Canonical names are those of Transformers' `FastVlmForConditionalGeneration`, whose vision tower is timm's `FastVit`.
The LLaVA names are those of the modules in apple/ml-fastvlm (`mobileclip/mci.py`, `llava_arch.py`).
"""

import re
from collections.abc import Collection, Sequence

VISION = "model.vision_tower.timm_model."
PROJECTOR = "model.multi_modal_projector."
LANGUAGE = "model.language_model."
LM_HEAD = "lm_head.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"

# (LLaVA, canonical) prefixes; the first that matches is taken, so the general one comes last.
_LLAVA_PREFIXES = (
    ("model.vision_tower.vision_tower.model.", VISION),
    ("model.mm_projector.0.", PROJECTOR + "linear_1."),
    ("model.mm_projector.2.", PROJECTOR + "linear_2."),
    ("lm_head.", "lm_head."),
    ("model.", LANGUAGE),
)

# The names that Transformers 4 wrote for the same class, before the parts moved under `model.`.
_OLD_TRANSFORMERS_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", LANGUAGE),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", PROJECTOR),
)

# (canonical, artefact): the MLX folder's names, as recipes speak of them.
_ARTEFACT_PREFIXES = (
    (LANGUAGE, "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    (PROJECTOR + "linear_1.", "multi_modal_projector.linear_0."),
    (PROJECTOR, "multi_modal_projector."),
)

# Apple keeps stem, downsampling, position encoding and blocks in one flat list; timm keeps them by stage.
_VISION_PLACES = (
    ("patch_embed.", "stem."),
    ("network.0.", "stages.0.blocks."),
    ("network.1.proj.", "stages.1.downsample.proj."),
    ("network.2.", "stages.1.blocks."),
    ("network.3.proj.", "stages.2.downsample.proj."),
    ("network.4.", "stages.2.blocks."),
    ("network.5.proj.", "stages.3.downsample.proj."),
    ("network.6.pe.", "stages.3.pos_emb.pos_enc."),
    ("network.6.reparam_conv.", "stages.3.pos_emb.reparam_conv."),
    ("network.7.", "stages.3.blocks."),
    ("network.8.proj.", "stages.4.downsample.proj."),
    ("network.9.pe.", "stages.4.pos_emb.pos_enc."),
    ("network.9.reparam_conv.", "stages.4.pos_emb.reparam_conv."),
    ("network.10.", "stages.4.blocks."),
    ("conv_exp.", "final_conv."),
)

# The prefixes that DistributedDataParallel, torch.compile and PEFT put before every name of a model that they wrap.
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")

_VISION_PARTS = (
    (".rbr_conv.", ".conv_kxk."),
    (".rbr_scale.", ".conv_scale."),
    (".rbr_skip.", ".identity."),
    (".lkb_origin.", ".large_conv."),
    (".downsample.proj.0.lkb_reparam.", ".downsample.proj.0.reparam_conv."),
    (".convffn.", ".mlp."),
    (".se.reduce.", ".se.fc1."),
    (".se.expand.", ".se.fc2."),
)

IMAGE_NEWLINE = "image_newline"
# Present in real checkpoints and of no effect on inference: the classifier of the pre-training, BatchNorm's counters
# (meaningful only in training), rotary tables that old versions saved, and what LLaVA puts between tiles.
_IGNORED = re.compile(
    r"(\.vision_tower\.model\.head\.|timm_model\.head\.|\.num_batches_tracked$|\.rotary_emb\.inv_freq$"
    r"|^(model\.)?image_newline$)"
)


def of_trained(name: str, known: Collection[str]) -> str | None:
    """The canonical name, one of `known`, of a tensor that was trained in any of the classes that hold FastVLM or its
    language model: LLaVA's, Transformers', mlx-vlm's, Qwen2's. None if it is none of them; a vision tower's in another
    form is its name all the same."""
    artefact = [(theirs, ours) for ours, theirs in _ARTEFACT_PREFIXES]
    names = [
        renamed
        for inner in (name, name.removeprefix("model."), "model." + name)
        for renamed in (from_llava(inner), from_transformers(inner), _swap_prefix(inner, artefact))
        if renamed is not None
    ]
    found = next((renamed for renamed in names if renamed in known), None)
    return found or next((renamed for renamed in names if renamed.startswith(VISION)), None)


def is_ignored(source: str) -> bool:
    """Whether a tensor of this (source) name is known to be unused by inference."""
    return bool(_IGNORED.search(source))


def wrapper_prefix(names: Collection[str]) -> str:
    """The prefix that wrappers put before all of the (source) names, "" if nothing."""
    prefix = ""
    while names and (more := [wrap for wrap in _WRAPPERS if all(name.startswith(prefix + wrap) for name in names)]):
        prefix += more[0]
    return prefix


def from_llava(name: str) -> str | None:
    """The canonical name of a LLaVA-layout tensor, or None for one that the layout doesn't have."""
    renamed = _swap_prefix(name, _LLAVA_PREFIXES)
    if renamed is None or not renamed.startswith(VISION):
        return renamed
    place = _swap_prefix(renamed[len(VISION) :], _VISION_PLACES)
    if place is None:
        return None
    for llava, canonical in _VISION_PARTS:
        place = place.replace(llava, canonical)
    return VISION + re.sub(r"(\.layer_scale(?:_[12])?)$", r"\1.gamma", place)


def to_llava(name: str) -> str:
    """The LLaVA layout's name of a canonical tensor name; KeyError if it has none."""
    prefixes = [(canonical, llava) for llava, canonical in _LLAVA_PREFIXES]
    renamed = _swap_prefix(name, prefixes)
    if renamed is None:
        raise KeyError(name)
    if not name.startswith(VISION):
        return renamed
    place = name[len(VISION) :].removesuffix(".gamma")
    for llava, canonical in _VISION_PARTS:
        place = place.replace(canonical, llava)
    swapped = _swap_prefix(place, [(canonical, llava) for llava, canonical in _VISION_PLACES])
    if swapped is None:
        raise KeyError(name)
    return _LLAVA_PREFIXES[0][0] + swapped


def from_transformers(name: str) -> str:
    """The canonical name of a Transformers-layout tensor (only versions before 5 differ)."""
    return _swap_prefix(name, _OLD_TRANSFORMERS_PREFIXES) or name


def to_artefact(name: str) -> str | None:
    """The name in the artefact's MLX folder, as in recipes; None for the vision tower's, which is not there."""
    return _swap_prefix(name, _ARTEFACT_PREFIXES)


def _swap_prefix(name: str, pairs: Sequence[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return None
