"""What the server refuses, what it says then, and what happens when a client hangs up."""

import threading
from typing import Any

import httpx
import openai
import pytest
import torch

from puna.server.app import create_app
from puna.server.worker import Worker
from puna.text.tokenizer import Tokenizer
from serving import CHAT, HELLO, NAME, PLAIN, SAID, WEATHER, Scripted, asked, busy, model, post, serving, wait_for

torch.set_num_threads(1)

USER = {"messages": HELLO}
MISTAKES: list[tuple[str, dict[str, Any], int, str | None, str | None, str]] = [
    # path, body, status, param, code, words
    (CHAT, {}, 400, "messages", "missing_required_parameter", "messages"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_value", "at least 1"),
    (CHAT, {**USER, "model": "gpt-9"}, 404, "model", "model_not_found", NAME),
    (CHAT, {**USER, "model": None}, 400, "model", "invalid_type", "string"),
    (CHAT, {**USER, "colour": "red"}, 400, "colour", "unknown_parameter", "Unrecognized request argument"),
    (CHAT, {**USER, "temperature": 3}, 400, "temperature", "invalid_value", "less than or equal to 2"),
    (CHAT, {**USER, "temperature": "hot"}, 400, "temperature", "invalid_value", "number"),
    (CHAT, {**USER, "top_p": 0}, 400, "top_p", "invalid_value", "greater than 0"),
    (CHAT, {**USER, "n": 0}, 400, "n", "invalid_value", "1"),
    (CHAT, {**USER, "max_tokens": 0}, 400, "max_tokens", "invalid_value", "1"),
    (CHAT, {**USER, "top_logprobs": 2}, 400, "top_logprobs", "invalid_value", "logprobs is true"),
    (CHAT, {**USER, "stream_options": {"include_usage": True}}, 400, None, None, "stream_options"),
    (CHAT, {**USER, "logit_bias": {"a": 1}}, 400, "logit_bias.a", None, "integer"),
    (CHAT, {**USER, "logit_bias": {"99999": 1}}, 400, None, None, "99999"),
    (CHAT, {**USER, "tool_choice": "required"}, 400, "tool_choice", "invalid_value", "tools"),
    (CHAT, {**USER, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "sun"}}}, 400,
     "tool_choice", "invalid_value", "sun"),
    (CHAT, {**USER, "response_format": {"type": "json_schema"}}, 400, "response_format.json_schema.schema",
     "missing_required_parameter", "schema"),
    (CHAT, {**USER, "min_tokens": 4}, 400, None, None, "min_tokens"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "invalid_value", "assistant"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "mood": 1}]}, 400, "messages[0].mood", "unknown_parameter",
     "mood"),
    (CHAT, {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, 400, "messages[0].content[0].type",
     "missing_required_parameter", "type"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_value", "content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, 400,
     "messages[0].content[0]", "invalid_value", "text only"),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]}, 400,
     "messages[1].tool_calls[0].function.arguments", "invalid_value", "not valid JSON"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 900}]}, 400, "messages", "context_length_exceeded",
     "maximum context length is 900 tokens"),
    (PLAIN, {"prompt": [5] * 900}, 400, "prompt", "context_length_exceeded", "has 900 tokens"),
    (PLAIN, {"prompt": [5] * 901}, 400, "prompt", "context_length_exceeded", "has 901 tokens"),
    (PLAIN, {"prompt": [[5] * 901], "echo": True, "logprobs": 1, "max_tokens": 0}, 400, "prompt",
     "context_length_exceeded", "has 901 tokens"),
    (PLAIN, {"prompt": []}, 400, "prompt", "invalid_value", "empty"),
    (PLAIN, {"prompt": [[]]}, 400, None, None, "empty"),
    (PLAIN, {"prompt": [5, "a"]}, 400, "prompt", "invalid_value", "token ids"),
    (PLAIN, {"prompt": [-1]}, 400, "prompt", "invalid_value", "token ids"),
    (PLAIN, {"prompt": None}, 400, "prompt", "invalid_value", "token ids"),
    (PLAIN, {"prompt": [99999]}, 400, None, None, "99999"),
    (PLAIN, {"prompt": "x", "best_of": 3}, 400, None, None, "best_of"),
    (PLAIN, {"prompt": "x", "suffix": "y"}, 400, "suffix", None, "suffix"),
    (PLAIN, {"prompt": "x", "logprobs": 99}, 400, "logprobs", "invalid_value", "20"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "param", "code", "words"), MISTAKES)
def test_mistakes_are_told_in_openais_shape(url: str, path: str, body: dict[str, Any], status: int, param: str | None,
                                            code: str | None, words: str, stream: bool) -> None:
    if "stream_options" in body and stream:
        pytest.skip("right when streaming")
    answer = post(url, path, **{**body, "stream": stream})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert error["param"] == param
    assert code in (None, error["code"])


