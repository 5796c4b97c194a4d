"""Decoding token by token, so that no piece shown holds half a character."""

import codecs
from collections.abc import Callable

EACH_BYTE = "puna.each-byte"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Sentencepiece's treatment of broken UTF-8: one U+FFFD for each byte, not for each maximal broken part."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _each_byte)


class StreamDecoder:
    """Turns ids into text as they come; the joined pieces equal decoding all ids at once.

    Bytes of an unfinished character are held until it is complete, or until they can no longer become one
    (then U+FFFD).
    """

    def __init__(self, token_bytes: Callable[[int], bytes], errors: str = "replace", strip_space: bool = False) -> None:
        """`token_bytes` gives b"" for ids that are not shown; `strip_space` drops one space at the very beginning."""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._strip_space = strip_space

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        return self.push_bytes(self._token_bytes(token_id))

    def push_bytes(self, data: bytes) -> str:
        """The text that these bytes complete."""
        return self._shown(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never came to its end."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text
