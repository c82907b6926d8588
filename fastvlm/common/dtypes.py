"""The types of tensors, by name: what a checkpoint may hold, and what becomes of a name in NumPy and in PyTorch.

NumPy has no bfloat16: an array of uint16 is one of its bits. PyTorch, whose import takes two seconds and 0.5 GB, is
imported where a type of its own is asked for.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastvlm.common.errors import UserError

if TYPE_CHECKING:
    import torch

Array: TypeAlias = np.ndarray[Any, Any]

DTYPES = ("float32", "float16", "bfloat16")
DEVICES = ("auto", "cpu", "mps", "cuda")

# What a float's values are held as in NumPy.
ARRAYS: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
LARGEST = {"float32": 3.4028234663852886e38, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}

# What a checkpoint may hold: its name in safetensors (huggingface.co/docs/safetensors), and bytes of a value.
_STORED = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
SAFETENSORS_NAMES = {dtype: name for dtype, (name, _) in _STORED.items()}
SAFETENSORS_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
ITEMSIZE = {dtype: size for dtype, (_, size) in _STORED.items()} | {"uint32": 4}


def kind_of(array: Array) -> str | None:
    """The float type that an array's values are of, None if they are of no such type."""
    return next((name for name, held in ARRAYS.items() if array.dtype == held), None)


def bits_of(array: Array, unit: Any = None) -> Array:
    """The bits of a contiguous array's values, flat: uint16 or uint32, or whatever `unit` they are cut into."""
    return array.reshape(-1).view(unit or f"u{array.itemsize}")


def as_float32(array: Array) -> Array:
    """An array's values in float32, without a copy if they are already; uint16 is bfloat16's bits."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def as_array(tensor: "torch.Tensor") -> Array:
    """A tensor's values in NumPy, without a copy if it is contiguous."""
    import torch

    plain = tensor.detach().contiguous()
    return plain.view(torch.uint16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


def as_tensor(array: Array) -> "torch.Tensor":
    """The inverse of `as_array`: uint16 becomes bfloat16. The memory stays the array's."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def torch_dtype(name: str) -> "torch.dtype":
    """`float32`, `float16` or `bfloat16` as a torch dtype; UserError for any other name."""
    import torch

    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; expected one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def computed_in(stored: str, device: str) -> tuple[str, str]:
    """The meaning of `--dtype auto` on a device for stored weights: encoder's and projector's, language model's.

    float32 on the CPU; elsewhere as stored, but never the encoder in float16, whose range the published weights leave
    (2.5e5 against 65504), and nothing in bfloat16 where the device has none.
    """
    if device == "cpu":
        return "float32", "float32"
    language = stored if stored != "bfloat16" or has_bfloat16(device) else "float32"
    return ("float32" if language == "float16" else language), language


def choose_device(device: str) -> str:
    """Resolve "auto"; UserError for a device that this machine lacks."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available.get(device):
        have = " or ".join(name for name, usable in available.items() if usable)
        raise UserError(f"--device: got {device}, expected {have}: this machine has no {device.upper()}")
    return device


def has_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16 itself: CUDA from Ampere on, Metal from macOS 14 on."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def dtype_name(dtype: "torch.dtype") -> str:
    """`torch.float16` -> `float16`."""
    return str(dtype).removeprefix("torch.")
