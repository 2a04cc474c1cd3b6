"""How a run was measured, as pairs of a word and what it was; only what the run recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from depthprobe.report.style import count, significant
from depthprobe.report.summary import SAMPLED, Summary


def conditions(summary: Summary) -> tuple[str, ...]:
    """The conditions of the first screen, each a few words."""
    run, manifest = summary.run, summary.run.manifest
    data, machine = manifest.get("data", {}), manifest.get("machine", {})
    tested = max((point.users for point in summary.points), default=0)
    seeds = int(run.study.seeds)
    said = [
        f"data {data['name']}" if data.get("name") else "",
        f"{data['users']:,} users ({tested:,} tested)" if data.get("users") else "",
        f"{data['items']:,} items" if data.get("items") else "",
        f"backbone {manifest.get('backbone', {}).get('source', '')}",
        f"{seeds} seed{'' if seeds == 1 else 's'}",
        "leave-one-out, full ranking"
        + (", seen items left out" if run.study.protocol.filter_seen else ""),
        _machine(machine),
    ]
    return tuple(part for part in said if part)


def how_measured(summary: Summary) -> tuple[tuple[str, str], ...]:
    """Word and fact, in the order of reading; what the run did not record is absent."""
    run, manifest = summary.run, summary.run.manifest
    study = run.study
    facts = [
        ("data", _data(manifest.get("data", {}))),
        ("warnings", " ".join(manifest.get("data", {}).get("warnings", ())) or "none"),
        ("backbone", _backbone(manifest.get("backbone", {}), study)),
        ("split", "Leave-one-out in the order of time: a user's last item is the test, the one "
                  "before it validation; neither is ever trained on."),
        ("ranking", "Every item of the catalogue is ranked for every tested user; items seen "
                    f"before are {'left out' if study.protocol.filter_seen else 'ranked too'}. "
                    "A rank is the mean rank over ties, so equal scores earn nothing."),
        ("sampled ranking", _sampled(summary)),
        ("intervals", f"95 %, bootstrap of {study.protocol.resamples:,} draws over users, and over "
                      "seeds where there are several; comparisons with the teacher use the same "
                      "users and seeds in both arms. Times: the median ratio over paired rounds."),
        ("sufficient depth", f"The smallest depth whose loss of NDCG@10 against the teacher is "
                             f"within {100 * study.protocol.margin:g} % with 95 % confidence, for "
                             "all candidates at once (Bonferroni). Early exits and all trained "
                             "methods are candidates; baselines, random init and skips are not."),
        ("timing", _timing(manifest.get("timing") or {})),
        ("machine", _machine(manifest.get("machine", {}), long=True)),
        ("versions", _pairs(manifest.get("versions", {}))),
        ("git commit", _git(manifest.get("git") or {})),
        ("study", f"{study.name}, hash {manifest.get('study_hash', 'not recorded')}"),
        ("wall time", _duration(manifest.get("wall_seconds"))),
    ]  # fmt: skip
    return tuple((word, text) for word, text in facts if text)


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return ""
    sizes = [f"{data[key]:,} {key}" for key in ("users", "items", "interactions") if key in data]
    said = [f"{data.get('name', 'unnamed')}: {', '.join(sizes)}"]
    if data.get("statistics"):
        said.append(_pairs(data["statistics"]))
    if data.get("fingerprint"):
        said.append(f"fingerprint {str(data['fingerprint'])[:16]}")
    return "; ".join(said)


def _backbone(backbone: Mapping[str, Any], study: Any) -> str:
    if not backbone:
        return ""
    said = [str(backbone.get("source", "")), str(backbone.get("family") or "")]
    if backbone.get("blocks"):
        said.append(f"{backbone['blocks']} blocks")
    if backbone.get("width"):
        said.append(f"width {backbone['width']}")
    if backbone.get("parameters"):
        said.append(f"{count(backbone['parameters'])} parameters")
    said += [f"revision {backbone['revision']}"] if backbone.get("revision") else []
    said += [f"tuning {study.backbone.tuning}", f"{study.backbone.dtype}"]
    return ", ".join(part for part in said if part)


def _sampled(summary: Summary) -> str:
    if not any(point.value("NDCG@10", SAMPLED) for point in summary.points):
        return ""
    return (
        "Beside it, the item among 999 random negatives that the user never took, the same for "
        "every trial. Its numbers are far higher and never comparable with those of full ranking."
    )


def _timing(timing: Mapping[str, Any]) -> str:
    if not timing:
        return ""
    return (
        f"{_pairs(timing)}. Rounds are interleaved over depths, so that a drift of the machine "
        "meets all alike. Inference is encoding the users and scoring the catalogue; a training "
        "step is forward, backward and update."
    )


def _machine(machine: Mapping[str, Any], *, long: bool = False) -> str:
    if not machine:
        return ""
    name = machine.get("gpu") or machine.get("cpu") or machine.get("device", "")
    said = [str(name)]
    if machine.get("cores"):
        said.append(f"{machine['cores']} cores")
    if long:
        said += [f"{machine['threads']} threads"] if machine.get("threads") else []
        said += [f"{significant(machine['memory_gib'])} GiB"] if machine.get("memory_gib") else []
        said += [f"device {machine['device']}"] if machine.get("device") else []
    return ", ".join(said)


def _git(git: Mapping[str, Any]) -> str:
    if not git.get("commit"):
        return ""
    return f"{git['commit']}{', with uncommitted changes' if git.get('dirty') else ''}"


def _duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts: Iterable[tuple[int, str]] = (
        (hours, "h"),
        (minutes, "min"),
        (rest if not hours else 0, "s"),
    )
    return " ".join(f"{value} {unit}" for value, unit in parts if value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{str(k).replace('_', ' ')} {_plain(v)}" for k, v in values.items() if v is not None
    )


def _plain(value: object) -> str:
    if isinstance(value, float):
        return significant(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
