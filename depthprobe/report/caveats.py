"""What a run does not show: controls that weaken the answer, warnings, limits of the numbers."""

from __future__ import annotations

from depthprobe.report.style import in_percent, method_style
from depthprobe.report.summary import FULL, HEADLINE, Point, Summary

FEW_SEEDS = 5


def caveats(summary: Summary, chosen: Point | None) -> tuple[str, ...]:
    """Sentences, the weightiest first; `chosen` is the point that the answer names."""
    found = [
        *_baselines(summary),
        *_no_blocks(summary),
        *_training(summary),
        *_pretraining(summary, chosen),
        *_data(summary),
        *_times(summary),
        *_seeds(summary),
        *_trials(summary),
    ]
    return tuple(dict.fromkeys(found))


def doubt(summary: Summary, baseline: str) -> str:
    """How a baseline puts the teacher's worth in doubt; empty if the teacher is shown better."""
    ratio = next((p.ratio.get((FULL, HEADLINE)) for p in summary.of(baseline)), None)
    if ratio is None or ratio.high < 1:
        return ""
    name = method_style(baseline).label
    less = "less accurate than" if ratio.low > 1 else "not shown to be more accurate than"
    return f"the teacher is {less} {name}, which reaches {in_percent(ratio)} of its {HEADLINE}"


def _baselines(summary: Summary) -> list[str]:
    text = doubt(summary, "sasrec")
    found = [f"{text[0].upper()}{text[1:]}."] if text else []
    if summary.teacher is not None and not summary.of("sasrec"):
        found.append("SASRec was not run: whether a language model is needed at all is not tested.")
    return found


def _no_blocks(summary: Summary) -> list[str]:
    """Heads of one kind, one on the last item's embedding alone: do blocks add anything?"""
    heads = {point.depth: point for point in summary.of("readout")}
    if 0 not in heads or (summary.blocks or 0) not in heads:
        return []
    ratio = summary.against(heads[0], heads[summary.blocks or 0])
    if ratio is None or ratio.high < 1 - summary.margin:
        return []
    return [
        f"It is not shown that blocks add more than {100 * summary.margin:g} %: a fresh head on "
        f"the last item alone reaches {in_percent(ratio)} of the {HEADLINE} of one behind all."
    ]


def _training(summary: Summary) -> list[str]:
    """A teacher that was cut off is an easy one to match."""
    last = int(summary.run.study.recipe.epochs)
    for record in summary.run.records:
        training = (record.get("costs") or {}).get("training") or {}
        if record["method"] == "full" and training.get("best_epoch") == last:
            return [
                f"The teacher was best at its last epoch ({last}): a longer training may change "
                "the comparison."
            ]
    return []


def _pretraining(summary: Summary, chosen: Point | None) -> list[str]:
    if chosen is None or summary.run.study.backbone.source == "embedded":
        return []
    control = next((p for p in summary.of("random-init") if p.depth == chosen.depth), None)
    ratio = summary.against(control, chosen) if control is not None else None
    if ratio is None:
        return [f"No random init at depth {chosen.depth}: what pretraining adds is not tested."]
    if ratio.high < 1:
        return []
    return [
        f"Pretraining is not shown to help: random init at depth {chosen.depth} reaches "
        f"{in_percent(ratio)} of this {HEADLINE}."
    ]


def _data(summary: Summary) -> list[str]:
    study, data = summary.run.study, summary.run.manifest.get("data", {})
    found = []
    if study.data.source == "embedded":
        found.append("The log is the generated default: the numbers say nothing about another log.")
    if study.backbone.source == "embedded":
        found.append(
            "The backbone is the small embedded one with random weights: pretraining has no part."
        )
    return found + [f"Data: {_sentence(warning)}" for warning in data.get("warnings", ())]


def _times(summary: Summary) -> list[str]:
    timed = any(point.speed for point in summary.points)
    conditions = summary.run.manifest.get("timing") or {}
    if not timed:
        return ["No times were compared: what a shallower model saves in time is not shown."]
    if conditions.get("device", "cpu") == "cpu":
        return ["Times were measured on a CPU; on a GPU the savings can differ."]
    return []


def _seeds(summary: Summary) -> list[str]:
    wanted, compared = int(summary.run.study.seeds), len(summary.seeds_compared)
    if not compared:
        return []
    if compared < wanted:
        plural = "" if compared == 1 else "s"
        return [
            f"{compared} seed{plural} of {wanted} compared: the others are not finished "
            "for the teacher and every candidate."
        ]
    if compared == 1:
        return ["One seed: the intervals do not hold the differences between trainings."]
    if compared < FEW_SEEDS:
        return [f"{compared} seeds: differences between trainings are only roughly known."]
    return []


def _trials(summary: Summary) -> list[str]:
    found = []
    if summary.left_out:
        names = ", ".join(f"{method_style(p.method).label} {p.depth}" for p in summary.left_out)
        found.append(f"Not compared with the teacher, for want of a common seed: {names}.")
    failed, total = len(summary.failed), len(summary.run.trials)
    if failed:
        found.append(f"{failed} of {total} trials failed; their errors are listed below.")
    return found


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
