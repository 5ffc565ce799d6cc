"""Groups: never divided, sizes as asked, and choices that further rows do not change."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tljax.data.examples import Source, select
from tljax.data.options import LabelOptions
from tljax.data.sources import open_labeled, open_splits
from tljax.data.splits import (
    choose_validation_groups,
    number_groups,
    refuse_divided_groups,
    search_groups,
    split_source,
)
from tljax.runtime.errors import RequestError
from tljax.runtime.task import Task

GROUPS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=80)
FRACTIONS = st.floats(0.01, 0.99)


def grouped(rows: list[tuple[int, int]], task: str = "classification") -> tuple[Source, list[str]]:
    """Make a source from (group, class) pairs; its examples are their row numbers."""
    numbers, names, _ = number_groups([f"patient {group}" for group, _ in rows], [""] * len(rows))
    labels = np.array([label for _, label in rows], np.int32)
    names_of_labels = ("a", "b", "c")
    if task == "multilabel":
        labels = (labels[:, None] > np.arange(3)).astype(np.float32)
    if task == "regression":
        labels, names_of_labels = labels[:, None].astype(np.float32), ("age",)
    files = [str(row).encode() for row in range(len(rows))]
    source = Source(files, labels, names_of_labels, [*map(repr, files)], groups=numbers)
    return replace(source, task=Task(task)), names  # type: ignore[arg-type]


def chosen_rows(source: Source, names: list[str], fraction: float) -> set[int]:
    """Return the validation rows, by the choice that `split_source` makes."""
    train, val = split_source(source, "table", fraction, names)[:2]
    rows = [{int(bytes(part.read(i))) for i in range(len(part))} for part in (train, val)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(len(source)))
    return rows[1]


@settings(max_examples=300, deadline=None)
@given(
    rows=GROUPS,
    more=GROUPS,
    fraction=FRACTIONS,
    task=st.sampled_from(["multilabel", "regression"]),
)
def test_no_group_is_divided_sizes_are_as_asked_and_new_rows_change_nothing(
    rows, more, fraction, task
):
    source, names = grouped(rows, task)
    groups = {group for group, _ in rows}
    # A part may have no group if it was asked to have less than about one.
    assume(1 < fraction * len(groups) < len(groups) - 1)
    val_rows = chosen_rows(source, names, fraction)
    val = {rows[row][0] for row in val_rows}
    assert not val & {rows[row][0] for row in range(len(rows)) if row not in val_rows}
    assert abs(len(val) - fraction * len(groups)) <= 1 + 1e-9

    total = len({group for group, _ in rows + more})
    assume(1 < fraction * total < total - 1)
    source, names = grouped(rows + more, task)
    after = chosen_rows(source, names, fraction)
    assert {row for row in after if row < len(rows)} == val_rows


@settings(max_examples=300, deadline=None)
@given(
    strata=st.lists(st.integers(0, 3), min_size=1, max_size=100),
    more=st.lists(st.integers(0, 9), max_size=30),
    fraction=FRACTIONS,
    first_trains=st.booleans(),
)
def test_choices_in_strata_are_within_one_group_and_are_kept(strata, more, fraction, first_trains):
    def choose(strata: list[int]) -> np.ndarray:
        names = [f"group {index}" for index in range(len(strata))]
        return choose_validation_groups(names, fraction, strata, first_trains=first_trains)

    chosen = choose(strata)
    assert chosen.tolist() == choose(strata + more)[: len(strata)].tolist()
    counts = np.cumsum(chosen) - fraction * np.arange(1, len(chosen) + 1)
    assert (abs(counts) <= 1 + 1e-9).all()


def test_classes_have_the_share_of_groups_that_was_asked_for():
    strata = np.random.default_rng(0).choice(4, 400, p=[0.7, 0.2, 0.07, 0.03]).tolist()
    names = [f"group {index}" for index in range(400)]
    chosen = choose_validation_groups(names, 0.2, strata, first_trains=True)
    for stratum in range(4):
        groups = np.equal(strata, stratum)
        # Within one group, but for choices that the total forces.
        assert abs(chosen[groups].sum() - 0.2 * groups.sum()) <= 2
    plain = choose_validation_groups(names, 0.2)
    assert abs(plain.sum() - 80) <= 1
    runs = np.diff(np.flatnonzero(plain))
    assert len(np.unique(runs)) > 5  # not every fifth


def test_another_order_of_the_groups_changes_part_of_the_choices_only():
    names = [f"group {index}" for index in range(1000)]
    first = dict(zip(names, choose_validation_groups(names, 0.2), strict=True))
    order = np.random.default_rng(0).permutation(names).tolist()
    other = dict(zip(order, choose_validation_groups(order, 0.2), strict=True))
    moved = sum(first[name] != other[name] for name in names)
    assert 0 < moved < 320 * 0.9  # 2 x 0.2 x 0.8 of them if the choices were independent


def test_a_class_with_a_single_group_is_trained_unless_the_total_forces_it_to_validate():
    def lost(*, first_trains: bool) -> int:
        count = 0
        for table in range(200):
            names = [f"group {group} of table {table}" for group in range(22)]
            strata = [0] * 20 + [1, 2]
            chosen = choose_validation_groups(names, 0.2, strata, first_trains=first_trains)
            count += int(chosen[-2:].any())
        return count

    assert lost(first_trains=True) < 20
    assert 50 < lost(first_trains=False) < 110  # about 1 - 0.8 ** 2 of 200


def test_a_class_whose_groups_all_validate_is_refused_and_labels_are_noted():
    rows = [(0, 0), (1, 1), (2, 2)]
    source, names = grouped(rows)
    with pytest.raises(RequestError, match="table: all images of b, c fall into the validation"):
        split_source(source, "table", 0.9, names)
    source, names = grouped([(group, 3 * (group == 9)) for group in range(10)], "multilabel")
    notes = split_source(source, "table", 0.2, names).notes
    assert notes[1] in ("no training image of a, b, c", "no validation image of a, b, c")


def test_the_note_gives_shares_and_val_fraction_0_validates_on_everything():
    source, names = grouped([(group // 2, group % 2) for group in range(40)])
    train, val, notes = split_source(source, "table", 0.25, names)
    groups = len(set(val.groups.tolist()))
    parts = f"{20 - groups} groups with {len(train)} images to train on, {groups} groups"
    shares = f"({groups / 20:.0%}) with {len(val)} images ({len(val) / 40:.0%}) to validate on"
    assert notes == (f"split by group: {parts} {shares}",)
    assert split_source(source, "table", 0, names).val is source
    assert split_source(source, "table", 0.25, names).val.names == val.names
    whole = split_source(replace(source, groups=None), "table", 0.5)
    assert whole.notes[0].startswith("split by content")


def test_groups_without_names_are_split_by_their_numbers():
    source, _ = grouped([(group, group % 2) for group in range(30)])
    _, val, _ = split_source(source, "table", 0.2)
    assert abs(len(val) - 6) <= 1


def test_rows_without_a_group_are_groups_of_their_own():
    numbers, names, notes = number_groups(
        ["x", None, "", "x", "p/1"], ["p/0", "p/1", "p/2", "p/3", "p/4"]
    )
    assert numbers.tolist() == [0, 1, 2, 0, 3]
    assert names == ["x", "p/1", "p/2", "p/1"]
    assert notes == ("2 images have no group: each is a group of its own",)


def test_an_expression_is_searched_in_paths():
    paths = ["a/img_1.jpg", "a/img_2.jpg", "b/other.jpg"]
    assert search_groups("(.*)_[0-9]+", paths, "data") == ["a/img", "a/img", None]
    for expression, message in (
        ("(", "'\\(' is no regular expression: missing"),
        ("patient", "'patient' is no column of data; a regular expression for paths needs paren"),
        ("(x)", "is found in none of 3 paths of data, such as a/img_1.jpg"),
    ):
        with pytest.raises(RequestError, match=message):
            search_groups(expression, paths, "data")


def test_a_group_on_both_sides_of_a_given_split_is_refused():
    groups, parts = np.array([0, 0, 1, 2, 2, 3]), np.array([0, 0, 1, 0, 1, 1])
    with pytest.raises(RequestError, match=r"1 groups are both in .* validation part: c: correct"):
        refuse_divided_groups(groups, parts, "abcd")
    refuse_divided_groups(groups[:3], parts[:3], "abcd")


def write(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_class_folders_are_split_by_an_expression(tmp_path):
    write(tmp_path, *(f"{c}/scene{s}_{i}.jpg" for c in "ab" for s in range(20) for i in range(3)))
    options = LabelOptions(group="(scene[0-9]+)_")
    train, val, notes = open_splits(str(tmp_path), labels=options)
    scenes = [{Path(name).name.split("_")[0] for name in part.names} for part in (train, val)]
    assert not scenes[0] & scenes[1]
    assert abs(len(scenes[1]) - 4) <= 1
    assert len(val) == 6 * len(scenes[1])
    assert notes[0].startswith("split by group: ")
    assert not any("no validation images" in note for note in notes)
    again = open_splits(str(tmp_path), labels=LabelOptions(group="/(scene[0-9]+)_"))
    assert again.val.names == val.names
    assert open_labeled(str(tmp_path), options).groups is not None
    with pytest.raises(RequestError, match=r"--group \(x\) needs|found in none"):
        open_splits(str(tmp_path), labels=LabelOptions(group="(x)"))
    without = open_splits(str(tmp_path), val_fraction=0, labels=options)
    assert without.notes == (
        "no validation images: metrics are computed on the 120 training images",
    )


def test_groups_of_a_folder_do_not_depend_on_where_it_is(tmp_path):
    splits = []
    for place in ("one_1", "two_2"):
        root = write(
            tmp_path / place, *(f"{c}/s{s}_{i}" for c in "ab" for s in range(9) for i in "12")
        )
        splits.append(open_splits(str(root), labels=LabelOptions(group="(.*)_[0-9]+")))
    relative = [
        [Path(name).relative_to(tmp_path / place).as_posix() for name in split.val.names]
        for split, place in zip(splits, ("one_1", "two_2"), strict=True)
    ]
    assert relative[0] == relative[1]


def test_groups_of_given_folders_are_checked(tmp_path):
    write(tmp_path, "train/a/s1_1", "train/b/s2_1", "val/a/s3_1", "val/b/s4_1")
    train, val, _ = open_splits(str(tmp_path), labels=LabelOptions(group="(s[0-9]+)_"))
    assert (train.groups.tolist(), val.groups.tolist()) == ([0, 1], [2, 3])
    write(tmp_path, "val/b/s2_9")
    with pytest.raises(RequestError, match=r"1 groups are both .* part: s2: correct the split"):
        open_splits(str(tmp_path), labels=LabelOptions(group="(s[0-9]+)_"))


def test_a_training_folder_alone_is_split_source(tmp_path):
    write(
        tmp_path, *(f"train/{c}/s{s}_{i}" for c in "ab" for s in range(9) for i in "12"), "test/1"
    )
    _, val, notes = open_splits(str(tmp_path), labels=LabelOptions(group="(s[0-9]+)_"))
    assert notes[0].endswith("is split, as no folder beside it has its classes")
    assert notes[1].startswith("split by group")
    assert len(val) % 4 == 0


def test_selections_and_digests_keep_groups():
    source, _ = grouped([(0, 0), (1, 1), (0, 2)])
    assert select(source, [2, 1]).groups.tolist() == [0, 1]
    assert source.digest != replace(source, groups=None).digest
    assert source.digest != replace(source, groups=np.array([0, 0, 0])).digest
    assert source.digest == replace(source, groups=source.groups.astype(np.int64)).digest
