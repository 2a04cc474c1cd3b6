from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprobe.data.cleaning import Step
from depthprobe.data.log import Ids, Log, encode_ids
from depthprobe.data.prepared import order_log, prepare_data
from depthprobe.data.statistics import NO_TIMES, tied_neighbours
from depthprobe.data.storage import Sequences, load_data, write_data
from depthprobe.errors import BadInput
from depthprobe.study import Cleaning, Columns

# users, items, interactions of the public sets, in the folder that DEPTHPROBE_DATA names
PUBLISHED = {
    "amazon-beauty": (22_363, 12_101, 198_502),
    "amazon-toys": (19_412, 11_924, 167_597),
    "ml-1m": (6_040, 3_416, 999_611),
    "ml-100k": (943, 1_682, 100_000),
}


def make_log(rows: list[tuple[str, str, int]], titles: dict[str, str] | None = None) -> Log:
    users, items, times = zip(*rows, strict=True)
    return Log(
        encode_ids(users), encode_ids(items), np.array(times), titles=titles or {}, name="made"
    )


LOG = make_log(
    [
        ("u10", "i2", 30),
        ("u2", "i10", 5),
        ("u10", "i1", 10),
        ("u2", "i2", 5),  # the same second as the row of u2 before: stays after it
        ("u10", "i10", 20),
        ("u2", "i1", 1),
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
    sequences = order_log(LOG, ties="file")
    assert raw(sequences) == {"u2": ["i1", "i10", "i2", "i2"], "u10": ["i1", "i10", "i2"]}
    assert sequences.item_ids.tolist() == ["i1", "i2", "i10"]  # numbers by value
    assert sequences.user_ids.tolist() == ["u2", "u10"]
    assert sequences.items.tolist() == [1, 3, 2, 2, 1, 3, 2]
    assert sequences.times is not None
    assert sequences.times.tolist() == [1, 5, 5, 7, 10, 20, 30]
    assert (sequences.n_users, sequences.n_items, sequences.n_interactions) == (2, 3, 7)
    assert sequences.titles == ["One", "", "x" * 256]
    assert sequences.warnings[-1] == "1 of 3 items have no title"
    assert [a.dtype for a in (sequences.offsets, sequences.items)] == [np.int64, np.int32]
    assert sequences.statistics["repeats"] == pytest.approx(1 / 7)
    assert sequences.statistics["density"] == pytest.approx(7 / 6)
    assert sequences.statistics["mean_length"] == 3.5


@pytest.mark.parametrize("same", [0, 2, 3])
def test_titles_of_several_items_are_told(same: int) -> None:
    names = [str(item) for item in range(200)]
    titles = {name: f"Title {max(int(name), same - 1)}" for name in names[:-2]}  # two have none
    items = encode_ids(names * 2)
    users = encode_ids(["a"] * 200 + ["b"] * 200)
    said = [one for one in order_log(Log(users, items, titles=titles)).warnings if "share" in one]
    told = f"{same} of 200 items share their title with another, such as 'Title {same - 1}': by"
    assert [one.startswith(told) for one in said] == [True] * (same > 2)  # more than 1 %


def test_agrees_with_sorted_on_random_logs() -> None:
    draw = np.random.default_rng(3)
    columns = draw.integers([40, 60, 25], size=(2000, 3))
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in columns]
    expected = {
        user: [item for u, item, _ in sorted(rows, key=lambda row: row[2]) if u == user]
        for user in {row[0] for row in rows}
    }
    assert raw(order_log(make_log(rows), ties="file")) == expected
    by_item = {
        user: [
            item
            for u, item, _ in sorted(rows, key=lambda row: (row[2], int(row[1][1:])))
            if u == user
        ]
        for user in expected
    }
    assert raw(order_log(make_log(rows), ties="item")) == by_item


def test_ties_are_broken_at_random_by_a_seed_whatever_the_order_of_the_lines(
    tmp_path: Path,
) -> None:
    draw = np.random.default_rng(3)
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in draw.integers([20, 60, 9], size=(900, 3))]
    found = order_log(make_log(rows))
    again = order_log(make_log([rows[place] for place in draw.permutation(len(rows))]))
    other = order_log(make_log(rows), ties_seed=1)
    assert found.fingerprint == again.fingerprint != other.fingerprint
    assert found.times is not None
    assert other.times is not None
    assert found.times.tolist() == other.times.tolist()
    assert {user: sorted(row) for user, row in raw(found).items()} == {
        user: sorted(row) for user, row in raw(other).items()
    }
    # half of the steps between tied neighbours rise, as they do by chance
    tied = tied_neighbours(found.offsets, found.times)
    rows_before = np.delete(np.arange(len(rows)), found.offsets[1:] - 1)[tied]
    steps = np.diff(found.items)[rows_before]
    assert 0.4 < (steps > 0).sum() / (steps != 0).sum() < 0.6
    assert found.statistics["ties"] == "random, seed 0"
    # a prepared folder has its order, and keeps it
    write_data(other, tmp_path / "other")
    cleaned = prepare_data(tmp_path / "other", cleaning=Cleaning(core=2))
    assert (
        cleaned.fingerprint
        == order_log(make_log(rows), ties_seed=1, cleaning=Cleaning(core=2)).fingerprint
    )
    assert cleaned.statistics["ties"] == "random, seed 1"
    with pytest.raises(BadInput, match=r"data\.ties: expected none .*its ties: random, seed 1"):
        prepare_data(tmp_path / "other", ties="item")


