"""Tests of scale/questions.py: the file, the judge, the task."""

import json
import time
import zlib
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="pip install transformers math-verify")
pytest.importorskip("math_verify", reason="pip install transformers math-verify")

import tokenizers
import torch
import transformers

from pr2_mini import Rollout
from scale.questions import DataError, Questions, clean, judge, read, read_questions
from test_pr2_mini import parametrize, table

SPECIAL = ["<pad>", "<eos>", "<user>", "<bot>", "<bos>", "<system>"]  # ids 0 to 5
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}<eot>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
VOCABULARY = 6 + 256 + 1  # the last is <eot>


def save_tokenizer(folder, template=TEMPLATE, single="<bos> $A", limits=False, **changes):
    """A tokenizer of bytes that writes <bos> before every text, and may store limits of length."""
    tokens = SPECIAL + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + ["<eot>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    if changes.pop("lower", False):
        inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", 4), ("<eos>", 1)]
    )
    if limits:
        inner.enable_truncation(max_length=9)
        inner.enable_padding(length=99, pad_id=0, pad_token="<pad>")
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    names["additional_special_tokens"] = [*SPECIAL, "<eot>"]
    names.update(changes)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def sums(count=40):
    return [{"question": f"What is {a} plus 1?", "answer": a + 1} for a in range(count)]


@pytest.fixture
def ask(tmp_path):
    """A function that makes Questions of rows, a tokenizer and settings."""

    def make(rows=None, system="", length=99, vocabulary=VOCABULARY, eos=None, **tokenizer):
        save_tokenizer(tmp_path, **tokenizer)
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or sums()))
        settings = {"checkpoint": str(tmp_path), "data": str(data), "system": system}
        config = SimpleNamespace(vocab_size=vocabulary, eos_token_id=eos)
        return Questions(SimpleNamespace(prompt_length=length, **settings), config)

    return make


