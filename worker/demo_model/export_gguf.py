# pyright: reportMissingImports=false
"""Writes a trained demo model as a GGUF file.

    python -m worker.demo_model.export_gguf FOLDER OUT.gguf [--type q8_0|f16]

FOLDER is what `train` wrote. Needs torch, numpy and gguf.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from worker.demo_model.network import Shape

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TEXT, IM_END = 0, 2

TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def add_facts(writer: gguf.GGUFWriter, shape: Shape, file_type: gguf.LlamaFileType) -> None:
    """The model's sizes."""
    writer.add_name("tiny-story-chat")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.theta)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(file_type)


def add_tokenizer(writer: gguf.GGUFWriter, shape: Shape, tokenizer: dict[str, Any]) -> None:
    """The vocabulary, and the chat template."""
    tokens = [f"<|unused{index}|>" for index in range(shape.vocab)]
    types = [gguf.TokenType.UNUSED] * shape.vocab
    for text, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        types[added["id"]] = gguf.TokenType.CONTROL
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(IM_END)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(TEMPLATE)


def add_tensors(
    writer: gguf.GGUFWriter, weights: dict[str, torch.Tensor], kind: gguf.GGMLQuantizationType
) -> None:
    """The weights: matrices in `kind`, vectors as they are."""
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values.astype(np.float32))
        elif kind is gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a trained model as a GGUF file.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=list(TYPES), default="q8_0")
    options = parser.parse_args()
    trained = torch.load(options.folder / "model.pt", map_location="cpu")
    tokenizer = json.loads((options.folder / "tokenizer.json").read_text("utf-8"))
    shape = Shape(**trained["shape"])
    kind, file_type = TYPES[options.type]
    writer = gguf.GGUFWriter(str(options.out), "llama")
    add_facts(writer, shape, file_type)
    add_tokenizer(writer, shape, tokenizer)
    add_tensors(writer, trained["weights"], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
