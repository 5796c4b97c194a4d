"""The engine on tiny random models: its loop against the plain forward pass."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puna.engine import ContextLengthError, Inputs, Model, Sampling, load, pace
from puna.engine.core import RUN_AHEAD
from puna.errors import PunaError
from puna.family.config import AttentionTemperature, ModelConfig
from puna.model import Decoder
from puna.text.tokenizer import Tokenizer
from puna.text.toolcalls import MARKERS
from puna.text.train import train_tokenizer

torch.set_num_threads(1)

TEXTS = ["The llama eats grass on the high plain.", "A small model writes small stories.", "Grüße, 世界! 🦙"] * 4


def tiny_config(**changes: Any) -> ModelConfig:
    """Llama 4 in small: chunks of 8, one NoPE layer, one mixture of experts."""
    config = ModelConfig(
        architecture="llama4", vocab_size=320, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, context_length=128, num_experts=4, expert_intermediate_size=24, moe_layers=(1,),
        nope_layers=(2,), attention_chunk_size=8, attention_temperature=AttentionTemperature(floor=16), qk_norm=True,
    )  # fmt: skip
    return config.with_(**changes)


def tiny_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if parameter.ndim > 1 else torch.ones_like(parameter))
    return decoder


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_decoder(tiny_config()))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def talker(tokenizer: Tokenizer) -> Model:
    """A tiny model with a tokenizer."""
    return Model(tiny_decoder(tiny_config(vocab_size=tokenizer.vocab_size)), tokenizer)


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    """The definition: the whole sequence again for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("prefill", [3, 8, 512])
def test_greedy_equals_the_plain_forward_pass_past_several_chunks(
    model: Model, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LARGEST", prefill)
    prompt = [(7 * i) % 320 for i in range(21)]
    reply = model.generate(prompt, max_tokens=30, temperature=0)
    assert reply.token_ids == greedy(model, prompt, 30)
    assert len(set(reply.token_ids)) > 3, "a constant answer would prove nothing"
    assert (reply.finish_reason, reply.text, reply.tool_calls, reply.logprobs) == ("length", "", [], None)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (21, 30, 51)


def test_logits_are_float32_also_of_a_bfloat16_model() -> None:
    model = Model(tiny_decoder(tiny_config()).bfloat16())
    logits = model.logits([1, 2, 3])
    assert (logits.shape, logits.dtype, logits.requires_grad) == ((3, 320), torch.float32, False)
    assert torch.equal(logits, model.logits(Inputs([1, 2, 3])))
    assert torch.equal(logits, model.logits(torch.tensor([1, 2, 3])))
    logits[0] = 0  # the caller's own, to write into


def test_a_seed_repeats_an_answer_and_defaults_are_metas(model: Model) -> None:
    assert (model.defaults.temperature, model.defaults.top_p) == (0.6, 0.9)
    first, again, other = (model.generate([1, 2], max_tokens=20, temperature=1.5, seed=s).token_ids for s in (3, 3, 4))
    assert first == again != other


def test_logprobs_are_the_log_softmax_of_the_raw_logits(model: Model) -> None:
    reply = model.generate([5, 6, 7], max_tokens=6, temperature=2.0, top_k=3, logit_bias={9: 5}, seed=1, logprobs=4)
    ids = [5, 6, 7, *reply.token_ids]
    expected = torch.log_softmax(model.logits(ids), -1)
    assert reply.logprobs is not None
    assert [entry.id for entry in reply.logprobs] == reply.token_ids
    for place, entry in enumerate(reply.logprobs):
        row = expected[2 + place]
        assert entry.logprob == pytest.approx(row[entry.id].item(), abs=1e-4)
        assert [e.id for e in entry.top] == row.topk(4).indices.tolist()
        assert [e.logprob for e in entry.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        assert (entry.token, entry.bytes) == (f"token_id:{entry.id}", None)
    chosen_only = model.generate([5, 6, 7], max_tokens=2, temperature=0, logprobs=0).logprobs
    assert chosen_only is not None
    assert [entry.top for entry in chosen_only] == [(), ()]


def test_score_gives_the_prompts_own_logprobs(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "LARGEST", 5)
    ids = [(11 * i) % 320 for i in range(19)]
    expected = torch.log_softmax(model.logits(ids), -1)
    scores = model.score(ids, top=2)
    assert scores[0] is None
    for place, entry in enumerate(scores[1:], start=1):
        assert entry is not None
        assert entry.id == ids[place]
        assert entry.logprob == pytest.approx(expected[place - 1, ids[place]].item(), abs=1e-4)
        assert entry.top[0].id == int(expected[place - 1].argmax())


def test_an_end_token_ends_the_answer_unless_ignored() -> None:
    config = tiny_config()
    free = Model(tiny_decoder(config)).generate([1, 2, 3], max_tokens=12, temperature=0).token_ids
    end = free[5]
    cut = free.index(end) + 1
    model = Model(tiny_decoder(config.with_(eos_token_ids=(end,))))
    reply = model.generate([1, 2, 3], max_tokens=12, temperature=0)
    assert (reply.token_ids, reply.finish_reason) == (free[:cut], "stop")
    assert reply.usage.completion_tokens == cut
    on = model.generate([1, 2, 3], max_tokens=12, temperature=0, ignore_eos=True)
    assert (on.token_ids, on.finish_reason) == (free, "length")


def test_the_context_bounds_prompt_and_answer() -> None:
    model = Model(tiny_decoder(tiny_config()), context=10)
    with pytest.raises(ContextLengthError, match=r"11 tokens.*context length is 10") as caught:
        model.stream([1] * 11)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (11, 10)
    reply = model.generate([1] * 7, max_tokens=50, temperature=0)
    assert (len(reply.token_ids), reply.finish_reason) == (3, "length")
    assert len(model.generate([1] * 7, temperature=0).token_ids) == 3
    assert model.generate([1] * 10).token_ids == []
    assert model.generate([1], max_tokens=0).token_ids == []
    assert model.config.context_length == 128
    with pytest.raises(PunaError, match="context 129 is more than this model's context length of 128"):
        Model(tiny_decoder(tiny_config()), context=129)
    with pytest.raises(PunaError, match="context must be a whole number"):
        Model(tiny_decoder(tiny_config()), context=0)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 320], {}, "token id 320 at place 1 is outside this model's vocabulary (0 to 319)"),
        ([1, -1], {}, "token id -1 at place 1"),
        ([1, 2.5], {}, "token ids must be whole numbers; at place 1 stands 2.5"),
        (7, {}, "a prompt is text, messages, Inputs or a list of token ids, not int"),
        ("hello", {}, "a text prompt needs a tokenizer, and this checkpoint has none"),
        ([{"role": "user", "content": "hi"}], {}, "a chat needs a tokenizer"),
        ([1], {"stop": "x"}, "a stop string needs a tokenizer"),
        ([1], {"schema": {"type": "object"}}, "a schema needs a tokenizer"),
        ([1], {"tools": [{"type": "function"}]}, "tools need a chat"),
        ([1], {"logit_bias": {320: 1}}, "logit_bias names token 320"),
        ([1], {"temperature": -1}, "temperature must be at least 0"),
        ([1], {"key": ["mine"]}, "key must be text"),
        ([1], {"timeout": 0}, "timeout must be a number of seconds above 0, not 0"),
        ([1], {"timeout": 10**400}, "timeout must be a number of seconds above 0, not 1000"),
        ([1], {"priority": 0.5}, "priority must be a whole number"),
        (Inputs([1], torch.zeros(1, 3, 4, 4), [(1, 1)]), {}, "this model reads text only"),
    ],
)
def test_mistakes_are_named_before_any_work(model: Model, prompt: Any, options: dict, message: str) -> None:
    with pytest.raises(PunaError) as caught:
        model.stream(prompt, **options)
    assert message in str(caught.value)


