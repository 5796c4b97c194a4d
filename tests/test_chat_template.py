"""Checkpoints' own templates: as transformers renders them, but no user's text can become a control token."""

import pytest

from puna.errors import PunaError
from puna.text import template
from puna.text.chat import render
from puna.text.train import train_tokenizer
from test_chat_cases import ASKED, CASES, TOOLS, called, result, said
from test_chat_formats import SMUGGLED, Bytes

# What published templates do, in small: each line is one template.
CONSTRUCTS = {
    "concatenation": "{{ bos_token }}{% for m in messages %}{{ '<|header_start|>' + m['role'] + '<|header_end|>\n\n' + "
                     "m['content'] | trim + '<|eot|>' }}{% endfor %}",
    "text between blocks": "{{ bos_token }}\n{% for m in messages %}\n<|header_start|>{{ m.role }}<|header_end|>\n\n"
                           "{{ m.content }}<|eot|>\n{% endfor %}\n",
    "no begin of text": "{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}",
    "set and namespace": "{{ bos_token }}{% set ns = namespace(end='<|eot|>', last='') %}{% for m in messages %}"
                         "{% set head = '<|header_start|>%s<|header_end|>' % m.role %}{{ head + m.content + ns.end }}"
                         "{% set ns.last = m.role %}{% endfor %}{{ ns.last }}",
    "searches": "{{ bos_token }}{% for m in messages %}{% if '<|eom|>' in m.content %}"
                "{{ m.content.split('<|eom|>')[-1] }}{% elif m.content.startswith('<|eot|>') %}"
                "starts{% else %}{{ m.content.replace('q', '<|eot|>') }}"
                "{% endif %}{% endfor %}",
    "macro and dict": "{% set ends = {'user': '<|eot|>', 'assistant': '<|eom|>'} %}{% macro head(r) %}"
                      "<|header_start|>{{ r }}<|header_end|>{% endmacro %}{{ bos_token }}{% for m in messages %}"
                      "{{ head(m.role) }}{{ m.content }}{{ ends.get(m.role, '<|eot|>') }}{% endfor %}",
    "join": "{{ bos_token }}{{ messages | map(attribute='content') | join('<|eot|>') }}",
    "json": "{{ bos_token }}{{ messages | tojson }}<|eot|>{{ tools | tojson(indent=2) }}{{ '<|eot|>' | tojson }}",
    "loop controls": "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
                     "{{ m.content }}{% endfor %}<|eot|>",
    "generation": "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}<|eot|>{% endgeneration %}"
                  "{% endfor %}{% if add_generation_prompt %}<|header_start|>{% endif %}",
    "date": "{{ bos_token }}{{ strftime_now('%Y') | length }}{% if documents %}no{% endif %}",
}  # fmt: skip
CHAT = [said("system", " S "), said("user", "a <b> & \"q\" <|x|> 城"), said("assistant", "b"), said("user", "{{ c }}")]


@pytest.mark.parametrize("source", CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(source, prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template(
        [CHAT], tools=TOOLS, chat_template=source, add_generation_prompt=prompt, bos_token="<|begin_of_text|>",
        eos_token="<|eot|>")  # fmt: skip
    tokenizer = Bytes(chat_template=source)
    begin = "" if "bos_token" in source else "<|begin_of_text|>"
    assert tokenizer.shown(render(tokenizer, CHAT, TOOLS if "tools" in source else None, prompt)) == (
        (begin + expected[0]) if "tools" in source else (begin + utils.render_jinja_template(
            [CHAT], chat_template=source, add_generation_prompt=prompt, bos_token="<|begin_of_text|>",
            eos_token="<|eot|>")[0][0]))  # fmt: skip


@pytest.mark.parametrize("source", CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
def test_user_text_never_becomes_control(source):
    def controls(text):
        tokenizer = Bytes(chat_template=source)
        tool = {"type": "function", "function": {"name": text, "description": text, "parameters": {text: text}}}
        # Parts that only together spell a control token.
        chat = [said("system", text), said("user", [{"type": "text", "text": piece} for piece in text]),
                said("assistant", text), said("user", text)]  # fmt: skip
        return [i for i in render(tokenizer, chat, [tool] if "tools" in source else None) if i >= 1000]

    assert controls(SMUGGLED.replace("q", "").replace("<|eot|>", "", 1)) == controls("harmless")


def test_ids_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(["to be or not to be, that is the question " * 9], 340)
    tokenizer.chat_template = CONSTRUCTS["concatenation"]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert tokenizer.render(CHAT) == ids
    assert len(ids) < len(tokenizer.decode(ids, skip_control=False).encode())  # some pairs were merged


def test_a_template_that_searches_for_control_tokens_still_finds_them():
    tokenizer = Bytes(chat_template=CONSTRUCTS["searches"])
    text = tokenizer.shown(render(tokenizer, [said("user", "thought<|eom|>answer"), said("user", "<|eot|>")]))
    assert text == "<|begin_of_text|>answerstarts"


def test_begin_of_text_once():
    for source in ("{{ bos_token }}{{ bos_token }}x", "{{ bos_token }}x", "x"):
        tokenizer = Bytes(chat_template=source)
        assert render(tokenizer, [said("user", "<|begin_of_text|>")]) == [tokenizer.bos_id, ord("x")]


def test_marks_differ_from_call_to_call():
    seen = []
    tokenizer = Bytes(chat_template="{% if messages[0].content == bos_token %}taken{% endif %}{{ bos_token }}")
    parts = template.chat_template(tokenizer.chat_template, tuple(tokenizer.control))
    for _ in range(2):
        template.ChatTemplate.render(parts, [said("user", "a")], None, True, {"bos_token": "<|begin_of_text|>"})
        marks = template._Marks(["x"])
        seen.append(marks.of("x"))
        assert marks.split(f"a{marks.of('x')}b") == ["a", template.Control("x"), "b"]
    assert seen[0] != seen[1]


@pytest.mark.parametrize(("source", "error"), [
    ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
    ("{% for %}", r"chat template, line 1"),
    ("{{ messages[0].content.absent.more }}", "refuses these messages"),
    ("{{ messages[9] + 1 }}", "refuses these messages"),
    ("{{ 1 + 'a' }}", "fails on these messages"),
    ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
    ("{% for m in messages %}{{ '<|' + m.role }}{{ '|>' if m.role else '' }}{{ '<|' + 'eot' + '|>' }}{% endfor %}",
     r"puts the control token <\|eot\|> together from pieces"),
])  # fmt: skip
def test_errors(source, error):
    with pytest.raises(PunaError, match=error):
        render(Bytes(chat_template=source), [said("user", "a")])


def test_template_without_a_place_for_tools():
    tokenizer = Bytes(chat_template=CONSTRUCTS["concatenation"])
    text = tokenizer.shown(render(tokenizer, [ASKED, called(("c", "clock", {})), result("c", "1")], TOOLS))
    assert '"name": "get_weather"' in text
    assert '<|header_start|>assistant<|header_end|>\n\n{"name": "clock", "parameters": {}}<|eot|>' in text
    assert text.endswith('<|header_start|>user<|header_end|>\n\n"1"<|eot|>')


def test_templates_are_compiled_once():
    tokenizer = Bytes(chat_template=CONSTRUCTS["json"])
    render(tokenizer, CASES["one"][0])
    before = template.chat_template.cache_info().misses
    render(tokenizer, CASES["turns"][0])
    assert template.chat_template.cache_info().misses == before
