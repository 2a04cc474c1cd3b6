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
# # Read a run: every number, from the ranks up
#
# A report shows what its author thought of. A run keeps more: the **rank** of every test user's
# item, for every model. This notebook reads it as DataFrames, computes a metric and an interval
# by hand, compares both with the report's, and draws a figure that no report has. About a minute.

# %%
# %matplotlib inline
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

import depthprobe as dp

warnings.filterwarnings("ignore", message="IProgress not found")  # no bars in a notebook
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1. A run to read
#
# With a run of your own, this is one line: `run = dp.open_run("runs/demo")`. Here we make a small
# one: a teacher of 12 blocks and a model of its first two, each trained twice (two **seeds**:
# other random numbers, the same data). The trainings are short, which suits the shallow model
# better than the deep one. That is fine here: we learn to read.

# %%
STUDY = """
layers = "2"
methods = ["popularity", "full", "finetune"]
seeds = 2
item_table = "learned"  # the items' vectors: learnt by each model, no SASRec needed

[data]
source = "embedded"

[backbone]
source = "embedded"

[recipe]
epochs = 3
batch_size = 32
learning_rate = 0.003

[cost]
rounds = 3
"""
(folder / "study.toml").write_text(STUDY)
run = dp.run_sweep(
    dp.load_study(folder / "study.toml"), folder / "run", jobs=0
)  # 0: in this process

# %% [markdown]
# ## 2. Three tables
#
# **`run.trials`**: a row a trial (method, depth, seed): its size, training, times. `kept` are the
# blocks that stayed, counted from 0.

# %%
run.trials[["trial", "method", "depth", "kept", "seed", "parameters_total", "training_epochs"]]

# %% [markdown]
# **`run.metrics`**: a row a trial and metric, with its interval. The `protocol` matters: `full`
# ranks the whole catalogue, `sampled-999` ranks the item among 999 others, which is easier. Never
# compare one with the other. `slice` is a group of users; `all` is everybody. The `validation`
# split chose the best epoch, so only `test` is reported.

# %%
metrics = run.metrics
everybody = metrics.query("split == 'test' and slice == 'all' and metric == 'NDCG@10'")
everybody.pivot_table("value", ["method", "depth"], "protocol").round(3)

# %% [markdown]
# **`run.users`**: a row a user and trial, with the rank of the item that the user really took. All
# else follows from this table. A rank may end in .5: tied items share the middle of their places.

# %%
users = run.users[run.users["protocol"] == "full"]
users.groupby("trial")["rank"].describe(percentiles=[0.25, 0.5, 0.75]).round(1)

# %% [markdown]
# ## 3. A metric by hand
#
# There is one right item a user. If it stands at rank r, then **HR@10** is 1 when r is at most 10,
# else 0. **NDCG@10** is then 1 / log2(r + 1): 1 for the first place, 0.63 for the second, 0.29 for
# the tenth. The figure of a model is the mean over users.

# %%
rank = users.loc[users["trial"] == "full-d12-s0", "rank"].to_numpy()
by_hand = np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean()

in_table = everybody.query("trial == 'full-d12-s0' and protocol == 'full'")["value"].item()
by_tool = dp.metrics_from_ranks(rank)["NDCG@10"]

assert np.allclose([by_tool, in_table], by_hand)
print(f"by hand {by_hand:.6f}, by the tool {by_tool:.6f}, in the run's table {in_table:.6f}")

# %% [markdown]
# ## 4. An interval by hand
#
# The question is not "how good?" but "how much worse than the teacher?". Both models answered the
# same users, so we compare **within** each user. A hard user is hard for both and cancels.
#
# Users and seeds are both samples: others would have given other figures. So the interval has two
# parts, how much the figure differs from user to user, and from seed to seed. Two seeds say little
# about seeds, which is why the factor is a quantile of Student's t and not 1.96.


# %%
def ndcg(method: str) -> np.ndarray:
    """NDCG@10 of each user, a row a seed."""
    own = users[users["trial"].str.startswith(method)]
    ranks = own.pivot_table("rank", index="trial", columns="user").to_numpy()  # (seeds, users)
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)