def test_how_many_alternatives_is_checked_before_any_work(model: Model) -> None:
    for top in (-1, True, "3"):
        with pytest.raises(PunaError, match="top must be a whole number of alternatives from 0 on"):
            model.score([1, 2], top)  # type: ignore[arg-type]
    assert len(model.score([1, 2], 10**9)[1].top) == model.config.vocab_size  # type: ignore[union-attr]


def test_damaged_weights_are_reported_not_sampled() -> None:
    decoder = tiny_decoder(tiny_config())
    with torch.no_grad():
        decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(PunaError, match="not finite"):
        Model(decoder).generate([1], max_tokens=1)


def counting(monkeypatch: pytest.MonkeyPatch, before: Any = None) -> list[int]:
    """How many tokens each pass of any decoder has from now on."""
    passes: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        passes.append(ids.shape[1])
        if before:
            before()
        return forward(self, ids, *args, **options)

    monkeypatch.setattr(Decoder, "forward", counted)
    return passes


def until(condition: Any, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


def idle(model: Model) -> bool:
    stats = model.stats()
    return (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


def test_a_stream_closed_midway_does_no_more_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = threading.Semaphore(0)  # passes
    passes = counting(monkeypatch, before=lambda: allowed.acquire(timeout=60))

    def settled(most: int) -> None:
        """The pass that has perhaps begun is the last."""
        allowed.release()
        assert until(lambda: idle(model))
        while allowed.acquire(blocking=False):
            pass
        assert len(passes) <= most
        passes.clear()

    allowed.release(2)
    stream = model.stream([1, 2], max_tokens=100)
    pieces = [next(stream), next(stream)]
    stream.close()
    assert list(stream) == []
    settled(3)
    assert stream.reply is None
    assert [len(piece.token_ids) for piece in pieces] == [1, 1]
    allowed.release()
    with model.stream([1, 2], max_tokens=100) as stream:
        next(stream)
    settled(2)
    allowed.release()
    dropped = model.stream([1, 2], max_tokens=100)
    next(dropped)
    del dropped
    settled(2)  # a stream that nobody holds any more
    allowed.release(10)
    assert model.generate([1, 2], max_tokens=3).usage.completion_tokens == 3


def test_a_stream_can_be_closed_while_another_thread_waits_for_its_prompt(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LARGEST", 1)
    started, proceed = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        assert proceed.wait(10)

    passes = counting(monkeypatch, slow)
    stream = model.stream([1] * 50)
    pieces: list[Any] = []
    reader = threading.Thread(target=lambda: pieces.extend(stream))
    reader.start()
    assert started.wait(10)
    stream.close()
    reader.join(10)
    assert not reader.is_alive(), "told at once, before the pass is over"
    proceed.set()
    assert until(lambda: idle(model))
    assert (pieces, len(passes)) == ([], 1)


def test_an_unread_answer_waits_for_its_reader(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counting(monkeypatch)
    stream = model.stream([1, 2], max_tokens=126, temperature=0)
    assert until(lambda: len(passes) >= RUN_AHEAD)
    time.sleep(0.05)
    assert len(passes) == RUN_AHEAD
    assert model.generate([3], max_tokens=2).usage.completion_tokens == 2, "others go on"
    ids = [token for piece in stream for token in piece.token_ids]
    assert ids == model.generate([1, 2], max_tokens=126, temperature=0).token_ids


def test_two_threads_and_a_stream_left_open_get_the_answers_of_one(model: Model) -> None:
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    alone = [model.generate(p, max_tokens=25, temperature=0).token_ids for p in prompts]
    left_open = model.stream([4], max_tokens=50)
    next(left_open)
    found: dict[int, list[int]] = {}

    def work(at: int) -> None:
        found[at] = model.generate(prompts[at], max_tokens=25, temperature=0).token_ids

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [found[0], found[1]] == alone


def test_pieces_join_to_the_reply(talker: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "seed": 2, "logprobs": 1}
    pieces = list(talker.stream("The llama", **options))
    reply = pieces[-1].reply
    assert reply == talker.generate("The llama", **options)
    assert reply is not None
    assert "".join(piece.text for piece in pieces) == reply.text != ""
    assert [id for piece in pieces for id in piece.token_ids] == reply.token_ids
    assert [entry for piece in pieces for entry in piece.logprobs or ()] == reply.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reply.finish_reason]
    assert reply.text == talker.tokenizer.decode(reply.token_ids)  # type: ignore[union-attr]
    assert reply.logprobs is not None
    shown = [e.bytes or b"" for e in reply.logprobs if e.id not in talker.tokenizer.control_ids]  # type: ignore[union-attr]
    assert b"".join(shown).decode("utf-8", "replace") == reply.text


def test_text_gets_bos_once_and_ids_are_taken_as_they_are(talker: Model, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The llama")
    assert tokenizer.bos_id is not None
    with_bos = talker.generate([tokenizer.bos_id, *ids], max_tokens=8, temperature=0)
    assert talker.generate("The llama", max_tokens=8, temperature=0) == with_bos
    assert talker.generate(ids, max_tokens=1, temperature=0).usage.prompt_tokens == len(ids)
    spelled = talker.generate("<|begin_of_text|>x", max_tokens=0)
    assert spelled.usage.prompt_tokens == 1 + len(tokenizer.encode("<|begin_of_text|>x"))


def test_stop_strings_end_the_text_wherever_tokens_are_cut(talker: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    whole = talker.generate("The", **options)
    assert len(whole.text) > 20
    for start in range(2, 16):
        stop = whole.text[start : start + 4]
        pieces = list(talker.stream("The", stop=[stop, "never-there"], **options))
        reply = pieces[-1].reply
        assert reply is not None
        assert reply.text == whole.text[: whole.text.index(stop)]
        assert "".join(piece.text for piece in pieces) == reply.text
        assert reply.finish_reason == "stop"
        assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
        assert len(reply.token_ids) < len(whole.token_ids)


def test_messages_are_rendered_and_checked(talker: Model, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    inputs = talker.prepare(messages)
    assert list(inputs.token_ids) == tokenizer.render(messages)
    assert talker.generate(messages, max_tokens=5, temperature=0) == talker.generate(
        inputs, max_tokens=5, temperature=0
    )
    with pytest.raises(PunaError, match=r"messages\[0\] must be a dict with 'role'"):
        talker.generate([{"content": "x"}])
    with pytest.raises(PunaError, match="this model reads text only"):
        talker.generate([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


def forced(talker: Model, said: str | list[int]) -> Model:
    """The same model, but it says this and then ends, whatever it is asked."""
    assert talker.tokenizer is not None
    script = [*(talker.tokenizer.encode(said) if isinstance(said, str) else said), sorted(talker.stop_ids)[0]]

    class Scripted(Decoder):
        def forward(self, token_ids_1S: torch.Tensor, *args: Any, rows: torch.Tensor, **options: Any) -> torch.Tensor:
            logits = super().forward(token_ids_1S, *args, rows=rows, **options)
            state = self.__dict__.setdefault("said", iter(script))
            out = torch.full_like(logits, -50.0)
            if len(rows):  # else more of the prompt follows
                out[:, -1, next(state)] = 50.0
            return out

    return Model(Scripted(talker.config.with_(context_length=4096)), talker.tokenizer)


def test_tool_calls_leave_the_text_and_set_the_finish_reason(talker: Model) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
    ask = [{"role": "user", "content": "Weather in La Paz?"}]
    call = '[weather(city="La Paz")]'
    reply = forced(talker, call).generate(ask, tools=tools, temperature=0, max_tokens=200)
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("weather", {"city": "La Paz"})]
    assert (reply.text, reply.finish_reason) == ("", "tool_calls")
    between = forced(talker, "Let me see.\n" + call + "\n").generate(ask, tools=tools, temperature=0)
    assert (between.text.strip(), len(between.tool_calls), between.finish_reason) == ("Let me see.", 1, "tool_calls")
    plain = forced(talker, call).generate(ask, temperature=0)
    assert (plain.text, plain.tool_calls, plain.finish_reason) == (call, [], "stop")
    spoken = forced(talker, "It is cold.").generate(ask, tools=tools, temperature=0, max_tokens=200)
    assert (spoken.text, spoken.tool_calls, spoken.finish_reason) == ("It is cold.", [], "stop")


def test_control_tokens_around_a_call_reach_the_parser_but_no_reader(talker: Model, tokenizer: Tokenizer) -> None:
    marker = next((tokenizer.control[name] for name in MARKERS if name in tokenizer.control), None)
    if marker is None:
        pytest.skip("this vocabulary has no python markers")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    ask = [{"role": "user", "content": "Look."}]
    called = forced(talker, [*tokenizer.encode("Well. "), marker, *tokenizer.encode("look.call(q='x')")])
    reply = called.generate(ask, tools=tools, temperature=0)
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("look", {"q": "x"})]
    assert reply.text.strip() == "Well."
    code = forced(talker, [marker, *tokenizer.encode("print(1)")]).generate(ask, tools=tools, temperature=0)
    assert (code.text, code.tool_calls) == ("print(1)", [])


def test_defaults_of_a_checkpoint_are_used() -> None:
    model = Model(tiny_decoder(tiny_config()), defaults=Sampling(temperature=0))
    assert model.generate([3], max_tokens=5) == model.generate([3], max_tokens=5, temperature=0)


@pytest.mark.parametrize("file", ["folder", "model.gguf"])
def test_a_saved_model_samples_and_stops_as_before(file: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_ids[:1])
    Model(tiny_decoder(config), tokenizer).save(tmp_path / "first")
    settings = tmp_path / "first" / "generation_config.json"
    assert json.loads(settings.read_text())["eos_token_id"] == list(tokenizer.eos_ids)
    settings.write_text(json.dumps({"temperature": 0.75, "top_p": 0.5, "top_k": 7, "eos_token_id": tokenizer.eos_ids}))
    model = load(tmp_path / "first")
    model.save(tmp_path / file, format="gguf" if file.endswith("gguf") else "safetensors")
    again = load(tmp_path / file)
    assert again.stop_ids == model.stop_ids == set(tokenizer.eos_ids)
    assert again.defaults == model.defaults == Sampling(temperature=0.75, top_p=0.5, top_k=7)


def test_ids_of_numpy_and_torch_are_ids(model: Model) -> None:
    expected = model.logits([3, 4])
    for ids in (list(np.array([3, 4])), list(torch.tensor([3, 4])), np.array([3, 4], dtype=np.int32)):
        assert torch.equal(model.logits(ids), expected)
    for wrong in ([True], [1.0], [torch.tensor(0.5)], [[3, 4]], ["3"]):
        with pytest.raises(PunaError, match="whole numbers; at place 0"):
            model.logits(wrong)


def test_logprobs_may_be_a_switch(model: Model) -> None:
    assert model.generate([5], max_tokens=1, logprobs=False).logprobs is None
    entries = model.generate([5], max_tokens=2, logprobs=True).logprobs
    assert entries is not None
    assert [entry.top for entry in entries] == [(), ()]
