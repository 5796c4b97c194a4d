"""Sampling against plain definitions, with tiny distributions."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.sampling import Sampling, adjust, choose, draw, probabilities
from puna.errors import PunaError

torch.set_num_threads(1)

OPEN = Sampling(temperature=1.0, top_p=1.0)


def plain(logits: list[float], s: Sampling) -> list[float]:
    """The definition, token by token, in Python floats."""
    peak = max(logits)
    weights = [math.exp((x - peak) / s.temperature) for x in logits]
    weights = [w if w >= s.min_p * max(weights) else 0.0 for w in weights]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if s.top_k:
        for i in order[s.top_k :]:
            weights[i] = 0.0
    total = sum(weights)
    weights = [w / total for w in weights]
    reached, kept = 0.0, set()
    for i in order:
        if reached >= s.top_p and s.top_p < 1:
            break
        kept.add(i)
        reached += weights[i]
    weights = [w if i in kept else 0.0 for i, w in enumerate(weights)]
    total = sum(weights)
    return [w / total for w in weights]


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.integers(-40, 40), min_size=2, max_size=40, unique=True),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 2.0]),
    top_p=st.sampled_from([0.05, 0.31, 0.5, 0.77, 0.9, 1.0]),
    top_k=st.sampled_from([None, 0, 1, 2, 5, 100]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 1.0]),
)
def test_filters_equal_their_definitions(
    steps: list[int], temperature: float, top_p: float, top_k: int | None, min_p: float
) -> None:
    logits = [0.137 * step for step in steps]  # distinct, and no cumulated sum lies on a threshold
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    found = probabilities(torch.tensor(logits), sampling)
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert found.tolist() == pytest.approx(plain(logits, sampling), abs=1e-5)


def test_a_flat_distribution_wider_than_the_candidates_is_cut_at_top_p() -> None:
    found = probabilities(torch.zeros(5000), Sampling(temperature=1, top_p=0.5))
    assert abs(int((found > 0).sum()) - 2500) <= 2


def test_temperature_zero_is_greedy_and_tiny_temperatures_do_not_overflow() -> None:
    logits = torch.tensor([1.0, 80.0, 79.9])
    random = OPEN.generator()
    assert choose(logits, Sampling(temperature=0), [], [], random) == 1
    for tiny in (1e-30, 1e-60, 5e-324):  # the latter two are 0 to float32
        assert probabilities(logits, Sampling(temperature=tiny)).tolist() == [0, 1, 0]
    assert probabilities(logits, Sampling(temperature=0)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("top_p", [1e-10, 1e-60, 5e-324])
def test_a_tiny_top_p_keeps_the_likeliest(top_p: float) -> None:
    assert probabilities(torch.tensor([1.0, 3.0, 2.0]), Sampling(temperature=1, top_p=top_p)).tolist() == [0, 1, 0]


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    repeated = adjust(logits, Sampling(repetition_penalty=2.0), prompt=[1], answer=[0])
    assert repeated.tolist() == [1.0, -4.0, 1.0, 0.5]
    counted = adjust(logits, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt=[1], answer=[2, 2, 0])
    assert counted.tolist() == [1.25, -2.0, 0.0, 0.5]  # the prompt doesn't count
    biased = adjust(logits, Sampling(logit_bias={3: 100, 0: -1.5}), prompt=[], answer=[])
    assert biased.tolist() == [0.5, -2.0, 1.0, 100.5]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5], "the model's logits must stay as they were"


def test_a_mask_bars_tokens_in_greedy_and_drawn_choice() -> None:
    logits = torch.tensor([9.0, 1.0, 0.0])
    allowed = torch.tensor([False, True, True])
    assert choose(logits, Sampling(temperature=0), [], [], OPEN.generator(), allowed) == 1
    assert 0 not in {choose(logits, OPEN, [], [], OPEN.generator(), allowed) for _ in range(50)}


def test_drawing_follows_the_probabilities_and_never_takes_the_impossible() -> None:
    random = Sampling(seed=5).generator()
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    counts = Counter(draw(probs, random) for _ in range(4000))
    assert set(counts) == {1, 3}
    assert counts[3] / 4000 == pytest.approx(0.75, abs=0.03)


def test_one_seed_gives_one_sequence() -> None:
    probs = torch.full((100,), 0.01)

    def sequence(seed: int | None) -> list[int]:
        random = Sampling(seed=seed).generator()
        return [draw(probs, random) for _ in range(20)]

    assert sequence(1) == sequence(1) != sequence(2)
    assert sequence(-1) == sequence(-1)
    assert sequence(None) != sequence(None)


def test_logits_that_are_not_numbers_are_an_error_not_a_token() -> None:
    with pytest.raises(PunaError, match="not finite"):
        choose(torch.tensor([0.0, float("nan")]), OPEN, [], [], OPEN.generator())


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_that_leaves_no_numbers_is_named_not_the_weights(penalty: float) -> None:
    sampling = Sampling(temperature=1, repetition_penalty=penalty)
    with pytest.raises(PunaError, match=r"repetition_penalty 1e[+-]300 takes logits out of float32's range"):
        choose(torch.tensor([1.0, -1.0]), sampling, [0, 1], [], OPEN.generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number at least 0"),
        ({"temperature": "hot"}, "temperature must be a number at least 0, not 'hot'"),
        ({"temperature": 10**400}, "temperature must be a number at least 0, not 1000"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, not 'no'"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, not 1.01"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_k": 1.5}, "top_k must be a whole number, not 1.5"),
        ({"min_p": 2}, "min_p must be at least 0 and at most 1, not 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, not 0"),
        ({"presence_penalty": 3}, "presence_penalty must be at least -2 and at most 2, not 3"),
        ({"frequency_penalty": -3}, "frequency_penalty must be at least -2 and at most 2, not -3"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, not -1"),
        ({"max_tokens": True}, "max_tokens must be a whole number, not True"),
        ({"logprobs": -1}, "logprobs must be at least 0, not -1"),
        ({"seed": "x"}, "seed must be a whole number, not 'x'"),
        ({"stop": ["", "a"]}, "stop must be non-empty strings"),
        ({"stop": 7}, "stop must be a string or a list of strings, not int"),
        ({"logit_bias": {-1: 0}}, "logit_bias: a token id must be at least 0, not -1"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 must be at least -100 and at most 100, not 101"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers, not list"),
    ],
)
def test_bad_values_name_the_field_and_its_range(options: dict, message: str) -> None:
    with pytest.raises(PunaError) as caught:
        Sampling().with_options(options)
    assert message in str(caught.value)


def test_options_override_defaults_and_none_means_default() -> None:
    defaults = Sampling(temperature=0.3)
    assert defaults.with_options({"temperature": None, "stop": "x"}) == Sampling(temperature=0.3, stop=("x",))
    with pytest.raises(TypeError, match="unknown generation option 'temprature'"):
        defaults.with_options({"temprature": 1})
