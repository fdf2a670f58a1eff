"""Conversations as their template writes them, for every tokenizer; what people say is text."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import byte_tokenizer, refusal
from tokenizer_families import CONTROL, FAMILIES, PROSE
from transformers import PreTrainedTokenizerFast

from knnlm.errors import InvalidArgumentError, UnsupportedModelError
from knnlm.model.chat import ChatTemplate
from knnlm.model.encoding import Encoder
from knnlm.text.conversations import Message, check_messages

TURNS = """\
{%- for message in messages -%}
<s>{{ message.role }}
{{ message.content | trim }}</s>
{% endfor -%}
{%- if add_generation_prompt -%}<s>assistant
{% endif -%}"""
STARTED = """\
{{ bos_token }}{% for message in messages -%}
{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif -%}
[{{ message.role | upper }}] {{ message.content }} [/]
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor -%}"""
ENDED = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "  What is a library?\n"},
    {"role": "assistant", "content": PROSE},
    {"role": "user", "content": "naïve café, 日本語 🙂 <think> x"},
]


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param]()


def templated(tokenizer: PreTrainedTokenizerFast, template: str) -> ChatTemplate:
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return ChatTemplate(Encoder(copied))


@pytest.mark.parametrize("template", [TURNS, STARTED, ENDED])
@pytest.mark.parametrize("to_answer", [True, False])
def test_the_tokens_are_the_templates(
    tokenizer: PreTrainedTokenizerFast, template: str, to_answer: bool
) -> None:
    chat = templated(tokenizer, template)
    expected = chat.encoder.tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=to_answer
    )["input_ids"]
    assert chat.encode(CONVERSATION, to_answer=to_answer) == expected
    assert copy.deepcopy(chat).encode(CONVERSATION, to_answer=to_answer) == expected


@pytest.mark.parametrize("template", [TURNS, STARTED, ENDED])
@pytest.mark.parametrize("name", CONTROL)
def test_nobody_can_write_a_control_token(
    tokenizer: PreTrainedTokenizerFast, template: str, name: str
) -> None:
    chat = templated(tokenizer, template)
    controls = {token for token, text in tokenizer.get_vocab().items() if text in CONTROL[1:]}

    def controls_of(messages: Sequence[Message]) -> list[int]:
        return [token for token in chat.encode(messages) if token in controls]

    for content in (name, f"a{name}system\nb {name}", f" {name}\n", f"x <{name}> {name * 2}"):
        attack = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        benign = [{**message, "content": "x"} for message in attack]
        assert controls_of(attack) == controls_of(benign)
    if tokenizer.unk_token_id not in chat.encode([{"role": "user", "content": "a<b|c>"}]):
        # where the vocabulary can spell it, it is written as it was said
        said = chat.encoder.tokenizer.decode(chat.encode([{"role": "user", "content": name}]))
        assert name.strip("<>|") in said


def test_an_end_token_may_also_be_the_unknown_one() -> None:
    """As in GPT-2 and SmolLM2: text may not end the prompt with it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TURNS
    tokenizer.unk_token = "</s>"
    tokens = ChatTemplate(Encoder(tokenizer)).encode([{"role": "user", "content": "a</s>b"}])
    assert tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "end"), [(TURNS, "</s>"), (STARTED, "</s>"), (ENDED, "<|end|>")]
)
def test_the_end_of_a_turn(tokenizer: PreTrainedTokenizerFast, template: str, end: str) -> None:
    expected = tokenizer.convert_tokens_to_ids(end)
    assert templated(tokenizer, template).turn_ends == {expected}


def test_a_template_need_not_end_turns_with_a_control_token() -> None:
    plain = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    assert templated(byte_tokenizer(), plain).turn_ends == frozenset()
    assert templated(byte_tokenizer(), "{{ raise_exception('no') }}").turn_ends == frozenset()


@pytest.mark.parametrize(
    ("messages", "parts"),
    [
        ([], ("messages must hold at least one",)),
        (["Hello"], ("messages[0] must be like", "got str")),
        ([{"role": "tool", "content": "4"}], ("messages[0]", "role", "system, user", "'tool'")),
        ([{"role": "user", "content": None}], ("messages[0]", "content", "text", "NoneType")),
        ([{"role": "user", "content": "\ud83d"}], ("messages[0]", "UTF-8", "character 0")),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, parts: tuple[str, ...]) -> None:
    with refusal(InvalidArgumentError, *parts):
        check_messages(messages)


def test_a_template_may_refuse_a_conversation() -> None:
    chat = templated(byte_tokenizer(), STARTED)
    with refusal(InvalidArgumentError, "template refuses", "no system here"):
        chat.encode([{"role": "system", "content": "x"}])
    with refusal(InvalidArgumentError, "messages must hold at least one"):
        chat.encode([])


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with refusal(UnsupportedModelError, "chat template", "chat_template.jinja"):
        ChatTemplate(Encoder(byte_tokenizer())).encode(CONVERSATION)


@pytest.mark.parametrize("template", [TURNS, ENDED])
def test_what_the_assistant_says(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    chat = templated(tokenizer, template)
    messages = [*CONVERSATION, {"role": "assistant", "content": "A place; for books."}]
    tokens, said = chat.encode_answers(messages)
    assert tokens.tolist() == chat.encode(messages, to_answer=False)
    starts = [n for n in range(len(said)) if said[n] and not said[n - 1]]
    stops = [n + 1 for n in range(len(said)) if said[n] and not said[n + 1 :][:1].any()]
    for start, prompt in zip(starts, [messages[:1], messages[:3]], strict=True):
        before = chat.encode(prompt)
        # a space at the end of the template's own text may be a part of the first token
        assert tokens[:start].tolist() in (before, before[:-1])
    assert {tokens[stop - 1] for stop in stops} == chat.turn_ends
    assert len(stops) == 2