# --------------------------------------------------------------------------------- The judge
# answer -> right responses -> wrong ones, and between the responses ¦
JUDGED = r"""
12 -> 12 ¦ 12.0 ¦ That makes $12.00 ¦ The answer is 12. ¦ 12 apples ¦ 7 + 5 = 12 ¦ \boxed{12} -> 13 ¦ 120
12 -> The answer is**12** ¦ so $12$ ¦ #### 12 ¦ **12** ¦ 12 dollars ¦ \[12\] ¦ **Answer:** 12 -> 1.2 ¦ -12 ¦ no idea ¦ ¦ 1, 12
12 -> 24/2 ¦ 3 x $4 = $12 ¦ 7 × 1 + 5 = 12 ¦ x = 12 ¦ 12, not 13 ¦ It is 12! ¦ it's 12 -> 12 or 13 ¦ It is not 12 ¦ 12x ¦ twelve
1,200 -> 1200 ¦ 1,200 ¦ $1,200.00 ¦ 1{,}200 ¦ 1\,200 ¦ 1.2e3 -> 1 ¦ 200 ¦ 1, 200 ¦ 1.2 ¦ (1,200)
1,200 -> 1,\!200 ¦ \boxed{1,200} ¦ \boxed{\$1,200.00} -> \{1,200\} ¦ \boxed{1, 200}
1e16 -> 1e16 ¦ 10000000000000000 ¦ 10^{16} ¦ 10^16 -> 1 ¦ 16 ¦ 1e15 ¦ 16e ¦ 10000000000000001
1e-05 -> 0.00001 ¦ 1e-5 ¦ 10^{-5} -> 0 ¦ 0.0 ¦ 1 ¦ -5 ¦ 1e-6
2^{10} -> 1024 ¦ 2^{10} ¦ 2^10 ¦ 2**10 -> 2 ¦ 10 ¦ 20 ¦ 210
3 1/2 -> 3 1/2 ¦ 3.5 ¦ 7/2 ¦ 3\frac12 ¦ x = 3 1/2 ¦ The answer is 3 1/2. ¦ 3 1/2 cups -> 31/2 ¦ 3/2 ¦ 3 ¦ 2 ¦ -3 1/2
-3 1/2 -> -3.5 ¦ -7/2 ¦ -3\frac{1}{2} ¦ −3 1/2 -> -5/2 ¦ 3.5 ¦ -31/2
3\frac{1}{2} -> 3.5 ¦ 7/2 ¦ 3 1/2 -> 1.5 ¦ 31/2
2x+1 -> 2x+1 ¦ 1 + 2x ¦ $2x+1$ ¦ \boxed{2x+1} ¦ y = 2x+1 ¦ 2*x+1 -> 2 ¦ 1 ¦ 2x ¦ 3 ¦ 2y+1
1, 2, 3 -> 1, 2, 3 ¦ 3,2,1 ¦ 1, 2 and 3 ¦ \{1, 2, 3\} ¦ so it is $1, 2, 3$ -> 1 ¦ 3 ¦ 1, 2 ¦ 123 ¦ 6
(3,4) -> (3,4) ¦ (3, 4) ¦ $(3,4)$ ¦ \left(3, 4\right) ¦ (x, y) = (3, 4) -> (4,3) ¦ 3 ¦ 7 ¦ [3,4] ¦ 34
\[\frac12\] -> 0.5 ¦ 1/2 ¦ \dfrac{1}{2} ¦ 50% -> 12 ¦ 1 ¦ 2 ¦ 0.2
−3 -> -3 ¦ −3 ¦ $-3$ ¦ The answer is −3. ¦ minus 3 ¦ Negative 3 degrees -> 3 ¦ 0 ¦ -33
3 -> 3 eggs -> 3 million ¦ 3 dozen eggs ¦ \boxed{3\text{ thousand}}
3 -> 5 minus 2 is 3 -> negative 3
x^2+1 -> x^2+1 ¦ x^{2} + 1 ¦ x**2+1 ¦ f(x) = x^2+1 -> x^2 ¦ 1 ¦ 2 ¦ x^2-1
yes -> yes ¦ Yes. ¦ \boxed{\text{Yes}} ¦ **yes** ¦ #### yes ¦ Yes! ¦ The answer is yes, because 2 > 1. -> no ¦ sey ¦ yes and no ¦ eyes ¦ not yes
no -> no ¦ No. ¦ The answer is no. -> I know ¦ yes ¦ on ¦ n ¦ none
A -> A ¦ (A) ¦ A. ¦ A) ¦ Answer: (A) ¦ The answer is (A) 12. -> A nice day, the answer is B ¦ B ¦ a ¦ A or B
(C) -> (C) ¦ C ¦ Answer: (C) ¦ \boxed{\text{C}} ¦ \boxed{\textbf{(C)}\ 12} -> C or D ¦ D ¦ c ¦ C is wrong, the answer is D
18 -> \boxed{18 \, \text{km}} ¦ \boxed{18\;\text{km}} -> \boxed{1\,\text{km}}
18 -> \boxed{18 \mathrm{~km}} ¦ \boxed{18\,\mathrm{cm}^2} -> \boxed{1\,\text{km}}
25% -> 25% ¦ 25\% ¦ 25 percent ¦ 25 ¦ 0.25 ¦ 1/4 -> 2.5 ¦ 0.25% ¦ 75%
12.5% -> 12.5% ¦ 12.5\% ¦ \boxed{12.5\%} ¦ 12.5 percent -> -12.5% ¦ 125%
12.5% -> 0.125 ¦ 1/8 -> 0.125% ¦ 12.5%, 20%
-5% -> -5% ¦ −5 percent ¦ -0.05 -> 5% ¦ 0.05 ¦ -0.5%
0.25 -> 1/4 ¦ 25% ¦ .25 -> 0.25% ¦ 25 ¦ 0.2500001
.5 -> 0.5 ¦ .5 ¦ 1/2 -> 5 ¦ 0.05
5,10,100 -> 5, 10, 100 ¦ 5,10,100 -> 5,10100 ¦ 115 ¦ 100
2\sqrt3 -> 2\sqrt{3} ¦ \sqrt{12} -> 2 ¦ 3 ¦ 6
x = 5 -> x = 5 ¦ 5 ¦ x=5 ¦ \boxed{x = 5} -> y = 5 ¦ x = 6 ¦ 6 ¦ x
2\pi -> 2\pi -> 2 ¦ \pi ¦ 2p
12345678901234567890 -> 12345678901234567890 -> 12345678901234567891 ¦ 1
We add. #### 12 -> 12 -> 13
"""  # noqa: E501, RUF001


@parametrize("case", JUDGED.strip().splitlines())
def test_what_a_response_earns(case):
    answer, right, wrong = case.split(" -> ")
    assert [r for r in right.split("¦") if judge(answer, r.strip()) != 1.0] == []
    assert [r for r in wrong.split("¦") if judge(answer, r.strip()) != 0.0] == []


