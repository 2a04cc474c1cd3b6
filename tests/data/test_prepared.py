from __future__ import annotations

import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from depthprobe.data.log import Log
from depthprobe.data.prepared import NO_TIMES, natural_order, order_log, prepare_data
from depthprobe.data.storage import Sequences, load_data
from depthprobe.study import BadInput

# users, items, interactions of the public sets, in the folder that DEPTHPROBE_DATA names
PUBLISHED = {
    "amazon-beauty": (22_363, 12_101, 198_502),
    "amazon-toys": (19_412, 11_924, 167_597),
    "ml-1m": (6_040, 3_416, 999_611),
}


def make_log(rows: list[tuple[str, str, int]], titles: dict[str, str] | None = None) -> Log:
    users, items, times = zip(*rows, strict=True)
    return Log(np.array(users), np.array(items), np.array(times), titles or {}, "made")


LOG = make_log(
    [
        ("u10", "i2", 30),
        ("u2", "i10", 5),
        ("u10", "i1", 10),
        ("u2", "i2", 5),  # the same second as the row of u2 before: stays after it
        ("u10", "i10", 20),
        ("u2", " i1 ", 1),
        ("u2", "i2", 7),
    ],
    {"i1": "One", "i10": "x" * 1000},
)


def raw(sequences: Sequences) -> dict[str, list[str]]:
    return {
        user: sequences.item_ids[sequences.history(place) - 1].tolist()
        for place, user in enumerate(sequences.user_ids.tolist())
    }


def test_by_time_and_stable() -> None:
    sequences = order_log(LOG)
    assert raw(sequences) == {"u2": ["i1", "i10", "i2", "i2"], "u10": ["i1", "i10", "i2"]}
    assert sequences.item_ids.tolist() == ["i1", "i2", "i10"]  # numbers by value
    assert sequences.user_ids.tolist() == ["u2", "u10"]
    assert sequences.items.tolist() == [1, 3, 2, 2, 1, 3, 2]
    assert sequences.times is not None
    assert sequences.times.tolist() == [1, 5, 5, 7, 10, 20, 30]
    assert (sequences.n_users, sequences.n_items, sequences.n_interactions) == (2, 3, 7)
    assert sequences.titles is not None
    assert sequences.titles.tolist() == ["One", "", "x" * 256]
    assert sequences.warnings == ("1 of 3 items have no title",)
    assert [a.dtype for a in (sequences.offsets, sequences.items)] == [np.int64, np.int32]
    assert sequences.statistics["repeats"] == pytest.approx(1 / 7)
    assert sequences.statistics["density"] == pytest.approx(7 / 6)
    assert sequences.statistics["mean_length"] == 3.5


def test_agrees_with_sorted_on_random_logs() -> None:
    draw = np.random.default_rng(3)
    columns = draw.integers([40, 60, 25], size=(2000, 3))
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in columns]
    expected = {
        user: [item for u, item, _ in sorted(rows, key=lambda row: row[2]) if u == user]
        for user in {row[0] for row in rows}
    }
    assert raw(order_log(make_log(rows))) == expected


def test_the_order_of_users_in_the_file_does_not_matter() -> None:
    rows = [("b", "x1", 0), ("b", "x2", 0), ("a", "x2", 0), ("c", "x3", 0)]
    one = order_log(make_log(rows))
    other = order_log(make_log([rows[3], *rows[:3]]))
    assert one.fingerprint == other.fingerprint
    swapped = order_log(make_log([rows[1], rows[0], *rows[2:]]))
    assert swapped.fingerprint != one.fingerprint


def test_fingerprint_sees_every_content() -> None:
    base = order_log(LOG).fingerprint
    assert len(base) == 64
    assert order_log(replace(LOG, name="other")).fingerprint == base
    assert order_log(replace(LOG, times=LOG.times + 1)).fingerprint != base  # type: ignore[operator]
    assert order_log(replace(LOG, times=None)).fingerprint != base
    assert order_log(replace(LOG, titles={})).fingerprint != base
    assert order_log(replace(LOG, users=np.char.add(LOG.users, "x"))).fingerprint != base


def test_large_logs_are_numbered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = order_log(LOG)
    monkeypatch.setattr("depthprobe.data.prepared.PART", 3)
    assert order_log(LOG).fingerprint == whole.fingerprint


def test_no_times_is_said_and_keeps_the_order() -> None:
    sequences = order_log(replace(LOG, times=None))
    assert raw(sequences) == {"u2": ["i10", "i2", "i1", "i2"], "u10": ["i2", "i1", "i10"]}
    assert sequences.times is None
    assert NO_TIMES in sequences.warnings


