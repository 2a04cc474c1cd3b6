"""From the command to the backbone a reader passes few of our functions."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaModel

import depthprobe
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study

OURS = str(Path(depthprobe.__file__).parent)
COMMAND = 1  # functions before `run_sweep`: the command's own
# by what runs the method, what is on the way, and which of our functions calls the backbone
MOST = {
    ("training.train_recommender", "objectives.forward", "recommender.forward"): 10,
    ("training.train_recommender", "objectives.forward", "prompt.shared_prompt"): 12,
    ("training.train_recommender", "ranks.evaluate", "recommender.forward"): 10,
    ("probing.walk_blocks", "walk.rank_routes", "recommender.forward"): 7,
}


def ours() -> list[str]:
    """Our functions on the stack, `run_sweep` first."""
    frames = [frame for frame in inspect.stack(0) if frame.filename.startswith(OURS)]
    names = [f"{Path(frame.filename).stem}.{frame.function}" for frame in reversed(frames)]
    return names[names.index("sweep.run_sweep") :]


def test_few_functions_lie_between_the_command_and_the_backbone(
    study: Study, tmp_path: Path
) -> None:
    stacks: list[list[str]] = []

    def note(module: torch.nn.Module, inputs: object) -> None:
        if isinstance(module, LlamaModel):
            stacks.append(ours())

    few = replace(study, methods=("finetune", "skip"), layers="1", seeds=1, variants={})
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run_sweep(few, tmp_path / "run", jobs=0)
    finally:
        hook.remove()
    for way, most in MOST.items():
        calls = [s for s in stacks if {*way} <= {*s} and s[-1] == way[-1]]
        deepest = max(calls, key=len)
        assert COMMAND + len(deepest) <= most, " > ".join(deepest)