MISREAD = r"5 km|12 apples|2 3|1:30|2516_8|0.\overline{3}|1/0|9^9^9|1/2x|2(3)|x2|(1|{|½||???|N+n"
MISREAD += "|3\u20135" + r"|\frac{1}{|1..2|2024-01-05|N = 5, M = 3|3x+2Y = 12|" + "7" * 501


@parametrize("answer", MISREAD.split("|"))
def test_answer_that_could_be_misread_is_refused(answer):
    with pytest.raises(DataError, match="cannot be read"):
        judge(answer, answer)


@table(
    ("responses", "reward"),
    ("<think>13</think>12|13</think>12|5+2=7\n7+5=12|The answer is 12.\nOr 7?", 1.0),
    ("#### 12\nI hope it helps|#### Sum\nThe answer is 12.", 1.0),
    (r"\boxed{7}, no, \boxed{12}|<answer>7</answer> or <answer>12</answer>", 1.0),
    ("<think>12|12<think>|<think>12</think>13|<think>12</think>|7+5=12\n5+2=7", 0.0),
    (r"\boxed{12}, no, \boxed{7}|\boxed{7} is not 12", 0.0),
)
def test_the_last_answer_counts_and_thoughts_do_not(responses, reward):
    for response in responses.split("|"):
        assert (response, judge("12", response)) == (response, reward)


HOSTILE = ["9^{9^9}", "9**9**9", "2^{1000000000}", "(10^9)!", r"3\frac{1}{0}", "1e999", "\ud800"]
HOSTILE += [r"\binom{20000}{10000}", r"12\binom{20000}{10000}"]  # of some 6000 digits
REPEATED = ["{", "x_", "answer ", r"\boxed{", "1 ", "\\text{", "not ", "1", "(", "<think>", "="]


@parametrize("response", [*HOSTILE, *(30000 * text for text in REPEATED)])
def test_hostile_response_earns_nothing_and_its_reading_ends(response):
    start = time.monotonic()
    assert judge("12", response) == 0.0
    assert time.monotonic() - start < 15  # three times two seconds, on a slow machine


# ---------------------------------------------------------------------------------- The file
@parametrize(
    ("written", "answer"),
    [('"We add.\\n#### 12"', "12"), ('" 12 "', "12"), ("12", "12"), ("0.1", "0.1"),
     ("-0.0", "-0.0"), ("1.50", "1.50"), ("1e16", "10000000000000000"), ("1e-05", "0.00001"),
     ("12345678901234567890", "12345678901234567890"), ("1E400", "1" + 400 * "0")],
)  # fmt: skip
def test_answer_is_what_follows_the_hashes_or_all_digits(written, answer, tmp_path):
    path = tmp_path / "one.jsonl"  # str.splitlines would break the question
    path.write_text(f'{{"question": "a\u2028b\x85", "answer": {written}}}\n\n\n', "utf-8")
    assert read_questions(str(path)) == [("a\u2028b\x85", answer)]


def row(question='"Why?"', answer="1"):
    return f'{{"question": {question}, "answer": {answer}}}'


BAD = [row(answer=text) for text in ("null", "true", "[1]", "{}", "NaN", "-Infinity", '""', '" "')]
BAD += [row(answer=text) for text in ('"####"', r'"\ud800"', "1e9999", "1e99999999999999999999")]
BAD += [row(question=text) for text in ("null", "[]", "5", '""', '" "', r'"\ud800"')]
BAD += ['{"question": "Why?"}', '{"answer": 1}', "[1, 2]", "3", "{"]


