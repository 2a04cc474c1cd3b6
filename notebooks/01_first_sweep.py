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
# # A first sweep: how many blocks does this recommender need?
#
# An LLM-based recommender reads a user's history through the blocks of a pretrained decoder and
# predicts the next item. Serving cost grows with the number of blocks. This notebook goes from
# nothing to a decision: which depth to serve, what it keeps of the accuracy, what it saves.
#
# It runs on the embedded default: a generated log and a small 12-block decoder, so nothing is
# downloaded. Replace `data.source` and `backbone.source` by your log and your model folder, and the
# rest stays as it is.

# %%
# %matplotlib inline
import warnings

import depthprobe as dp
from depthprobe.study import demo_study, override

warnings.filterwarnings("ignore", message="IProgress not found")  # text bars will do

# %% [markdown]
# ## 1. The study
#
# A study says what to run. We take the embedded one and make it smaller, so that the notebook
# takes a minute: two depths, one seed, and no skipping of single blocks.

# %%
study = override(
    demo_study(),
    name="first-sweep",
    layers="2,4",
    seeds=1,
    methods=("popularity", "sasrec", "full", "early-exit", "finetune", "distill"),
)
study.layers, study.methods

# %% [markdown]
# The methods: `popularity` and `sasrec` are baselines without a language model.
# `full` is the **teacher**, the trained recommender with all 12 blocks. `early-exit` reads the
# teacher out after every block, without training. `finetune` trains a **variant** with the first
# blocks alone; `distill` trains a **student** that also follows the teacher's states.
#
# ## 2. Run it
#
# Every trial leaves one record in the run's folder, so an interrupted run continues where it
# stopped, and a second call finds everything done.

# %%
run = dp.run_sweep(study, "runs/first-sweep")
run.trials[["trial", "status", "parameters_total", "training_seconds", "encode_ms"]]

# %% [markdown]
# ## 3. Accuracy against depth
#
# All items of the catalogue are ranked for every test user. NDCG@10 is 1 when the item the user
# took next stands on top, and 0 when it isn't among the ten best.

# %%
from depthprobe.report.figures import accuracy_vs_depth

accuracy_vs_depth(run).figure

# %% [markdown]
# Two things to look at:
#
# - The **early exit** curve says where in the trained teacher the answer appears. A teacher that is
#   cut without further training usually loses a lot.
# - The **variants** and **students** are trained at their depth. Where they reach the
#   teacher's band, the blocks above them were not needed for this log.
#
# ## 4. From a picture to a decision
#
# A point near the teacher is not enough: with few test users, luck could have put it there. The
# share of the teacher's NDCG@10 that a candidate keeps is computed user by user, on the same
# users, and gets an interval by resampling them.

# %%
import numpy as np

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import bootstrap_ratio


def ndcg(trial: str) -> np.ndarray:
    """NDCG@10 of every test user."""
    users = run.users
    chosen = users[(users["trial"] == trial) & (users["protocol"] == "full")]
    return per_user_metric(chosen["rank"].to_numpy(), "NDCG@10")


teacher = ndcg("full-d12-s0")
for trial in ["finetune-d02-s0", "finetune-d04-s0", "distill-d02-s0", "distill-d04-s0"]:
    kept = bootstrap_ratio(ndcg(trial), teacher)
    print(f"{trial}: keeps {kept.value:.1%} [{kept.low:.1%}, {kept.high:.1%}] of the teacher")

# %% [markdown]
# ## 5. What it saves
#
# Times are measured on this machine, alone, depths in turn; each round of a depth is compared with
# the same round of the teacher, so that a machine that slows down does not favour anybody.

# %%
from depthprobe.evaluation.statistics import median_ratio


def seconds(trial: str, action: str) -> list[float]:
    """Raw seconds of each round."""
    return run.record(trial)["costs"]["timing"][action]["seconds"]


for trial in ["distill-d02-s0", "distill-d04-s0"]:
    for action in ["encode", "train_step"]:
        ratio = median_ratio(seconds(trial, action), seconds("full-d12-s0", action))
        print(f"{trial}: {action} {ratio.value:.1f}x faster [{ratio.low:.1f}, {ratio.high:.1f}]")

# %% [markdown]
# ## 6. The answer in words
#
# The report puts this together: the smallest depth whose loss is *shown* to be within the margin
# (1 % of NDCG@10 unless the study says otherwise), corrected for having looked at several depths.
# Where the users don't suffice to show it, it says so, and how many would.

# %%
from depthprobe.report.answer import build_answer

answer = build_answer(run)
print(answer.headline)
print(answer.detail)

# %%
dp.build_report(run)

# %% [markdown]
# Open the report in a browser. Then take the model home: `depthprobe export RUN TRIAL FOLDER`
# writes it as an ordinary Hugging Face checkpoint.
