"""A checkpoint's architecture and tokenizer with random weights in place of the pretrained ones.

    python analyses/distillation/random_weights.py weights/plaintext-3M random-3M

The teacher that a sweep then trains from this folder has seen nothing but the log.
"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

import depthprobe as dp

SEED = 0  # of the weights; what a sweep's seeds vary is the adapters, the table and the batches


def main() -> None:
    source, target = sys.argv[1:]
    dp.load_backbone(source, random_init=SEED).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    main()
