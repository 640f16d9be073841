"""What fuzzing found in our readers, one case each: all ended in a foreign error, a bad message or a wrong success."""

import json
import re
import struct

import pytest

from jaxpost import config
from jaxpost.data import template
from jaxpost.data.chat import load_tokenizer
from jaxpost.data.files import jsonl_file
from jaxpost.data.sources import SourceConfig, open_source
from jaxpost.data.tasks import make_task
from jaxpost.errors import CheckpointError, ConfigError, DataError
from jaxpost.models.loading import locate
from jaxpost.models.safetensors_reader import read_header
from tests import tiny
from tests.fuzz.readers import LLAMA, Gguf, check_message

LONG = "x" * 3000


def refused(kind, call, *args, says: str, file=None) -> None:
    with pytest.raises(kind) as caught:
        call(*args)
    check_message(caught.value, file)
    assert re.search(says, str(caught.value)), str(caught.value)


# --------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "surrogates not allowed"),
        ({"__metadata__": {"format": 9}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "__metadata__"),
        ({"__metadata__": [], "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "__metadata__"),
        ({"a": {"dtype": "F32", "shape": [1 << 62, 0], "data_offsets": [0, 0]}}, "bad shape"),
    ],
    ids=["half a character in a name", "number as metadata", "list as metadata", "empty but huge"],
)
def test_safetensors(tmp_path, header, says):
    file, text = tmp_path / "x.safetensors", json.dumps(header).encode()
    size = max(entry["data_offsets"][1] for entry in header.values() if "dtype" in entry)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)
    refused(CheckpointError, read_header, file, says=says, file=file)


# ----------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def folder(tmp_path):
    return tiny.write_tokenizer(tmp_path / "tokenizer")


def change(file, edit) -> None:
    tree = json.loads(file.read_text()) if file.exists() else {}
    edit(tree)
    file.write_text(json.dumps(tree))


def test_tokenizer_stop_id_of_another_type(folder):
    change(folder / "generation_config.json", lambda tree: tree.update(eos_token_id=[0, "2"]))
    refused(
        DataError, load_tokenizer, folder, says="generation_config.json: eos_token_id .* is no token id", file=folder
    )


def test_tokenizer_stop_id_outside_names_the_folder(folder):
    change(folder / "generation_config.json", lambda tree: tree.update(eos_token_id=-(2**63)))
    refused(DataError, load_tokenizer, folder, says="outside its vocabulary of 259", file=folder)


def test_tokenizer_special_token_that_is_missing_names_the_folder(folder):
    change(folder / "tokenizer_config.json", lambda tree: tree.update(unk_token=LONG))
    refused(DataError, load_tokenizer, folder, says="unk_token 'x+' is not in its vocabulary", file=folder)


def test_tokenizer_with_an_id_beyond_all_memory(folder):
    change(folder / "tokenizer.json", lambda tree: tree["model"]["vocab"].update({"a": 2**32 - 2}))
    refused(DataError, load_tokenizer, folder, says="4294967295 tokens; expected 1 to", file=folder)


def test_tokenizer_error_of_the_library_is_cut_short(folder):
    change(folder / "tokenizer.json", lambda tree: tree.update(added_tokens=LONG))
    refused(DataError, load_tokenizer, folder, says="tokenizer.json: .*invalid type", file=folder)


def test_tokenizer_library_panics(folder, capfd):
    """A prefix that is longer than a piece: the Rust code slices from -1 and panics, which is no Exception."""

    def edit(tree):
        tree["model"]["vocab"] |= {"ab": 300}
        tree["model"] |= {"merges": [["a", "b"]], "continuing_subword_prefix": "####"}

    change(folder / "tokenizer.json", edit)
    refused(DataError, load_tokenizer, folder, says="PanicException|out of vocabulary", file=folder)


