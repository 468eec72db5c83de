"""What a user reads when text cannot be used: every sentence, compared with the one in `text_refusals.json`.

`UPDATE_REFUSALS=1 pytest` writes the file anew, for a person to read through.
"""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from vishwamai_eqx import cache, data
from vishwamai_eqx import tokenizer as tokenizer_commands
from vishwamai_eqx.cache import cache_folder
from vishwamai_eqx.config import DataConfig
from vishwamai_eqx.tokenizer import VishwamAITokenizer

HERE = Path(__file__).parent
SNAPSHOT = HERE / "text_refusals.json"
REFUSALS: dict[str, Callable[[Path], object]] = {}


def refusal(function: Callable[[Path], object]) -> Callable[[Path], object]:
    REFUSALS[function.__name__] = function
    return function


def load(folder: Path, *files: str, **settings) -> data.Corpus:
    return data.load_documents(
        DataConfig(files=tuple(str(folder / name) for name in files), **settings), cache_dir=folder / "cache"
    )


def written(folder: Path, name: str, content: bytes | str) -> data.Corpus:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(folder, name)


def parquet(folder: Path, name: str, select: str) -> Path:
    with duckdb.connect() as connection:
        connection.execute(f"COPY ({select}) TO '{folder / name}'")
    return folder / name


def documents(folder: Path, count: int = 20) -> None:
    for index in range(count):
        (folder / f"{index:02}.txt").write_text(f"{index} " * (40 + index))


@refusal
def no_file_matches(folder):
    load(folder, "*.txt")


@refusal
def a_folder_is_no_file(folder):
    (folder / "folder.txt").mkdir()
    load(folder, "folder.txt")


@refusal
def a_kind_of_file_that_is_not_read(folder):
    written(folder, "paper.pdf", "%PDF")


@refusal
def a_glob_whose_files_are_all_taken(folder):
    documents(folder)
    load(folder, "*.txt", "00.txt")


@refusal
def an_empty_file(folder):
    written(folder, "empty.txt", "")


@refusal
def a_binary_file(folder):
    written(folder, "binary.txt", b"text and \x00 more")


@refusal
def a_file_in_latin_1(folder):
    written(folder, "latin.txt", "schöner".encode("latin-1"))


@refusal
def a_file_that_ends_inside_a_character(folder):
    written(folder, "cut.txt", "漢字".encode()[:-1])


@refusal
def a_file_without_permission(folder):
    (folder / "link.txt").symlink_to(folder / "link.txt")
    (folder / "private.txt").write_text("text")
    original = Path.open

    def refuse(self, *arguments, **options):
        if self.name == "private.txt":
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        load(folder, "private.txt")


@refusal
def a_json_line_that_does_not_parse(folder):
    written(folder, "lines.jsonl", '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n')


