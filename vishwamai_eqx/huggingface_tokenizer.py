"""A SentencePiece byte-pair model in the words of Hugging Face's `tokenizers`, written without that library."""

from typing import Any

from sentencepiece import sentencepiece_model_pb2

# Made at import, out of a type checker's sight.
ModelProto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
TrainerSpec = sentencepiece_model_pb2.TrainerSpec  # pyright: ignore[reportAttributeAccessIssue]
Piece = ModelProto.SentencePiece

SPACE = "\u2581"


def expressible(model: ModelProto) -> bool:
    """Whether `tokenizer_json` says all there is to say about a model: byte pairs, and text left as it is."""
    normalizer = model.normalizer_spec
    return (
        model.trainer_spec.model_type == TrainerSpec.BPE
        and normalizer.name == "identity"
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and not any(piece.type == Piece.USER_DEFINED for piece in model.pieces)
    )


def config(model: ModelProto, special_tokens: dict[str, str]) -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": model.normalizer_spec.add_dummy_prefix,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        # What a text spells is text, here and there, even where it spells a special token.
        "split_special_tokens": True,
        **special_tokens,
    }


def tokenizer_json(model: ModelProto, bos_id: int) -> dict[str, Any]:
    """The content of `tokenizer.json`: the vocabulary, its merges, and spaces written as U+2581.

    Hugging Face writes a literal U+2581 like a space, where `VishwamAITokenizer` spells it in bytes.
    """
    bos = model.pieces[bos_id].piece

    def start(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": piece.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id, piece in enumerate(model.pieces)
            if piece.type in (Piece.CONTROL, Piece.UNKNOWN)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start(0), sequence("A", 0)],
            "pair": [start(0), sequence("A", 0), start(1), sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: id for id, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _merges(model: ModelProto) -> list[list[str]]:
    """Every pair of pieces that makes a piece, the best first.

    SentencePiece ranks a merge by the score of what it makes, whatever the two halves; `tokenizers` ranks pairs, so the
    pairs of one piece stand together.
    """
    ids = {piece.piece: id for id, piece in enumerate(model.pieces) if piece.type == Piece.NORMAL}
    merges = []
    for piece, id in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        score = model.pieces[id].score
        merges += [(-score, id, len(left), left, right) for left, right in pairs if left in ids and right in ids]
    merges.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in merges]
