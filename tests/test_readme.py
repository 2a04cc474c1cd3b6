"""README as a reader would follow it: its commands in their order, on a small log and model."""

from __future__ import annotations

import gzip
import random
import re
import shlex
from pathlib import Path

import pytest

from depthprobe.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
# what makes an hour of a few seconds
SHORT = "--epochs 1 --seeds 1 --jobs 0 --output RUN"


def commands() -> list[list[str]]:
    """The commands of the section on one's own log and model."""
    section = README.partition("## Your log, your model")[2].partition("\n## ")[0]
    lines = re.findall(r"^    depthprobe ([^#\n]+)", section, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def write_inputs(folder: Path) -> None:
    """Reviews as Amazon's, a model with its tokenizer, histories; in the folder."""
    import depthprobe as dp
    from depthprobe.models.backbones import load_tokenizer

    draw = random.Random(0)  # noqa: S311
    with gzip.open(folder / "reviews.csv.gz", "wt") as file:
        file.write("user_id,item_id,rating,timestamp\n")
        for user in range(80):
            for step, item in enumerate(draw.sample(range(40), 10)):
                file.write(
                    f"u{user},i{item},{draw.choice([3, 4, 5])},{1_600_000_000 + 9000 * step}\n"
                )
    dp.load_backbone("embedded").save_pretrained(folder / "path/to/model")
    load_tokenizer("embedded").save_pretrained(folder / "path/to/model")
    (folder / "histories.txt").write_text("a i1 i2 i3\nb i4\n")
    for name, ranks in (("a.csv", (1, 4)), ("b.csv", (2, 3))):
        (folder / name).write_text("user,rank\nann,{}\nbob,{}\n".format(*ranks))


def test_the_section_is_found() -> None:
    listed = [words[0] for words in commands()]
    assert listed == ["data", "sweep", "find", "export", "recommend", "compare"]


@pytest.mark.slow
def test_the_commands_run_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    printed = {}
    for words in commands():
        more = {"sweep": SHORT, "find": SHORT.replace("RUN", "FOUND")}
        added = shlex.split(more.get(words[0], ""))
        with pytest.raises(SystemExit) as exit_:
            main([*words, *added])
        said = capsys.readouterr()
        assert exit_.value.code == 0, (words, said.err)
        printed[" ".join(words[:2])] = said.out
    assert "users         80" in printed["data show"]
    assert Path("RUN/report.html").is_file()
    _, *rows = printed["recommend small/"].splitlines()
    lines = [row.split("\t") for row in rows]
    assert [line[0] for line in lines] == ["a"] * 10 + ["b"] * 10
    assert not {line[2] for line in lines[:10]} & {"i1", "i2", "i3"}
    assert "Undecided: b.csv" in printed["compare a.csv"]

    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code[1].replace("runs/demo", "RUN"), names)  # noqa: S102
    assert len(names["model"].model.layers) == 4  # type: ignore[attr-defined]
