"""Tab-separated files: when quotes are text, as in GLUE, and when a CSV writer put them about fields."""

import csv
import io

import pytest

from lte.data.sources import read_rows

ROWS = [
    {"text": 'he said "no"', "label": "1"},
    {"text": '"Stop!" he said', "label": "0"},
    {"text": "plain", "label": "1"},
]


def quoted(rows, quoting=csv.QUOTE_MINIMAL) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter="\t", quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read(tmp_path, text, *options):
    (tmp_path / "a.tsv").write_bytes(text.encode())
    return list(read_rows(tmp_path / "a.tsv", *options))


@pytest.mark.parametrize("text", ["a\ttab", "two\nlines", "a\r\n\tboth", 'a "quote"', '"all"', '"'])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_what_a_csv_writer_wrote(tmp_path, text, quoting):
    rows = [*ROWS, {"text": text, "label": "0"}]
    assert read(tmp_path, quoted(rows, quoting)) == rows


@pytest.mark.parametrize(
    "texts",
    [
        ['"', "a"],
        ['" open only', "a"],
        ['"all of it"', "a"],  # a speech: a writer had no need to quote it
        ['"he said ""no"""', '"a" b'],  # doubled, but another field begins with a quote and goes on
        ['"opens', 'and closes"'],  # read as quoted, this is one field over two lines
        ['a "b" c', 'd" e'],
        ['"a', 'b"\tc"', "d"],
    ],
)
def test_quotes_that_are_text(tmp_path, texts):
    width = max(text.count("\t") for text in texts) + 2
    names = [f"c{i}" for i in range(width - 1)]
    lines = ["\t".join([*names, "label"])]
    lines += ["\t".join([text, *[""] * (width - 2 - text.count("\t")), "1"]) for text in texts]
    rows = read(tmp_path, "\n".join(lines) + "\n")
    assert ["\t".join(row.values()) for row in rows] == lines[1:]


def test_a_bad_row_of_either_kind_is_still_one(tmp_path):
    with pytest.raises(ValueError, match="line 4: 3 fields, but the header has 2"):
        read(tmp_path, 'text\tlabel\n" open\t1\na\t0\nb\tc\t1\n')
    with pytest.raises(ValueError, match="line 5: 3 fields, but the header has 2"):
        read(tmp_path, 'text\tlabel\n"a\tb"\t1\n"c\nd"\t0\ne\tf\t1\n')
    rows = read(tmp_path, 'text\tlabel\n"a\tb"\t1\nc\td\t0\n', (), True)
    assert rows == [{"text": "a\tb", "label": "1"}]


def test_without_a_header_line(tmp_path):
    assert read(tmp_path, '"a\tb"\t1\nc\t0\n', ("text", "label")) == [
        {"text": "a\tb", "label": "1"},
        {"text": "c", "label": "0"},
    ]