@pytest.mark.parametrize(("body", "headers", "status", "code"), [
    (b'{"model": ', {"content-type": "application/json"}, 400, "invalid_json"),
    (b"[" * 100_000, {"content-type": "application/json"}, 400, "invalid_json"),
    (b"\xff\xfe\xfd", {"content-type": "application/json"}, 400, "invalid_json"),
    (b"[1]", {"content-type": "application/json"}, 400, "invalid_type"),
    (b"{}", {"content-type": "text/plain"}, 415, "unsupported_content_type"),
    (b"{}", {"content-type": "application/json", "host": "evil.example"}, 421, "wrong_host"),
    (b'{"model": "\\ud800", "prompt": "x"}', {"content-type": "application/json"}, 404, "model_not_found"),
    (b'{"model": "m", "prompt": "x", "temperature": NaN}', {"content-type": "application/json"}, 400, "invalid_value"),
])
def test_bad_bodies(url: str, body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_too_large_a_body_is_refused(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=b" " * (17 * 2**20),
                        headers={"content-type": "application/json"}, timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_unknown_routes_and_methods(url: str) -> None:
    missing, wrong = httpx.get(f"{url}/v2/nothing"), httpx.get(f"{url}/v1/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_supported")
    assert wrong.headers["allow"] == "POST"


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: wings"):
        client.chat.completions.create(model=NAME, messages=HELLO, extra_body={"wings": 2})


def test_a_fault_of_ours_is_a_500_without_its_secrets(client: openai.OpenAI, decoder: Scripted) -> None:
    decoder.say(SAID, fail_at=0)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=NAME, messages=HELLO)
    assert "secret" not in caught.value.response.text
    assert "Traceback" not in caught.value.response.text
    assert caught.value.response.json()["error"]["type"] == "server_error"


def test_an_error_amid_a_stream_is_told(client: openai.OpenAI, decoder: Scripted, url: str) -> None:
    decoder.say(SAID, fail_at=3)
    text = ""
    stream = client.chat.completions.create(model=NAME, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="The server had an error"):  # noqa: PT012 - the loop is what raises
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert SAID.startswith(text)
    assert text
    assert "[DONE]" not in post(url, CHAT, messages=HELLO, stream=True).text
    decoder.say(SAID)
    assert client.chat.completions.create(model=NAME, messages=HELLO).choices[0].message.content == SAID


def test_health_answers_while_the_model_works_on_requests_together(url: str, decoder: Scripted) -> None:
    decoder.say("llama " * 10, pause_at=2)
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(post(url, PLAIN, prompt="x", max_tokens=20)))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: busy(url) == 3)
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    assert decoder.calls <= 2, "the model is amid a pass"
    decoder.go_on.set()
    for thread in threads:
        thread.join()
    assert decoder.calls < 2 * 20, "three answers of 20 tokens"
    assert [a.json()["choices"][0]["text"] for a in answers] == [answers[0].json()["choices"][0]["text"]] * 3
    assert wait_for(lambda: busy(url) == 0)


def calls_when_done(url: str, decoder: Scripted) -> int:
    """Passes until a last short request is answered, whose one pass isn't counted."""
    decoder.go_on.set()
    assert post(url, PLAIN, prompt="x", max_tokens=1).status_code == 200
    return decoder.calls - 1


def test_hanging_up_amid_a_stream_stops_the_work(client: openai.OpenAI, decoder: Scripted, url: str) -> None:
    decoder.say("llama " * 60, pause_at=5)
    stream = client.chat.completions.create(model=NAME, messages=HELLO, stream=True)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    assert wait_for(lambda: busy(url) == 0), "it should leave at once, amid a pass"
    assert calls_when_done(url, decoder) <= 6, "the pass in progress is the last"


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_before_the_answer_drops_each_alone(url: str, decoder: Scripted, stream: bool) -> None:
    decoder.say("llama " * 60, pause_at=0)
    running = asked(url, prompt="x", max_tokens=100)
    assert wait_for(lambda: busy(url) == 1)
    another = asked(url, prompt="x", max_tokens=100, stream=stream)
    assert wait_for(lambda: busy(url) == 2)
    another.close()
    assert wait_for(lambda: busy(url) == 1), "it should leave at once, amid a pass"
    running.close()
    assert wait_for(lambda: busy(url) == 0)
    assert calls_when_done(url, decoder) <= 1, "the pass in progress is the last"


def test_hanging_up_amid_a_long_prompt_stops_the_work(url: str, decoder: Scripted,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.engine.pace.LARGEST", 1)
    decoder.say("Yes", pause_at=2)
    connection = asked(url, prompt=[5] * 100)
    assert wait_for(lambda: decoder.calls == 2)
    connection.close()
    assert wait_for(lambda: busy(url) == 0)
    assert calls_when_done(url, decoder) < 30


def test_too_many_waiting_requests_are_turned_away(decoder: Scripted, tokenizer: Tokenizer,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.server.app.Worker", lambda: Worker(limit=1))
    decoder.say("llama " * 20, pause_at=0)
    with serving(create_app(model(decoder, tokenizer), NAME)) as url:
        running = threading.Thread(target=lambda: post(url, PLAIN, prompt="x", max_tokens=30))
        running.start()
        assert wait_for(lambda: busy(url) == 1)
        refused = post(url, PLAIN, prompt="x")
        decoder.go_on.set()
        running.join()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
    assert refused.json()["error"]["type"] == "server_error"
