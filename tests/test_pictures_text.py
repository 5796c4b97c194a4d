"""Pictures in a prompt: token by token as the reference processors write them, and never from what a user types."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.family.vision import LLAMA_4_VISION, Llama4Vision, Llama32Vision
from puna.text import template
from puna.text.chat import chat_parts, render
from puna.text.pictures import placeholders
from test_chat_cases import TOOLS, said
from test_chat_formats import Bytes

LLAMA_32 = Llama32Vision((3, 8))
SMALL = Llama4Vision(tile_side=28, patch_side=7)  # 4 tokens a tile
IMAGE = {"type": "image"}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
GRIDS = [(rows, columns) for rows in range(1, 17) for columns in range(1, 17) if rows * columns <= 16]
# As Llama 3.2 Vision's checkpoints have it, shortened.
VISION_32 = (
    "{{- bos_token }}{% for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if m['content'] is string %}{{- m['content'] }}{%- else %}{%- for c in m['content'] %}"
    "{%- if c['type'] == 'image' %}{{- '<|image|>' }}{%- elif c['type'] == 'text' %}{{- c['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def text(words):
    return {"type": "text", "text": words}


CHATS = {
    "picture first": ([said("user", [URL, text(" what is this? ")])], 1),
    "picture last": ([said("user", [text("what is this?\n"), IMAGE])], 1),
    "two, apart": ([said("user", [URL, text("and"), IMAGE, text("?")])], 2),
    "two, side by side": ([said("user", [URL, IMAGE, text("?")])], 2),
    "only pictures": ([said("user", [URL, IMAGE, URL])], 3),
    "a later turn": ([said("user", "Hello <|image|>"), said("assistant", "Yes"), said("user", [IMAGE, text("?")])], 1),
    "every turn": ([said("user", [IMAGE, text("a")]), said("assistant", "b"), said("user", [text("c"), IMAGE])], 2),
    "system": ([said("system", "Be brief"), said("user", [IMAGE, text("?")])], 1),
    "spelled out": ([said("user", [text("<|image|><|patch|>"), IMAGE, text("<|image_start|><|eot|>")])], 1),
    "none": ([said("user", "hello")], 0),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [144, 4])
def test_llama4_placeholders_equal_the_processors(tokens):
    reference = pytest.importorskip("transformers.models.llama4.processing_llama4").Llama4Processor
    vision = LLAMA_4_VISION if tokens == 144 else SMALL
    assert vision.tokens_per_tile == tokens
    for grid in GRIDS:
        names = placeholders(grid, vision)
        assert "".join(names) == reference._prompt_split_image(None, grid, tokens)
        tiles = grid[0] * grid[1]
        assert len(names) == (147 if tokens == 144 else 7) if tiles == 1 else 3 + tokens * (tiles + 1) + tiles


def test_llama32_placeholder_equals_the_processors():
    reference = pytest.importorskip("transformers.models.mllama.processing_mllama").MllamaProcessor
    processor = reference.__new__(reference)
    processor.image_token = "<|image|>"
    for grid in [(1, 1), (1, 4), (4, 1), (2, 2)]:
        assert "".join(placeholders(grid, LLAMA_32)) == processor.replace_image_token({}, 0)


@pytest.mark.parametrize(("messages", "pictures"), CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("own", [True, False], ids=["own format", "template"])
def test_llama4_chat_equals_the_processors(messages, pictures, own):
    """The processor's own template, whose every <|image|> it replaces by its own layout."""
    module = pytest.importorskip("transformers.models.llama4.processing_llama4")
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    grids = [(1, 1), (2, 3), (1, 2)][:pictures]
    plain = [{**m, "content": [IMAGE if p["type"] != "text" else p for p in m["content"]]}
             if isinstance(m["content"], list) else m for m in messages]  # fmt: skip
    (marked,), _ = utils.render_jinja_template(
        [[{**m, "content": _marked(m["content"])} for m in plain]], chat_template=module.chat_template,
        add_generation_prompt=True, bos_token="<|begin_of_text|>")  # fmt: skip
    pieces = marked.split("<|image|>")
    layouts = [module.Llama4Processor._prompt_split_image(None, grid, 4) for grid in grids]
    expected = "".join(a + b for a, b in zip(pieces, [*layouts, ""], strict=True)).replace("[image]", "<|image|>")
    tokenizer = Bytes(chat_template=None if own else module.chat_template)
    ids = render(tokenizer, messages, grids=grids, vision=SMALL)
    assert tokenizer.shown(ids) == expected
    assert ids.count(tokenizer.control["<|patch|>"]) == 4 * sum(r * c + (r * c > 1) for r, c in grids)
    assert ids.count(tokenizer.control["<|image|>"]) == pictures


def _marked(content):
    """A user's own <|image|> in other words, which the reference can't tell from a picture."""
    if isinstance(content, str):
        return content.replace("<|image|>", "[image]")
    return [{**part, "text": _marked(part["text"])} if "text" in part else part for part in content]


