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
# # Distil and ship
#
# **Distillation** trains a small **student** to imitate a large **teacher**. What exactly should it
# imitate: the teacher's inner states, its scores, or nothing at all? We try each beside plain
# training, read the comparison, take a student out of its run, and prove that what leaves is what
# was measured. About a minute.

# %%
# %matplotlib inline
import os
import sys  # noqa: F401  (the lines that begin with ! use it)
import tempfile
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # no bars in a notebook
os.environ["TQDM_DISABLE"] = "1"
os.chdir(tempfile.mkdtemp())  # all files below go here

import numpy as np
import pandas as pd
from transformers import AutoModelForCausalLM

import depthprobe as dp

# %% [markdown]
# ## 1. An ablation is one study
#
# An **ablation** takes a method apart to see which part does the work. A student's loss is a
# weighted sum; a weight of 0 takes its part out:
#
# | weight | what is asked of the student |
# |---|---|
# | `ce` | to predict the next item, as without a teacher |
# | `cosine`, `norm` | to have states like the teacher's, in direction and in size (SLMRec) |
# | `supervision` | to predict well from the states half-way, too; no teacher is involved |
# | `logits` | to score all items as the teacher does |
#
# A table `[variants.NAME.distillation]` changes some of them, and `distill:NAME` is then a method
# of its own. `finetune` is the comparison that matters: the same two blocks, without a teacher.

# %%
STUDY = """
layers = "2"
methods = ["full", "finetune", "distill", "distill:states", "distill:halfway", "distill:scores"]
seeds = 1
item_table = "learned"  # the items' vectors: learnt by each model, no SASRec needed

[data]
source = "embedded"

[backbone]
source = "embedded"
prompt = "Next item:"

[recipe]
epochs = 3
batch_size = 32
learning_rate = 0.003

[cost]
rounds = 3

# plain distill: all but the scores, as SLMRec does
[variants.states.distillation]
supervision = 0

[variants.halfway.distillation]
cosine = 0
norm = 0

[variants.scores.distillation]
cosine = 0
norm = 0
supervision = 0
logits = 1
"""
with open("study.toml", "w") as file:
    file.write(STUDY)
run = dp.run_sweep(dp.load_study("study.toml"), "run", jobs=0)  # 0: in this process
dp.build_report(run)
run.trials[["trial", "depth", "training_seconds", "training_teacher_seconds"]].round(1)

# %% [markdown]
# The last column is what the teacher took: its training, and what it was asked by the student.
# Whoever trains a teacher only to distil it pays for both.
#
# ## 2. Read the comparison
#
# The report writes it as `tables/ablation.csv`. `ratio` is the NDCG@10 of a method over that of
# fine-tuning at the same depth, each user compared with itself, and its 95 % interval.

# %%
table = pd.read_csv("run/tables/ablation.csv")
columns = ["NDCG@10", "ratio", "ratio low", "ratio high", "training seconds", "teacher seconds"]
table.set_index("method")[columns].round(3)

# %%
students = table.dropna(subset="ratio").set_index("method")["ratio"]
ends = table.dropna(subset="ratio").set_index("method")[["ratio low", "ratio high"]]
ax = students.plot.barh(
    xerr=[students - ends["ratio low"], ends["ratio high"] - students], color="lightgrey", capsize=3
)
ax.axvline(1, color="black")
_ = ax.set(xlabel="NDCG@10 over that of plain fine-tuning", ylabel="")

# %% [markdown]
# How to read it:
#
# - An interval that holds 1: the data can't tell this student from plain training. Don't pay for a
#   teacher on its account.
# - Below 1: imitation hurts. A student of a teacher that is worse than itself learns its faults.
#   Look at the teacher's own NDCG@10 first.
# - Four students were looked at. The best of four looks good by luck alone now and then, and one
#   seed knows nothing of other seeds. Before you believe a winner, run it again with `seeds = 5`.

# %%
run.metrics.query(
    "split == 'test' and protocol == 'full' and slice == 'all' and metric == 'NDCG@10'"
)[["trial", "value", "ci_low", "ci_high"]].round(3)

# %% [markdown]
# ## 3. Take one home
#
# `export` writes a trial as a folder of its own: an ordinary Hugging Face model that happens to
# have fewer blocks, the item vectors, the products' names, and a card that says what it is.

# %%
# !{sys.executable} -m depthprobe export run distill-states-d02-s0 small
sorted(os.listdir("small"))

# %% [markdown]
# Stock transformers opens it. It has two blocks, and needs no code of ours.

# %%
model = AutoModelForCausalLM.from_pretrained("small")
print(type(model).__name__, "with", model.config.num_hidden_layers, "blocks")

# %% [markdown]
# ## 4. Recommend
#
# Histories in, items out. Many users go in one call, and are computed in batches. On the command
# line: `depthprobe recommend small --history histories.txt --top 10`.

# %%
small = dp.load_recommender("small")
log = dp.load_data("run/shared/data")
history = list(log.item_ids[log.history(0)[:-1] - 1])
took = [small.titles[small.numbers[item] - 1] for item in history[-3:]]
likes = [f"{item.title} ({item.score:.2f})" for item in small.recommend([history], top=3)[0]]
print("took last:", *took, "may like:", *likes, sep="\n  ")

# %% [markdown]
# ## 5. Is it the model that was measured?
#
# Between a measurement and a server much can go wrong: another item order, another prompt, weights
# that were not saved. The run kept the rank of every test user's item. So ask the exported
# model the same questions. Where the run says "rank 3", the item must stand third in its list.

# %%
ranks = run.users.query("trial == 'distill-states-d02-s0' and protocol == 'full'")
histories = [list(log.item_ids[log.history(user)[:-1] - 1]) for user in ranks["user"]]
wanted = [log.item_ids[log.history(user)[-1] - 1] for user in ranks["user"]]

lists = [[item for item, _, _ in best] for best in small.recommend(histories, top=10)]
served = np.array(
    [
        best.index(item) + 1 if item in best else np.inf
        for best, item in zip(lists, wanted, strict=True)
    ]
)
measured = ranks["rank"].where(ranks["rank"] <= 10, np.inf).to_numpy()

assert np.mean(served == measured) > 0.999  # two scores may tie within a rounding
print(f"{np.isfinite(served).sum()} of {len(served)} users get their item among the first ten,")
print(f"{np.isfinite(measured).sum()} by the run's record; HR@10 {np.isfinite(served).mean():.4f}")

# %% [markdown]
# It is. The folder `small` can now be copied to where it serves; the run is not needed there.
# The licence of the backbone and the terms of the data go with it: the card names them.