@refusal
def a_json_line_with_a_key_twice(folder):
    written(folder, "lines.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n')


@refusal
def a_json_line_that_does_not_parse_compressed(folder):
    written(folder, "lines.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": b}\n'))


@refusal
def a_json_line_that_is_not_utf_8(folder):
    written(folder, "lines.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')


@refusal
def a_json_line_with_half_a_surrogate_pair(folder):
    written(folder, "lines.jsonl", '{"text": "\\ud800"}\n')


@refusal
def a_json_line_without_the_column(folder):
    written(folder, "lines.jsonl", '{"text": "a"}\n{"body": "b", "id": 1}\n')


@refusal
def a_json_line_whose_text_is_null(folder):
    written(folder, "lines.jsonl", '{"text": "a"}\n{"text": null}\n')


@refusal
def a_json_line_whose_text_is_a_number(folder):
    written(folder, "lines.jsonl", '{"text": "a"}\n{"text": 1.50}\n')


@refusal
def a_json_line_whose_text_is_an_object(folder):
    written(folder, "lines.jsonl", '{"text": {"text": "a"}}\n')


@refusal
def a_file_of_records_whose_name_is_no_text(folder):
    written(folder, os.fsdecode(b"\xff.jsonl"), '{"text": "a"}\n')


@refusal
def a_json_line_that_is_a_list(folder):
    written(folder, "lines.jsonl", '{"text": "a"}\n["b"]\n')


@refusal
def a_json_line_that_is_too_long(folder):
    written(folder, "lines.jsonl", '{"text": "a"}\n' + json.dumps({"text": "long " * (1 << 23)}) + "\n")


@refusal
def a_json_file_without_lines(folder):
    written(folder, "lines.jsonl", "\n\n")


@refusal
def a_compressed_file_whose_checksum_is_wrong(folder):
    packed = bytearray(gzip.compress(b'{"text": "some text or other"}\n' * 100))
    packed[-6] ^= 1
    written(folder, "lines.jsonl.gz", bytes(packed))


@refusal
def a_damaged_gzip_file(folder):
    written(folder, "lines.jsonl.gz", gzip.compress(b'{"text": "some text or other"}\n' * 100)[:-20])


@refusal
def a_file_that_is_called_gzip_and_is_not(folder):
    written(folder, "lines.jsonl.gz", '{"text": "a"}\n')


@refusal
def a_parquet_file_cut_short(folder):
    path = parquet(folder, "table.parquet", "SELECT 'text ' || i AS text FROM range(1000) t(i)")
    path.write_bytes(path.read_bytes()[:-100])
    load(folder, "table.parquet")


@refusal
def a_parquet_file_that_is_damaged(folder):
    path = parquet(folder, "table.parquet", "SELECT 'text ' || i AS text FROM range(1000) t(i)")
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30
    path.write_bytes(content)
    load(folder, "table.parquet")


@refusal
def a_parquet_file_without_the_column(folder):
    parquet(folder, "table.parquet", "SELECT 'a' AS body, 'b' AS title, 1 AS id")
    load(folder, "table.parquet")


@refusal
def a_parquet_column_that_is_not_text(folder):
    parquet(folder, "table.parquet", "SELECT 1 AS text")
    load(folder, "table.parquet")


@refusal
def a_parquet_record_without_text(folder):
    parquet(folder, "table.parquet", "SELECT unnest(['a', NULL]) AS text")
    load(folder, "table.parquet")


@refusal
def a_held_out_share_that_is_no_share(folder):
    documents(folder)
    load(folder, "*.txt", held_out_share=1.0)


@refusal
def a_held_out_share_that_leaves_nothing(folder):
    documents(folder, 5)
    load(folder, "*.txt", held_out_share=0.05)


@refusal
def one_document_cannot_be_split(folder):
    documents(folder, 1)
    load(folder, "*.txt")


@refusal
def copies_of_one_document_cannot_be_split(folder):
    for name in "abc":
        (folder / f"{name}.txt").write_text("the same text")
    load(folder, "*.txt", held_out_share=0.4)


@refusal
def weights_for_other_globs(folder):
    documents(folder)
    load(folder, "*.txt", weights=(1.0, 2.0))


@refusal
def a_weight_of_nothing(folder):
    documents(folder)
    load(folder, "0*.txt", "1*.txt", weights=(1.0, 0.0))


@refusal
def a_weighted_source_that_is_all_held_out(folder):
    documents(folder)
    (folder / "few.md").write_text("x")
    settings = {"weights": (1.0, 1.0), "held_out_share": 0.3}
    files = DataConfig(files=(f"{folder}/*.txt", f"{folder}/*.md"), **settings)
    # At one of these seeds it is held out.
    for seed in range(20):
        data.load_documents(files, seed, folder / "cache")


@refusal
def rows_of_no_tokens(folder):
    documents(folder)
    corpus, tokenizer = load(folder, "*.txt", held_out_share=0.2), VishwamAITokenizer(HERE / "huggingface")
    data.prepare(corpus, tokenizer, seq_len=0, batch_size=2, seed=0, cache_dir=folder / "cache")


@refusal
def a_file_that_changed(folder):
    documents(folder)
    corpus = load(folder, "*.txt", held_out_share=0.2)
    (folder / "03.txt").write_text("something else")
    list(corpus.blocks())


@refusal
def a_file_that_went_away(folder):
    documents(folder)
    corpus = load(folder, "*.txt", held_out_share=0.2)
    (folder / "03.txt").unlink()
    list(corpus.blocks())


@refusal
def a_file_that_changed_before_a_vocabulary_is_learned(folder):
    documents(folder)
    corpus = load(folder, "*.txt", held_out_share=0.2)
    for path in folder.glob("*.txt"):
        path.write_text("something else")
    VishwamAITokenizer.train(corpus.training_text(1 << 20), 300, folder / "tokenizer")


@refusal
def a_part_of_the_cache_that_is_another_user_s(folder):
    documents(folder)
    original = Path.open

    def refuse(self, *arguments, **options):
        if self.name == "lock":
            raise PermissionError(13, "Permission denied")
        return original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with cache.locked(folder / "index"):
            pass


@refusal
def no_tokenizer_there(folder):
    VishwamAITokenizer(folder / "nowhere")


@refusal
def a_folder_without_a_tokenizer(folder):
    VishwamAITokenizer(folder)


@refusal
def a_file_that_is_no_tokenizer(folder):
    (folder / "tokenizer.model").write_text("{}")
    VishwamAITokenizer(folder)


@refusal
def a_tokenizer_cut_short(folder):
    model = (HERE / "huggingface" / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(model[: len(model) // 2])
    VishwamAITokenizer(folder)


def foreign_model(folder: Path, **options) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to train on"] * 9),
        model_prefix=str(folder / "foreign"),
        vocab_size=options.pop("vocab_size", 20),
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / "foreign.model"


@refusal
def a_tokenizer_without_bytes(folder):
    VishwamAITokenizer(foreign_model(folder, model_type="bpe"))


@refusal
def a_tokenizer_without_a_beginning(folder):
    VishwamAITokenizer(foreign_model(folder, model_type="bpe", byte_fallback=True, bos_id=-1, vocab_size=290))


@refusal
def no_room_for_a_token(folder):
    VishwamAITokenizer(HERE / "huggingface", max_length=0)


@refusal
def no_room_for_a_token_in_a_call(folder):
    VishwamAITokenizer(HERE / "huggingface").encode("text", max_length=-1)


@refusal
def an_id_that_is_no_piece(folder):
    VishwamAITokenizer(HERE / "huggingface").decode([5, 1400])


@refusal
def an_id_larger_than_any_type(folder):
    VishwamAITokenizer(HERE / "huggingface").decode([2**70])


@refusal
def a_text_with_half_a_surrogate_pair(folder):
    VishwamAITokenizer(HERE / "huggingface").encode_ids("some text \udc80 and more")


@refusal
def a_batch_with_half_a_surrogate_pair(folder):
    VishwamAITokenizer(HERE / "huggingface").encode_batch(["fine", "not fine \ud83d"])


@refusal
def a_vocabulary_that_the_text_does_not_fill(folder):
    VishwamAITokenizer.train(["a small text"], 4096, folder)


@refusal
def a_vocabulary_too_small_for_its_bytes(folder):
    VishwamAITokenizer.train(["a small text"], 100, folder)


@refusal
def a_vocabulary_from_nothing(folder):
    VishwamAITokenizer.train([], 300, folder)


@refusal
def a_vocabulary_from_blank_lines(folder):
    VishwamAITokenizer.train(["\n", "\r\n\n"], 300, folder)


@refusal
def a_vocabulary_from_spaces(folder):
    VishwamAITokenizer.train(["    \n  "] * 20, 300, folder)


@refusal
def a_vocabulary_from_zero_characters(folder):
    VishwamAITokenizer.train(["\0\0\n\0"] * 20, 300, folder)


@refusal
def a_folder_for_a_vocabulary_that_is_a_file(folder):
    documents(folder)
    (folder / "tokenizer").write_text("in the way")
    tokenizer_commands._train_command((f"{folder}/*.txt",), vocab_size=300, directory=folder / "tokenizer")


@pytest.mark.parametrize("name", REFUSALS)
def test_the_sentence_is_the_one_agreed_on(name, tmp_path):
    with pytest.raises(ValueError) as refused:
        REFUSALS[name](tmp_path)
    sentence = str(refused.value).replace(str(tmp_path), "DIR").replace(str(HERE), "TESTS")
    assert "\n" not in sentence
    if os.environ.get("UPDATE_REFUSALS"):
        agreed = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
        agreed = {known: agreed[known] for known in REFUSALS if known in agreed} | {name: sentence}
        SNAPSHOT.write_text(json.dumps(agreed, ensure_ascii=False, indent=1) + "\n")
    assert json.loads(SNAPSHOT.read_text())[name] == sentence


def test_every_sentence_belongs_to_a_refusal():
    assert set(json.loads(SNAPSHOT.read_text())) == set(REFUSALS)


@pytest.mark.parametrize("name", ["cache", "cache/index", "cache/tokens"])
def test_a_cache_folder_that_cannot_be_written_is_stood_in_for(tmp_path, monkeypatch, caplog, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("in the way")
    monkeypatch.setenv("VISHWAMAI_CACHE", str(tmp_path / "cache"))
    documents(tmp_path)
    folder = cache_folder()
    assert folder.is_dir() and folder != tmp_path / "cache" and cache_folder() == folder
    (message,) = caplog.messages
    assert f"{tmp_path}/{name} cannot be written (File exists)" in message and "set VISHWAMAI_CACHE" in message
    config = DataConfig(files=(f"{tmp_path}/*.txt",), held_out_share=0.2)
    assert data.load_documents(config).held_out.any()
