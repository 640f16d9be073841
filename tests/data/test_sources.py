"""Files to records: every kind, every broken row with its file, line, field and reason."""

import gzip
import json
import pickle
import random

import pydantic
import pytest

from jaxpost.data.rows import RowError, parse_json
from jaxpost.data.sources import SourceConfig, find_files, open_source, split_source
from jaxpost.errors import ConfigError, DataError


def records_of(source, **options):
    records = open_source(SourceConfig(source=source, **options))
    return [records[i] for i in range(len(records))]


def test_jsonl_bom_crlf_and_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \t\n{"text": "two \xc3\xa9"}\n{"text": "three"}')
    records = open_source(SourceConfig(source=f"jsonl:{path}"))
    assert [records[i]["text"] for i in range(3)] == ["one", "two é", "three"]
    assert [records.where(i) for i in range(3)] == [f"{path}:1", f"{path}:4", f"{path}:5"]
    assert len(records) == 3
    with pytest.raises(IndexError):
        records[3]


def test_gz_equals_plain_and_is_picklable(tmp_path):
    text = "".join(json.dumps({"text": "x" * i}) + "\n" for i in range(1, 40))
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    records = open_source(SourceConfig(source=f"jsonl:{tmp_path}/a.jsonl.gz"))
    plain = records_of(f"jsonl:{tmp_path}/a.jsonl")
    copy = pickle.loads(pickle.dumps(records))
    assert [copy[i] for i in reversed(range(39))] == plain[::-1]
    assert copy.where(5) == f"{tmp_path}/a.jsonl.gz:6"


def test_damaged_gz_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 500)
    damaged = {"cut": whole[:-20], "none": b"not gzip at all", "flip": whole[:30] + b"!!" + whole[32:]}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.jsonl.gz: damaged gzip"):
            open_source(SourceConfig(source=f"jsonl:{path}"))


def test_globs_are_sorted_and_one_long_list(tmp_path):
    for name in ("b", "c", "a"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(3)))
    (tmp_path / "bb.jsonl").write_text("\n")  # a file without records is fine among others
    got = [record["text"] for record in records_of(f"jsonl:{tmp_path}/*.jsonl")]
    assert got == ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2"]
    got = [record["text"] for record in records_of(f"jsonl:{tmp_path}/*.jsonl", skip=2, limit=3)]
    assert got == ["a2", "b0", "b1"]
    assert len(records_of(f"jsonl:{tmp_path}/*.jsonl", skip=7, limit=5)) == 2


def test_a_file_name_with_brackets(tmp_path):
    (tmp_path / "a[1].jsonl").write_text('{"text": "x"}\n')
    assert find_files(str(tmp_path / "a[1].jsonl")) == [str(tmp_path / "a[1].jsonl")]


def test_text_is_one_record_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n two \nthree")
    assert records_of(f"text:{tmp_path}/a.txt") == [{"text": "one"}, {"text": " two "}, {"text": "three"}]
    (tmp_path / "b.txt").write_bytes(b"fine\n\xff\xfe\n")
    records = open_source(SourceConfig(source=f"text:{tmp_path}/b.txt"))
    with pytest.raises(DataError, match=r"b.txt:2: not UTF-8: byte 0xff at byte 1"):
        records[1]


def test_parquet_random_access_over_blocks(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"text": f"row {i}", "messages": [{"role": "user", "content": str(i)}]} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    records = pickle.loads(pickle.dumps(source := open_source(SourceConfig(source=f"parquet:{tmp_path}/a.parquet"))))
    assert len(records) == len(source) == 2500
    for i in [2499, 0, 1023, 1024, 700, 2048, 2047]:
        assert records[i] == rows[i]
    assert records.where(7) == f"{tmp_path}/a.parquet:8"


def test_parquet_nan_and_broken_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"text": "a", "reward": 1.0}, {"text": "b", "reward": float("nan")}, {"text": "c", "reward": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = open_source(SourceConfig(source=f"parquet:{tmp_path}/a.parquet"))
    assert records[2] == rows[2]
    with pytest.raises(DataError, match=r"a.parquet:2: field 'reward': nan is not a finite number"):
        records[1]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="b.parquet: not a readable parquet file"):
        open_source(SourceConfig(source=f"parquet:{tmp_path}/b.parquet"))


def test_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a", "text": "old"}\n{"answer": "b"}\n')
    columns = {"prompt": "question", "text": "answer"}
    records = open_source(SourceConfig(source=f"jsonl:{tmp_path}/a.jsonl", columns=columns))
    assert records[0] == {"prompt": "q", "text": "a"}
    with pytest.raises(DataError, match=r"a.jsonl:2: field 'question': missing; the row has answer"):
        records[1]


