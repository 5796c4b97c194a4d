"""Answers that follow a JSON schema: at each step, which tokens keep the text valid. The parser is llguidance's."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.errors import PunaError
from puna.text.tokenizer import Tokenizer

# A weak model may put white space without end between two values: bounded, though JSON has no bound.
WHITESPACE = r"[ \n\t]{0,16}"


class Vocabulary:
    """A tokenizer as the parser wants it. Takes about a second for 200,000 tokens, so it is made once a model."""

    def __init__(self, tokenizer: Tokenizer, size: int, stop_ids: Collection[int]) -> None:
        """`size`: the width of the logits, which may exceed the tokenizer's; the rest is never allowed."""
        try:
            import llguidance
        except ImportError:
            raise PunaError("schema needs the package llguidance: pip install llguidance") from None
        stops = sorted(stop_ids)
        self.size = size
        self.eos_token_id = stops[0] if stops else size - 1  # the parser needs a way to say that it is done
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) if i < tokenizer.vocab_size else b"" for i in range(size)]
        self.special_token_ids = sorted({*tokenizer.control_ids, *stops, self.eos_token_id})
        self._tokenizer = tokenizer
        self.native = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(self), n_vocab=size, eos_token=stops or [self.eos_token_id],
            slices=llguidance.LLTokenizer.json_slices(),
        )  # fmt: skip

    def __call__(self, data: bytes) -> list[int]:
        return self._tokenizer.encode(data.decode("utf-8", errors="replace"))


class Grammar:
    """The state of one answer. Raises PunaError for a schema that is not valid, or uses what the parser lacks."""

    def __init__(self, schema: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        import llguidance

        if not isinstance(schema, Mapping):
            raise PunaError(f"schema must be a JSON schema as a dict, not {type(schema).__name__}")
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise PunaError(f"schema is not JSON: {error}") from None
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
        self._matcher = llguidance.LLMatcher(vocabulary.native, grammar, log_level=0)
        self._size = vocabulary.size
        self._check("the schema can't be followed")

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """Bool [V]: the tokens that may come next."""
        mask = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)[: self._size] > 0
        self._check("the schema is too complex at this place")
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """Go on by one token."""
        self._matcher.consume_token(token)
        self._check("the schema refused a token")

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise PunaError(f"{what}: {self._matcher.get_error().splitlines()[0]}; mend or simplify it")
