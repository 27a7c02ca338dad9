"""Conversations: what the assistant says is learnt, and nothing that somebody wrote ends a turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import ConfigError, DataError, ModelError
from lora_cli.spec import ChatSpec, DecodeSpec
from lora_cli.tasks.chat import Chat
from lora_cli.tasks.sequences import IGNORED, TextExample
from tasks.readers import Reader, reader_like, rows_of

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|header|>' + message['role'] + '<|/header|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{% if message.role == 'user' or loop.last %}"
    "{{ '<|im_start|>' + message.role + ' ' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


def smollm2() -> Reader:
    reader = reader_like("gpt2", special=("<|im_start|>", "<|im_end|>"))
    reader.tokenizer.chat_template = SMOLLM2
    reader.tokenizer.eos_token = "<|im_end|>"
    return reader


def llama3() -> Reader:
    """A base tokenizer, whose end of text is not its template's end of a turn."""
    reader = reader_like("gpt2", special=("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>"))
    reader.tokenizer.chat_template = LLAMA3
    return reader


def task_of(template: str = "tokenizer", **values: object) -> Chat:
    return Chat(ChatSpec(name="t", template=template, **values))


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, contents, strict=False)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *turns]


TWO_TURNS = talk("Hi", "Hello", "Bye", "See you", system="Be kind")


def learnt(reader: Reader, example: TextExample) -> list[str]:
    """The texts that are learnt, one a stretch."""
    stretches: list[list[int]] = [[]]
    for label in example.labels:
        if label == IGNORED and stretches[-1]:
            stretches.append([])
        elif label != IGNORED:
            stretches[-1].append(label)
    return [reader.tokenizer.decode(stretch) for stretch in stretches if stretch]


def encoded(
    reader: Reader, messages: object, template: str = "tokenizer", **values: object
) -> tuple[TextExample, object]:
    found = task_of(template, **values).encode(rows_of({"messages": messages}), reader)
    ((example,), (query,)) = found.examples, found.queries
    return example, query


CHATML = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
LLAMA3_TEXT = "<|begin|><|header|>system<|/header|>\n\nBe kind<|eot|><|header|>user<|/header|>\n\nHi<|eot|>"
PLAIN = "System: Be kind\nUser: Hi\nAssistant: Hello<|endoftext|>\nUser: Bye\nAssistant: See you<|endoftext|>"


@pytest.mark.parametrize(
    ("reader", "template", "ends", "text"),
    [
        (smollm2(), "tokenizer", ["<|im_end|>", "<|im_end|>"], CHATML),
        (smollm2(), "chatml", ["<|im_end|>", "<|im_end|>"], CHATML),
        (llama3(), "tokenizer", ["<|eot|>", "<|eot|><|endoftext|>"], LLAMA3_TEXT),
        (
            reader_like("gpt2"),
            "chatml",
            ["<|endoftext|>", "<|endoftext|>"],
            CHATML.replace("<|im_end|>", "<|endoftext|>"),
        ),
        (reader_like("gpt2"), "plain", ["<|endoftext|>", "<|endoftext|>"], PLAIN),
    ],
    ids=["smollm2", "chatml-special", "llama3", "chatml", "plain"],
)
def test_every_answer_is_learnt_up_to_its_end_and_nothing_else(
    reader: Reader, template: str, ends: list[str], text: str
) -> None:
    example, query = encoded(reader, TWO_TURNS, template)
    assert learnt(reader, example) == [f"Hello{ends[0]}", f"See you{ends[1]}"]
    assert reader.tokenizer.decode(example.input_ids).startswith(text)
    assert example.labels[-1] == reader.eos
    assert query.references == ["See you"]
    assert example.input_ids[: query.num_tokens] == query.input_ids
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))


@pytest.mark.parametrize("reader", [smollm2(), llama3()], ids=["smollm2", "llama3"])
def test_a_tokenizers_own_template_is_tokenized_as_transformers_does(reader: Reader) -> None:
    _, query = encoded(reader, TWO_TURNS)
    expected = reader.tokenizer.apply_chat_template(TWO_TURNS[:-1], add_generation_prompt=True, return_dict=False)
    assert query.input_ids == expected
    assert query.text == reader.tokenizer.apply_chat_template(
        TWO_TURNS[:-1], add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_our_templates_begin_as_the_tokenizers_texts_do(template: str) -> None:
    reader = reader_like("llama")
    example, query = encoded(reader, TWO_TURNS, template)
    assert example.input_ids[0] == query.input_ids[0] == reader.tokenizer.bos_token_id
    assert example.input_ids[: query.num_tokens] == query.input_ids
    assert learnt(reader, example)[-1].startswith("See you")


written = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "a", "\n", "assistant", "{{ 1 }}", "<"]), max_size=8
).map("".join)