teacher, small = ndcg("full"), ndcg("finetune")
seeds, n = teacher.shape
share = small.mean() / teacher.mean()


def interval(changes: np.ndarray) -> list[float]:
    """Of the share, from what each seed and user (S, U) adds to it: an oracle in ten lines."""
    by_user, by_seed = changes.mean(axis=0), changes.mean(axis=1)
    left = changes - by_user - by_seed[:, None]
    noise = (left**2).sum() / (seeds - 1) / (n - 1) / n  # of users, in the mean of one seed
    of_users, of_seeds = by_user.var(ddof=1) / n, by_seed.var(ddof=1)
    variance = of_users + max(0, of_seeds - noise) / seeds
    freedom = variance**2 / (of_users**2 / (n - 1) + (of_seeds / seeds) ** 2 / (seeds - 1))
    reach = t.ppf(0.975, max(freedom, seeds - 1)) * variance**0.5
    return [share, share - reach, share + reach]


changes = (small - share * teacher) / teacher.mean()
paired = interval(changes)

dp.build_report(run)
table = pd.read_csv(run.path / "tables" / "methods.csv").set_index("method")
columns = ["NDCG@10 of teacher", "NDCG@10 of teacher low", "NDCG@10 of teacher high"]
pd.DataFrame(
    {
        "by hand, paired": paired,
        "the report's": table.loc["finetune", columns].to_numpy(float),
    },
    index=["share of the teacher's NDCG@10", "low", "high"],
).T.round(3)

# %% [markdown]
# They agree. What does the pairing do? Compare each user with somebody else, as if the models had
# answered different people, and the error that comes from the users grows.

# %%
shuffled = np.random.default_rng(0).permutation(n)  # the teacher's users are now other people
apart = (small - share * teacher[:, shuffled]) / teacher.mean()
errors = {
    name: each.mean(axis=0).std(ddof=1) / n**0.5
    for name, each in {"paired": changes, "not paired": apart}.items()
}
pd.Series(errors, name="standard error of the share, from users").round(3)

# %% [markdown]
# ## 5. Who loses?
#
# A mean can hide that one group pays. `run.slices` says which group each user belongs to: by the
# length of the history, and by how popular the item is that was asked for (`head`: the
# best-sellers, `tail`: what few people take).

# %%
share = pd.DataFrame({"teacher": teacher.mean(axis=0), "2 blocks": small.mean(axis=0)})
share["user"] = np.sort(users["user"].unique())
grouped = share.merge(run.slices, on="user").groupby("target", observed=True)
grouped[["teacher", "2 blocks"]].mean().assign(users=grouped.size()).round(3)

# %% [markdown]
# ## 6. A figure of your own
#
# HR@10 looks at one cut-off. The share of users whose item is among the first K, for *every* K, is
# one line more. If you show 20 items and not 10, read it at 20.

# %%
ax = None
for trial, label in {"full-d12-s0": "teacher", "finetune-d02-s0": "2 blocks"}.items():
    ranks = users.loc[users["trial"] == trial, "rank"].sort_values()
    found = pd.DataFrame({"K": ranks, "share": np.arange(1, len(ranks) + 1) / len(ranks)})
    ax = found.plot("K", "share", label=label, logx=True, drawstyle="steps-post", ax=ax)
_ = ax.set(xlabel="K (log scale)", ylabel="HR@K")

# %% [markdown]
# And did the same users win? Each user has two ranks. Users below the diagonal are served better by
# the two blocks, users above it by the teacher. Two models of equal accuracy may please different
# people.

# %%
both = users.pivot_table("rank", index="user", columns="trial")
ax = both.plot.scatter("full-d12-s0", "finetune-d02-s0", s=3, alpha=0.3, loglog=True)
ax.axline((1, 1), (10, 10), color="grey")
_ = ax.set(xlabel="rank by the teacher", ylabel="rank by 2 blocks", aspect="equal")

# %% [markdown]
# ## 7. Where a number comes from
#
# Each trial's record says which data, model, code and machine it comes from. Two runs whose
# `data` differs can't be compared, whatever their names say.

# %%
record = json.loads((run.path / "trials" / "full-d12-s0" / "record.json").read_text())
sorted(record["provenance"])
