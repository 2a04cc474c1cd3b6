"""Backbones, block surgery, the recommender and the SASRec baseline."""

import logging

# transformers imports these wherever they are installed, and they list the kernels that this
# machine has no use for
for _noisy in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