def test_short_users_are_said() -> None:
    sequences = order_log(make_log([("a", "x", 1), ("b", "x", 1), ("b", "y", 2), ("b", "z", 3)]))
    assert sequences.warnings == ("1 of 2 users train only: fewer than 3 interactions",)
    assert sequences.statistics["evaluated_users"] == 1


@pytest.mark.parametrize("log", [LOG, replace(LOG, times=None, titles={})])
def test_round_trip(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.data.prepared.read_log", lambda _: log)
    direct = prepare_data("anything", name="mine")
    written = prepare_data("anything", tmp_path / "a" / "b", name="mine")
    for one in (written, load_data(tmp_path / "a" / "b"), prepare_data(tmp_path / "a" / "b")):
        assert isinstance(one.items, np.memmap)
        for field in fields(Sequences):
            expected, found = getattr(direct, field.name), getattr(one, field.name)
            if isinstance(expected, np.ndarray):
                assert found.dtype.kind == expected.dtype.kind
                assert found.tolist() == expected.tolist()
            else:
                assert found == expected
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]  # nothing temporary is left


def test_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.data.prepared.read_log", lambda _: LOG)
    prepare_data("log", tmp_path / "one")
    prepare_data("log", tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_replaces_prepared_folders_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr("depthprobe.data.prepared.read_log", lambda _: LOG)
    prepare_data("log", output)
    monkeypatch.setattr("depthprobe.data.prepared.read_log", lambda _: replace(LOG, times=None))
    assert prepare_data("log", output).times is None
    assert not (output / "times.npy").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").touch()
    with pytest.raises(BadInput, match="output"):
        prepare_data("log", other)
    assert (other / "cat.png").exists()
    with pytest.raises(BadInput, match="a folder"):
        prepare_data("log", other / "cat.png")


def test_a_failed_write_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("depthprobe.data.prepared.read_log", lambda _: LOG)
    before = prepare_data("log", tmp_path / "out").fingerprint

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("depthprobe.data.prepared.read_log", lambda _: replace(LOG, times=None))
    monkeypatch.setattr("depthprobe.data.storage._write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare_data("log", tmp_path / "out")
    assert load_data(tmp_path / "out").fingerprint == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_refuses_damaged_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"manifest\.json"):
        load_data(tmp_path)
    monkeypatch.setattr("depthprobe.data.prepared.read_log", lambda _: LOG)

    def damaged(name: str, content: bytes | None) -> Path:
        folder = tmp_path / name
        prepare_data("log", folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    for name, content in [
        ("items.npy", None),
        ("times.npy", b"\x93NUMPY"),
        ("users.parquet", b"PAR1"),
        ("manifest.json", b"{}"),
        ("manifest.json", b"[1"),
        ("manifest.json", json.dumps({"schema": 99}).encode()),
    ]:
        with pytest.raises(BadInput) as caught:
            load_data(damaged(name, content))
        assert "\n" not in str(caught.value)
    folder = damaged("offsets.npy", None)
    np.save(folder / "offsets.npy", np.array([0, 2], dtype=np.int64))
    with pytest.raises(BadInput, match="sizes disagree"):
        load_data(folder)


def test_refuses_blank_ids_and_empty_logs() -> None:
    with pytest.raises(BadInput, match="blank"):
        order_log(make_log([("u", " ", 1)]))
    with pytest.raises(BadInput, match="at least one"):
        order_log(Log(np.array([], dtype=str), np.array([], dtype=str)))


def test_natural_order() -> None:
    texts = ["10", "9", "09", "a10b2", "a10b10", "a9", "b", "", "9" * 5000]
    shuffled = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    expected = ["", "09", "9", "10", "9" * 5000, "a9", "a10b2", "a10b10", "b"]
    assert sorted(shuffled, key=natural_order) == expected


def test_embedded_is_deterministic() -> None:
    one = prepare_data("embedded")
    assert one.name == "embedded"
    assert one.fingerprint == prepare_data("embedded").fingerprint
    assert one.times is not None
    late = np.diff(one.times) < 0
    late[one.offsets[1:-1] - 1] = False  # from one user to the next
    assert not late.any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str, tmp_path: Path) -> None:
    root = os.environ.get("DEPTHPROBE_DATA")
    if not root:
        pytest.skip("DEPTHPROBE_DATA is not set: the folder with amazon-beauty, amazon-toys, ml-1m")
    start = time.perf_counter()
    sequences = prepare_data(Path(root) / name, tmp_path / name)
    assert time.perf_counter() - start < 20
    assert (sequences.n_users, sequences.n_items, sequences.n_interactions) == PUBLISHED[name]
    lines = (Path(root) / name / "sequences.txt").read_text().splitlines()
    expected = {line.split()[0]: line.split()[1:] for line in lines}
    assert raw(sequences) == expected
