"""Pictures in the engine: the same answers alone, among others, cut, cached and preempted; each looked at once."""

import itertools
import threading
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.checkpoint import open_source
from puna.engine import CacheSize, Inputs, Model, load, pace, pictures
from puna.engine.forecast import Needs
from puna.engine.gallery import Gallery, gallery_bytes, looking_bytes, picture_bytes
from puna.errors import PunaError
from puna.model.native import kernels
from puna.model.paged import blocks_for
from puna.model.pictures import PatchFeatures
from tiny import decoder as text_decoder
from tiny_pictures import KINDS, asked, checkpoint_of, config, decoder, image, model, tokenizer

torch.set_num_threads(1)
compiled = pytest.mark.skipif(kernels() is None, reason="the compiled kernels were not built")
both = pytest.mark.parametrize("kind", KINDS)

CHATS = [
    asked("What is", image(1, 60, 20), "?"),
    asked(image(2), image(3, 30, 90), "beside each other, and", image(1, 60, 20), "again"),
    asked("no picture at all"),
    [*asked("Hello, llama"), {"role": "assistant", "content": "Yes?"}, *asked("look:", image(4, 100, 100))],
    [*asked(image(1, 60, 20), "A?"), {"role": "assistant", "content": "B."}, *asked("and", image(5), "?")],
    asked("no picture at all either, but a longer text that goes on for a while, so that it takes some blocks"),
]


class Watched:
    """A decoder that counts the tiles it looks at."""

    def __init__(self, kind, **shape):
        self.decoder = decoder(kind, **shape)
        self.tiles = 0
        look = self.decoder.look

        def counted(pixels, grids):
            self.tiles += len(pixels)
            return look(pixels, grids)

        self.decoder.look = counted


def answer(llama: Model, chat, **options):
    return llama.generate(chat, **{"max_tokens": 10, "logprobs": 2, "ignore_eos": True, **options})


def plain(llama: Model, inputs: Inputs) -> torch.Tensor:
    """The decoder's own pass over everything at once, without an engine."""
    own, ids = llama.decoder, inputs.token_ids
    with torch.no_grad():
        shares = ()
        if inputs.grids:
            shares = [own.place(ids, own.look(inputs.pixel_values, inputs.grids)).share(0, len(ids), 0)]
        from puna.model.pictures import PassPictures

        return own(torch.tensor([ids]), pictures=PassPictures.joined(shares))[0].float()


@both
def test_logits_are_those_of_the_plain_pass(kind):
    llama = model(kind)
    for chat in CHATS:
        inputs = llama.prepare(chat)
        torch.testing.assert_close(llama.logits(inputs), plain(llama, inputs), atol=1e-4, rtol=0)


@both
def test_pictures_matter_where_they_stand(kind):
    llama = model(kind)
    one, other = (llama.prepare(asked("ab", image(seed, 60, 20), "cd")) for seed in (1, 2))
    assert list(one.token_ids) == list(other.token_ids)
    differs = (llama.logits(one) != llama.logits(other)).any(-1)
    first = int(differs.nonzero()[0])
    assert list(one.token_ids)[first] == config(kind).vision.image_token_id
    assert differs[-1]


@compiled
@both
def test_prompts_cut_anywhere_give_the_same_bits(kind, monkeypatch):
    prompts = [model(kind).prepare(chat) for chat in CHATS[:2]]
    whole = [model(kind, prefix_cache=False).logits(prompt) for prompt in prompts]
    for pieces in (1, 5, 33):
        monkeypatch.setattr(pace, "LARGEST", pieces)
        llama = model(kind)
        for prompt, expected in zip(prompts, whole, strict=True):
            assert torch.equal(llama.logits(prompt), expected)


