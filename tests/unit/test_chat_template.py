# SPDX-License-Identifier: Apache-2.0
"""Chat templates: equal to transformers where it is there, and harmless where the template is not."""

import json
import threading
import time
from datetime import datetime
from pathlib import Path

import packages
import pytest

from nemotron_fast.chat_template import ChatTemplate, ChatTemplateError, TemplateLimits, template_sources
from nemotron_fast.errors import RequestError
from nemotron_fast.template_limits import LimitError, check_call
from nemotron_fast.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "templates"
BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
USER = [{"role": "user", "content": "hi"}]
SMALL = TemplateLimits(value_chars=10_000, range_items=1000, steps=2000, seconds=1.0)

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é<&>"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "description": "<+>"}}]
CONVERSATIONS = {
    "user": [{"role": "user", "content": "  hi \n"}],
    "system": [{"role": "system", "content": " Be brief. "}, *USER],
    "no_think": [{"role": "system", "content": "Be brief./no_think"}, *USER],
    "past thoughts": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nhm </think> no\n</think>\n\n 2"},
        {"role": "user", "content": "2+2?"},
    ],
    "tools": [
        {"role": "user", "content": "1+é?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sum": 2}', "tool_call_id": "1"},
        {"role": "tool", "content": "3", "tool_call_id": "2"},
        {"role": "assistant", "content": "2"},
    ],
}


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def template(name: str, **options) -> ChatTemplate:
    return ChatTemplate(source(name), BOS, EOT, **options)


def render(text: str, messages=USER, limits: TemplateLimits = SMALL, **variables) -> str:
    return ChatTemplate(text, BOS, EOT, limits=limits).render(messages, **variables)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "with tools"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", ""])
@pytest.mark.parametrize("name", ["v1", "v1_5", "nano", "llama3"])
def test_equals_transformers(name, prompt, tools, conversation):
    reference = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    messages = CONVERSATIONS[conversation]
    arguments = {"tools": tools, "add_generation_prompt": prompt}
    tokens = {"bos_token": BOS, "eos_token": EOT}
    theirs, _ = reference([messages], chat_template=source(name), date_string="1 Jan", **arguments, **tokens)
    assert template(name).render(messages, date_string="1 Jan", **arguments) == theirs[0]


def test_smollm2_equals_transformers():
    reference = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    chat = Tokenizer.from_folder(packages.smollm2_tokenizer_folder()).chat_template
    for messages in CONVERSATIONS.values():
        theirs, _ = reference([messages], chat_template=chat.source, add_generation_prompt=True)
        assert chat.render(messages) == theirs[0]
    assert chat.render(USER).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_v1():
    head = f"{BOS}<|start_header_id|>system<|end_header_id|>\n\n"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    user = f"<|start_header_id|>user<|end_header_id|>\n\nhi{EOT}"
    chat = template("v1")
    assert chat.render(CONVERSATIONS["user"]) == head + EOT + user + assistant
    assert chat.render(CONVERSATIONS["system"], tools=TOOLS) == head + "Be brief." + EOT + user + assistant
    assert assistant + "2" + EOT in chat.render(CONVERSATIONS["past thoughts"])


def test_v1_5():
    head = f"{BOS}<|start_header_id|>system<|end_header_id|>\n\n"
    chat = template("v1_5")
    assert chat.render(CONVERSATIONS["system"]).startswith(f"{head} Be brief. \n\n{EOT}")
    assert chat.render(CONVERSATIONS["user"]).endswith("assistant<|end_header_id|>\n\n")
    off = chat.render(CONVERSATIONS["no_think"])
    assert off.startswith(f"{head}Be brief.\n\n{EOT}")
    assert off.endswith("assistant<|end_header_id|>\n\n<think>\n\n</think>\n\n")
    tools = chat.render(CONVERSATIONS["tools"], tools=TOOLS)
    assert f"<AVAILABLE_TOOLS>[{json.dumps(TOOLS[0]['function'])}]</AVAILABLE_TOOLS>" in tools
    assert '<TOOLCALL>[{"name": "add", "arguments": {"a": 1, "b": "é<&>"}}]</TOOLCALL>' in tools
    assert '<TOOL_RESPONSE>[{"sum": 2}, 3]</TOOL_RESPONSE>' in tools


