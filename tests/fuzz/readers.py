"""One class a reader of untrusted files: its good files, how they are damaged, and what a success must look like."""

from __future__ import annotations

import json
import math
import pathlib
import random
import struct
from collections.abc import Callable

import numpy as np

from tests import tiny
from tests.fuzz.mutate import damage, damage_json, dump, swap

TESTS = pathlib.Path(__file__).parents[1]
TEXTS = ("the quick brown fox", " a  b\n", "漢字 🦜 é", "<|im_start|>user\n12<|im_end|>", "")


class Reader:
    """mutate(rng) writes a damaged file; check() reads it and asserts that what came out is sane."""

    file: pathlib.Path

    def restore(self) -> None:
        """Writes a good file, which must pass check()."""
        raise NotImplementedError

    def mutate(self, rng: random.Random) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


class Safetensors(Reader):
    """read_header and every view; what is accepted must be what the safetensors library itself reads."""

    def __init__(self, folder: pathlib.Path):
        from safetensors.numpy import save

        arrays = {f"t{i}": np.arange((i + 1) * 6, dtype=np.float32).reshape(2, -1) for i in range(4)}
        arrays |= {"h": np.ones((3, 2), np.float16), "ids": np.arange(5), "none": np.zeros((0, 3), np.float32)}
        self.good, self.file = save(arrays, metadata={"format": "np"}), folder / "x.safetensors"

    def restore(self) -> None:
        self.file.write_bytes(self.good)

    def mutate(self, rng: random.Random) -> None:
        data = self.good
        if rng.random() < 0.5:
            length = struct.unpack("<Q", data[:8])[0]
            header = dump(swap(rng, json.loads(data[8 : 8 + length])))
            data = struct.pack("<Q", len(header)) + header + data[8 + length :]
        self.file.write_bytes(data if data != self.good and rng.random() < 0.7 else damage(rng, data))

    def check(self) -> None:
        import safetensors

        from jaxpost.models.safetensors_reader import ITEM_BYTES, WEIGHT_DTYPES, read_header

        found = read_header(self.file)
        data = self.file.read_bytes()
        wanted = {name: value for name, value in safetensors.deserialize(data)}
        assert found.keys() == wanted.keys()
        for name, info in found.items():
            size = math.prod(info.shape) * ITEM_BYTES[info.dtype]
            assert 8 <= info.offset and info.offset + size <= len(data), "reads outside of the file"
            assert list(info.shape) == wanted[name]["shape"]
            assert data[info.offset : info.offset + size] == bytes(wanted[name]["data"])
            if info.dtype in WEIGHT_DTYPES:
                assert info.view(name).tobytes() == bytes(wanted[name]["data"])


