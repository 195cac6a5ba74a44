"""YAML documents: what they may hold, how they come back, and that nothing in one does harm."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokquant
from tokquant import QuantScheme, SchemeError, precisions
from tokquant.schemes import document, preset_names
from tokquant.schemes.presets import source

TEXT = "\n".join(f"{role}: {{precision: int8}}" for role in "qkvp")
BASE = {role: {"precision": "int8"} for role in "qkvp"}
GRANULARITIES = ["token", "tensor", "head", "channel", {"block": 128}, {"channel_block": 256}, {"group": 16}]
SINGLE = {"rotate": "hadamard", "rotate_v": "hadamard", "balance": "channel"}


def refusal(text):
    with pytest.raises(SchemeError) as error:
        QuantScheme.from_yaml(text)
    return str(error.value)


REFUSED = {
    "an anchor": ("name: &a x\n" + TEXT, "line 1: an anchor or alias"),
    "an alias": (TEXT + "\nname: *a", "line 5: an anchor or alias"),
    "a merge key": (TEXT + "\n<<: {rotate: none}", "line 5: the key '<<'"),
    "a duplicate key": (TEXT + "\nq: {precision: int4}", "line 5: the key 'q' twice"),
    "a duplicate key deep inside": ("k: {precision: int8, precision: int4}", "line 1: the key 'precision' twice"),
    "a local tag": ("name: !name x", "line 1: the tag '!name'"),
    "a standard tag": ("name: !!str x", "line 1: the tag 'tag:yaml.org,2002:str'"),
    "a tag of Python": ("!!python/object/apply:os.system [ls]", "line 1: the tag 'tag:yaml.org,2002:python/object/apply"),
    "a second document": (TEXT + "\n---\n" + TEXT, "line 5: a second document"),
    "more than 64 KiB": (TEXT + "\n#" + "x" * 2**16, "more than 65536 bytes"),
    "too deep": ("[" * 20 + "]" * 20, "nested more than 16 deep"),
    "too many values": ("name: [" + "1, " * 2500 + "]", "more than 2000 values"),
    "Latin-1": (b"name: \xe9", "not UTF-8", "at byte 6"),
    "UTF-16": (TEXT.encode("utf-16"), "not UTF-8"),
    "a bell": ("name: \x07", "not YAML: special characters are not allowed"),
    "a NUL": ("name: a\0", "not YAML: special characters are not allowed"),
    "nothing": ("", "the document is empty"),
    "no text": (None, "a document is text, not None"),
    "a comment alone": ("# int8\n", "the document is empty"),
    "a list": ("- q\n- k", "a scheme is a mapping with q, k, v and p, not ['q', 'k']"),
    "a word": ("int8", "a scheme is a mapping with q, k, v and p, not 'int8'"),
    "an empty value": ("---\n", "a scheme is a mapping with q, k, v and p, not None"),
    "a number as a key": ("1: x", "line 1: the key 1"),
    "a list as a key": ("? [q]\n: x", "line 1: the key ['q']"),
    "an open brace": ("q: {precision: int8", "line 1: not YAML"),
    "a tab": ("q:\n\tprecision: int8", "line 2: not YAML", "'\\t'"),
    "a character past Unicode": ('name: "\\U00110000"', "not YAML"),
    "a character far past Unicode": ('name: "\\UFFFFFFFF"', "not YAML"),
    "a version of many digits": ("%YAML " + "9" * 5000 + ".1\n---\n" + TEXT, "not YAML"),
}


@pytest.mark.parametrize(("text", "parts"), [(text, parts) for text, *parts in REFUSED.values()], ids=REFUSED)
def test_is_refused_with_its_line_and_why(text, parts):
    told = refusal(text)
    assert all(part in told for part in parts), told


ODDITIES = ["on", "off", "yes", "no", "y", "010", "064", "0064", "0x40", "0o100", "64.0", "64.", "6.4e1", "1e3", "12:30"]
ODDITIES += ["1_000", ".nan", ".inf", "-.inf", "+64", "'64'", '"64"', "~", "TRUE", "True", "2024-01-01", "", "=", "1e999"]


@pytest.mark.parametrize("written", ODDITIES)
@pytest.mark.parametrize("line", ["cache: {{page: {}}}", "cache: {{sink: {}}}", "k: {{precision: int8, symmetric: {}}}"])
def test_an_oddity_of_yaml_is_not_taken_for_a_number_or_a_truth(line, written):
    lines = {role: f"{role}: {{precision: int8}}" for role in "qkvp"}
    place = line.split(":")[0]
    assert f"{place}." in refusal("\n".join({**lines, place: line.format(written)}.values()))


@pytest.mark.parametrize("written", ["on", "off", "yes", "010", "0x40", "12:30", "1_000", "TRUE", "+64", "2024-01-01"])
def test_an_oddity_of_yaml_stays_the_text_it_looks_like(written):
    assert document.read(f"x: {written}") == {"x": written}


@pytest.mark.parametrize(("written", "value"), [("64", 64), ("-3", -3), ("true", True), ("false", False), ("null", None)])
def test_plain_numbers_truths_and_null_are_what_they_are(written, value):
    [read] = document.read(f"x: {written}").values()
    assert read == value and type(read) is type(value)


def test_comments_blank_lines_quotes_and_a_byte_order_mark_do_no_harm():
    text = "\ufeff# mine\n---\n\n'name': \"a\"  # its name\n" + TEXT + "\n...\n"
    assert QuantScheme.from_yaml(text) == QuantScheme.from_yaml(text.encode()) == QuantScheme(**BASE, name="a")


UNREADABLE = {
    "a missing file": ("missing.yaml", "No such file"),
    "a directory": ("folder.yaml", "Is a directory"),
    "a binary file": ("binary.yaml", "not UTF-8"),
    "a large file": ("large.yaml", "more than 65536 bytes"),
    "a list": ("list.yaml", "a scheme is a mapping with q, k, v and p, not [1, 2]"),
    "a scheme with a mistake": ("wrong.yaml", ": q: 'int8' is not accepted"),
    "a name with a NUL": ("a\0b.yaml", "null"),
    "a name too long": ("x" * 300 + ".yaml", "too long"),
}


@pytest.mark.parametrize(("name", "part"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("load", [QuantScheme.load, lambda path: tokquant.schemes.resolve(str(path))], ids=["load", "resolve"])
def test_a_file_that_is_no_scheme_is_refused_with_its_path(tmp_path, name, part, load):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "large.yaml").write_bytes(b"#" * 10**6)
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "wrong.yaml").write_text("q: int8")
    with pytest.raises(SchemeError) as error:
        load(tmp_path / name)
    assert part in str(error.value) and str(tmp_path) in str(error.value)


HOSTILE = ["[", "{", "{a: ", "? ", "- ", "&", "'", '"', "%", "!", "[a]: ", "? a\n", "|\n", ": ", "\\", "\n", "a: a\n ", "é"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_large_document_of_one_piece_is_refused_quickly(piece):
    start = time.process_time()
    assert refusal(piece * (30000 // len(piece)))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", ["1e3", "08", "010", "null", "true", "on", "1.5", "0x1f", "0o7", "2024-01-01", "1_0"])
def test_a_name_that_yaml_could_take_for_something_else_comes_back_as_it_was(name):
    assert QuantScheme.from_yaml(QuantScheme(**BASE, name=name).to_yaml()).name == name


def operands(role):
    choices = {
        "precision": st.sampled_from(precisions.names(role)),
        "granularity": st.sampled_from(GRANULARITIES),
        "symmetric": st.booleans(),
        "scale": st.sampled_from(["dynamic", "static"]),
        "scale_dtype": st.sampled_from(["fp32", "fp16", "fp8_e4m3"]),
        "smooth": st.sampled_from(["none", "block_mean"] if role == "q" else ["none", "mean", "static"]),
    }
    return st.fixed_dictionaries({}, optional=choices).map(lambda fields: consistent(role, fields))


def consistent(role, fields):
    precision = precisions.get(fields.setdefault("precision", "int8"))
    if role == "q" or precision.kind != "int":
        fields.pop("symmetric", None)
    if precision.largest is None or fields.get("granularity") not in GRANULARITIES[1:4]:
        fields.pop("scale", None)
    return fields


probabilities = st.fixed_dictionaries(
    {"precision": st.sampled_from(precisions.names("p"))},
    optional={"granularity": st.sampled_from(["unit", *({"row_block": n} for n in (16, 32, 64, 128))])},
)
sizes = st.integers(0, 2**20)
rest = {key: st.sampled_from(["none", value]) for key, value in SINGLE.items()} | {
    "balance": st.sampled_from(["none", "channel", "rope_pairs"])
    | st.fixed_dictionaries(
        {},
        optional={
            "alpha": st.floats(1e-4, 1),
            "beta": st.floats(1e-4, 1e4),
            "top_k": st.integers(0, 64),
            "scale": st.just("static"),
        },
    ).map(lambda parameters: {"rope_pairs": parameters}),
    "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True),
    "normalizer": st.sampled_from(["exact", "quantized"]),
    "cache": st.fixed_dictionaries({}, optional={"sink": sizes, "recent": sizes, "page": st.sampled_from([16, 128, 1024])}),
}
fields = st.fixed_dictionaries({**{role: operands(role) for role in "qkv"}, "p": probabilities}, optional=rest)


@settings(max_examples=150)
@given(fields)
def test_any_valid_scheme_survives_yaml_and_python(data):
    whole = QuantScheme(**data)
    again = QuantScheme.from_yaml(whole.to_yaml())
    assert (again, hash(again), again.digest()) == (whole, hash(whole), whole.digest())
    assert QuantScheme(**whole.model_dump(mode="json")) == whole


def test_a_dumped_scheme_loads_as_an_equal_one_and_names_itself(tmp_path):
    whole = QuantScheme(**{**BASE, "k": {"precision": "int8", "granularity": {"block": 64}}}, name="mine", cache={"sink": 4})
    whole.dump(tmp_path / "other.yaml")
    assert QuantScheme.load(tmp_path / "other.yaml") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["other.yaml"]


def test_a_file_without_a_name_is_named_after_the_file(tmp_path):
    path = tmp_path / "My Int8.yaml"
    path.write_text(TEXT)
    assert QuantScheme.load(path) == tokquant.schemes.resolve(str(path)) == QuantScheme(**BASE, name="my-int8")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["int8", "token", "static"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["precision", "block", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    [*"qkvp", "name", "cache", "rotate", "precision", "granularity", "symmetric", "page", "\ud800", "\x1b[2J"]
)


@settings(max_examples=150)
@given(st.dictionaries(keys, values | st.dictionaries(keys, values, max_size=4), max_size=6))
def test_any_nested_mapping_gives_a_scheme_or_a_scheme_error(data):
    try:
        QuantScheme(**data)
    except SchemeError as error:
        assert all(line.isprintable() for line in str(error).split("\n")), str(error)


PIECES = [
    "{",
    "}",
    "[",
    "]",
    ": ",
    ", ",
    "\n",
    "  ",
    "- ",
    "&a ",
    "*a",
    "!!int ",
    "---\n",
    "%YAML 1.1\n",
    '"\\U00110000"',
    "\\",
]
PIECES += [
    "'",
    '"',
    "|",
    ">",
    "? ",
    "<<",
    "q",
    "k:",
    "int4",
    "token",
    "static",
    "false",
    "010",
    ".nan",
    "1e3",
    "\t",
    "\0",
    "\ud800",
]


@st.composite
def mutated_presets(draw):
    text = source(draw(st.sampled_from(preset_names())))
    text = text[text.index("name:") :]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.sampled_from([0, 0, 1, 2, 8]))
        text = text[:start] + draw(st.sampled_from(["", *PIECES])) + text[end:]
    return text


def survives(text):
    try:
        again = QuantScheme.from_yaml(text)
    except SchemeError as error:
        assert all(line.isprintable() for line in str(error).split("\n")), str(error)
    else:
        assert QuantScheme.from_yaml(again.to_yaml()) == again


@settings(max_examples=150)
@given(mutated_presets())
def test_a_mutated_preset_is_a_scheme_or_a_scheme_error(text):
    survives(text)


@settings(max_examples=150)
@given(st.text(max_size=60) | st.binary(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_random_text_is_a_scheme_or_a_scheme_error(text):
    survives(text)
