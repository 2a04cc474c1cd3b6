# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your model, your data
#
# From a table of purchases and a folder with a model to the first answer: look at the log, prepare
# it, check that the model can be cut, sweep. The last part probes a recommender that was written
# and trained without depthprobe. Under a minute.
#
# We make up both the purchases and the model, so that this runs anywhere. Replace them by yours.

# %%
# %matplotlib inline
import csv
import os
import sys  # noqa: F401  (the lines that begin with ! use it)
import tempfile
import warnings
from datetime import datetime, timedelta

warnings.filterwarnings("ignore", message="IProgress not found")  # no bars in a notebook
os.environ["TQDM_DISABLE"] = "1"
os.chdir(tempfile.mkdtemp())  # all files below go here

import numpy as np
import pandas as pd
import torch

import depthprobe as dp
from depthprobe.evaluation.ranks import EvalSet
from depthprobe.probing.passes import CausalEncoder, early_exit
from depthprobe.probing.walk import rank_routes, route
from depthprobe.study import Cleaning, Columns

# %% [markdown]
# ## 1. A log
#
# A row a purchase: who, what, when, and how many stars. Our shop has 15 shelves of 10 products.
# A customer likes three shelves and mostly buys the product that stands next to the last one. So
# there is something to learn, and it takes a memory: three threads run through a history.

# %%
draw = np.random.default_rng(0)
with open("shop.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["customer", "product", "bought at", "stars"])
    for customer in range(1000):
        shelves, place = draw.choice(15, size=3, replace=False), draw.integers(10, size=3)
        when = datetime(2024, 1, 1) + timedelta(days=float(draw.uniform(0, 300)))
        for _ in range(draw.integers(6, 16)):
            thread = draw.integers(3)
            place[thread] = (place[thread] + 1) % 10 if draw.random() < 0.8 else draw.integers(10)
            when += timedelta(days=float(draw.exponential(3)))
            product = f"sku-{shelves[thread] * 10 + place[thread]:03d}"
            rows.writerow(
                [f"c{customer}", product, when.isoformat(" ", "seconds"), draw.integers(1, 6)]
            )

pd.read_csv("shop.csv").head(3)

# %% [markdown]
# ## 2. Look, then prepare
#
# `depthprobe data show` says what a log holds and warns of what would spoil the results: no times,
# times too coarse to order a history, test items that training never saw. Columns with unusual
# names are named by hand.

# %%
COLUMNS = "--user-column customer --item-column product --time-column 'bought at'"
# !{sys.executable} -m depthprobe data show shop.csv {COLUMNS}

# %% [markdown]
# Preparing orders each history by time and numbers the products. Nothing is dropped unless you ask.
# Here customers and products with fewer than five purchases go. Every step is counted.

# %%
columns = Columns(user="customer", item="product", time="bought at", rating="stars")
log = dp.prepare_data("shop.csv", "shop", columns=columns, cleaning=Cleaning(core=5))
print(f"{log.n_users} users, {log.n_items} items, {log.n_interactions} interactions")
print("the first user bought", *log.item_ids[log.history(0) - 1])

# %% [markdown]
# ## 3. A model
#
# Any decoder of transformers that is saved with safetensors will do: a folder, or the name of a
# model on the Hugging Face hub. Ours is a Qwen3 of six small blocks with random weights. It knows
# no language, so it needs no tokenizer, and the prompt stays empty.

# %%
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.manual_seed(7)
config = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)
Qwen3ForCausalLM(config).save_pretrained("model")

# %% [markdown]
# Can it be cut? `check` builds a small copy of the same architecture, cuts it, skips blocks, saves
# and reloads, and compares. It takes seconds, whatever the size of the model. Do this before any
# training.

# %%
# !{sys.executable} -m depthprobe check --backbone model

# %% [markdown]
# ## 4. Sweep
#
# The prepared folder and the model's folder go into the study. `popularity` asks whether the model
# learnt anything; `random-init` asks what its pretraining is worth. Ours has none, so they should
# agree. For a pretrained model this control is the one that reviewers ask for.

