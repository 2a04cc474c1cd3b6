"""Backbones, block surgery, the recommender and the SASRec baseline."""

import logging

# transformers imports these if they are installed, and they list the kernels that this
# machine has no use for; torch resets the levels of its own loggers, but not their filters
for _noisy in ("bitsandbytes", "torchao"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: record.levelno >= logging.ERROR)
