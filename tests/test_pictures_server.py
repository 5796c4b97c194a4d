"""Pictures over HTTP, asked by the official client: what is read, and what is refused by name."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest
import torch
from PIL import Image

from puna.errors import PunaError
from puna.server import images
from puna.server.app import LOOPBACK, create_app
from puna.server.images import Allowed
from serving import NAME, serving
from tiny_pictures import KINDS, asked, clip, image, model, png

torch.set_num_threads(1)


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def part(url: str, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def said(*parts: str | dict) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": one} if isinstance(one, str) else one
                                         for one in parts]}]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def llama(request):
    return model(request.param)


@pytest.fixture(scope="module")
def url(llama):
    with serving(create_app(llama, NAME, hosts=LOOPBACK)) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages, **options):
    options = {"model": NAME, "max_tokens": 8, "extra_body": {"ignore_eos": True}} | options
    return client.chat.completions.create(messages=messages, **options)


def told(client, messages) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, messages)
    assert found.value.type == "invalid_request_error"
    return found.value.body


def expected(llama, chat):
    return llama.generate(chat, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_by_data_url(llama, client, stream):
    """One, two, in a later turn: the model's own answer, with the pictures' tokens in usage."""
    one, two = png(1, 60, 20), png(2)
    first = said("What is", part(data(one), detail="auto"), "?")
    later = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"},
             *said(part(data(one)), part(data(two)), "which?")]  # fmt: skip
    for messages, chat in [
        (first, asked("What is", image(1, 60, 20), "?")),
        (later, [*later[:2], *asked(image(1, 60, 20), image(2), "which?")]),
        (said(part(data(one), detail="low"), "?"), None),
    ]:
        if stream:
            chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            usage = chunks[-1].usage
        else:
            answer = ask(client, messages)
            text, usage = answer.choices[0].message.content, answer.usage
        if chat is None:  # one tile
            small = llama.prepare([{"role": "user", "content": [
                {"type": "image", "image": one, "detail": "low"}, {"type": "text", "text": "?"}]}])  # fmt: skip
            assert list(small.grids) == [(1, 1)]
            chat = small
        reply = expected(llama, chat)
        assert (text, usage.prompt_tokens) == (reply.text, reply.usage.prompt_tokens)
        assert usage.completion_tokens == 8


def test_many_at_once_with_text_between(llama, client):
    chats = [asked(image(seed, 30 * seed, 20), "?") for seed in (1, 2, 3)] + [asked("no picture")] * 2
    sent = [said(part(data(png(seed, 30 * seed, 20))), "?") for seed in (1, 2, 3)] + [said("no picture")] * 2
    found = {}
    threads = [threading.Thread(target=lambda at=at: found.__setitem__(at, ask(client, sent[at % 5])))
               for at in range(10)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    answers = [found[at].choices[0].message.content for at in range(10)]
    assert answers == [expected(llama, chats[at % 5]).text for at in range(10)]


def test_several_answers_read_the_picture_once(llama, client):
    answer = ask(client, said(part(data(png(1))), "?"), n=3)
    assert [choice.message.content for choice in answer.choices] == [expected(llama, asked(image(1), "?")).text] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_clip_is_read_as_frames_and_says_so(llama, client, stream):
    video = {"type": "video_url", "video_url": {"url": data(clip(), "video/mp4")}}
    raw = client.chat.completions.with_raw_response.create(
        model=NAME, messages=said("What happens?", video), max_tokens=4, stream=stream)
    assert raw.headers["puna-notes"] == "messages[0].content[1].video_url.url: frames used 16 of 40"
    reply = raw.parse()
    if stream:
        list(reply)
    else:
        chat = [{"role": "user", "content": [{"type": "text", "text": "What happens?"},
                                             {"type": "video", "video": clip()}]}]  # fmt: skip
        inputs = llama.prepare(chat)
        assert reply.usage.prompt_tokens == len(inputs.token_ids)
        assert list(inputs.grids) == [(1, 1)] * 16
        shown = llama.tokenizer.decode(inputs.token_ids)
        assert "[0.1 s]" in shown
        assert "[4.8 s]" in shown
    few = {**video, "video_url": {**video["video_url"], "frames": 3}}
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=said(few), max_tokens=1)
    assert raw.headers["puna-notes"].endswith("frames used 3 of 40")


def big() -> bytes:
    """A small file of 90 megapixels."""
    file = io.BytesIO()
    Image.new("1", (30000, 3000)).save(file, "PNG")
    return file.getvalue()


GIF = io.BytesIO()
Image.new("RGB", (8, 8)).save(GIF, "GIF")


@pytest.mark.parametrize(("bad", "error"), [
    (part(data(b"hello, this is a text")), "content[1].image_url.url is text, not a picture; give PNG"),
    (part(data(png(1, 300, 300)[:200])), "content[1].image_url.url is cut off or damaged"),
    (part(data(b"")), "content[1].image_url.url is empty"),
    (part(data(big())), "content[1].image_url.url is 30000 x 3000 pixels, above the limit of 64,000,000"),
    (part(data(png(1), "text/html")), "content[1].image_url.url: its type is 'text/html', but image/..."),
    (part(data(png(1), "video/mp4")), "content[1].image_url.url: its type is 'video/mp4', but image/..."),
    (part("data:image/png,abc"), "content[1].image_url.url: the data URL must have ';base64,'"),
    (part("data:image/png;base64,a!c"), "content[1].image_url.url: not valid base64"),
    (part("llama.png"), "content[1].image_url.url: 'llama.png' is no data URL"),
    (part("file:///etc/passwd"), "content[1].image_url.url: this server reads no files"),
    (part("https://images.example.org/a.png"), "content[1].image_url.url: this server fetches no pictures from https:"),
    (part("http://127.0.0.1/a.png"), "content[1].image_url.url: 127.0.0.1 is a private, loopback or link-local"),
    (part("http://[::1]:8000/"), "content[1].image_url.url: ::1 is a private, loopback or link-local address"),
    (part("http://[::ffff:10.0.0.1]/"), "is a private, loopback or link-local address; nothing is fetched there"),
    (part("http://169.254.169.254/latest/meta-data"), "169.254.169.254 is a private, loopback or link-local address"),
    (part("http://user:secret@example.org/"), "only plain http(s) addresses are fetched"),
    (part(data(png(1)), detail="huge"), "content[1].image_url.detail: 'huge' is not supported; use low"),
    (part(data(png(1)), colour="red"), "content[1].image_url.colour: not known"),
    ({"type": "image_url"}, "content[1].image_url: missing; give a data URL"),
    ({"type": "image_url", "image_url": {}}, "content[1].image_url.url: missing"),
    ({"type": "image_url", "image_url": {"url": 7}}, "content[1].image_url.url: a text is needed"),
    ({"type": "image", "image": "/etc/passwd"}, "content[1].image: '/etc/passwd' is no data URL"),
    ({"type": "video_url", "video_url": {"url": data(b"no video", "video/mp4")}},
     "content[1].video_url.url is of no known video type"),
    ({"type": "video_url", "video_url": {"url": data(b"", "video/mp4"), "frames": 99}},
     "content[1].video_url.frames: a whole number from 1 to 48"),
    ({"type": "input_audio", "input_audio": {}}, "content[1].type: 'input_audio' is not supported"),
])  # fmt: skip
def test_refusals_name_the_part(client, bad, error):
    found = told(client, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}, *said("See", bad)])
    assert error in found["message"]
    assert found["message"].startswith("messages[2].content[1]")
    assert found["param"].startswith("messages[2].content[1]")
    assert "secret" not in found["message"]


def test_too_many_pictures(client):
    found = told(client, said(*[part(data(png(1)))] * 49))
    assert found["param"].startswith("messages[0].content[")
    assert "more than 48 pictures" in found["message"] or "tiles, more than the" in found["message"]


def test_only_the_user_shows_pictures(client):
    found = told(client, [{"role": "system", "content": [part(data(png(1)))]}, *said("Hi")])
    assert found["message"].startswith("messages[0].content[0]: only messages of the user show pictures")


# Where pictures may come from.


class Pictures(BaseHTTPRequestHandler):
    """/picture is one; /to/URL leads on; /endless sends for ever, /slow a little at a time; /packed is compressed; /no
    is not there."""

    def do_GET(self):
        if self.path == "/slow":
            self.slow()
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/no" else 200)
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            self.wfile.write(png(1))
            while self.path == "/endless":
                self.wfile.write(bytes(1 << 16))
        except OSError:
            pass  # whoever asked has had enough

    def slow(self):
        try:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            while True:
                self.wfile.write(b"X: y\r\n")
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@contextmanager
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(allowed: Allowed, url: str):
    (plain,) = allowed.read({"type": "image_url", "image_url": {"url": url}}, "messages[0].content[0]")
    assert plain["type"] == "image_url"
    return plain["image_url"]["url"]


def test_a_named_host_is_fetched_from(monkeypatch):
    monkeypatch.setattr(images, "BYTES", 1 << 18)
    with host() as here:
        allowed = Allowed([here])
        assert fetched(allowed, f"{here}/picture") == fetched(allowed, f"{here}/to//picture") == png(1)
        for path, error in [
            ("/no", "127.0.0.1 answers 404 instead of a picture"),
            ("/endless", "127.0.0.1 sends more than 262,144 bytes"),
            ("/packed", "127.0.0.1 packs its answer"),
            ("/to/" * 9, "more than 3 redirects"),
            ("/to/http://10.0.0.1/", "10.0.0.1 is a private, loopback or link-local address"),
            ("/to/http://localhost:1/", "this server fetches no pictures from http://localhost:1"),
            ("/to/file:///etc/passwd", "only plain http(s) addresses"),
        ]:
            with pytest.raises(PunaError) as found:
                fetched(allowed, here + path)
            assert error in str(found.value)
            assert str(found.value).startswith("messages[0].content[0].image_url.url: ")
        other = here.replace("127.0.0.1", "127.0.0.2")
        with pytest.raises(PunaError, match=r"127\.0\.0\.2 is a private, loopback"):
            fetched(allowed, f"{other}/picture")
    with pytest.raises(PunaError, match="can't be reached"):
        fetched(allowed, f"{here}/picture")


def test_a_host_that_sends_a_little_at_a_time_is_left(monkeypatch):
    monkeypatch.setattr(images, "SECONDS", 0.5)
    with host() as here, pytest.raises(PunaError, match=r"127\.0\.0\.1 can't be reached"):
        fetched(Allowed([here]), f"{here}/slow")


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0",
                                     "100.64.0.1", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
                                     "224.0.0.1", "2002:7f00:1::"])  # fmt: skip
def test_a_name_never_leads_to_a_private_address(monkeypatch, address):
    def lookup(host, port, **_):
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(images.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(images.socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    for places in (["https://*", "http://*"], ["http://images.example.org"]):
        with pytest.raises(PunaError, match=r"images\.example\.org is at .*, a private, loopback or link-local"):
            fetched(Allowed(places), "http://images.example.org/a.png")
    literal = f"[{address}]" if ":" in address else address
    with pytest.raises(PunaError, match="private, loopback or link-local address"):
        fetched(Allowed(["http://*"]), f"http://{literal}/a.png")


def test_the_address_that_was_checked_is_the_one_that_is_used(monkeypatch):
    """A name that leads elsewhere at its second look-up (DNS rebinding)."""
    looked_up = []

    def lookup(host, port, **_):
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14" if len(looked_up) == 1 else "127.0.0.1",
                                                             port))]  # fmt: skip

    def connect(address, **_):
        assert address == ("93.184.215.14", 80)
        raise OSError("no network here")

    monkeypatch.setattr(images.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(images.socket, "create_connection", connect)
    with pytest.raises(PunaError, match=r"images.example.org can't be reached \(no network here\)"):
        fetched(Allowed(["http://*"]), "http://images.example.org/a.png")
    assert looked_up == ["images.example.org"]


def test_other_ports_are_only_reached_by_name():
    with pytest.raises(PunaError, match=r"this server fetches no pictures from http://example\.org:22"):
        fetched(Allowed(["http://*"]), "http://example.org:22/")


def test_files_only_from_their_folder(tmp_path):
    inside, outside = tmp_path / "pictures", tmp_path / "secret.png"
    inside.mkdir()
    outside.write_bytes(png(2))
    (inside / "a b.png").write_bytes(png(1))
    (inside / "link.png").symlink_to(outside)
    (inside / "folder").mkdir()
    allowed = Allowed([str(inside)])
    assert fetched(allowed, (inside / "a b.png").as_uri()) == inside / "a b.png"
    for url, error in [
        (outside.as_uri(), "outside of the folders"),
        ((inside / "link.png").as_uri(), "outside of the folders"),
        (f"file://{inside}/../secret.png", "outside of the folders"),
        (f"file://{inside}/%2e%2e/secret.png", "outside of the folders"),
        ((inside / "none.png").as_uri(), "there is no such file"),
        ((inside / "folder").as_uri(), "there is no such file"),
        ("file://elsewhere/a.png", "a file URL with an absolute path is needed"),
        ("file:a.png", "a file URL with an absolute path is needed"),
        ("file:///a\0b", "outside of the folders"),
    ]:
        with pytest.raises(PunaError, match=error):
            fetched(allowed, url)


@pytest.mark.parametrize("place", ["/no/such/folder", "https://", "https://example.org/path", "https://a b"])
def test_places_that_are_none(place):
    with pytest.raises(PunaError, match="--images-from"):
        Allowed([place])