class Gguf(Reader):
    """Metadata, spec and every tensor of a GGUF file, and its tokenizer."""

    def __init__(self, folder: pathlib.Path):
        import gguf

        from jaxpost.models.gguf_reader import read_gguf

        self.file = folder / "x.gguf"
        writer = gguf.GGUFWriter(self.file, "llama")
        for key, value in {
            **{"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32},
            **{"attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 260},
        }.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        vocab = json.loads((tiny.write_tokenizer(folder / "t") / "tokenizer.json").read_text())["model"]["vocab"]
        tokens = [*sorted(vocab, key=vocab.get), "<|im_start|>", "<|im_end|>", "ab", "abc"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 256 + [3, 3, 1, 1])
        writer.add_token_merges(["a b", "ab c"])
        writer.add_eos_token_id(257)
        writer.add_bos_token_id(256)
        writer.add_add_bos_token(True)
        writer.add_chat_template(tiny.TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
        rng = np.random.default_rng(0)
        for name, shape in {"token_embd.weight": (260, 32), "blk.0.attn_q.weight": (32, 32)}.items():
            value = rng.normal(size=shape).astype(np.float32)
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self.good = self.file.read_bytes()
        self.header = min(tensor.offset for tensor in read_gguf(self.file).tensors.values())

    def restore(self) -> None:
        self.file.write_bytes(self.good)

    def mutate(self, rng: random.Random) -> None:
        head, rest = self.good[: self.header], self.good[self.header :]
        if rng.random() < 0.3:  # a metadata name or a count, with the sizes around it still right
            at = rng.choice([i for i in range(24, self.header - 8) if head[i : i + 8] == b"tokenize"] + [8, 16])
            patch = rng.choice((b"tokenizf", struct.pack("<Q", rng.choice((0, 1, 9, 30, 2**63))), b"llama.xx"))
            data = head[:at] + patch + head[at + 8 :] + rest
        else:
            data = damage(rng, head) + rest if rng.random() < 0.8 else damage(rng, self.good)
        self.file.write_bytes(data)

    def check(self) -> None:
        from jaxpost.errors import JaxpostError
        from jaxpost.models import gguf
        from jaxpost.models.gguf_reader import read_gguf

        size = self.file.stat().st_size
        try:
            use_tokenizer(self.file)
        except JaxpostError as error:
            check_message(error, self.file)
        content = read_gguf(self.file)
        for tensor in content.tensors.values():
            assert self.header // 2 < tensor.offset <= size
            assert tensor.values().shape == tensor.shape
        gguf.spec_of(content, str(self.file))


class TokenizerJson(Reader):
    """A Hugging Face tokenizer folder, one of its files damaged."""

    def __init__(self, folder: pathlib.Path):
        from tokenizers import normalizers

        from jaxpost.data.chat import load_tokenizer

        self.file = folder / "hf"
        self.variants = []
        for name, source in {"byte": tiny.write_tokenizer(folder / "t"), "llama": LLAMA}.items():
            tokenizer = load_tokenizer(source)
            if name == "byte":
                tokenizer._backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("q", "k")])
            tokenizer.save(folder / name)
            self.variants.append({file.name: file.read_bytes() for file in (folder / name).iterdir()})
        self.file.mkdir()

    def restore(self) -> None:
        for name, data in self.variants[1].items():
            (self.file / name).write_bytes(data)

    def mutate(self, rng: random.Random) -> None:
        files = dict(rng.choice(self.variants))
        for file in self.file.iterdir():
            file.unlink()
        name = rng.choice(["tokenizer.json", "tokenizer.json", *sorted(files)])
        files[name] = (damage if name.endswith(".jinja") else damage_json)(rng, files[name])
        for name, data in files.items():
            (self.file / name).write_bytes(data)

    def check(self) -> None:
        use_tokenizer(self.file)


LLAMA = TESTS / "parity" / "sentencepiece_llama.model"


class Sentencepiece(Reader):
    """A model file as bytes and as a message; where sentencepiece itself loads it, it must give the same ids."""

    def __init__(self, folder: pathlib.Path):
        import sentencepiece

        self.file, self.variants = folder / "x.model", [LLAMA.read_bytes()]
        corpus = ["the quick brown fox jumps over a lazy dog 12", "naïve café ünder Straße"] * 20
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_prefix=str(folder / "u"), vocab_size=60, hard_vocab_limit=False,
            model_type="unigram", minloglevel=2, normalization_rule_name="nfkc",
        )  # fmt: skip
        self.variants.append((folder / "u.model").read_bytes())

    def restore(self) -> None:
        self.file.write_bytes(self.variants[1])

    def mutate(self, rng: random.Random) -> None:
        from sentencepiece import sentencepiece_model_pb2

        data = rng.choice(self.variants)
        if rng.random() < 0.5:
            proto = sentencepiece_model_pb2.ModelProto()
            proto.ParseFromString(data)
            self._change(rng, proto)
            data = proto.SerializeToString()
            if rng.random() < 0.8:
                self.file.write_bytes(data)
                return
        self.file.write_bytes(damage(rng, data))

    def _change(self, rng: random.Random, proto) -> None:
        for _ in range(rng.choice((1, 2, 5))):
            piece = rng.choice(proto.pieces)
            kind = rng.randrange(7)
            if kind == 0:
                piece.type = rng.choice((1, 2, 3, 4, 5, 6))
            elif kind == 1:
                piece.score = rng.choice((0.0, float("nan"), float("inf"), -1e38, 5.0, -2.5))
            elif kind == 2:
                piece.piece = rng.choice(("", "a", "<0x41>", "\u2581", "x" * 500, "the", "ab\0", " "))
            elif kind == 3:
                del proto.pieces[rng.randrange(len(proto.pieces))]
            elif kind == 4:
                part = rng.choice((proto.trainer_spec, proto.normalizer_spec))
                field = rng.choice([f for f in part.DESCRIPTOR.fields if f.cpp_type == f.CPPTYPE_BOOL])
                setattr(part, field.name, not getattr(part, field.name))
            elif kind == 5:
                name = rng.choice(("bos_id", "eos_id", "pad_id", "unk_id"))
                setattr(proto.trainer_spec, name, rng.choice((-1, 0, 1, 2, 7, 2**31 - 1, -(2**31))))
            else:
                spec = proto.normalizer_spec
                spec.precompiled_charsmap = damage(rng, spec.precompiled_charsmap or rng.randbytes(40))

    def check(self) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        from jaxpost.errors import DataError

        tokenizer = use_tokenizer(self.file)
        try:
            theirs = sentencepiece.SentencePieceProcessor(model_file=str(self.file))
        except (RuntimeError, OSError):
            return
        specials = [theirs.id_to_piece(i) for i in range(len(theirs)) if theirs.is_control(i) or theirs.is_unknown(i)]
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(self.file.read_bytes())
        own = tuple(piece.piece for piece in proto.pieces if piece.type == type(piece).Type.USER_DEFINED)
        for text in TEXTS:
            # At the very start a user-defined symbol has no dummy prefix, as in transformers: the one meant difference.
            if not any(piece in text for piece in specials) and not text.lstrip().startswith(own):
                try:
                    ids = tokenizer.encode(text)
                except DataError:
                    continue
                assert ids == theirs.encode(text), (text, ids, theirs.encode(text))