def test_rendered_prompt_has_one_bos_when_encoded():
    tokenizer = Tokenizer.from_folder(packages.llama3_tokenizer_folder())
    ids = tokenizer.encode(template("v1").render(USER))
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    assert ids[-4:] == [128006, 78191, 128007, 271]


def test_indexing_after_calls():
    text = "{{ messages[-1].content.split(',')[-1].lstrip() }}|{{ (messages[0]['content']).split(',')[0][::-1] }}"
    assert render(text, [{"role": "user", "content": "ab, c"}]) == "c|ba"


def test_functions_of_the_environment():
    chat = ChatTemplate(
        "{{ strftime_now('%Y') }}{{ {'a': '<é>'} | tojson }}{{ bos_token }}{{ pad_token }}{{ unk_token }}",
        "<s>",
        special_tokens={"pad_token": "P"},
        now=lambda: datetime(2024, 7, 26),
    )
    assert chat.render(USER) == '2024{"a": "<é>"}<s>P'
    with pytest.raises(RequestError, match=r"refuses these messages: no such role$"):
        render("{{ raise_exception('no such role') }}")


def test_sha256():
    assert ChatTemplate("x").sha256 == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


def test_variables_are_an_allow_list():
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert ChatTemplate("{{ mood }}", extra_variables=["mood"]).render(USER, mood=1) == "1"
    for name in ("mood", "bos_token", "range"):
        with pytest.raises(RequestError, match=rf"variables \['{name}'\] cannot be set, only date_string, "):
            render("", **{name: 1})
    with pytest.raises(RequestError, match=r"variables.thinking holds object, want plain JSON"):
        render("", thinking=object())


def test_content_forms():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert render(text, [{"role": "user", "content": parts}, calls]) == "[a\nb][]"


@pytest.mark.parametrize(
    "messages, problem",
    [
        ("hi", "messages is str, want a list"),
        ({"role": "user", "content": "hi"}, "messages is dict, want a list"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is str, want a dict"),
        ([*USER, {"content": "hi"}], r"messages\[1\] has the role None"),
        ([{"role": "", "content": "hi"}], r"has the role ''"),
        ([{"role": "user"}], r"messages\[0\] \(user\) has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] has the type 'image_url': only text"),
        ([{"role": "user", "content": ["a"]}], r"content\[0\] is 'a', want \{'type': 'text'"),
        ([{"role": "user", "content": "a", "x": {1: 2}}], r"messages\[0\].x has the key 1"),
        ([{"role": "user", "content": "a", "x": [{"y": b""}]}], r"messages\[0\].x\[0\].y holds bytes"),
    ],
)
def test_bad_messages(messages, problem):
    with pytest.raises(RequestError, match=problem):
        render("", messages)


def test_deep_data_is_refused():
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="nested more than 64 levels"):
        render("", [{"role": "user", "content": "a", "x": deep}])


@pytest.mark.parametrize(
    "text, problem",
    [("{% if %}", "line 1"), ("\n\n{{ a | nope }}", "line 3: No filter named 'nope'"), ("x" * 10_001, "10001 char")],
)
def test_broken_templates(text, problem):
    with pytest.raises(ChatTemplateError, match=problem):
        ChatTemplate(text, limits=TemplateLimits(source_chars=10_000))


def test_very_deep_template():
    with pytest.raises(ChatTemplateError, match="cannot be compiled"):
        ChatTemplate("{{ " + "(" * 50_000 + " }}")


