"""How a study is run and what is told about it meanwhile: nothing here decides a number."""

from __future__ import annotations

from dataclasses import dataclass

from depthprobe.study.errors import BadInput, at_least


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What each job of ``--executor slurm`` asks the cluster for; what is left out, it decides.

    Attributes:
        partition: where the jobs run.
        account: who pays.
        minutes: a job's time limit: one that reaches it is queued again and goes on.
        gpus: of a job.
        cpus: of a job.
        memory_gb: of a job.
        setup: lines of shell that a job runs first.
    """

    partition: str | None = None
    account: str | None = None
    minutes: int = 720
    gpus: int = 1
    cpus: int = 4
    memory_gb: int = 32
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {"minutes": self.minutes, "cpus": self.cpus, "memory_gb": self.memory_gb}
        at_least("slurm", sizes, 1)
        at_least("slurm", {"gpus": self.gpus}, 0)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where trainings are told to while they run.

    Attributes:
        to: names of accelerate's trackers: ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``, ...
    """

    to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.to)) != len(self.to):
            raise BadInput("tracking.to", ",".join(self.to), "each tracker once")