BAD = [
    (b'{"text": "a"', "invalid JSON"),
    (b"[1, 2]", "expected a JSON object on one line, got a list"),
    (b'"text"', "got a string"),
    (b"null", "got null"),
    (b"true", "got a boolean"),
    (b'{"text": "a"} {"text": "b"}', "invalid JSON: Extra data at column 15"),
    (b'{"reward": NaN}', "field 'reward': nan is not a finite number"),
    (b'{"a": {"b": [1, {"c": -Infinity}]}}', r"field 'a\.b\[1\]\.c': -inf"),
    (b'{"a": 1e999}', "field 'a': inf"),
    (b'{"text": "\\ud800"}', r"field 'text': lone surrogate U\+D800"),
    (b'{"m": [{"content": "x\\udc00y"}]}', r"field 'm\[0\]\.content': lone surrogate U\+DC00"),
    (b'{"a\\udc00": 1}', "lone surrogate"),
    (b'{"text": "a\\u0000b"}', "field 'text': text with a NUL"),
    (b'{"text": "a\0b"}', "NUL byte at byte 12"),
    (b'{"text": "a\tb"}', "Invalid control character"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff at byte 11"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"text": 1, "text": 2}', "field 'text': the key appears twice"),
    (b'{"a": [{"b": 1, "b": 1}]}', "field 'b': the key appears twice"),
    (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON: Exceeds the limit"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize("line,reason", BAD, ids=range(len(BAD)))
def test_broken_rows_are_named(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    records = open_source(SourceConfig(source=f"jsonl:{path}"))
    assert records[0] == {"text": "fine"}
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{reason}"):
        records[1]


def test_a_megabyte_line_is_fine():
    assert len(parse_json(json.dumps({"text": "é" * 1_000_000}).encode())["text"]) == 1_000_000


def test_fuzzed_lines_never_escape():
    """400 seeded mutations of good lines: a record of clean values, or a RowError of one printable line."""
    rng = random.Random(0)
    good = [line for line, _ in BAD[:18]] + [b'{"text": "caf\xc3\xa9", "n": [1, 2.5, null, {"a": true}]}']
    pieces = [b"", b"\0", b"\\ud83d", b"NaN", b'"', b"{", b"\xff", b"\r", b"\xef\xbb\xbf", b"1e400", b",,"]
    refused = 0
    for _ in range(400):
        line = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(line) + 1)
            line[place : place + rng.randint(0, 2)] = rng.choice(pieces)
        try:
            record = parse_json(bytes(line))
        except RowError as error:
            refused += 1
            str(error).encode("utf-8")
            assert "\n" not in str(error)
        else:
            json.dumps(record, allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert 200 < refused < 400


def test_missing_files_are_config_errors(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXPOST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    where = r"data.train\[0\].source: no file matches .*nothing-\*.jsonl; where a config says \$\{JAXPOST_DATA\}"
    with pytest.raises(ConfigError, match=where):
        open_source(SourceConfig(source=f"jsonl:{tmp_path}/data/nothing-*.jsonl"), "data.train[0].source")
    with pytest.raises(ConfigError, match=r"nothing\.jsonl$"):  # it has nothing to do with the variable
        open_source(SourceConfig(source=f"jsonl:{tmp_path}/nothing.jsonl"))
    monkeypatch.setenv("JAXPOST_DATA", str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"nothing\.jsonl$"):
        open_source(SourceConfig(source=f"jsonl:{tmp_path}/data/nothing.jsonl"))


def test_empty_files_and_skipped_away(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n \n")
    with pytest.raises(DataError, match="no records"):
        open_source(SourceConfig(source=f"jsonl:{tmp_path}/a.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="no records after skipping 1"):
        open_source(SourceConfig(source=f"jsonl:{tmp_path}/b.jsonl", skip=1))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"source": "hf:org/name"}, "hub is not read yet"),
        ({"source": "csv:a.csv"}, "unknown kind"),
        ({"source": "a.csv"}, "unknown kind"),
        ({"source": "jsonl:"}, "nothing after"),
        ({"source": "jsonl:a", "split": "train"}, "have no splits"),
        ({"source": "jsonl:a", "columns": {"a": "x", "b": "x"}}, "same column"),
        ({"source": "jsonl:a", "weight": 0.0}, "greater than 0"),
        ({"source": "jsonl:a", "limit": True}, "valid integer"),
        ({"source": "jsonl:a", "task": "chatt"}, "task"),
        ({"source": "jsonl:a", "wieght": 1.0}, "wieght"),
    ],
)
def test_source_config_refuses(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        SourceConfig(**fields)


def test_kind_by_suffix():
    assert split_source("x/a.jsonl.gz") == ("jsonl", "x/a.jsonl.gz")
    assert split_source("a.parquet") == ("parquet", "a.parquet")
    assert split_source("text:notes") == ("text", "notes")
    assert split_source("a.xyz") == ("", "a.xyz")


def test_fingerprint_is_of_content_not_of_place(tmp_path):
    def fingerprint(name, text, **options):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return open_source(SourceConfig(source=f"jsonl:{path}", **options)).fingerprint

    same = fingerprint("here/a.jsonl", '{"text": "x"}\n')
    assert same == fingerprint("there/b.jsonl", '{"text": "x"}\n')
    assert same != fingerprint("here/a.jsonl", '{"text": "y"}\n')
    assert same != fingerprint("here/a.jsonl", '{"text": "x"}\n', columns={"prompt": "text"})
