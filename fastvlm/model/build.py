"""Build Transformers' FastVLM, or its encoder alone, from a checkpoint: strictly, weights in memory once."""

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastvlm.checkpoint import naming
from fastvlm.checkpoint.checkpoint import Checkpoint
from fastvlm.checkpoint.configuration import ARCHITECTURE
from fastvlm.checkpoint.shapes import skeleton
from fastvlm.common.dtypes import as_tensor, dtype_name, torch_dtype
from fastvlm.model.streamed import STREAMED, Memory, Rows, StreamedEmbedding, StreamedLinear

if TYPE_CHECKING:
    from transformers import FastVlmForConditionalGeneration


def build(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
    vision_dtype: str | torch.dtype | None = None,
    streamed: bool = False,
) -> "FastVlmForConditionalGeneration":
    """The whole model in the checkpoint's form (training or folded), eval mode, no gradients.

    `attn_implementation` is the text decoder's; the vision tower's attention is timm's own. `vision_dtype` is the
    vision tower's and the projector's (None: `dtype`). Weights already in `dtype`
    stay memory-mapped on the CPU (changes in memory never reach the file); others are converted one at a time.
    `streamed`: the language model's matrices stay as they are stored (`fastvlm.model.streamed`).
    """
    config: Any = copy.deepcopy(checkpoint.hf_config)  # Any: Transformers types its parts as dict | config | None
    config.text_config._attn_implementation = attn_implementation
    config.image_token_index = checkpoint.image_token_id
    model = skeleton(config)
    if streamed:
        _stream(model, checkpoint, _dtype(dtype))
    _load(model, checkpoint, "", _dtype(dtype), torch.device(device), _dtype(vision_dtype or dtype))
    decoder = model.model.language_model
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config.text_config).to(
        device
    )  # not in any file: float32 always
    if checkpoint.tied and not streamed:
        model.lm_head.weight = decoder.embed_tokens.weight
    return _frozen(model)


def _stream(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Put streamed layers in the places of the language model's embeddings and linear layers; biases are left."""
    memory, head = Memory(), naming.LM_HEAD.removesuffix(".weight")

    def rows(name: str, alone: bool = False) -> Rows:
        if checkpoint.tensors[name].change is not None:
            return partial(_merged_rows, checkpoint, name)
        # Of what stays, one mapping for all: a page that two mappings share counts twice.
        return checkpoint.read(name, mapped=True, alone=alone).__getitem__

    for path, layer in [*model.named_modules()]:
        name = naming.EMBEDDINGS if path == head and checkpoint.tied else f"{path}.weight"
        if isinstance(layer, nn.Embedding):
            model.set_submodule(path, StreamedEmbedding(rows(name), dtype))
        elif isinstance(layer, nn.Linear) and path.startswith((naming.LANGUAGE, head)):
            info = checkpoint.tensors[name]
            keeps = info.change is not None or memory.take(info.nbytes)  # merged rows are computed at each use
            model.set_submodule(path, StreamedLinear(partial(rows, name, not keeps), info.shape, keeps, layer.bias))


def _merged_rows(checkpoint: Checkpoint, name: str, which: slice | torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor that an adapter changes: a slice, or those of ids (N,)."""
    if isinstance(which, slice):
        return as_tensor(checkpoint.rows(name, which.start, which.stop))
    ids, places = which.unique(return_inverse=True)
    return torch.cat([as_tensor(checkpoint.rows(name, row, row + 1)) for row in ids.tolist()])[places]


def folded_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The vision tower in folded form on the meta device, whatever the checkpoint's form is: names and shapes."""
    return _fastvit(checkpoint, inference_mode=True)


def encoder(checkpoint: Checkpoint, dtype: str | torch.dtype = torch.float32) -> nn.Module:
    """Only the vision tower, timm's FastVit: `forward_features` takes (B,3,S,S) in 0..1 and gives (B,C,S/64,S/64)."""
    model = _fastvit(checkpoint)
    _load(model, checkpoint, naming.VISION, _dtype(dtype), torch.device("cpu"), _dtype(dtype))
    return _frozen(model)


def tower(checkpoint: Checkpoint) -> nn.Module:
    """The vision tower in the checkpoint's form on the meta device."""
    return _fastvit(checkpoint)


def _fastvit(checkpoint: Checkpoint, **changed: Any) -> nn.Module:
    import timm

    args = {**checkpoint.model_config.vision_args, **changed}
    with torch.device("meta"):
        return timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, **args)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    return torch_dtype(dtype) if isinstance(dtype, str) else dtype


def _load(
    model: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
    vision_dtype: torch.dtype,
) -> None:
    """Assign every tensor below `prefix` to the module on the meta device; anything left over or missing raises."""
    state: dict[str, Any] = {}
    streamed = {f"{path}.weight" for path, layer in model.named_modules() if isinstance(layer, STREAMED)}
    for name in checkpoint.tensors:
        if name.startswith(prefix) and name not in streamed:
            wanted = vision_dtype if name.startswith((naming.VISION, naming.PROJECTOR)) else dtype
            same = dtype_name(wanted) == checkpoint.tensors[name].dtype
            state[name[len(prefix) :]] = checkpoint.read(name, mapped=same).to(device=device, dtype=wanted)
    for name in model.state_dict():
        if naming.is_ignored(name):
            state[name] = torch.zeros((), dtype=torch.int64, device=device)  # BatchNorm's counter
    if checkpoint.tied and not prefix and not streamed:
        state[naming.LM_HEAD] = state[naming.EMBEDDINGS]
    model.load_state_dict(state, strict=True, assign=True)


def _frozen(model: Any) -> Any:
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"not loaded: {', '.join(left)}")
    return model.eval().requires_grad_(False)