@pytest.mark.parametrize(("messages", "pictures"), CHATS.values(), ids=CHATS.keys())
def test_llama32_chat_equals_its_template(messages, pictures):
    if messages[0]["role"] == "system" or not pictures:
        pytest.skip("the shortened template has no system message")
    ours, template_ = Bytes("llama3.2"), Bytes("llama3.2", VISION_32)
    ids = [render(tokenizer, messages, grids=[(1, 1)] * pictures, vision=LLAMA_32) for tokenizer in (ours, template_)]
    assert ids[1].count(ours.control["<|image|>"]) == pictures
    assert ids[0] == ids[1]


def test_llama32_system_message_only_where_one_is_given(monkeypatch):
    monkeypatch.setattr(template, "strftime_now", lambda _: "09 Mar 2025")
    tokenizer = Bytes("llama3.2")
    asked = said("user", [IMAGE, text("?")])
    shown = tokenizer.shown(render(tokenizer, [asked], grids=[(1, 1)], vision=LLAMA_32))
    assert "system" not in shown
    shown = tokenizer.shown(render(tokenizer, [said("system", "Brief."), asked], grids=[(1, 1)], vision=LLAMA_32))
    assert shown.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date")


@pytest.mark.parametrize("generation", ["llama4", "llama3.2", "llama3"])
@settings(deadline=None, max_examples=40)
@given(words=st.lists(st.sampled_from(["<|image|>", "<|patch|>", "<|image_start|>", "<|im", "age|>", "a", " "]),
                      max_size=6), before=st.booleans())  # fmt: skip
def test_no_text_becomes_a_placeholder(generation, words, before):
    tokenizer = Bytes(generation)
    typed = text("".join(words))
    ids = render(tokenizer, [said("user", [typed, IMAGE] if before else [IMAGE, typed])], grids=[(1, 2)])
    plain = render(tokenizer, [said("user", [text("x"), IMAGE] if before else [IMAGE, text("x")])], grids=[(1, 2)])
    for name in ("<|image|>", "<|patch|>", "<|image_start|>"):
        if name in tokenizer.control:
            assert ids.count(tokenizer.control[name]) == plain.count(tokenizer.control[name])


@pytest.mark.parametrize("generation", ["llama4", "llama3.1"])
def test_tools_beside_pictures(generation):
    """Llama 4's own template writes such a message as Python's representation of a list: it isn't asked."""
    from_processor = pytest.importorskip("transformers.models.llama4.processing_llama4").chat_template
    for source in (None, from_processor) if generation == "llama4" else (None,):
        tokenizer = Bytes(generation, source)
        ids = render(tokenizer, [said("user", [IMAGE, text("?")])], TOOLS, grids=[(1, 1)])
        shown = tokenizer.shown(ids)
        assert shown.index("Given the following functions") < shown.index("<|image|>") < shown.index("?<|eot")


def test_results_of_tools_beside_pictures():
    template_ = ("{{ bos_token }}{% for m in messages %}{{ m.role }}:"
                 "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
                 "{% if c.type == 'image' %}<|image|>{% else %}{{ c.text }}{% endif %}"
                 "{% endfor %}{% endif %};{% endfor %}")  # fmt: skip
    tokenizer = Bytes("llama4", template_)
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [said("user", [IMAGE, text("a")]), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "red"}, said("user", [text("b"), IMAGE])]  # fmt: skip
    shown = "".join(part if isinstance(part, str) else part.name
                    for part in chat_parts(tokenizer, messages, read_picture=lambda *_: [IMAGE]))
    assert shown.endswith('user:"red"\n\nb<|image|>;')


def test_errors_name_the_field():
    tokenizer = Bytes()
    with pytest.raises(PunaError, match=r"^messages\[0\].content\[1\]: this model reads text only; leave the picture"):
        render(tokenizer, [said("user", [text("a"), URL])])
    with pytest.raises(PunaError, match=r"messages\[1\].content\[0\]: only messages of the user show pictures; this"):
        render(tokenizer, [said("user", "a"), said("assistant", [URL])], grids=[(1, 1)])
    with pytest.raises(PunaError, match=r"the chat has 2 pictures, of which its template shows 1; put"):
        render(tokenizer, [said("user", [URL])], grids=[(1, 1), (1, 1)])
    with pytest.raises(PunaError, match=r"the chat has 1 pictures, of which its template shows 0"):
        render(Bytes(chat_template="{{ messages[0].role }}"), [said("user", [URL, text("a")])], grids=[(1, 1)])
    with pytest.raises(PunaError, match=r"messages\[0\].content\[0\]: a video has to be read"):
        render(tokenizer, [said("user", [{"type": "video_url", "video_url": {"url": ""}}])], grids=[(1, 1)])
    with pytest.raises(PunaError, match=r"control token <\|image_start\|>, which this vocabulary lacks"):
        render(Bytes("llama3.2"), [said("user", [URL])], grids=[(1, 1)], vision=SMALL)
