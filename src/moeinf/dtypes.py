"""torch's dtypes by the names that safetensors gives them, the other way round, and the bytes of tensors."""

from __future__ import annotations

import torch

__all__ = ["SAFETENSORS_NAMES", "TORCH_DTYPES", "bytes_of"]

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Its numbers as a file has them, row-major."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
