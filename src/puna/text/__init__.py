"""Characters to tokens and back: tokenizers, chat formats, tool calls. No torch."""

from puna.text.gguf_ import tokenizer_from_gguf
from puna.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "tokenizer_from_gguf"]