# %%
STUDY = """
layers = "1,2"
methods = ["popularity", "full", "finetune", "random-init"]
seeds = 1
item_table = "learned"

[data]
source = "shop"

[backbone]
source = "model"
prompt = ""

[recipe]
epochs = 12
batch_size = 64
learning_rate = 0.003

[cost]
rounds = 3
"""
with open("study.toml", "w") as file:
    file.write(STUDY)
run = dp.run_sweep(dp.load_study("study.toml"), "run", jobs=0)  # 0: in this process
dp.build_report(run)
table = pd.read_csv("run/tables/methods.csv").set_index(["method", "depth"])
table[["NDCG@10", "NDCG@10 low", "NDCG@10 high", "parameters total"]].round(3)

# %% [markdown]
# `run/report.html` has the answer in words, the figures and the warnings. The same on the command
# line: `depthprobe sweep study.toml --output run`.
#
# ## 5. A recommender that is not ours
#
# You may have a trained recommender already, with its own code. If a transformers decoder reads the
# histories, it can be probed without training it again. It has to say two things:
#
# - `encode`: histories in, a vector a user out;
# - `item_matrix`: a vector an item. A user's score of an item is the dot product.
#
# Item numbers start at 1; 0 is padding. This one reads items as if they were words.

# %%
from transformers import GPT2Config, GPT2Model


class Mine(torch.nn.Module, CausalEncoder):
    """A GPT-2 whose words are the products."""

    def __init__(self, items: int) -> None:
        super().__init__()
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        self.backbone = GPT2Model(GPT2Config(vocab_size=items + 1, **sizes))

    def encode(self, histories, lengths):  # (B, T), (B,) -> (B, d)
        states = self.backbone(input_ids=histories, use_cache=False).last_hidden_state
        return states[torch.arange(len(lengths)), lengths - 1]

    def item_matrix(self):  # (I + 1, d)
        return self.backbone.get_input_embeddings().weight.detach()


# %% [markdown]
# Its training is its own business. Each user's last item is kept out of it, to ask for later.

# %%
histories = [log.history(user)[:-1] for user in range(log.n_users)]
targets = np.array([log.history(user)[-1] for user in range(log.n_users)])

mine = Mine(log.n_items)
padded = torch.zeros(log.n_users, max(map(len, histories)), dtype=torch.long)
for user, history in enumerate(histories):
    padded[user, : len(history)] = torch.tensor(history)
optimizer = torch.optim.AdamW(mine.parameters(), lr=3e-3)
for _ in range(12):
    for rows in torch.randperm(log.n_users).split(64):
        states = mine.backbone(input_ids=padded[rows, :-1], use_cache=False).last_hidden_state
        scores = states @ mine.backbone.get_input_embeddings().weight.T
        loss = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), padded[rows, 1:].flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
_ = mine.eval()

# %% [markdown]
# Now ask it. `early_exit` reads it out after each block: one pass over the users gives all depths.
# A `route` says which blocks run: here each block is left out once.

# %%
eval_set = EvalSet(np.arange(log.n_users), histories, targets, seen=histories, negatives=None)
cpu = torch.device("cpu")


def ndcg(ranks: dict[str, np.ndarray]) -> float:
    return dp.metrics_from_ranks(ranks["full"])["NDCG@10"]


exits = early_exit(mine, eval_set, device=cpu)
without = [route([block for block in range(4) if block != left]) for left in range(4)]
skipped = rank_routes(mine, eval_set, without, device=cpu)
print("after so many blocks: ", *(f"{depth}: {ndcg(each):.3f}" for depth, each in enumerate(exits)))
print(
    "without this block:   ", *(f"{block}: {ndcg(each):.3f}" for block, each in enumerate(skipped))
)

# %% [markdown]
# Depth 0 is the last item's own vector and nothing else: what the blocks add is the rise from
# there. A block whose absence changes little is a candidate to go. The other probes (similarities,
# greedy removal, read-outs, settling) take the same `mine` and `eval_set`; the guide to probing
# lists them.
#
# One check, that costs nothing: all blocks kept must be the model itself.

# %%
with torch.inference_mode():
    same = rank_routes(mine, eval_set, [route(range(4))], device=cpu)[0]
assert np.array_equal(same["full"], exits[4]["full"])