def test_tokenizer_post_processor_without_its_token(folder):
    """Its Rust code panics at the first text, long after the file was read."""
    single = [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    change(folder / "tokenizer_config.json", lambda tree: tree.update(bos_token="<|im_start|>"))
    change(folder / "tokenizer.json", lambda tree: tree.update(post_processor=processor))
    refused(DataError, lambda: load_tokenizer(folder).encode_text("a"), says="post-processor fails")


def test_gguf_merge_of_a_token_that_is_not_there(tmp_path):
    reader = Gguf(tmp_path)
    assert reader.good.count(b"ab c") == 1
    reader.file.write_bytes(reader.good.replace(b"ab c", b"ab d"))
    refused(DataError, load_tokenizer, reader.file, says="out of vocabulary", file=reader.file)


def sentencepiece_model(file, edit) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(LLAMA.read_bytes())
    edit(proto)
    file.write_bytes(proto.SerializeToString())


def test_sentencepiece_character_map_that_sentencepiece_refuses(tmp_path):
    def edit(proto):
        proto.normalizer_spec.remove_extra_whitespaces = True
        proto.normalizer_spec.precompiled_charsmap = struct.pack("<I", 4) + b"\0" * 8

    sentencepiece_model(tmp_path / "x.model", edit)
    refused(DataError, load_tokenizer, tmp_path / "x.model", says="damaged character map", file=tmp_path / "x.model")


def test_sentencepiece_merge_over_a_character_that_is_no_piece(tmp_path):
    """sentencepiece merges q and u to "qu" even where "q" itself is no piece; tokenizers would not."""

    def edit(proto):
        next(piece for piece in proto.pieces if piece.piece == "q").piece = "\u0416"

    sentencepiece_model(tmp_path / "x.model", edit)
    refused(DataError, load_tokenizer, tmp_path / "x.model", says="holds a character that is no piece")


def test_sentencepiece_control_symbol_that_a_text_can_spell(tmp_path):
    sentencepiece_model(tmp_path / "x.model", lambda proto: setattr(proto.pieces[1], "piece", "\u2581"))
    refused(DataError, load_tokenizer, tmp_path / "x.model", says="appears twice|holds white space")

    def edit(proto):
        next(piece for piece in proto.pieces if piece.piece == "\u2581").piece = "\u0416"
        proto.pieces[1].piece = "\u2581"

    sentencepiece_model(tmp_path / "y.model", edit)
    refused(DataError, load_tokenizer, tmp_path / "y.model", says="control symbol .* holds white space")


def test_sentencepiece_text_that_is_normalised_to_a_control_symbol(tmp_path):
    """Full-width letters spelt </s>; a unigram model then found the end-of-text id in what a user wrote."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox < / s >"] * 20), model_prefix=str(tmp_path / "u"), vocab_size=40,
        hard_vocab_limit=False, model_type="unigram", minloglevel=2, normalization_rule_name="nfkc_cf",
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "u.model")
    for text in ("the \uff1c/\uff53\uff1e fox", "the </S> fox"):
        refused(DataError, tokenizer.encode, text, says="becomes the control symbol '</s>'", file=tmp_path / "u.model")
    assert tokenizer.eos_id not in tokenizer.encode("the < / s > fox") and 2 in tokenizer.encode("a</s>")


def test_template_error_of_several_lines():
    call = "{{ raise_exception('no\nline') }}"
    refused(DataError, template.render, call, [{"role": "user", "content": "a"}], {}, says="TemplateError: no line")


# ----------------------------------------------------------------------------------------------------- rows


def test_row_whose_field_names_hold_line_breaks(tmp_path, folder):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "c\ntent": "a"}]}) + "\n")
    row, task = jsonl_file(str(file)).read(0), make_task("auto", str(folder))
    refused(DataError, task, row, f"{file}:1", says=r"missing, found role, 'c\\ntent'", file=file)
    file.write_text(json.dumps({"a\nb": 1, LONG: 2}) + "\n")
    source = open_source(SourceConfig(source=f"jsonl:{file}", columns={"text": "t"}))
    refused(DataError, source.__getitem__, 0, says=r"the row has 'a\\nb', x+\.\.\.", file=file)


def parquet(file, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file, compression="NONE", store_schema=False)
    return file.read_bytes()


def test_parquet_message_of_several_lines(tmp_path):
    file = tmp_path / "x.parquet"
    data = bytearray(parquet(file, text=["a", "b"]))
    size = struct.unpack("<I", data[-8:-4])[0]
    data[-8 - size : -8] = b"\x0e" * size
    file.write_bytes(data)
    refused(DataError, open_source, SourceConfig(source=f"parquet:{file}"), says="not a readable parquet", file=file)


def test_parquet_column_name_that_is_no_utf_8(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(parquet(file, texty=["a", "b"]).replace(b"texty", b"te\xffty"))
    refused(DataError, open_source, SourceConfig(source=f"parquet:{file}"), says="not a readable parquet", file=file)


# -------------------------------------------------------------------------------------------------- configs


def test_config_value_of_thousands_of_characters(tmp_path):
    file = tiny.write_config(tmp_path, data={"eval": [{"source": LONG}]})
    refused(ConfigError, config.load, file, says=r"data.eval.0.source: x+ \.\.\. .*use jsonl:", file=file)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"tokenizer": {"a": 1}}, "model.tokenizer is no text"),
        ({"tokenizer": LONG}, "does not exist"),
        ({"source": LONG}, "does not exist"),
        ({"source": "~nobody-is-called-this/model"}, "does not exist"),
        ({"source": "a\0b"}, "not printable"),
    ],
    ids=["tokenizer is a mapping", "long tokenizer", "long source", "home of nobody", "NUL"],
)
def test_saved_run(tmp_path, edit, says):
    file = tiny.write_config(tmp_path)
    change(file, lambda tree: tree["model"].update(edit))
    refused(ConfigError, locate, f"ckpt:{tmp_path}", says=says, file=file)


def test_saved_run_with_a_deep_config(tmp_path):
    (tmp_path / "config.yaml").write_text("model: " + "[" * 5000)
    refused(ConfigError, locate, f"ckpt:{tmp_path}", says="nested deeper", file=tmp_path / "config.yaml")


def test_saved_run_whose_algorithm_has_no_name(tmp_path):
    change(tiny.write_config(tmp_path), lambda tree: tree.update(algorithm={"name": ["sft"]}))
    refused(ConfigError, config.load_saved, tmp_path, says="algorithm", file=tmp_path)
