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
# A language model is a stack of **blocks** (layers), each as dear as the next. Used as a
# recommender, it reads what a user took and predicts the next item. If the upper blocks add
# nothing, they can go, and serving gets cheaper. This notebook goes from nothing to a decision:
# which depth to serve, how much accuracy it keeps, what it saves. It takes about a minute.
#
# Nothing is downloaded: the log is generated, and the model is a small decoder of 12 blocks.

# %%
# %matplotlib inline
import tempfile
import warnings
from pathlib import Path

import pandas as pd

import depthprobe as dp

warnings.filterwarnings("ignore", message="IProgress not found")  # no bars in a notebook
folder = Path(tempfile.mkdtemp())  # for your own runs, a folder that you keep

# %% [markdown]
# ## 1. Say what to run
#
# A **study** is a text file. What it leaves out has a default. For your own question, `source`
# is your log and your model's folder, and the recipe may be longer.

# %%
STUDY = """
layers = "2,4"    # the depths to try: how many blocks stay
methods = ["popularity", "sasrec", "full", "early-exit", "finetune", "distill"]
seeds = 1

[data]
source = "embedded"

[backbone]
source = "embedded"

[sasrec]
dropout = 0.3

[sasrec.recipe]
epochs = 12
batch_size = 64

[recipe]
epochs = 5
batch_size = 64
learning_rate = 0.006
patience = 5

[cost]
rounds = 5        # how often each time is measured
"""
(folder / "study.toml").write_text(STUDY)
study = dp.load_study(folder / "study.toml")

# %% [markdown]
# The methods are what will be compared:
#
# - `full` is the **teacher**: the recommender trained with all its blocks.
# - `early-exit` reads the teacher out after each block. Nothing is trained again.
# - `finetune` keeps the first 2 or 4 blocks and trains this smaller model from the start.
# - `distill` does the same, but the **student** also imitates the teacher's inner states.
# - `popularity` and `sasrec` need no language model. If they win, you don't need one either.
#
# ## 2. Run it
#
# Each **trial** (a method, a depth, a seed) leaves a record in the run's folder. If this is
# interrupted, the same call goes on where it stopped. On the command line it would be
# `depthprobe sweep study.toml --output run`. `jobs=0` runs the trials one by one in this process,
# which is quickest for models as small as these.

# %%
run = dp.run_sweep(study, folder / "run", jobs=0)
run.trials[["trial", "status", "parameters_total", "training_seconds"]]

# %% [markdown]
# ## 3. Look at accuracy against depth
#
# For every test user, all items are ranked. **NDCG@10** is 1 if the item that the user really took
# next stands first, less if it stands lower, and 0 if it is not among the first ten.
#
# The report writes its numbers as tables too. We draw our own figure from one of them.

# %%
report = dp.build_report(run)
table = pd.read_csv(run.path / "tables" / "methods.csv")

names = {"early-exit": "early exit", "finetune": "fine-tuned", "distill": "distilled"}
ax = None
for method, label in names.items():
    own = table[table["method"] == method]
    low, high = own["NDCG@10"] - own["NDCG@10 low"], own["NDCG@10 high"] - own["NDCG@10"]
    ax = own.plot("depth", "NDCG@10", yerr=[low, high], capsize=3, marker="o", label=label, ax=ax)
for method, style in {"full": "-", "sasrec": "--", "popularity": ":"}.items():
    value = table.set_index("method").loc[method, "NDCG@10"]
    ax.axhline(
        value, color="grey", linestyle=style, label="teacher" if method == "full" else method
    )
ax.set(xlabel="blocks kept", ylabel="NDCG@10, 95 % intervals", ylim=(0, None))
_ = ax.legend(ncols=2)

# %% [markdown]
# How to read it:
#
# - The **early exits** say where in the teacher the answer appears. Where this curve is flat, later
#   blocks change little.
# - The **fine-tuned** and **distilled** models are what you would serve. Where they reach the
#   teacher's line, the blocks above were not needed on this log.
# - The lines without a language model keep us honest. If SASRec lies above the teacher, a
#   shallow language model is not the saving to look for.
#
# ## 4. Don't trust a point, ask for its interval
#
# With few test users, luck can lift a model to the teacher's line. So each user is compared with
# itself: what did the small model give this user, what did the teacher? The share of the
# teacher's NDCG@10 that is kept comes with a 95 % interval over users.

# %%
kept = ["NDCG@10 of teacher", "NDCG@10 of teacher low", "NDCG@10 of teacher high"]
small = table[table["method"].isin(["finetune", "distill"])]
small.set_index(["method", "depth"])[kept].rename(columns=lambda name: name[len("NDCG@10 of ") :])

# %% [markdown]
# 1 is "as good as the teacher". We ask that at most 1 % is lost (the **margin**). This is *shown*
# only where even the lower end is above 0.99. Where just the middle is, more users are needed.
#
# A share far above 1 is a warning about the teacher. A deep stack learns more slowly than a shallow
# one, and this recipe is short. Train longer before you call its upper blocks useless; the
# report says so if a training was still getting better when it ended.
#
# ## 5. What it saves
#
# All depths were timed on this machine, alone and in turn, so that a slow moment hits all of them.
# "Times faster" is against the teacher, round by round.

# %%
saved = ["parameters total", "inference times faster", "training times faster"]
small.set_index(["method", "depth"])[saved].round(1)

# %% [markdown]
# A student imitates only in training. So at one depth both methods serve at the same speed, and
# their inference times are those of the depth.
#
# ## 6. Decide
#
# The report puts all this together. It opens with the **sufficient depth**: the smallest whose
# loss is shown to be within the margin, corrected for having tried several. Where the
# users can't show it, it says so, and how many would. Open `report.html` in the run's folder.

# %%
print(
    report.relative_to(folder), "and", *sorted(p.name for p in (run.path / "tables").glob("*.csv"))
)

# %% [markdown]
# One seed and a generated log teach the steps and nothing about your data. Next:
#
# - `02_read_a_run`: the tables behind the report, and how to check its numbers.
# - `03_your_model_your_data`: your log, your model.
# - `04_distil_and_ship`: better students, and taking one home.
