"""Guesses change how long an answer takes, and nothing else."""

import random
from typing import Any

import pytest
import torch

import puna
from puna.engine import CacheSize, Model, Reply
from puna.engine.core import Core
from puna.engine.pace import Pace
from puna.engine.scheduler import Sequence
from puna.engine.speculation import MOST, PAUSES, TRIAL, Chance, DraftModel, NGrams, _Index
from puna.errors import PunaError
from puna.family.config import ModelConfig
from puna.model.packing import pack
from test_engine_together import gather, idle, until
from tiny import CONFIGS, decoder

KINDS = ["llama3.2", "scout"]
LOOP = [5, 17, 80, 3, 44, 9, 21, 60]


def model(kind: str, speculate: Any = None, **settings: Any) -> Model:
    """Packed, as `load` gives it: only then are equal bits promised."""
    plain = decoder(kind)
    pack(plain)
    return Model(plain, speculate=speculate, **settings)


def drafts(kind: str) -> dict[str, Any]:
    """Who guesses: n-grams; the model itself, nearly always right; one that knows nothing."""
    return {"ngram": "ngram", "itself": model(kind), "stranger": Model(decoder(kind, seed=9))}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Half of them repeat themselves."""
    rng = random.Random(seed)
    asked = [[rng.randrange(96) for _ in range(rng.randint(1, 40))] for _ in range(count)]
    return [(prompt[:7] * 6)[: len(prompt) + 7] if at % 2 else prompt for at, prompt in enumerate(asked)]


def options(at: int, most: int | None = None) -> dict[str, Any]:
    """A third plain and greedy, the others at random, with a bias and penalties."""
    kind = at % 3
    return {"max_tokens": most or 12 + at % 20, "temperature": [0.0, 1.0, 0.3][kind], "top_p": 1.0, "seed": at,
            "logprobs": 2, "ignore_eos": True, "repetition_penalty": [1.0, 1.0, 0.7][kind],
            "logit_bias": {at: 3.0} if kind else {}}


def alone(llama: Model, asked: list[list[int]], most: int | None = None) -> list[Reply]:
    """One after the other."""
    return [llama.generate(prompt, **options(at, most)) for at, prompt in enumerate(asked)]


def together(llama: Model, asked: list[list[int]], most: int | None = None) -> list[Reply]:
    """All at once, none longer than what the engine computes ahead of its reader."""
    gather(llama, len(asked))
    streams = [llama.stream(prompt, **options(at, most)) for at, prompt in enumerate(asked)]
    found = []
    for stream in streams:
        assert list(stream)
        assert stream.reply is not None
        found.append(stream.reply)
    assert until(lambda: idle(llama))
    return found


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses whatever they cost, in every step."""
    monkeypatch.setattr(Pace, "price", lambda *_: 0.0)
    monkeypatch.setattr(Chance, "learn", lambda *_: None)
    monkeypatch.setattr(Chance, "count", lambda *_: MOST - 3)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["ngram", "itself", "stranger"])
def test_answers_are_equal_with_and_without_guesses(kind: str, who: str) -> None:
    asked = prompts(16)
    expected = alone(model(kind, prefix_cache=False), asked)
    guessing = model(kind, drafts(kind)[who])
    assert together(guessing, asked) == expected
    assert alone(guessing, asked) == expected
    stats = guessing.stats()
    assert stats.proposed > 100
    assert stats.accepted < stats.proposed
    if who == "itself":
        assert stats.accepted > 0.15 * stats.proposed


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["ngram", "itself"])
def test_tiny_pools_preempt_and_answers_stay_equal(kind: str, who: str) -> None:
    asked = prompts(8, seed=1)
    expected = alone(model(kind, prefix_cache=False), asked, most=60)
    for blocks, local in ((5, 5), (7, 3)):
        size = CacheSize(blocks, local if CONFIGS[kind].attention_chunk_size else 0)
        guessing = model(kind, drafts(kind)[who], cache=size)
        guessing._engine.core.pace = Pace(fixed=True)  # all prompts in the first step, whatever the time
        assert together(guessing, asked, most=60) == expected
        assert guessing.stats().preemptions > 0
        assert guessing.stats().accepted > 0


