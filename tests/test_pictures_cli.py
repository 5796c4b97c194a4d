"""`puna chat` and `puna generate` with pictures and videos in files."""

import json
from pathlib import Path

import pytest
import torch

import puna
from test_cli_generate import Puna, tiny_checkpoint
from tiny_pictures import KINDS, checkpoint_of, clip, png

torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch, capsys):
    return Puna(monkeypatch, capsys)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    return checkpoint_of(request.param, tmp_path_factory.mktemp("pictures") / request.param)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for seed, size in ((1, (60, 20)), (2, (28, 28))):
        (folder / f"{seed}.png").write_bytes(png(seed, *size))
    (folder / "text.png").write_text("hello, I am no picture")
    return folder


def shown(*paths: Path, text: str, kind: str = "image"):
    parts = [{"type": kind, kind: path} for path in paths]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_generate_about_pictures(checkpoint, files, run):
    options = ["--max-tokens", 8, "--temperature", 0, "--ignore-eos", "--json"]
    done = run("generate", checkpoint, "--image", files / "1.png", "--image", files / "2.png", "-p", "Which?", *options)
    reply = puna.load(checkpoint).generate([shown(files / "1.png", files / "2.png", text="Which?")], max_tokens=8,
                                           temperature=0, ignore_eos=True)  # fmt: skip
    record = json.loads(done.stdout)
    assert record["token_ids"] == reply.token_ids
    assert record["usage"]["prompt_tokens"] == reply.usage.prompt_tokens


def test_generate_about_a_video_says_what_was_used(checkpoint, files, run):
    (files / "clip.mp4").write_bytes(clip())
    done = run("generate", checkpoint, "--video", files / "clip.mp4", "-p", "What happens?", "-n", 4, "--json")
    assert f"{files / 'clip.mp4'}: frames used 16 of 40" in done.stderr
    asked = [shown(files / "clip.mp4", text="What happens?", kind="video")]
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == len(puna.load(checkpoint).prepare(asked).token_ids)


def test_a_chat_with_pictures_in_several_turns(checkpoint, files, run, tmp_path):
    target = tmp_path / "talk.json"
    lines = ["What is it?", "/image", f"/image {files / 'none.png'}", f"/image {files / 'text.png'}",
             f"/image {files / '2.png'}", "And this?", "No picture", f"/save {target}"]  # fmt: skip
    done = run("chat", checkpoint, "--image", files / "1.png", "-n", 8, "-t", 0, stdin="\n".join(lines) + "\n")
    llama, messages = puna.load(checkpoint), []
    for asked in (shown(files / "1.png", text="What is it?"), shown(files / "2.png", text="And this?"),
                  {"role": "user", "content": "No picture"}):  # fmt: skip
        reply = llama.generate([*messages, asked], max_tokens=8, temperature=0, repetition_penalty=1.1)
        messages += [asked, {"role": "assistant", "content": reply.text}]
        assert f"{reply.usage.prompt_tokens} tokens in, 8 out" in done.stderr
        assert reply.text.strip() in done.stdout
    for told in ("/image needs a file name, as in: /image llama.png", "none.png can't be read: No such file",
                 "text.png is text, not a picture", "2.png is shown with your next message."):  # fmt: skip
        assert told in done.stdout
    saved = json.loads(target.read_text())
    assert saved[0]["content"][0] == {"type": "image_url", "image_url": {"url": (files / "1.png").as_uri()}}
    assert [message["role"] for message in saved] == ["user", "assistant"] * 3


def test_what_is_wrong_is_told(files, run, tmp_path_factory):
    text_model = tiny_checkpoint(tmp_path_factory.mktemp("text") / "tiny")
    for command in (["generate", text_model, "-p", "x"], ["chat", text_model]):
        done = run(*command, "--image", files / "1.png", code=1)
        assert f"{files / '1.png'}: this model reads text only; leave the image out" in done.stderr + done.stdout
        done = run(*command, "--image", files / "none.png", code=1)
        assert f"{files / 'none.png'} can't be read: No such file" in done.stderr
        assert "needs" not in done.stderr  # nothing was loaded
    assert "--ids stands alone" in run("generate", text_model, "--ids", "1", "--image", files / "1.png", code=1).stderr
