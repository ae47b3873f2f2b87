"""Llama 1 and 2's tokenizer.model: a SentencePiece BPE with digits split and byte fallback."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, normalizers
from tokenizers import models as tokenizer_models

from infra.errors import CheckpointError
from models.tokenizers.base import Tokenizer, add_specials, split_on_specials

SPACE = "\u2581"
"""SentencePiece writes a space as this mark."""
UNKNOWN = 2
"""The piece type in SentencePiece's protobuf."""
BPE = 2
"""The model type in SentencePiece's protobuf."""


class SentencePieceTokenizer(Tokenizer):
    """Encodes with SentencePiece itself."""

    def __init__(self, file: Path) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        processor = self._processor
        controls = [i for i in range(processor.vocab_size()) if processor.is_control(i) or processor.is_unknown(i)]
        specials = {processor.id_to_piece(i): i for i in controls}
        bos, eos = (processor.id_to_piece(i) if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))
        super().__init__(specials, processor.vocab_size(), bos, eos)

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        if not allow_special:
            return self._processor.encode(list(texts))
        return [self._encode_with_specials(text) for text in texts]

    def _encode_with_specials(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_on_specials(text, self.specials):
            ids += [piece] if isinstance(piece, int) else self._processor.encode(piece)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        if skip_special:
            return self._processor.decode([i for i in ids if not self._processor.is_control(i)])
        texts = {index: name for name, index in self.specials.items()}
        runs: list[str] = []
        ordinary: list[int] = []
        for index in ids:
            if index in texts:
                runs += [self._processor.decode(ordinary), texts[index]]
                ordinary = []
            else:
                ordinary.append(index)
        return "".join([*runs, self._processor.decode(ordinary)])

    @cached_property
    def _proto(self) -> Any:
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self._processor.serialized_model_proto())
        return proto

    def to_backend(self) -> tokenizers.Tokenizer:
        """Scores become merges: any two pieces that spell a piece merge into it, pieces of better score first.

        Raises CheckpointError for a model that is not a BPE.
        """
        proto = self._proto
        if proto.trainer_spec.model_type != BPE:
            raise CheckpointError(
                "tokenizer.model is not a SentencePiece BPE; Llama tokenizers are, unigram models not"
            )
        vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
        backend = tokenizers.Tokenizer(
            tokenizer_models.BPE(
                vocabulary,
                self._merges(vocabulary),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=proto.trainer_spec.byte_fallback,
            )
        )
        backend.normalizer = self._normalizer()
        last = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
        add_specials(
            backend, [name for name, _ in sorted(self.specials.items(), key=lambda item: item[1])], bos=self.bos
        )
        return backend

    def _merges(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        merges: list[tuple[float, int, int, tuple[str, str]]] = []
        for piece in self._proto.pieces:
            for cut in range(1, len(piece.piece)):
                left, right = piece.piece[:cut], piece.piece[cut:]
                if left in vocabulary and right in vocabulary:
                    merges.append((-piece.score, vocabulary[left], vocabulary[right], (left, right)))
        return [pair for *_, pair in sorted(merges)]

    def _normalizer(self) -> normalizers.Normalizer:
        spec = self._proto.normalizer_spec
        rules: list[normalizers.Normalizer] = []
        if spec.precompiled_charsmap:
            rules.append(normalizers.Precompiled(spec.precompiled_charsmap))
        if spec.remove_extra_whitespaces:
            rules += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
        if spec.add_dummy_prefix:
            rules.append(normalizers.Prepend(SPACE))
        rules.append(normalizers.Replace(" ", SPACE))
        return normalizers.Sequence(rules)