BIG = "{% set ns = namespace(x='aaaaaaaaaa') %}"
HOSTILE = {
    "nested loops": "{% for a in range(1000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}",
    "range": "{{ range(1001) | list | length }}",
    "range of a big step": "{{ range(0, 10 ** 9, 2) | length }}",
    "recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for a in range(1000) %}" + "x" * 50 + "{% endfor %}",
    "block": "{% set b %}{% for a in range(1000) %}" + "x" * 50 + "{% endfor %}{% endset %}{{ b | length }}",
    "plus": BIG + "{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "tilde": BIG + "{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "list plus": "{% set ns = namespace(x=[1]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "times": "{{ ('a' * 1000000000000) | length }}",
    "times from the left": "{{ (1000000000000 * [1]) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squaring": "{% set ns = namespace(x=9) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "ljust": "{{ 'a'.ljust(1000000000000) | length }}",
    "center": "{{ 'a' | center(1000000000000) | length }}",
    "expandtabs": "{{ ('\t' * 100).expandtabs(100000000) | length }}",
    "indent": "{{ ('\n' * 1000) | indent('x' * 1000) | length }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent filter": "{{ '%-1000000000s' | format('a') }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:>1000000000}'.format('a') }}",
    "format of a format": "{{ '{:>{}}'.format('a', 1000000000) }}",
    "format many": "{{ ('{0}' * 1000).format('x' * 1000) }}",
    "replace": "{{ ('a' * 9000).replace('a', 'b' * 9000) | length }}",
    "replace filter": "{{ ('a' * 9000) | replace('a', 'b' * 9000) | length }}",
    "join": "{{ (['a' * 1000] * 1000) | join | length }}",
    "join by": "{{ ('a' * 5000).join(['b'] * 5000) | length }}",
    "json indent": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "dict": "{{ dict.fromkeys(range(1000), 1) | list | length * 10 ** 4000 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_limits(name):
    start = time.process_time()
    with pytest.raises((ChatTemplateError, RequestError), match=r"beyond its limits|RecursionError"):
        render(HOSTILE[name])
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "name, inputs, size",
    [
        ("replace", ["aba", "a", "xyz"], 9),
        ("join", [["aa", 1], ", "], 7),
        ("join", [", ", ["aa", 1]], 7),
        ("join", ["abc"], 3),
        ("center", ["ab", 7], 9),
        ("indent", ["a\nb", "xx"], 7),
        ("format", ["%s-%s", "abc", 1], 11),
    ],
)
def test_sizes_are_bounded_before_the_call(name, inputs, size):
    check_call(name, inputs, limit=size)
    with pytest.raises(LimitError, match=f"of {size} items, at most {size - 1}"):
        check_call(name, inputs, limit=size - 1)


def test_deadline():
    slow = "{% for a in range(1000) %}{{ range(1000) | list | sum }}{% for b in range(99) %}{% endfor %}{% endfor %}"
    limits = TemplateLimits(seconds=0.05)
    with pytest.raises(ChatTemplateError, match=r"beyond its limits: more than 0\.05 s"):
        render(slow, limits=limits)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ ''['__class__'].x }}",
        "{{ '{0.__class__.__mro__}'.format('a') }}",
        "{{ ('' | attr('__class__')).x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__call__=1) }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_the_sandbox_holds(text):
    with pytest.raises(RequestError, match=r"the chat template (refuses|fails on) these messages"):
        render(text)


def test_a_template_cannot_change_the_messages():
    messages = [{"role": "user", "content": "hi", "x": [1]}]
    render("{% set _ = messages | map('upper') %}", messages)
    assert messages == [{"role": "user", "content": "hi", "x": [1]}]


def test_threads_share_a_template():
    chat = template("v1_5")
    expected = chat.render(CONVERSATIONS["tools"], tools=TOOLS)
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.extend(chat.render(CONVERSATIONS["tools"], tools=TOOLS) for _ in "x" * 20)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 80


def test_long_conversations_stay_within_the_limits():
    messages = [{"role": role, "content": "word " * 200} for _ in range(1000) for role in ("user", "assistant")]
    assert len(template("v1_5").render(messages)) > 2_000_000


def test_template_sources():
    assert template_sources(None) == {} and template_sources("a") == {"default": "a"}
    assert template_sources([{"name": "rag", "template": "r"}], "f") == {"rag": "r", "default": "f"}
    with pytest.raises(ChatTemplateError, match=r"chat_template in tokenizer_config\.json has 'rag'"):
        template_sources({"rag": "r"})