def test_a_loop_is_guessed_and_takes_fewer_steps() -> None:
    """The prompt goes on as it began, because each token is made likely by the one before it."""
    plain = decoder("llama3.2")
    with torch.no_grad():  # the next token of the loop follows from the last one alone
        for block in plain.layers:
            block.self_attn.o_proj.weight.zero_()
            block.feed_forward.down_proj.weight.zero_()
        plain.embed_tokens.weight.zero_()
        plain.embed_tokens.weight[LOOP, range(len(LOOP))] = 1.0
    untied = decoder(ModelConfig(**{**vars(CONFIGS["llama3.2"]), "tie_word_embeddings": False}))
    untied.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        untied.norm.weight.fill_(1.0)
        assert untied.lm_head is not None
        untied.lm_head.weight.zero_()  # type: ignore[operator]
        untied.lm_head.weight[LOOP[1:] + LOOP[:1], range(len(LOOP))] = 9.0  # type: ignore[index]
    guessing = Model(untied, speculate="ngram")
    reply = guessing.generate(LOOP * 2, max_tokens=100, temperature=0)
    assert reply.token_ids == (LOOP * 13)[:100]
    assert until(lambda: idle(guessing))
    stats = guessing.stats()
    assert stats.accepted > 0.8 * stats.proposed > 30
    assert stats.steps < 60
    # all but the first, in ten seconds; the last step is counted a moment after its answer is out
    assert until(lambda: guessing.stats().answer_tokens_per_second == pytest.approx(9.9))


def test_a_schema_is_followed_with_guesses() -> None:
    schema = {"type": "object", "required": ["names"], "additionalProperties": False,
              "properties": {"names": {"type": "array", "items": {"enum": ["alpaca", "llama"]}, "minItems": 3,
                                       "maxItems": 6}}}  # fmt: skip
    plain, guessing = (puna.load("cria", speculate=speculate) for speculate in (None, "ngram"))
    for temperature in (0.0, 1.0):
        one, other = (llama.generate("Some names: ", schema=schema, temperature=temperature, seed=1, max_tokens=50,
                                     logprobs=1, stop=["zzz"]) for llama in (plain, guessing))  # fmt: skip
        assert one == other
    assert guessing.stats().accepted > 0


def test_the_number_of_guesses_follows_chance_and_price() -> None:
    chance = Chance()
    assert 1 <= chance.count(None) <= 3
    for _ in range(20):
        count = chance.count(0.05)
        chance.learn(count, count)
    assert chance.count(0.05) == MOST
    assert chance.count(1.0) == 0, "a guess that takes as long as a token never pays"
    for _ in range(60):
        chance.learn(4, 1)
    assert 1 <= chance.count(0.2) <= 2
    assert chance.count(0.6) == 0


def test_guesses_that_fail_end_and_are_tried_again_now_and_then() -> None:
    chance = Chance()
    counts = []
    for _ in range(2000):
        counts.append(chance.count(0.01))
        if counts[-1]:
            chance.learn(counts[-1], 0)
    assert sum(counts[:20]) <= 16
    assert counts[20:].count(TRIAL) == sum(count > 0 for count in counts[20:])
    assert 2000 / PAUSES[1] - 1 <= counts[20:].count(TRIAL) <= 2000 / PAUSES[1] + 4
    for _ in range(PAUSES[1] * 5):  # now they are right
        count = chance.count(0.01)
        chance.learn(count, count)
    assert chance.count(0.01) == MOST


def test_random_text_ends_without_guesses() -> None:
    guessing = model("llama3.2", Model(decoder("llama3.2", seed=9)))
    stream = guessing.stream([1, 2, 3], max_tokens=200, temperature=1.5, top_p=1.0, seed=3, ignore_eos=True)
    for _ in range(150):
        next(stream)
    speculation = guessing._engine.core.speculation
    assert speculation is not None
    (chance,) = speculation.chances.values()
    assert not chance.on
    assert guessing.stats().proposed < 40
    assert len(list(stream)) == 51
    assert not speculation.chances


def test_the_price_of_a_guess_is_measured() -> None:
    pace = Pace()
    assert pace.price(4) is None
    assert pace.budget(4) == 4, "first without guesses"
    pace.record(4, 0, 0.100)
    for _ in range(50):
        pace.record(4, 0, 0.100 + 6 * 0.005, guesses=6, drafting=6 * 0.001)
    assert pace.price(4) == pytest.approx(4 * 0.006 / 0.100)
    assert pace.price(1) is None
    assert Pace(fixed=True).price(4) == pytest.approx(0.4)


