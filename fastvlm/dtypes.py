"""The floating-point types of checkpoints, by name: the one place where names become torch dtypes."""

import torch

from fastvlm.errors import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# safetensors' names (huggingface.co/docs/safetensors) of what a checkpoint may hold.
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SAFETENSORS_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """`float32`, `float16` or `bfloat16` as a torch dtype; UserError for any other name."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def computed_in(stored: str, device: str) -> tuple[str, str]:
    """What `--dtype auto` is on a device for weights stored in a dtype: encoder's and projector's, language model's.

    float32 on the CPU; elsewhere as stored, but never the encoder in float16, whose range the published weights leave
    (2.5e5 against 65504), and nothing in bfloat16 where the device has none.
    """
    if device == "cpu":
        return "float32", "float32"
    language = stored if stored != "bfloat16" or has_bfloat16(device) else "float32"
    return ("float32" if language == "float16" else language), language


def has_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16 itself: CUDA from Ampere on, Metal from macOS 14 on."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `float16`."""
    return str(dtype).removeprefix("torch.")