class Templates(Reader):
    """A chat template, rendered: a text or an error, in little time."""

    def __init__(self, folder: pathlib.Path):
        golden = json.loads((TESTS / "golden" / "chat_templates.json").read_text(encoding="utf-8"))
        self.good = [tiny.TEMPLATE, *(style["template"] for style in golden["styles"].values())]
        self.file, self.text = pathlib.Path("chat"), ""

    def restore(self) -> None:
        self.text = self.good[0]

    def mutate(self, rng: random.Random) -> None:
        self.text = rng.choice(self.good)
        if cut := rng.random() < 0.6:
            self.text = damage(rng, self.text.encode()).decode("utf-8", "replace")
        if not cut or rng.random() < 0.3:
            at = rng.randrange(len(self.text) + 1)
            self.text = self.text[:at] + rng.choice(SNIPPETS) + self.text[at:]

    def check(self) -> None:
        from jaxpost.data import template

        chat = tiny.rows(1)[0]["messages"]
        names = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
        done = template.render(self.text, chat, names, mark=True, prefixes=[(1, True)])
        assert isinstance(done.text, str) and "subprocess.Popen" not in done.text
        for start, end in done.spans or []:
            assert 0 <= start <= end <= len(done.text)
        assert all(0 <= size <= len(done.text) for size in done.prefixes)


SNIPPETS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages | attr('__class__') }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{% set x = namespace() %}{% set x.a = x %}{{ x.a }}",
    "{{ messages[9].content }}",
    "{{ raise_exception('no\nline') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% generation %}",
    "{% include 'x' %}",
    "{{ 1 // 0 }}",
    "{{ (",
)


class Jsonl(Reader):
    """Lines of a file of rows, each read and made into an example."""

    def __init__(self, folder: pathlib.Path):
        self.file = folder / "x.jsonl"
        rows = [*tiny.rows(4), {"prompt": "a", "completion": "é"}, {"text": "漢字 🦜", "n": [1, 2.5, None, True]}]
        self.rows = rows
        self.folder = tiny.write_tokenizer(folder / "t")

    def restore(self) -> None:
        self.file.write_bytes(b"\n".join(dump(row) for row in self.rows))

    def mutate(self, rng: random.Random) -> None:
        lines = [dump(swap(rng, row) if rng.random() < 0.4 else row) for row in self.rows]
        data = b"\n".join(lines)
        self.file.write_bytes(damage(rng, data) if rng.random() < 0.6 else data)

    def check(self) -> None:
        read_rows(f"jsonl:{self.file}", self.file, self.folder)


