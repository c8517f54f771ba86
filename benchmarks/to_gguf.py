"""Write a random checkpoint as the GGUF files that llama.cpp reads, so that both can be compared on the same weights.

    pip install gguf llama-cpp-python
    python -m moeinf.testing small random-small && moeinf pull ./random-small
    python benchmarks/to_gguf.py random-small small.gguf --quantize Q8_0 --quantize Q4_0
    moeinf bench random-small --experts 25% --against llama.cpp --gguf small.gguf --temperature 1

Takes what `moeinf.testing` writes of the Qwen3-MoE family (`small`, `qwen3-30b-a3b`), whose tensors lie as llama.cpp
wants them but for gates and ups, which are two tensors there. The file has no vocabulary: token ids go in and come
out. Quantised files (`small-Q8_0.gguf`) are made by llama.cpp, the dense part too.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.pop(0)  # or transformers takes the kernels.py beside this for the package of that name

import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from safetensors import safe_open
from transformers import AutoConfig

ARCHITECTURE = "qwen3moe"
_HALVES = {"gate_up_proj": ("gate_proj", "up_proj")}


def write(folder: Path, file: Path) -> None:
    """Write the checkpoint in `folder` to `file`, weights in bfloat16, norms and routers in float32."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen3_moe":
        raise SystemExit(f"{folder} is of {config.model_type}: only qwen3_moe is known here")
    writer = GGUFWriter(file, ARCHITECTURE)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, tensor in _tensors(folder):
        known = names.get_name(name, try_suffixes=(".weight",))
        if known is None:
            raise SystemExit(f"llama.cpp knows no {name}")
        _add(writer, known if known.endswith(".weight") else f"{known}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                module, _, last = name.rpartition(".")
                if last in _HALVES:
                    halves = tensors.get_tensor(name).chunk(2, dim=1)
                    yield from ((f"{module}.{half}", part) for half, part in zip(_HALVES[last], halves, strict=True))
                else:
                    yield name, tensors.get_tensor(name)


def _add(writer: GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
        writer.add_tensor(name, tensor.float().numpy())
    else:
        as_bytes = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, as_bytes, raw_dtype=GGMLQuantizationType.BF16)


def quantize(file: Path, kind: str) -> Path:
    """The file in one of llama.cpp's quantised forms, beside it."""
    import llama_cpp

    known: Any = vars(llama_cpp)
    if (number := known.get(f"LLAMA_FTYPE_MOSTLY_{kind}")) is None:
        raise SystemExit(f"llama.cpp knows no {kind}")
    quantized = file.with_stem(f"{file.stem}-{kind}")
    wishes = llama_cpp.llama_model_quantize_default_params()
    wishes.ftype = number
    if failed := llama_cpp.llama_model_quantize(bytes(file), bytes(quantized), ctypes.byref(wishes)):
        raise SystemExit(f"llama.cpp could not write {quantized}: {failed}")
    return quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quantize", action="append", default=[], metavar="KIND", help="Q8_0, Q4_0, Q4_K_M, ...")
    asked = parser.parse_args()
    write(asked.folder, asked.file)
    for kind in asked.quantize:
        print(quantize(asked.file, kind))


if __name__ == "__main__":
    main()