def test_fingerprint_sees_every_content() -> None:
    base = order_log(LOG).fingerprint
    assert len(base) == 64
    assert order_log(replace(LOG, name="other")).fingerprint == base
    renamed = Ids(LOG.users.codes, [f"{user}x" for user in LOG.users.names])
    for change in ({"times": LOG.times + 1}, {"times": None}, {"titles": {}}, {"users": renamed}):  # type: ignore[operator]
        assert order_log(replace(LOG, **change)).fingerprint != base  # type: ignore[arg-type]


def test_without_times_the_order_stays_with_a_warning() -> None:
    sequences = order_log(replace(LOG, times=None))
    assert raw(sequences) == {"u2": ["i10", "i2", "i1", "i2"], "u10": ["i2", "i1", "i10"]}
    assert sequences.times is None
    assert NO_TIMES in sequences.warnings


SPLIT = replace(LOG, parts=np.array([0, 0, 1, 1, 2, 2, 0], dtype=np.int8), notes=("a note",))


@pytest.mark.parametrize("log", [LOG, replace(LOG, times=None, titles={}), SPLIT])
def test_round_trip(log: Log, tmp_path: Path) -> None:
    direct = order_log(log, name="mine")
    write_data(direct, tmp_path / "a" / "b")
    for one in (load_data(tmp_path / "a" / "b"), prepare_data(tmp_path / "a" / "b")):
        assert isinstance(one.items, np.memmap)
        names = [field.name for field in fields(Sequences)]
        for name in [*names, "item_ids", "user_ids", "titles"]:
            expected, value = getattr(direct, name), getattr(one, name)
            if name.startswith("read_"):
                assert value() == expected()
            elif isinstance(expected, np.ndarray):
                assert value.dtype.kind == expected.dtype.kind
                assert value.tolist() == expected.tolist()
            else:
                assert value == expected
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]  # nothing temporary is left
    write_data(direct, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / "b" / path.name).read_bytes()


