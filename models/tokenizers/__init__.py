"""Tokenizers of every text format that a Llama comes with."""

from models.tokenizers.base import Tokenizer
from models.tokenizers.hugging_face import train_bpe
from models.tokenizers.open import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "train_bpe"]