class Parquet(Reader):
    """Rows of a parquet file."""

    def __init__(self, folder: pathlib.Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{**row, "note": f"é{i}", "score": i / 2} for i, row in enumerate(tiny.rows(40))]
        self.file, self.variants = folder / "x.parquet", []
        for options in ({}, {"compression": "NONE", "use_dictionary": False}, {"row_group_size": 7}):
            pq.write_table(pa.Table.from_pylist(rows), self.file, **options)
            self.variants.append(self.file.read_bytes())
        self.folder = tiny.write_tokenizer(folder / "t")

    def restore(self) -> None:
        self.file.write_bytes(self.variants[0])

    def mutate(self, rng: random.Random) -> None:
        data = rng.choice(self.variants)
        if rng.random() < 0.6:  # the footer, its length and the magic bytes stay
            size = struct.unpack("<I", data[-8:-4])[0]
            footer = damage(rng, data[-8 - size : -8])
            data = data[: -8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1"
        else:
            data = damage(rng, data)
        self.file.write_bytes(data)

    def check(self) -> None:
        read_rows(f"parquet:{self.file}", self.file, self.folder)


class Yaml(Reader):
    """A config file, loaded whole."""

    def __init__(self, folder: pathlib.Path):
        self.file = tiny.write_config(folder)
        self.tree = json.loads(self.file.read_text())
        shipped = TESTS.parent / "configs" / "quickstart.yaml"
        self.variants = [self.file.read_bytes(), shipped.read_bytes()]

    def restore(self) -> None:
        self.file.write_bytes(self.variants[0])

    def mutate(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            data = dump(swap(rng, self.tree))
        else:
            data = rng.choice(self.variants)
            if rng.random() < 0.4:
                lines = data.split(b"\n")
                lines.insert(rng.randrange(len(lines)), rng.choice(LINES))
                data = b"\n".join(lines)
            data = damage(rng, data)
        self.file.write_bytes(data)

    def check(self) -> None:
        from jaxpost import config, yaml_loader

        loaded = config.load(self.file)
        again = yaml_loader.parse(loaded.dump()).tree
        assert again.keys() == {field for field in vars(loaded.config) if not field.startswith("_")}
        assert 0 <= loaded.config.seed < 2**32


LINES = (
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b, *b]",
    b"seed: !!python/object/apply:os.system ['true']",
    b"<<: *x",
    b"seed: 1e999",
    b"seed: 0x10",
    b'run_dir: "\\ud800"',
    b"run_dir: ${HOME",
    b"loop: {steps: -1}",
    b"optim: {learning_rate: .nan}",
    b"? [a, b]",
    b"--- a",
    b"\tseed: 1",
)


class SavedRun(Reader):
    """config.yaml of a run folder, as `ckpt:RUN` reads it."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.file = folder / "run", folder / "run" / "config.yaml"
        self.folder.mkdir()
        self.tree = json.loads(tiny.write_config(folder).read_text())
        self.tree["model"]["tokenizer"] = str(folder / "tokenizer")

    def restore(self) -> None:
        self.file.write_bytes(dump(self.tree))

    def mutate(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            model = swap(rng, self.tree["model"])
            self.file.write_bytes(dump({**self.tree, "model": model}))
            return
        self.file.write_bytes(damage_json(rng, dump(self.tree)))

    def check(self) -> None:
        from jaxpost.config import load_saved
        from jaxpost.models.loading import locate

        located = locate(f"ckpt:{self.folder}")
        assert located.kind == "ckpt" and located.spec.vocab_size > 0
        load_saved(self.folder)


READERS: dict[str, Callable] = {
    "safetensors": Safetensors,
    "gguf": Gguf,
    "tokenizer_json": TokenizerJson,
    "sentencepiece": Sentencepiece,
    "templates": Templates,
    "jsonl": Jsonl,
    "parquet": Parquet,
    "yaml": Yaml,
    "saved_run": SavedRun,
}


def use_tokenizer(path: pathlib.Path):
    """A Tokenizer of path, put to work: ids inside of its vocabulary, decoded to text."""
    from jaxpost.data import chat
    from jaxpost.errors import DataError

    chat._load.cache_clear()
    tokenizer = chat.load_tokenizer(path)
    assert 0 < tokenizer.vocab_size < 1 << 31 and all(0 <= i < tokenizer.vocab_size for i in tokenizer.stop_ids)
    for text in TEXTS:
        try:
            ids, trainable = tokenizer.encode_text(text)
        except DataError as error:
            check_message(error)
            continue
        assert len(ids) == len(trainable) and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids), str)
    if tokenizer.chat_template:
        try:
            tokenizer.encode_chat(tiny.rows(1)[0]["messages"])
        except DataError as error:
            check_message(error)
    return tokenizer


def read_rows(source: str, file: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """Every row of a source, as an example; a bad one is an error that says its file and line."""
    from jaxpost.data.sources import SourceConfig, open_source
    from jaxpost.data.tasks import make_task
    from jaxpost.errors import DataError

    records = open_source(SourceConfig(source=source))
    task, bad = make_task("auto", str(tokenizer)), 0
    for i in range(len(records)):
        try:
            record = records[i]
            json.dumps(record, allow_nan=False, ensure_ascii=False, default=str).encode("utf-8")
            example = task(record, records.where(i))
            assert example.trainable.any() and len(example.tokens) == len(example.trainable)
        except DataError as error:
            bad += 1
            check_message(error, file)
            assert str(error).startswith(f"{file}:")
    if bad:
        raise DataError(f"{file}: {bad} bad rows")  # counts as refused


def check_message(error: Exception, file: pathlib.Path | None = None) -> None:
    """One printable line of bounded length that names the file."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 1500, f"not one line: {text!r:.300}"
    text.encode("utf-8")
    assert file is None or str(file) in text, f"does not name {file}: {text}"
