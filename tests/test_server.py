"""The server's answers, read by the official client."""

import json
import time
from typing import Any

import openai
import pytest
import torch

from puna.server.app import create_app
from puna.text.tokenizer import Tokenizer
from serving import CHAT, HELLO, NAME, SAID, WEATHER, Scripted, model, post, serving

torch.set_num_threads(1)


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == (NAME, "model", "puna")
    assert client.models.retrieve(NAME) == card
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/another")
    assert caught.value.code == "model_not_found"


def test_a_whole_chat(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HELLO)
    assert (answer.id[:9], answer.object, answer.model) == ("chatcmpl-", "chat.completion", NAME)
    assert abs(answer.created - time.time()) < 60
    assert answer.system_fingerprint
    assert answer.system_fingerprint.startswith("fp_")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.tool_calls) == ("assistant", SAID, None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.render(HELLO))
    assert answer.usage.completion_tokens == len(tokenizer.encode(SAID)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_has_openais_order(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=HELLO)
    chunks = list(client.chat.completions.create(
        model=NAME, messages=HELLO, stream=True, stream_options={"include_usage": True}))
    assert len({(c.id, c.created, c.object, c.model) for c in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(c.choices[0].delta.role is None and c.choices[0].finish_reason is None for c in middle)
    assert "".join(c.choices[0].delta.content or "" for c in middle) == SAID
    assert "\ufffd" not in "".join(c.choices[0].delta.content or "" for c in middle)
    assert len(middle) > 4
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert all(c.usage is None for c in chunks[:-1])


def test_a_stream_ends_with_done_and_tells_no_usage_unasked(url: str, decoder: Scripted) -> None:
    decoder.say("Yes")
    for path, extra in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "Hi"})):
        answer = post(url, path, stream=True, **extra)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: {") for event in events[:-2])
        assert "usage" not in answer.text


@pytest.mark.parametrize("stop", ["END", ["never", " END"], ["a", "b", "c", "d", "e", "grass."]])
def test_stop(client: openai.OpenAI, stop: Any) -> None:
    places = [SAID.find(one) for one in ([stop] if isinstance(stop, str) else stop)]
    expected = SAID[: min(at for at in places if at >= 0)]
    whole = client.chat.completions.create(model=NAME, messages=HELLO, stop=stop).choices[0]
    assert (whole.message.content, whole.finish_reason) == (expected, "stop")
    chunks = list(client.chat.completions.create(model=NAME, messages=HELLO, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    plain = client.completions.create(model=NAME, prompt="Hi", stop=stop, max_tokens=100).choices[0]
    assert (plain.text, plain.finish_reason) == (expected, "stop")


def test_max_tokens(client: openai.OpenAI) -> None:
    for extra in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 9}):
        answer = client.chat.completions.create(model=NAME, messages=HELLO, **extra)  # type: ignore[call-overload]
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    answer = client.completions.create(model=NAME, prompt="Hi")
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 16)


def test_vllms_extras_and_ignored_names_are_taken(client: openai.OpenAI) -> None:
    extra = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 40,
             "skip_special_tokens": True, "priority": 0}
    answer = client.chat.completions.create(
        model=NAME, messages=HELLO, max_tokens=50, user="me", metadata={"a": "b"}, store=False, top_p=0.5,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"5": -3}, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 50