@parametrize("line", [*BAD, "", "\xff", 99999 * "["])
def test_bad_line_is_named_by_its_number(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{row()}\n{line}\n{row()}\n", "latin-1")
    with pytest.raises(DataError, match=f"line 2 of {path} is not .* mend or remove it"):
        read_questions(str(path))


# ---------------------------------------------------------------------------------- The task
@table(
    ("changes", "prompt"),
    ({}, "<bos><user>What is 0 plus 0?<bot>"),
    ({"system": "Think."}, "<bos><system>Think.<user>What is 0 plus 0?<bot>"),
    ({"template": None}, "<bos>What is 0 plus 0?\nAnswer:"),
    ({"template": None, "single": "<bos> $A <eos>"}, "<bos>What is 0 plus 0?\nAnswer:"),
)
def test_prompt_is_templated_or_plain(changes, prompt, ask):
    task = ask(limits=True, **changes)  # stored padding and truncation must not leak in
    assert task.tokenizer.decode(task.encode("What is 0 plus 0?")) == prompt


@parametrize(
    ("config", "generation", "ends"),
    [(None, None, (1, 262)), ([7, 8], None, (1, 7, 8, 262)), (1, [9, 1], (1, 9, 262))],
)
def test_every_end_token_ends_a_response(config, generation, ends, ask, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert ask(eos=config).eos == ends


def test_without_a_template_only_the_configured_ids_end_a_response(ask):
    assert ask(template=None, unk_token="A").eos == (1,)  # "A" also begins the plain "Answer:"


@table(
    ("changes", "pad"),
    ({}, 0), ({"pad_token": None}, 1), ({"pad_token": "<eos>"}, 1),
    ({"pad_token": "<bos>"}, 1),  # every prompt begins with it
    ({"pad_token": "<eot>", "vocabulary": 262, "template": None}, 1),  # the model has none
    ({"pad_token": "<bot>", "eos_token": "<bos>", "template": None}, 3),
    ({"pad_token": "<bos>", "eos_token": "<bos>", "template": None}, 0),
)  # fmt: skip
def test_padding_is_an_id_that_no_prompt_begins_or_ends_with(changes, pad, ask):
    assert ask(**changes).pad == pad


def test_what_is_left_out_is_counted_with_the_first_line(ask):
    rows = [*sums(), {"question": 30 * "long ", "answer": 1}, {"question": "Why?", "answer": "?"}]
    task = ask([*rows, {"question": "Who?", "answer": "5 km"}])
    assert task.left_out == {
        "prompts of more than 99 tokens": [41],
        "answers that cannot be read": [42, 43],
    }
    assert len(task.parts[True] + task.parts[False]) == 40
    assert task.longest == len(task.encode("What is 10 plus 1?"))


def test_an_eighth_is_held_out_and_never_trained_on(ask):
    task = ask(sums(100))
    generator = torch.Generator().manual_seed(0)
    held_out = {one.text for one in task.problems(999, generator, held_out=True)}
    training = {one.text for one in task.problems(9999, generator)}
    assert {zlib.crc32(text.encode()) % 8 for text in held_out} == {0}
    assert not training & held_out and len(training | held_out) == 100


@table(
    ("rows", "changes", "message"),
    ([], {"template": None, "system": "Think."}, "or its lack, drops 'Think.'"),
    ([], {"template": "<user>Hello<bot>"}, r"drops 'What is 0 plus 1\?'"),
    ([], {"template": "{{ raise_exception('no system') }}"}, "refuses: no system"),
    ([], {"eos": 999}, "the end of a response has the ids .* vocab_size 263"),
    ([], {"vocabulary": 100, "template": None}, "prompt .* below the model's vocab_size 100"),
    ([{"question": "WHAT is 3 plus 1?", "answer": 4}], {"lower": True}, "are one prompt"),
    ([], {"length": 5}, "0 questions to train on and 0 held out; add questions"),
)
def test_files_that_will_not_do_are_refused(rows, changes, message, ask):
    with pytest.raises(DataError, match=message):
        ask([*sums(), *rows], **changes)


def test_checksum_is_of_prompts_and_answers_and_of_nothing_else(ask):
    rows = sums()
    first = ask(rows).checksum
    assert first == ask(rows, length=60).checksum == 559950020  # in any process
    assert first != ask([*rows[:-1], {**rows[-1], "answer": 0}]).checksum
    assert first != ask(rows, system="Think.").checksum


def rewards(task, answers, texts):
    """Of a rollout whose responses are these texts, where <eos> ends them."""
    rows = [task.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    C = max(map(len, rows))
    tokens = torch.tensor([[7] + row + [0] * (C - len(row)) for row in rows])
    mask = torch.tensor([[column < len(row) for column in range(C)] for row in rows])
    ended = torch.tensor([row[-1] in task.eos for row in rows])
    rollout = Rollout(tokens, None, mask, None, None, ended)
    problems = [SimpleNamespace(gold=read(clean(answer))) for answer in answers]
    return task.rewards(problems, rollout).tolist()


def test_rewards_are_of_responses_that_ended_prompt_by_prompt(ask):
    texts = ["2<eos>", "2", "It is 3.<eot>", "2<eos>", "1<bot>2<eos>", "12<eos>"]
    assert rewards(ask(), ["2", "3", "12"], texts) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_template_may_open_the_thoughts(ask):
    task = ask(template=TEMPLATE.replace("<bot>", "<bot><think>\n"))
    assert rewards(task, ["2"], ["2<eos>", "3</think>2<eos>"]) == [0.0, 1.0]
