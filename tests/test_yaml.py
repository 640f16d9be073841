import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpost import yaml_loader
from jaxpost.errors import ConfigError

FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(text):
    return yaml_loader.parse(text, "f.yaml").tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.", 1.0),
        ("-.5E3", -500.0),
        ("+3", 3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-0", 0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2020-01-01", "2020-01-01"),
        ("2020-01-01T10:00:00Z", "2020-01-01T10:00:00Z"),
        ("infinity", "infinity"),
        ("nan", "nan"),
        ("=", "="),
        ("'1'", "1"),
        ('"true"', "true"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    for got in (read(f"a: {text}")["a"], yaml_loader.parse_value(text)):
        assert got == value and type(got) is type(value)


def test_nan_and_block_text():
    assert math.isnan(read("a: .nan")["a"])
    assert read("a: |\n  1\n  2\n") == {"a": "1\n2\n"}
    assert read("") is None and read("# only a comment\n") is None


def test_aliases_within_bounds_are_fine():
    assert read("a: &x [1, {b: 2}]\nc: *x") == {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}


def test_positions():
    parsed = yaml_loader.parse("a:\n  - b: 1\n    c: [2,\n      3]\n")
    assert parsed.positions[("a",)] == (1, 1)
    assert parsed.positions[("a", 0, "c")] == (3, 5)
    assert parsed.positions[("a", 0, "c", 1)] == (4, 7)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(200))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 2\n  c: 3", "f.yaml:4:3: duplicate key 'c', first on line 3"),
        ("a: 1\n'a': 2", "f.yaml:2:1: duplicate key 'a'"),
        ("a: !!python/object/apply:os.system ['true']", "f.yaml:1:4: the tag "),
        ("a: !!python/name:os.system", "the tag "),
        ("a: !custom 1", "the tag "),
        ("a: !!str 1", "the tag "),
        ("a: !!binary aGk=", "the tag "),
        ("1: 2", "f.yaml:1:1: a key must be text; quote it: '1'"),
        ("true: 2", "a key must be text"),
        ("~: 2", "a key must be text"),
        ("[a]: 2", "a key must be text"),
        ("? {a: b}\n: 2", "a key must be text"),
        ("<<: {a: 1}", "merge keys"),
        ("--- \na: 1\n---\nb: 2", "f.yaml:3:1: "),
        ("a: &a [*a]", "recursive alias"),
        ("a: *b", "f.yaml:1:4: found undefined alias 'b'"),
        ("[" * 1_000, "nested deeper"),
        ("- " * 100 + "x", "nested deeper"),
        (BOMB, "aliases expand to more than"),
        (CHAIN, "nested deeper"),
        ("- 1\n" * 12_000, "more than 10000 values"),
        ("a: b: c", "f.yaml:1:5: mapping values are not allowed here"),
        ("a: [1", "expected ',' or ']'"),
        ("a: 'x\nb: 3", "unexpected end of stream"),
        ("\ta: 1", "cannot start any token"),
        ("a: \x00", "f.yaml:1:4: character U+0000 is not allowed"),
        ("x: 1\na: \ud800", "f.yaml:2:4: character U+D800 is not allowed"),
        ('a: "\\ud800"', "not printable"),
        ('a: "\\0"', "not printable"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("- 99999999999999999999999", "more than 64 bits"),
        ("- " + "9" * 5_000, "more than 64 bits"),
        ("%YAML 3.0\n---\na: 1", "incompatible"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("f.yaml") and "\n" not in str(caught.value)


def test_files(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9\r\nb: 2\r\n")  # a BOM and Windows line ends
    assert yaml_loader.parse_file(str(file)).tree == {"a": "é", "b": 2}
    file.write_bytes(b"a: 1\nb: \xff")
    with pytest.raises(ConfigError, match=r"c\.yaml:2:1: not UTF-8"):
        yaml_loader.parse_file(str(file))
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        yaml_loader.parse_file(str(file))
    for name, reason in [(str(tmp_path / "none"), "No such file"), (str(tmp_path), "directory"), ("a\0b", "null")]:
        with pytest.raises(ConfigError, match=reason):
            yaml_loader.parse_file(name)


def test_typed_values_are_plain_unless_they_open_like_yaml():
    assert yaml_loader.parse_value("*.jsonl") == "*.jsonl"
    assert yaml_loader.parse_value("a: b # c") == "a: b # c"
    assert yaml_loader.parse_value("!!python/object:x") == "!!python/object:x"
    assert yaml_loader.parse_value(" [1, {a: no}] ") == [1, {"a": "no"}]
    assert yaml_loader.parse_value('"a\\tb"') == "a\tb"
    for text in ("[1", '"a" b', "{a: 1, a: 2}", "[*x]", "a\0"):
        with pytest.raises(ConfigError):
            yaml_loader.parse_value(text)


def test_dump_is_readable():
    tree = {"a": {"b": [1, 2.5, None], "c": []}, "d": [{"e": "x y", "f": {"g": True}}, {"e": "no: 1"}], "h": "1e-4"}
    text = yaml_loader.dump(tree)
    want = [
        "a:", "  b: [1, 2.5, null]", "  c: []", "d:", '  - e: "x y"', "    f:", "      g: true", '  - e: "no: 1"',
        'h: "1e-4"',
    ]  # fmt: skip
    assert text.splitlines() == want
    commented = yaml_loader.dump(tree, lambda path: yaml_loader.dotted(path))
    assert "# a.b" in commented.splitlines()[1] and read(commented) == tree


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"])),
    st.sampled_from(["1e-4", "true", "null", "~", "<<", "a: b", "- x", "#", "a #b", "x:", "0x1", "a\nb\t", "*a", "é"]),
)
KEYS = SCALARS.filter(lambda value: isinstance(value, str))
TREES = st.recursive(SCALARS, lambda t: st.lists(t, max_size=4) | st.dictionaries(KEYS, t), max_leaves=20)


def check_identity(tree):
    text = yaml_loader.dump({"root": tree}, lambda path: "comment")
    try:
        assert read(text) == {"root": tree}
    except ConfigError as error:
        assert "not printable" in str(error)  # private or unassigned code points that YAML excludes


def check_any_text(text):
    try:
        yaml_loader.parse(text, "f.yaml")
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("f.yaml")


TOKENS = [
    "a",
    ": ",
    ":",
    "\n",
    "  ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "&x ",
    "*x",
    "!!",
    "!<",
    "'",
    '"',
    "|",
    ">",
    "%",
    "#",
]
TOKENS += ["? ", "---", "...", "\\", "\t", "\r", "<<", "1", "\u2028", "\ufeff", "\\x", "@", "`", "|-2", "&", "*"]
FRAGMENTS = st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=40).map("".join)


@FEW
@given(TREES)
def test_dump_then_parse_is_the_identity(tree):
    check_identity(tree)


@FEW
@given(FRAGMENTS)
def test_any_text_is_a_tree_or_one_line(text):
    check_any_text(text)


@pytest.mark.slow
@MANY
@given(TREES)
def test_dump_then_parse_is_the_identity_long(tree):
    check_identity(tree)


@pytest.mark.slow
@MANY
@given(FRAGMENTS)
def test_any_text_is_a_tree_or_one_line_long(text):
    check_any_text(text)