def test_logit_bias_reaches_the_engine(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    token = tokenizer.encode("!")[0]
    answer = client.completions.create(model=NAME, prompt="Hi", max_tokens=3, logit_bias={str(token): 100})
    assert answer.choices[0].text == "!!!"


def test_chat_logprobs_spell_the_answer(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model=NAME, messages=HELLO, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    assert b"".join(bytes(e.bytes or []) for e in entries).decode() == SAID
    assert all(e.logprob == e.top_logprobs[0].logprob and e.logprob <= 0 for e in entries)
    assert {len(e.top_logprobs) for e in entries} == {2}
    chunks = client.chat.completions.create(model=NAME, messages=HELLO, logprobs=True, top_logprobs=2, stream=True)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert streamed == entries
    stopped = client.chat.completions.create(model=NAME, messages=HELLO, logprobs=True, stop=" grass").choices[0]
    assert stopped.logprobs is not None
    spelled = b"".join(bytes(e.bytes or []) for e in stopped.logprobs.content or []).decode()
    assert spelled == stopped.message.content == "The llama eats 🦙"


def test_n_and_seed(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    def texts(seed: int | None, n: int = 3, stream: bool = False) -> list[str]:
        asked: Any = {"model": NAME, "messages": HELLO, "n": n, "seed": seed, "temperature": 2.0, "max_tokens": 12,
                      "top_p": 1.0}
        if not stream:
            answer = client.chat.completions.create(**asked)
            assert [c.index for c in answer.choices] == list(range(n))
            assert answer.usage.prompt_tokens == len(tokenizer.render(HELLO))
            assert answer.usage.completion_tokens >= n
            return [c.message.content or "" for c in answer.choices]
        found = [""] * n
        for chunk in client.chat.completions.create(stream=True, **asked):
            found[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        return found

    one = texts(7)
    assert one == texts(7) == texts(7, stream=True) != texts(8)
    assert len(set(one)) == 3
    assert texts(None) != texts(None)


def test_tools_whole_and_streamed(client: openai.OpenAI, decoder: Scripted) -> None:
    decoder.say('[weather(city="Lima, \'Perú\'"), weather(city="世界")]')
    wanted = [("weather", {"city": "Lima, 'Perú'"}), ("weather", {"city": "世界"})]
    choice = client.chat.completions.create(model=NAME, messages=HELLO, tools=[WEATHER]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls: list[Any] = list(choice.message.tool_calls or [])
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == wanted
    assert {c.type for c in calls} == {"function"}
    assert len({c.id for c in calls}) == 2

    chunks = list(client.chat.completions.create(model=NAME, messages=HELLO, tools=[WEATHER], stream=True))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    heads = [d for d in deltas if d.id]
    assert [(d.index, d.type, d.function.name if d.function else None) for d in heads] == [
        (0, "function", "weather"), (1, "function", "weather")]
    for index, (_, arguments) in enumerate(wanted):
        text = "".join(d.function.arguments or "" for d in deltas if d.index == index and d.function)
        assert json.loads(text) == arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model=NAME, messages=HELLO, tools=[WEATHER]) as stream:
        helped = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [(c.function.name, json.loads(c.function.arguments)) for c in helped] == wanted

    only = client.chat.completions.create(model=NAME, messages=HELLO, tools=[WEATHER], parallel_tool_calls=False)
    assert len(only.choices[0].message.tool_calls or []) == 1

    # the result goes back
    decoder.say("It rains.")
    history = [*HELLO, choice.message, *({"role": "tool", "tool_call_id": c.id, "content": "rain"} for c in calls)]
    answer = client.chat.completions.create(model=NAME, messages=history, tools=[WEATHER])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("It rains.", "stop")


def test_tool_choice(client: openai.OpenAI, decoder: Scripted) -> None:
    decoder.say('[weather(city="Lima")]')
    none = client.chat.completions.create(model=NAME, messages=HELLO, tools=[WEATHER], tool_choice="none").choices[0]
    assert (none.message.tool_calls, none.message.content) == (None, '[weather(city="Lima")]')
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        decoder.say('{"name": "weather", "parameters": {"city": "Lima"}}')
        forced = client.chat.completions.create(
            model=NAME, messages=HELLO, tools=[WEATHER], tool_choice=choice)  # type: ignore[call-overload]
        assert forced.choices[0].finish_reason == "tool_calls"
        (call,) = forced.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Lima"})


def test_a_required_call_comes_whatever_the_model_wants_to_say(client: openai.OpenAI, decoder: Scripted) -> None:
    decoder.say("No, I will not.")
    tool: Any = {"type": "function", "function": {"name": "pick", "parameters": {
        "type": "object", "properties": {"animal": {"$ref": "#/$defs/Animal"}}, "required": ["animal"],
        "additionalProperties": False, "$defs": {"Animal": {"enum": ["llama"]}}}}}
    with client.chat.completions.stream(model=NAME, messages=HELLO, tools=[tool], tool_choice="required") as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("pick", {"animal": "llama"})
    clash: Any = {"type": "function", "function": {"name": "other", "parameters": {
        "type": "object", "$defs": {"Animal": {"enum": ["alpaca"]}}}}}
    with pytest.raises(openai.BadRequestError, match="differently"):
        client.chat.completions.create(model=NAME, messages=HELLO, tools=[tool, clash], tool_choice="required")


def test_a_schema_is_followed(client: openai.OpenAI, decoder: Scripted) -> None:
    schema = {"type": "object", "properties": {"legs": {"const": 4}}, "required": ["legs"],
              "additionalProperties": False}
    decoder.say("Never mind")
    answer = client.chat.completions.create(model=NAME, messages=HELLO, response_format={
        "type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}})
    assert json.loads(answer.choices[0].message.content or "") == {"legs": 4}
    plain = client.chat.completions.create(model=NAME, messages=HELLO, response_format={"type": "text"})
    assert plain.choices[0].message.content == "Never mind"


def test_text_parts_and_developer_messages(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    parts: Any = [{"role": "developer", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    answer = client.chat.completions.create(model=NAME, messages=parts)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.render([{"role": "system", "content": "Be brief."}, *HELLO]))


def test_completions_in_all_forms_of_prompt(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The llama")
    assert tokenizer.bos_id is not None
    for prompt, count, tokens in (("The llama", 1, len(ids) + 1), (["The llama", "Hi"], 2, None), (ids, 1, len(ids)),
                                  ([ids, ids[:1]], 2, len(ids) + 1)):
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=50)  # type: ignore[arg-type]
        assert (answer.id[:5], answer.object) == ("cmpl-", "text_completion")
        assert [(c.index, c.text, c.finish_reason, c.logprobs) for c in answer.choices] == [
            (i, SAID, "stop", None) for i in range(count)]
        assert answer.usage is not None
        assert tokens in (None, answer.usage.prompt_tokens)
        chunks = list(client.completions.create(
            model=NAME, prompt=prompt, max_tokens=50, stream=True,  # type: ignore[arg-type]
            stream_options={"include_usage": True}))
        for index in range(count):
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
            assert "".join(c.text for c in mine) == SAID
            assert [c.finish_reason for c in mine][-1] == "stop"
        assert (chunks[-1].choices, chunks[-1].usage) == ([], answer.usage)


def test_n_counts_choices_over_all_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=["a", "b"], n=2, best_of=2, echo=True, max_tokens=2)
    assert [(c.index, c.text[0]) for c in answer.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_as_lm_eval_asks(client: openai.OpenAI, tokenizer: Tokenizer, max_tokens: int) -> None:
    ids = [tokenizer.bos_id or 0, *tokenizer.encode("The llama 🦙 eats")]
    asked: Any = {"model": NAME, "prompt": [ids, ids[:3]], "temperature": 0, "max_tokens": max_tokens, "logprobs": 1,
                  "seed": 1234, "echo": True}
    answer = client.completions.create(**asked)
    assert [c.index for c in answer.choices] == [0, 1]
    for choice, prompt in zip(answer.choices, (ids, ids[:3]), strict=True):
        told: Any = choice.logprobs
        assert choice.text.startswith(tokenizer.decode(prompt))
        assert choice.finish_reason == "length"
        lists = (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset)
        assert {len(one) for one in lists} == {len(prompt) + max_tokens}
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        assert all(value <= 0 for value in told.token_logprobs[1:])
        assert all(told.tokens[i] in told.top_logprobs[i] for i in range(1, len(prompt)))
        assert all(told.token_logprobs[i] <= max(told.top_logprobs[i].values()) for i in range(1, len(prompt)))
        assert told.text_offset[0] == 0
        assert told.text_offset == sorted(told.text_offset)
        for name, at in zip(told.tokens[1:], told.text_offset[1:], strict=True):
            assert name.startswith("bytes:") or choice.text[at:].startswith(name)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids) + 3, 2 * max_tokens)
    parts = [c.choices[0] for c in client.completions.create(**asked, stream=True)]
    names = [name for part in parts if part.index == 0 and part.logprobs for name in part.logprobs.tokens or []]
    assert answer.choices[0].logprobs is not None
    assert names == answer.choices[0].logprobs.tokens


def test_token_ids_are_told_where_asked(client: openai.OpenAI, decoder: Scripted) -> None:
    extra = {"return_token_ids": True}
    answer: Any = client.completions.create(model=NAME, prompt=[5, 6], max_tokens=3, extra_body=extra)
    assert (answer.choices[0].prompt_token_ids, answer.choices[0].token_ids) == ([5, 6], decoder.script[:3])


def test_a_checkpoint_without_tokenizer_answers_ids(decoder: Scripted) -> None:
    decoder.say("Yes")
    with serving(create_app(model(decoder, None), NAME)) as url:
        asked: Any = {"prompt": [5, 6], "max_tokens": 2, "logprobs": 0, "echo": True, "return_token_ids": True}
        told = post(url, "completions", **asked).json()
        refused = post(url, CHAT, messages=HELLO)
    (choice,) = told["choices"]
    assert choice["token_ids"] == decoder.script[:2]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in (5, 6, *decoder.script[:2])]
    assert (refused.status_code, "tokenizer" in refused.json()["error"]["message"]) == (400, True)
