"""Tables as spreadsheets, pandas, R and databases write them: read right, or refused with the line."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana_lab.data import tables
from sana_lab.data.caption_lists import parse

COLUMNS = ("file_name", "caption")


def write(folder: Path, text: str | bytes, name: str = "captions.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pairs(path: Path) -> list[tuple[int, str, str]]:
    return [(line, row["file_name"], row["caption"]) for line, row in tables.rows(path, COLUMNS)]


@pytest.mark.parametrize(
    "text",
    [
        "file_name,caption\na.png,one\nb.png,two\n",
        "file_name;caption\r\na.png;one\r\nb.png;two",
        "file_name\tcaption\ra.png\tone\rb.png\ttwo\r",
        "file_name|caption\na.png|one\nb.png|two\n",
        " File Name , Caption \n a.png, one\nb.png, two\n",
        'FILE-NAME,CAPTION\n"a.png" , "one"\n"b.png","two"\n',
        ",file_name,caption\n0,a.png,one\n1,b.png,two\n",  # pandas' index
        '"file_name","caption"\n"1","a.png","one"\n"2","b.png","two"\n',  # R's write.table
        "file_name,caption,\na.png,one,\nb.png,two,,,\n,,\n",  # a spreadsheet's empty cells
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_same_table_of_many_programs(tmp_path, text, encoding):
    rows = pairs(write(tmp_path, text.encode(encoding)))
    assert [row[1:] for row in rows] == [("a.png", "one"), ("b.png", "two")]
    assert [row[0] for row in rows] == [2, 3]


def test_the_delimiter_line_of_a_spreadsheet(tmp_path):
    assert pairs(write(tmp_path, "sep=;\nfile_name;caption\na.png;x, y\n")) == [(3, "a.png", "x, y")]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ('"red, ""very"""', 'red, "very"'),
        (r'"a sign that says \"stop, now\""', 'a sign that says "stop, now"'),
        (r'"\"stop\""', '"stop"'),
        (r"red\, very", "red, very"),
        (r"says \"stop\"", 'says "stop"'),
        ('"two\nlines"', "two\nlines"),
        ('a 5" disk', 'a 5" disk'),
        (r"back\slash", r"back\slash"),
        ("x" * 200_000, "x" * 200_000),
        ('"' + "x" * 200_000 + '"', "x" * 200_000),
    ],
    ids=range(10),
)
def test_quotes_and_escapes(tmp_path, field, value):
    path = write(tmp_path, f"file_name,caption\na.png,{field}\nb.png,end\n")
    assert [row[2] for row in pairs(path)] == [value, "end"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('a.png,"one\nb.png,two\n', 2),
        ('a.png,one\nb.png,"two', 3),
        ('a.png,"one\nb.png,"two"\n', 2),
        ('a.png,"one" more\n', 2),
        ('"two\nlines",x\na.png,"one\n', 4),
        ("a.png,one,more\n", 2),
        ("a.png\n", 2),
        ("a.png,one\n\nb.png\n", 4),
    ],
)
def test_a_broken_row_is_named_by_the_line_where_it_starts(tmp_path, text, line):
    with pytest.raises(ValueError, match=rf"captions.csv:{line}\b.*(not closed|fields than the header)"):
        tables.rows(write(tmp_path, f"file_name,caption\n{text}"), COLUMNS)


def test_a_column_that_the_header_has_twice(tmp_path):
    path = write(tmp_path, "file_name,caption,Caption\na.png,one,two\n")
    assert tables.rows(path, COLUMNS) == [(2, {"file_name": "a.png", "caption": ["one", "two"]})]


def test_rows_of_jsonl_come_one_after_the_other(tmp_path):
    path = write(tmp_path, '{"file_name": "a.png"}\r\n\n{"file_name": "b.png"}\nno row\n', "captions.jsonl")
    rows = tables.stream(path, COLUMNS)
    assert [next(rows), next(rows)] == [(1, {"file_name": "a.png"}), (3, {"file_name": "b.png"})]
    with pytest.raises(ValueError, match=r"captions.jsonl:4 is not JSON"):
        next(rows)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from(tables.DELIMITERS))
def test_what_the_standard_library_writes_comes_back(tmp_path_factory, rows, delimiter):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    path = write(tmp_path_factory.mktemp("table"), file.getvalue())
    written = [row for row in rows if any(field.strip() for field in row)]
    if not any('\\"' in field or field.endswith("\\") for row in rows for field in row):
        assert [row[1:] for row in pairs(path)] == written


@given(texts)
def test_any_text_is_a_table_or_a_value_error(tmp_path_factory, text):
    path = write(tmp_path_factory.mktemp("table"), f"file_name,caption\n{text}")
    try:
        tables.rows(path, COLUMNS)
    except ValueError as error:
        assert "captions.csv:" in str(error)  # noqa: PT017


class TestLists:
    @pytest.mark.parametrize(
        ("field", "captions"),
        [
            ('["a cat", "it\'s"]', ["a cat", "it's"]),
            ('["\\ud83d\\ude42"]', ["🙂"]),
            ("['a cat', \"it's\"]", ["a cat", "it's"]),
            ("['a cat' 'b']", ["a cat", "b"]),  # numpy
            ("['a cat'\n 'b']", ["a cat", "b"]),
            ("('a cat', 'b')", ["a cat", "b"]),
            ("('a cat',)", ["a cat"]),
            ("{'a cat', 'b'}", ["a cat", "b"]),
            ('c("a cat", "b")', ["a cat", "b"]),  # R
            ("[]", []),
            ("nan", []),
            ("NA", []),
            ("a cat", ["a cat"]),
            ("(a cat)", ["(a cat)"]),
            ('("Stop") sign', ['("Stop") sign']),
            ("[A] cat [B]", ["[A] cat [B]"]),
        ],
    )
    def test_of_many_programs(self, field, captions):
        assert parse(field, bare=True) == captions

    @pytest.mark.parametrize(
        "field",
        [
            *("array(['a'], dtype=object)", "['a', nan]", "['it''s']"),
            *(
                "['a cat', 'a sm",
                "[a cat, b]",
                "{a,b}",
                '{"en": "a"}',
                "[['a']]",
                '["a", 3]',
                "['a' ... 'z']",
                "b'a cat'",
            ),
        ],
    )
    def test_that_are_none_are_refused(self, field):
        with pytest.raises(ValueError, match="looks like a list"):
            parse(field, bare=True)

    def test_a_text_of_json_may_have_brackets(self):
        assert parse("[a cat]", bare=False) == ["[a cat]"]
        assert parse("nan", bare=False) == ["nan"]
        assert parse("['a', 'b']", bare=False) == ["a", "b"]
