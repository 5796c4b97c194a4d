"""`Model`: checks what a caller asks for, then hands a `Request` to the loop."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor

from puna.engine.core import Core
from puna.engine.engine import Engine
from puna.engine.forecast import Forecast, Needs
from puna.engine.generate import Request, Rows, Scores, Stream
from puna.engine.grammar import Grammar, Vocabulary
from puna.engine.pace import LARGEST
from puna.engine.pictures import Shown, shown
from puna.engine.reply import ContextLengthError, Inputs, Reply, TokenLogprob
from puna.engine.sampling import Options, Sampling, finite
from puna.engine.sizes import CacheSize, cache_size
from puna.engine.speculation import DraftModel, drafter_for
from puna.engine.stats import Stats
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model import Decoder
from puna.model.memory import resident_peak
from puna.model.paged import BLOCK, blocks_for
from puna.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from puna.checkpoint import GenerationDefaults

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Inputs | Sequence[int] | Tensor

BESIDE = ("tools", "schema", "key", "priority", "timeout")  # options that say nothing about sampling


def check_context(context: Any, own: int) -> None:
    """Raises PunaError for what is no context length of a model whose own is `own`; None is."""
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise PunaError(f"context must be a whole number of tokens from 1 to {own}, not {context!r}")
    if context is not None and context > own:
        raise PunaError(
            f"context {context} is more than this model's context length of {own} tokens; give at most that"
        )


class Model:
    """A decoder with its tokenizer, ready to answer. Safe to use from several threads: requests are computed together.

    context: caps the context length. cache: how many blocks there are for keys and values (default: see `cache_size`);
    what can't fit into them caps the context too. kv: None or "int8". prefix_cache: share equal beginnings.
    speculate: None, "ngram" or a model that guesses.
    """

    _threaded = True  # whether the engine may step whenever it likes

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        defaults: Sampling | None = None,
        stop_ids: Sequence[int] = (),
        context: int | None = None,
        generation: "GenerationDefaults | None" = None,
        cache: CacheSize | None = None,
        kv: str | None = None,
        prefix_cache: bool = True,
        needs: Needs | None = None,
        speculate: "Model | str | Literal[False] | None" = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.needs = needs  # of memory, as forecast before loading
        self.notes = tuple(notes)  # what the load left out or packed in other bits, one sentence each
        self.decoder = decoder.eval()
        self._generation = generation  # what the checkpoint said, to be saved with it
        self.tokenizer = tokenizer
        self.defaults = defaults or Sampling()
        own = decoder.config.context_length
        check_context(context, own)
        size = cache or cache_size(decoder.config, decoder.dtype, kv, context, decoder.device)
        core = Core(self.decoder, size, kv=kv, prefix_cache=prefix_cache, fixed_steps=not self._threaded,
                    drafter=drafter_for(speculate, decoder.config.vocab_size, size))
        self._engine = Engine(core, threaded=self._threaded)
        fits = core.state.blocks.longest
        if context is not None and context > fits:
            raise PunaError(
                f"context {context} needs {blocks_for(context)} blocks of {BLOCK} tokens, but the cache was given "
                f"{size.blocks}, which hold {fits} tokens; give at most that, or more blocks"
            )
        self._wanted_context = context or own
        self.cache_size = size
        self.context_length = min(self._wanted_context, fits)
        of_tokenizer = tokenizer.eos_ids if tokenizer else ()
        self.stop_ids = frozenset((*stop_ids, *decoder.config.eos_token_ids, *of_tokenizer))

    @property
    def config(self) -> ModelConfig:
        """The decoder's shape, as the checkpoint has it (`context_length` here, on the model, is the capped one)."""
        return self.decoder.config

    def prepare(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Inputs:
        """A chat as ready inputs, ending where the assistant speaks.

        Pictures and videos are parts of the user's messages (docs/sight.md). Raises PunaError without a tokenizer, for
        pictures where the model reads text only, and naming messages[i].content[j] for what can't be read.
        """
        tokenizer = self._need_tokenizer("a chat")
        if not messages:
            raise PunaError("messages is empty: a chat needs at least one message")
        for at, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise PunaError(f"messages[{at}] must be a dict with 'role' and 'content', not {message!r:.80}")
        told = list(tools) if tools else None
        if self.config.vision is None:
            return Inputs(tokenizer.render(list(messages), tools=told))
        from puna.engine.picture_parts import prepare

        return prepare(tokenizer, self.config.vision, list(messages), told)

    def logits(self, ids_or_inputs: Inputs | Sequence[int] | Tensor) -> Tensor:
        """The plain forward pass: float32 [S, V], row i for the token after i. Every token is computed for it."""
        return torch.cat(list(Rows(self._engine, *self._checked(ids_or_inputs))))

    def score(self, ids_or_inputs: Inputs | Sequence[int] | Tensor, top: int = 0) -> list[TokenLogprob | None]:
        """The log-probability of each token given those before it (None for the first), with `top` alternatives."""
        return list(self.scores(ids_or_inputs, top))

    def scores(self, ids_or_inputs: Inputs | Sequence[int] | Tensor, top: int = 0, *, key: str | None = None) -> Scores:
        """What `score` gives, one by one, and with an end that can be called: `close`. key: see `stream`."""
        ids, pictures = self._checked(ids_or_inputs)
        if isinstance(top, bool) or not isinstance(top, int) or top < 0:
            raise PunaError(f"top must be a whole number of alternatives from 0 on, not {top!r}")
        return Scores(self._engine, ids, top, self.tokenizer, _key(key), pictures)

    def memory_used(self) -> tuple[Forecast | None, int]:
        """What was forecast for the cache that was really used, and the process's largest resident size so far."""
        if self.needs is None:
            return None, resident_peak()
        core = self._engine.core
        used = CacheSize(core.state.blocks.full.touched, core.state.blocks.local.touched)
        drafter = core.speculation.drafter if core.speculation else None
        draft = drafter.touched if isinstance(drafter, DraftModel) else None
        needs = self.needs if core.experts is None else self.needs.on_demand(core.experts.bytes)
        return needs.used(used, draft, LARGEST, 1, core.looker.gallery.most), resident_peak()

    def stats(self) -> Stats:
        """How the engine is doing: requests, rates, cache."""
        return self._engine.stats()

    def expert_load(self) -> dict[int, list[int]]:
        """Of each layer with routed experts, by its number: how many tokens every expert has served so far."""
        return self.decoder.expert_load()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Reply:
        """One whole answer. See `Sampling` for the options, `stream` for prompts and errors."""
        reply = None
        for piece in self.stream(prompt, **options):
            reply = piece.reply
        assert reply is not None, "a stream that nobody closes ends with its reply"
        return reply

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The answer piece by piece; the last piece has `.reply`. Close it to stop early.

        prompt: text (gets BOS once), messages (list of dicts), `Inputs`, or token ids (taken as they are).
        Beside the fields of `Sampling`: tools (OpenAI's definitions; with messages, or with what `prepare` made of
        messages and the same tools), schema (JSON schema that the answer follows), and for the engine: key (requests
        of one key share its part of the machine), priority (the smaller, the earlier; 0), timeout (seconds after which
        the answer fails). Everything is checked, and the work begins, before this returns. Raises ContextLengthError
        for a prompt that is too long, QueueFullError where too
        many wait already, PunaError for any other mistake.
        """
        tools, schema = options.get("tools"), options.get("schema")
        sampling = self.defaults.with_options({k: v for k, v in options.items() if k not in BESIDE})
        if tools and not (_is_chat(prompt) or isinstance(prompt, Inputs)):
            raise PunaError("tools need a chat: give messages, or use render(messages, tools=...) and parse yourself")
        ids, pictures = self._checked(self._read(prompt, tools))
        if sampling.stop:
            self._need_tokenizer("a stop string")
        beyond = [token for token in sampling.logit_bias if token >= self.config.vocab_size]
        if beyond:
            raise PunaError(f"logit_bias names token {beyond[0]}, but ids go from 0 to {self.config.vocab_size - 1}")
        room = self.context_length - len(ids)
        grammar = None if schema is None else Grammar(schema, self._vocabulary)
        request = Request(
            prompt=ids,
            sampling=sampling,
            limit=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            stop_ids=self.stop_ids if grammar is None else self.stop_ids | {self._vocabulary.eos_token_id},
            continues_text=not isinstance(prompt, Inputs) and not _is_chat(prompt),
            tools=tools or (),
            grammar=grammar,
            key=_key(options.get("key")),
            priority=_priority(options.get("priority")),
            timeout=_timeout(options.get("timeout")),
            pictures=pictures,
        )
        return Stream(self._engine, request, self.tokenizer)

    def save(self, path: str | Path, format: Literal["safetensors", "gguf"] = "safetensors") -> None:
        """Write a checkpoint: a folder that transformers loads, or a GGUF file that llama.cpp loads."""
        from puna.checkpoint import save
        from puna.engine.adapters import has_adapter

        if has_adapter(self.decoder):
            raise PunaError("this model has an adapter beside its weights; `puna export` writes both as one checkpoint")
        save(self.decoder, self.config, self.tokenizer, Path(path), format=format, generation=self._generation)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._need_tokenizer("a schema"), self.config.vocab_size, self.stop_ids)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise PunaError(
                f"{what} needs a tokenizer, and this checkpoint has none; give token ids, or put the tokenizer's files "
                "beside the weights"
            )
        return self.tokenizer

    def prompt_ids(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The token ids that a prompt of any kind becomes: text gets BOS, a chat is rendered, ids stay as they are."""
        return self._checked(self._read(prompt, tools))[0]

    def _read(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None) -> Inputs | Sequence[int] | Tensor:
        if isinstance(prompt, str):
            tokenizer = self._need_tokenizer("a text prompt")
            bos = tokenizer.bos_id if tokenizer.bos_id is not None else self.config.bos_token_id
            return ([] if bos is None else [bos]) + tokenizer.encode(prompt)
        return self.prepare(prompt, tools) if _is_chat(prompt) else prompt  # type: ignore[arg-type, return-value]

    def _checked(self, given: Inputs | Sequence[int] | Tensor) -> tuple[list[int], Sequence[Shown]]:
        if not isinstance(given, Inputs):
            return self._ids(given), ()
        ids = self._ids(given.token_ids)
        pictures = shown(given, ids, self.config)
        self._engine.core.looker.check(pictures)
        return ids, pictures

    def _ids(self, given: Sequence[int] | Tensor) -> list[int]:
        if hasattr(given, "tolist"):  # a tensor or an array
            given = given.tolist()
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise PunaError(f"a prompt is text, messages, Inputs or a list of token ids, not {type(given).__name__}")
        if not given:
            raise PunaError("the prompt is empty: it needs at least one token")
        size = self.config.input_vocab_size
        ids: list[int] = []
        for at, id in enumerate(given):
            try:
                whole = None if isinstance(id, bool) else index(id)  # numpy's integers too
            except TypeError:
                whole = None
            if whole is None:
                raise PunaError(f"token ids must be whole numbers; at place {at} stands {id!r:.80}")
            ids.append(whole)
            if not 0 <= whole < size:
                raise PunaError(f"token id {id} at place {at} is outside this model's vocabulary (0 to {size - 1})")
        if len(ids) > self.context_length:
            raise ContextLengthError(len(ids), self.context_length, self._wanted_context)
        return ids


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _priority(given: Any) -> int:
    if given is None:
        return 0
    if isinstance(given, bool) or not isinstance(given, int):
        raise PunaError(f"priority must be a whole number (the smaller, the earlier), not {given!r}")
    return given


def _key(given: Any) -> str | None:
    if given is not None and not isinstance(given, str):
        raise PunaError(f"key must be text (requests of one key share its part of the machine), not {given!r:.80}")
    return given


def _timeout(given: Any) -> float | None:
    if given is not None and not (given == math.inf or (finite(given) and given > 0)):
        raise PunaError(f"timeout must be a number of seconds above 0, not {given!r:.80}")
    return given