@pytest.mark.parametrize("template", ["tokenizer", "chatml"])
@settings(max_examples=40, deadline=None)
@given(written, st.text(st.characters(exclude_categories=["Cs"])))
def test_what_somebody_writes_ends_no_turn(template: str, asked: str, answer: str) -> None:
    reader = smollm2()
    messages = talk(asked, answer + asked, asked, "ok")
    example, query = encoded(reader, messages, template, max_length=100_000)
    special = [
        reader.tokenizer.decode(token) for token in example.input_ids if token in reader.tokenizer.all_special_ids
    ]
    turns = len(messages) + (template == "tokenizer")  # its own system prompt
    assert special == ["<|im_start|>", "<|im_end|>"] * turns
    assert asked in reader.tokenizer.decode(example.input_ids)
    assert asked in query.text
    assert len(learnt(reader, example)) == 2


def test_other_tools_names_are_understood() -> None:
    theirs = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert encoded(smollm2(), theirs) == encoded(smollm2(), talk("Hi", "Hello"))


def test_what_follows_the_last_answer_does_not_count() -> None:
    assert encoded(smollm2(), talk("Hi", "Hello", "Bye")) == encoded(smollm2(), talk("Hi", "Hello"))


def test_the_start_of_a_long_conversation_is_cut() -> None:
    reader = smollm2()
    whole, whole_query = encoded(reader, TWO_TURNS)
    task = task_of(max_length=20, decode=DecodeSpec(max_new_tokens=5))
    found = task.encode(rows_of({"messages": TWO_TURNS}), reader)
    assert found.num_truncated == 1
    assert found.examples[0].input_ids == whole.input_ids[-20:]
    assert found.examples[0].labels == [IGNORED, *whole.labels[-19:]]
    assert found.queries[0].input_ids == whole_query.input_ids[-20:]
    _, num_cut = task.encode_queries(rows_of({"messages": TWO_TURNS}, {"messages": talk("")}), reader)
    assert num_cut == sum(len(ids) > 20 for ids in (whole_query.input_ids, encoded(reader, talk("", ""))[1].input_ids))
    exact = task_of(max_length=whole_query.num_tokens)
    assert exact.encode_queries(rows_of({"messages": TWO_TURNS}), reader)[1] == 0
    right, _ = encoded(reader, TWO_TURNS, max_length=20, truncate="right")
    assert right.input_ids == whole.input_ids[:20]


def test_a_query_leaves_out_a_last_answer() -> None:
    task, reader = task_of(), smollm2()
    rows = rows_of({"messages": talk("Hi", "Hello")}, {"messages": talk("Hi")}, task.row_of("Hi"))
    queries, _ = task.encode_queries(rows, reader)
    assert queries[0].input_ids == queries[1].input_ids == queries[2].input_ids


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    reader = smollm2()
    reader.tokenizer.chat_template = FORGETFUL
    assert learnt(reader, encoded(reader, talk("Hi", "Hello"))[0]) == ["Hello<|im_end|>"]
    with pytest.raises(ModelError, match=r"rewrites earlier turns.*task\.template=chatml"):
        encoded(reader, TWO_TURNS)


def test_what_a_template_refuses_is_named() -> None:
    reader = smollm2()
    reader.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template refuses the conversation: no system role"):
        encoded(reader, TWO_TURNS)


def test_a_model_without_chat_template_and_an_encoder_decoder_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.template=tokenizer: .*chatml or plain"):
        encoded(reader_like("gpt2"), TWO_TURNS)
    with pytest.raises(ConfigError, match="conversations need a decoder"):
        encoded(reader_like("t5"), TWO_TURNS)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"mesages": []}, "no column (task.messages) 'messages'. Did you mean 'mesages'?"),
        ({"messages": "Hi"}, "column 'messages' is no list of {role, content}"),
        ({"messages": []}, "column 'messages' is no list of {role, content}"),
        ({"messages": ["Hi"]}, "column 'messages' is no list of {role, content}"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' is none of system, user, assistant"),
        ({"messages": [{"content": "x"}]}, "role 'None' is none of"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn of the user holds NoneType, not text"),
        ({"messages": talk("Hi")}, "the assistant says nothing"),
        ({"messages": talk("", "Hi")[1:]}, "the assistant speaks first"),
    ],
)
def test_what_is_no_conversation_is_named(row: dict, says: str) -> None:
    with pytest.raises(DataError) as caught:
        task_of().check(rows_of(row))
    assert str(caught.value).startswith("data.jsonl:1: ")
    assert says in str(caught.value)


def test_a_conversation_is_described_and_counted() -> None:
    task = task_of()
    found = task.encode(rows_of({"messages": talk("Hi", " ")}, {"messages": TWO_TURNS}), smollm2())
    assert (found.num_empty, found.num_truncated) == (1, 0)
    assert found.num_tokens == sum(len(example.input_ids) for example in found.examples)
    assert task.columns == task.all_columns == ("messages",)
    assert task.describe() == "messages → the assistant's turns"
    assert not task.generates
