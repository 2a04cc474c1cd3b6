"""A copy of a backbone whose blocks' weights are rounded to int8 and kept in float32.

python analyses/combine/rounded.py path/to/plaintext-3M build/rounded
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import depthprobe as dp
from depthprobe.models.backbones import load_tokenizer


@torch.no_grad()
def main(source: Path, target: Path) -> None:
    model = dp.load_backbone(source)
    blocks = dp.find_blocks(model)
    quantize_(blocks, Int8WeightOnlyConfig())
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize())
    model.save_pretrained(target)
    load_tokenizer(str(source)).save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