def test_replaces_prepared_folders_only(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_data(order_log(LOG), output)
    write_data(order_log(replace(LOG, times=None)), output)
    assert load_data(output).times is None
    assert not (output / "times.npy").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").touch()
    with pytest.raises(BadInput, match="output"):
        prepare_data("embedded", other)
    assert (other / "cat.png").exists()
    with pytest.raises(BadInput, match="a folder"):
        prepare_data("embedded", other / "cat.png")


def test_a_failed_write_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(order_log(LOG), tmp_path / "out")
    before = load_data(tmp_path / "out").fingerprint

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(BadInput, match=r"output.*room for the log \(disk full\)") as caught:
        write_data(order_log(replace(LOG, times=None)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert load_data(tmp_path / "out").fingerprint == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def changed(name: str) -> bytes:
    """A whole file of the same form with other content, as an edit leaves it."""
    array = np.array([1, 3, 2, 2, 1, 3, 3] if name == "items.npy" else range(7), np.int32)
    stream = io.BytesIO()
    np.save(stream, array.astype(np.int32 if name == "items.npy" else np.int64))
    return stream.getvalue()


def everything_of(folder: Path) -> None:
    opened = load_data(folder)
    _ = opened.user_ids, opened.titles


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("items.npy", None, "items.npy is missing"),
        ("items.npy", b"", "items.npy has changed"),
        ("items.npy", changed("items.npy"), "items.npy has changed"),
        ("times.npy", b"\x93NUMPY", "times.npy has changed"),
        ("offsets.npy", changed("offsets.npy"), "offsets.npy has changed"),
        ("manifest.json", b"{}", "missing required field"),
        ("manifest.json", b"[1", "a whole prepared folder"),
        ("manifest.json", b"[" * 10**5, "a whole prepared folder"),
        ("manifest.json", json.dumps({"schema": 99}).encode(), "a whole prepared folder"),
        ("users.parquet", b"PAR1", "users.parquet has changed"),  # read only when it is needed
        ("items.parquet", None, "items.parquet is missing"),
    ],
)
@pytest.mark.parametrize("digests", [True, False])
def test_refuses_damaged_folders(
    tmp_path: Path, name: str, content: bytes | None, fault: str, digests: bool
) -> None:
    write_data(order_log(LOG), tmp_path)
    if not digests:  # as earlier versions wrote it
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
        if content == changed("items.npy"):
            return  # nothing tells
        if name != "manifest.json":
            fault = "a whole prepared folder"
    (tmp_path / name).unlink()
    if content is None:
        os.mkfifo(tmp_path / name)  # a pipe is not waited for
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=fault) as caught:
        everything_of(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("item", [0, -1, 4, 10**6])
def test_items_outside_the_catalogue(tmp_path: Path, item: int) -> None:
    sequences = order_log(LOG)
    sequences.items[3] = item
    write_data(sequences, tmp_path)
    with pytest.raises(BadInput, match="not among 1 to 3"):
        load_data(tmp_path)


def test_what_is_replaced_is_a_prepared_folder(tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    (tmp_path / "log.txt").write_text("u1 i1 i2\nu2 i1 i3\n")
    source, folder = tmp_path / "log.txt", tmp_path / "out"
    prepare_data(source, folder)
    before = files(folder)
    with pytest.raises(BadInput, match="--overwrite replaces it"):
        prepare_data(source, folder)
    assert files(folder) == before
    assert prepare_data(source, folder, name="other", overwrite=True).name == "other"
    # a run, an export, somebody's own manifest; one with a note in it; none of them goes
    manifest = (folder / "manifest.json").read_bytes()
    for name, content in {
        "run": {"manifest.json": b'{"schema": 2}', "study.toml": b""},
        "web": {"manifest.json": b'{"name": "app"}'},
        "export": {"config.json": b"{}"},
        "noted": {"manifest.json": manifest, "notes.txt": b"mine"},
        "damaged": {"manifest.json": manifest[:99]},
    }.items():
        (tmp_path / name).mkdir()
        for file, raw_content in content.items():
            (tmp_path / name / file).write_bytes(raw_content)
        with pytest.raises(BadInput, match="a new or empty folder, or a prepared one"):
            prepare_data(source, tmp_path / name, overwrite=True)
        assert files(tmp_path / name) == content


def test_refuses_empty_and_lonely_logs() -> None:
    with pytest.raises(BadInput, match="at least one"):
        order_log(Log(encode_ids([]), encode_ids([])))
    with pytest.raises(BadInput, match="two users or more"):
        order_log(make_log([("u", "x", 1), ("u", "y", 2)]))
    with pytest.raises(BadInput, match="two users or more"):  # one is left
        order_log(
            make_log([("u", "x", 1), ("u", "x", 2), ("v", "y", 2)]), cleaning=Cleaning(core=2)
        )


ROWS = st.lists(
    st.tuples(st.sampled_from(["u1", "u2", "u10", "ü"]), st.sampled_from(["a", "b", "c"])),
    min_size=2,
    max_size=30,
).filter(lambda rows: len({user for user, _ in rows}) > 1)


@settings(max_examples=100, deadline=None)
@given(st.data(), ROWS)
def test_distinct_times_decide_whatever_the_order_of_the_lines(
    data: st.DataObject, rows: list[tuple[str, str]]
) -> None:
    times = data.draw(st.permutations(range(len(rows))))
    lines = [(user, item, time) for (user, item), time in zip(rows, times, strict=True)]
    titles = {"a": "A", "b": "B"}
    one = order_log(make_log(lines, titles))
    other = order_log(make_log(data.draw(st.permutations(lines)), titles))
    assert one.fingerprint == other.fingerprint
    assert one.warnings == other.warnings


CLEANED = make_log(
    [
        ("a", "x", 1), ("a", "y", 2), ("a", "x", 3), ("a", "z", 4),
        ("b", "y", 5), ("b", "x", 6), ("b", "w", 7),
        ("c", "w", 8), ("c", "v", 9),
    ],
    {"x": "Ex", "y": "Why", "z": "Zed", "w": "Double", "v": "Vee"},
)  # fmt: skip


def test_cleaning_by_hand() -> None:
    sequences = order_log(CLEANED, cleaning=Cleaning(repeats="last", core=2))
    assert raw(sequences) == {"a": ["y", "x"], "b": ["y", "x"]}
    assert sequences.titles == ["Ex", "Why"]
    assert sequences.items.tolist() == [2, 1, 2, 1]
    assert sequences.cleaning == (
        Step("as read", 9, 3, 5),
        Step("last of a repeat", 8, 3, 5),
        Step("2-core", 4, 2, 2),  # z and v go, then c and with c the second w, then w
    )
    assert sequences.statistics["interactions"] == 4


@pytest.mark.parametrize("log", [CLEANED, replace(CLEANED, times=None), SPLIT])
def test_cleaning_in_two_goes_is_cleaning_in_one(log: Log, tmp_path: Path) -> None:
    rules = Cleaning(repeats="first", latest=3)
    once = order_log(log, cleaning=rules)
    write_data(order_log(log), tmp_path / "all")
    again = prepare_data(tmp_path / "all", tmp_path / "some", cleaning=rules)
    assert again.fingerprint == once.fingerprint
    assert again.cleaning == once.cleaning
    assert again.warnings == once.warnings
    with pytest.raises(BadInput, match="none for a prepared folder"):
        prepare_data(tmp_path / "some", format="csv")
    with pytest.raises(BadInput, match="none for a prepared folder"):
        prepare_data(tmp_path / "some", columns=Columns(user="u"))
    renamed = prepare_data(tmp_path / "some", name="other")
    assert (renamed.name, renamed.fingerprint) == ("other", once.fingerprint)


def test_given_parts_come_in_their_order() -> None:
    sequences = order_log(SPLIT)
    assert raw(sequences) == {"u2": ["i10", "i2", "i2", "i1"], "u10": ["i2", "i1", "i10"]}
    assert sequences.given is not None
    assert sequences.given.tolist() == [[2, 3], [5, 6]]


def test_opening_reads_neither_ids_nor_titles(tmp_path: Path) -> None:
    write_data(order_log(LOG), tmp_path / "out")
    code = (
        "import sys; from depthprobe.data.storage import load_data;"
        f"data = load_data({str(tmp_path / 'out')!r}); data.items.sum(), data.n_items;"
        "print('pyarrow' in sys.modules, data.item_ids.tolist(), 'pyarrow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False ['i1', 'i2', 'i10'] True"


def test_hash_seeds_and_processes_make_no_difference(tmp_path: Path) -> None:
    lines = [f"u{u} i{u % 7} i{u % 5} i{u % 3}" for u in range(50)]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    code = (
        "from depthprobe.data.prepared import prepare_data;"
        f"print(prepare_data({str(tmp_path / 'log.txt')!r}).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == prepare_data(tmp_path / "log.txt").fingerprint


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str, tmp_path: Path) -> None:
    root = os.environ.get("DEPTHPROBE_DATA")
    if not root:
        pytest.skip("DEPTHPROBE_DATA is not set: the folder with amazon-beauty, amazon-toys, ml-1m")
    sequences = prepare_data(Path(root) / name, tmp_path / name)
    assert (sequences.n_users, sequences.n_items, sequences.n_interactions) == PUBLISHED[name]
    assert sequences.titles is not None
    assert all(sequences.titles)
    if name != "ml-100k":  # which has times, and lies in no order
        lines = (Path(root) / name / "sequences.txt").read_text().splitlines()
        assert raw(sequences) == {line.split()[0]: line.split()[1:] for line in lines}