def test_ngrams_find_what_a_search_finds() -> None:
    rng = random.Random(1)
    index, tokens, hits = _Index(), [rng.randrange(6) for _ in range(50)], 0
    for _ in range(300):
        tokens += [rng.randrange(6) for _ in range(rng.randint(1, 3))]
        expected: list[int] = []
        for size in (4, 2):
            places = [at for at in range(size, len(tokens)) if tokens[at - size : at] == tokens[-size:]]
            if places:
                expected = [*tokens]
                while len(expected) < len(tokens) + 5:
                    expected.append(expected[places[-1] + len(expected) - len(tokens)])
                expected = expected[len(tokens) :]
                break
        assert index.guess(tokens, 5) == expected
        hits += bool(expected)
    assert hits > 200


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    sequence = Sequence(list(range(90)) * 200, 0)
    drafter = NGrams()
    assert drafter.guess({sequence: 3}) == {sequence: [0, 1, 2]}, "what is known already helps"
    for _ in range(5):
        found = drafter.guess({sequence: 3})
    assert found == {sequence: [0, 1, 2]}
    drafter.forget(sequence)
    assert not drafter._indices


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_model_says_what_it_would_say_alone(kind: str) -> None:
    """Whatever was guessed before and came out otherwise, with prompts that are read in pieces."""
    config = ModelConfig(**{**vars(CONFIGS[kind]), "context_length": 1024})
    plain = decoder(config)
    drafter = DraftModel(plain, CacheSize(64, 8 if config.attention_chunk_size else 0))
    rng = random.Random(2)
    sequences = [Sequence([rng.randrange(96) for _ in range(length)], 0) for length in (1, 30, 600, 960)]
    for step in range(12):
        wanted = {sequence: rng.randint(1, 5) for sequence in sequences}
        found = drafter.guess(wanted)
        for sequence, guesses in found.items():
            tokens = list(sequence.tokens)
            for guess in guesses if step % 4 == 0 else ():
                with torch.no_grad():
                    assert int(plain(torch.tensor([tokens]))[0, -1].argmax()) == guess
                tokens.append(guess)
            assert len(guesses) == min(wanted[sequence], 1000 - len(sequence.tokens))
        for sequence in sequences:
            guesses = found.get(sequence, [])
            right = rng.randint(0, len(guesses))
            sequence.tokens += [*guesses[:right], rng.randrange(96)]
            del sequence.tokens[1000:]
        if step in (0, 3):  # long ones are read bit by bit
            assert {sequence in found for sequence in sequences[2:]} == {step == 3}
    for sequence in sequences:
        drafter.forget(sequence)
    assert drafter._blocks.full.used == drafter._blocks.local.used == 0


def test_a_draft_model_of_a_shorter_context_guesses_nothing_beyond_it() -> None:
    guessing = model("llama3.2", Model(decoder(CONFIGS["llama3.2"].with_(context_length=64))))
    assert guessing.generate([1] * 80, max_tokens=5, ignore_eos=True).usage.completion_tokens == 5
    assert guessing.stats().proposed == 0


def test_cancelling_forgets_guesses() -> None:
    guessing = model("llama3.2", Model(decoder("llama3.2")))
    streams = [guessing.stream([at, 2], max_tokens=100, timeout=60) for at in range(5)]
    for stream in streams:
        next(stream)
        stream.close()
    assert until(lambda: idle(guessing))
    core = guessing._engine.core
    assert isinstance(core, Core)
    assert core.speculation is not None
    assert not core.speculation.chances
    assert core.speculation.drafter._blocks.full.used == 0  # type: ignore[attr-defined]


def test_what_cannot_guess_is_refused() -> None:
    with pytest.raises(PunaError, match="speculate must be None, False, 'ngram' or a draft model, not True"):
        puna.load("cria", speculate=True)  # type: ignore[arg-type]
    other = ModelConfig(**{**vars(CONFIGS["llama3.2"]), "vocab_size": 128})
    with pytest.raises(PunaError, match="draft model has 128 tokens, but the model 96"):
        model("llama3.2", Model(decoder(other)))
    with pytest.raises(PunaError, match="nowhere"):
        puna.load("cria", speculate="./nowhere")
