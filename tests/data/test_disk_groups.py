"""Values grouped by name on the disk: as a sorted dictionary of lists."""

from hypothesis import given
from hypothesis import strategies as st

from sana_lab.data.disk_groups import DiskGroups

names = st.text(st.sampled_from("ab/é中\U0001f642\ud83d\udcff\uffff"), max_size=3)


@given(st.lists(st.tuples(names, st.integers())))
def test_as_a_sorted_dictionary(items):
    expected: dict[str, list[int]] = {}
    for name, value in items:
        expected.setdefault(name, []).append(value)
    groups = DiskGroups(iter(items))
    for _ in range(2):
        assert list(groups) == sorted(expected.items())
    assert (len(groups), bool(groups)) == (len(expected), bool(expected))


def test_values_come_back():
    value = ["x \ud83d", None, 1.5, {"a": [True]}]
    assert list(DiskGroups([("a", value)])) == [("a", [value])]