@compiled
@both
@pytest.mark.parametrize("reference", ["meta", "transformers"])
def test_answers_are_the_same_bits_among_others_cached_and_preempted(kind, reference):
    if kind == "llama4" and reference != "meta":
        pytest.skip("both references agree on Llama 4")
    alone = model(kind, decoder(kind, reference=reference), prefix_cache=False)
    expected = [answer(alone, chat) for chat in CHATS]
    crowd = model(kind, decoder(kind, reference=reference), cache=CacheSize(24, 24 if kind == "llama4" else 0))
    found = {}

    def ask(at: int) -> None:
        found[at] = answer(crowd, CHATS[at % len(CHATS)])

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(3 * len(CHATS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[at] for at in range(len(threads))] == expected * 3
    assert [answer(crowd, chat) for chat in CHATS] == expected


@compiled
@both
@pytest.mark.parametrize("looked_at", [False, True], ids=["before its pictures are looked at", "amid its answer"])
def test_a_preempted_request_loses_nothing(kind, looked_at):
    chats = CHATS[0], CHATS[1]
    alone = model(kind, prefix_cache=False)
    expected = [answer(alone, chat).token_ids for chat in chats]
    size = blocks_for(len(alone.prepare(chats[1]).token_ids) + 10)  # of the longer one alone
    llama = model(kind, cache=CacheSize(size, size if kind == "llama4" else 0))
    core = llama._engine.core
    llama._engine.threaded = False  # steps are taken here, one by one
    options = {"max_tokens": 10, "ignore_eos": True}
    later = llama.stream(chats[0], priority=1, **options)
    core.take_in()
    with torch.no_grad():
        core.step()
        while looked_at and len(later._task.answer) < 4:
            core.step()
    assert later._task.running
    first = llama.stream(chats[1], **options)
    replies = [list(stream)[-1].reply.token_ids for stream in (first, later)]
    assert core.meter.preemptions > 0
    assert replies == expected[::-1]


@compiled
@both
@pytest.mark.parametrize("speculate", ["ngram", "model"])
def test_guesses_change_nothing(kind, speculate):
    expected = [answer(model(kind), chat) for chat in CHATS]
    drafting = Model(text_decoder(config(kind).with_(vision=None))) if speculate == "model" else speculate
    llama = model(kind, speculate=drafting)
    assert [answer(llama, chat) for chat in CHATS] == expected


@compiled
@both
def test_prefixes_are_shared_with_the_same_pictures_only(kind):
    long = "a text before any picture, which is long enough for a block or two of the cache, and then some"
    chats = [asked(long, image(seed, 60, 20), long, image(5), long) for seed in (1, 2)]
    llama = model(kind)
    first = [answer(llama, chat) for chat in chats]
    again = [answer(llama, chat) for chat in chats]
    assert first == again == [answer(model(kind, prefix_cache=False), chat) for chat in chats]
    ids = list(llama.prepare(chats[0]).token_ids)
    picture = ids.index(config(kind).vision.image_token_id)
    assert first[0].usage.cached_tokens == 0
    assert first[1].usage.cached_tokens == picture // 32 * 32 > 0  # as far as the pictures don't differ
    assert again[0].usage.cached_tokens == again[1].usage.cached_tokens == (len(ids) - 1) // 32 * 32


@both
def test_every_picture_is_looked_at_once(kind):
    watched = Watched(kind)
    llama = model(kind, watched.decoder, prefix_cache=False)
    chat = asked(image(1, 60, 20), "and", image(2), "?")
    tiles = len(llama.prepare(chat).pixel_values)
    streams = [llama.stream(chat, max_tokens=3) for _ in range(4)]
    for stream in streams:
        list(stream)
    llama.generate([*chat, {"role": "assistant", "content": "x"}, *asked(image(2), "?")], max_tokens=3)
    assert watched.tiles == tiles
    llama.logits(llama.prepare(asked(image(3))))
    assert watched.tiles == tiles + 1


def test_nothing_is_looked_at_behind_a_shared_prefix():
    """Llama 4 needs a picture no more once its places are computed; Llama 3.2 reads it with every further token."""
    watched = Watched("llama4")
    llama = model("llama4", watched.decoder)
    chat = asked(image(1, 60, 20), "a text after the picture that fills up at least one whole block of the cache")
    first = answer(llama, chat)
    llama._engine.core.looker.gallery = Gallery(gallery_bytes(llama.config, 4))  # everything is forgotten
    seen = watched.tiles
    again = answer(llama, chat)
    assert again == first
    assert again.usage.cached_tokens > list(llama.prepare(chat).token_ids).index(llama.config.vision.image_token_id)
    assert watched.tiles == seen


@both
def test_few_pictures_at_once_where_room_is_short(kind):
    """Requests wait for each other's pictures; what could never be held is refused."""
    expected = [answer(model(kind, prefix_cache=False), chat) for chat in CHATS]
    watched = Watched(kind)
    llama = model(kind, watched.decoder, prefix_cache=False)
    gallery = llama._engine.core.looker.gallery
    gallery.room = 3 * picture_bytes(config(kind), 5, 4)
    streams = [llama.stream(chat, max_tokens=10, logprobs=2, ignore_eos=True) for chat in [*CHATS, *CHATS]]
    for stream in streams:
        list(stream)
    assert [stream.reply.token_ids for stream in streams] == [reply.token_ids for reply in [*expected, *expected]]
    assert not gallery._holders
    assert gallery.used <= gallery.room
    with pytest.raises(PunaError, match=r"the 4 pictures of this prompt take \d+ MB, but there is room for \d+ MB"):
        llama.generate(asked(*(image(seed, 90, 90) for seed in range(4))))


@both
def test_one_that_is_closed_amid_looking_leaves_nothing(kind):
    llama = model(kind)
    core = llama._engine.core
    llama._engine.threaded = False  # steps are taken here, one by one
    stream = llama.stream(asked(image(1, 90, 90), "?"), max_tokens=3)
    core.take_in()
    with torch.no_grad():
        core.step()
        core.step()
    assert core.looker.gallery._holders
    stream.close()
    core.drop_cancelled()
    assert not core.looker.gallery._holders
    assert not core.looker._begun


def test_answers_go_on_while_pictures_are_looked_at(monkeypatch):
    """One tile a step at most."""
    watched = Watched("llama4")
    llama = model("llama4", watched.decoder)
    core = llama._engine.core
    llama._engine.threaded = False
    monkeypatch.setattr(pictures, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # looking takes no time
    chatting = llama.stream(asked("Hello"), max_tokens=100, ignore_eos=True)
    core.take_in()
    with torch.no_grad():
        core.step()
        looking = llama.stream(asked(image(1, 90, 90), image(2, 90, 90), "?"), max_tokens=3)
        core.take_in()
        answered, seen = [], []
        while watched.tiles < 10:
            core.step()
            answered.append(len(chatting._task.answer))
            seen.append(watched.tiles)
    assert all(b - a == 1 for a, b in pairwise(answered))
    assert all(b - a <= 1 for a, b in pairwise(seen))
    assert len(list(looking)) > 0
    chatting.close()


def test_answers_get_half_of_the_time(monkeypatch):
    llama = model("llama4")
    looker = llama._engine.core.looker
    inputs = llama.prepare(asked(image(1, 90, 90)))
    all_shown = pictures.shown(inputs, inputs.token_ids, llama.config)
    waiting = pictures.TaskPictures(inputs.token_ids, all_shown)
    ticks = itertools.count()
    monkeypatch.setattr(pictures, "time", SimpleNamespace(perf_counter=lambda: 2.0 * next(ticks)))
    with torch.no_grad():
        assert not looker.settle(waiting, 0)
        assert looker.look([waiting], answers=True)  # took 2 seconds
        assert not looker.look([waiting], answers=True)
        looker.worked(1.5)
        assert not looker.look([waiting], answers=True)
        looker.worked(0.6)
        assert looker.look([waiting], answers=True)
        assert looker.look([waiting], answers=False)  # nobody is kept waiting
        while not looker.settle(waiting, 0):
            looker.look([waiting], answers=False)
    assert waiting.ready(0) is None


@both
def test_scores_and_usage_count_pictures(kind):
    llama = model(kind)
    inputs = llama.prepare(CHATS[0])
    reply = answer(llama, CHATS[0])
    assert reply.usage.prompt_tokens == len(inputs.token_ids)
    whole = Inputs([*inputs.token_ids, *reply.token_ids], inputs.pixel_values, inputs.grids)
    scores = llama.score(whole)[len(inputs.token_ids) :]
    assert [one.logprob for one in scores] == pytest.approx([one.logprob for one in reply.logprobs], abs=1e-4)
    assert answer(llama, inputs) == reply


def test_repetition_penalty_and_ids_beyond_the_vocabulary():
    llama = model("llama3.2")
    reply = llama.generate(CHATS[0], max_tokens=5, repetition_penalty=1.3)
    assert len(reply.token_ids) > 0


def without(inputs: Inputs, **changes) -> Inputs:
    fields = {"token_ids": inputs.token_ids, "pixel_values": inputs.pixel_values, "grids": inputs.grids}
    return Inputs(**fields | changes)


@both
def test_inputs_made_by_hand_are_checked(kind):
    llama = model(kind)
    good = llama.prepare(CHATS[0])  # 1 x 3 tiles
    tiles = 4 if kind == "llama4" else 3
    assert good.pixel_values.shape == (tiles, 3, 28, 28)
    same = without(good, token_ids=torch.tensor(good.token_ids), pixel_values=good.pixel_values.numpy(),
                   grids=np.array(good.grids))  # fmt: skip
    assert torch.equal(llama.logits(same), llama.logits(good))
    nan = good.pixel_values.clone()
    nan[1, 2, 3, 4] = float("nan")
    place = llama.config.vision.image_token_id
    fewer = list(good.token_ids)
    fewer.remove(place)
    for bad, error in [
        ({"pixel_values": None}, r"Inputs\.pixel_values is missing: pictures need both"),
        ({"grids": None}, r"Inputs\.grids is missing"),
        ({"grids": []}, r"Inputs\.grids is missing"),
        ({"grids": [(3, 3)]}, r"Inputs\.grids\[0\] must be \(rows, columns\) of at most 4 tiles, not \(3, 3\)"),
        ({"grids": [(0, 1)]}, r"Inputs\.grids\[0\] must be"),
        ({"grids": [(1, 3, 1)]}, r"Inputs\.grids\[0\] must be"),
        ({"grids": [(1, 2.0)]}, r"Inputs\.grids\[0\] must be"),
        ({"grids": [7]}, r"Inputs\.grids\[0\] must be .* not 7"),
        ({"grids": [(1, 1)]}, r"Inputs\.pixel_values must be \[1, 3, 28, 28\] for these.*, not \[\d, 3, 28, 28\]"),
        ({"pixel_values": good.pixel_values[:, :2]}, r"Inputs\.pixel_values must be"),
        ({"pixel_values": good.pixel_values[0]}, r"Inputs\.pixel_values must be"),
        ({"pixel_values": [1.0]}, r"Inputs\.pixel_values must be .* not list"),
        ({"pixel_values": good.pixel_values.bfloat16()}, r"Inputs\.pixel_values must be float32, not bfloat16"),
        ({"pixel_values": nan}, r"Inputs\.pixel_values has values in tile 1 that are not finite"),
        ({"token_ids": fewer}, r"Inputs\.token_ids has \d+ places for pictures .token \d+., but .* need \d+; let"),
        ({"token_ids": [place, *good.token_ids]}, r"Inputs\.token_ids has"),
        ({"token_ids": []}, "the prompt is empty"),
        ({"token_ids": [10**6]}, "token id 1000000 at place 0 is outside this model's vocabulary"),
    ]:
        with pytest.raises(PunaError, match=error):
            llama.logits(without(good, **bad))


@both
def test_the_forecast_counts_room_for_pictures(kind, tmp_path):
    source = open_source(checkpoint_of(kind, tmp_path / kind))
    needs = Needs.of(source, None, None, None)
    shape, size = source.config, CacheSize(8, 8 if kind == "llama4" else 0)
    blind = replace(needs, config=shape.with_(vision=None))
    room = gallery_bytes(shape, 4)
    assert room >= 8 * picture_bytes(shape, shape.vision.max_tiles, 4) > 0
    assert needs.most(size).cache == blind.most(size).cache + room
    assert needs.forecast(64).cache == blind.forecast(64).cache + room
    assert needs.most(size).work >= looking_bytes(shape, 4)
    llama = load(tmp_path / kind)
    llama.generate(CHATS[0], max_tokens=2)
    held = llama._engine.core.looker.gallery
    assert llama.memory_used()[0].cache == blind.used(CacheSize(*touched(llama)), None, 512, 1).cache + held.most
    assert 0 < held.used <= held.most <= room


def touched(llama: Model) -> tuple[int, int]:
    blocks = llama._engine.core.state.blocks
    return blocks.full.touched, blocks.local.touched


def test_models_of_text_refuse_pictures():
    llama = Model(text_decoder("llama3.2"))
    with pytest.raises(PunaError, match="these Inputs hold pictures, but this model reads text only"):
        llama.logits(Inputs([1, 2], torch.zeros(1, 3, 28, 28), [(1, 1)]))
    words = config("llama4").with_(vision=None)
    speaks = Model(text_decoder(words), tokenizer())
    with pytest.raises(PunaError, match=r"messages\[0\].content\[1\]: this model reads text only; leave the"):
        speaks.generate(CHATS[0])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 5), min_size=1, max_size=4)), max_size=30))
def test_the_gallery_never_takes_more_room_than_it_has(steps):
    sizes = {b"%d" % i: 40 * (i + 1) for i in range(6)}
    gallery, holds = Gallery(400), {}
    for who, wanted in steps:
        if who in holds:
            gallery.release(holds.pop(who))
        else:
            keys = {b"%d" % i for i in wanted}
            held = set().union(*holds.values()) if holds else set()
            fits = sum(sizes[key] for key in keys | held) <= 400
            assert gallery.hold({key: sizes[key] for key in keys}) == fits
            if fits:
                holds[who] = keys
                for key in sorted(keys)[: len(keys) // 2 + 1]:
                    gallery.put(key, PatchFeatures(torch.zeros(sizes[key] // 8, 2)))
        held = set().union(*holds.values()) if holds else set()
        assert gallery.used <= 400
        assert held <= set(gallery._sizes)
        assert set(gallery._known) <= set(gallery._sizes)
        assert set(gallery._holders) == held
