"""Questions and answers of a JSON-lines file, GSM8K's format too, for a checkpoint with its own
tokenizer and chat template: the file, the judge, the task.

A text is read as words, or by math-verify as `$...$` if what that makes of it has just the numbers
and letters that are written. An answer in the file that cannot be read so is left out and counted,
not misjudged. A reward of your own goes into `Questions.rewards`."""

import json
import logging
import re
import zlib
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Rational, latex
from torch import Tensor

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every slow response
LONGEST = 500  # characters of an answer


class DataError(ValueError):
    """A mistake in a file that the command line names, in one sentence."""


# ------------------------------------------------------------------------------- 1. The file
def read_questions(path: str) -> list[tuple[str, str]]:
    """(question, answer) of each line: of an answer with #### what follows it, as in GSM8K, of a
    number all its digits. Only the last lines may be blank: pair n is of line n."""
    lines = Path(path).read_bytes().rstrip().split(b"\n")
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            # A float would lose digits. NaN stays one, and is refused.
            row = json.loads(line.decode("utf-8-sig"), parse_int=Decimal, parse_float=Decimal)
            pairs.append(checked(row["question"], row["answer"]))
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise DataError(
                f'line {number} of {path} is not {{"question": a text, "answer": a text or a '
                f"number of at most {LONGEST} digits}}; mend or remove it"
            ) from error
    return pairs


def checked(question, answer) -> tuple[str, str]:
    if isinstance(answer, Decimal) and abs(answer.adjusted()) < LONGEST:
        answer = format(answer, "f")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise TypeError
    answer = answer.rpartition("####")[2].strip()
    if not question.strip() or not answer:
        raise ValueError
    (question + answer).encode()  # a ValueError: "\ud800", half of a character, is no text
    return question, answer


# ------------------------------------------------------------------------------ 2. The judge
SECONDS = 2  # for math-verify, which stops itself by a signal: in a main thread only
SPELLINGS = [  # rewritten in this order, in answers and in responses
    ("\u2212", "-"),
    ("\u00d7", r"\\times "),
    (r"\\(?:left|right)(?![a-z])|\\?\$|\\[()\[\]!]", ""),  # also currency
    (r"\\(?:text|math)[a-z]*\s?\{([^{}]*)\}", r" \1 "),
    (r"\\?%|\s?\bpercent\b", r"\\%"),
    (r"(?<=[A-Za-z]{2})\*\*", " "),  # bold
    (r"(?<=\w)\*\*(?=\w)", "^"),
    (r"\*\*", ""),
    (r"(?i)(?<=\d)\s+(?:hundred|thousand|dozen|[mbtr]+illion)\b", "@"),  # in doubt, unlike a unit
    (r"(?i)\b(?:minus|negative)\s+(?=[\d.])", "-"),
    (r"\bnot\s+[-\d]\S*", ""),  # "12, not 13"
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\w.^/})])(\d+)\s?/\s?(\d+)(?!\w|\s?[\^/(\\]|\.\d)", r"\\frac{\1}{\2}"),
]
THOUSANDS = re.compile(  # of a box, but not of (1,200), [1,200] or {1,200}
    r"(?<![\d.,(\[])(?:(?<!\{)|(?<=\\boxed\{))\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+(?!,?\d)"
)
FRACTION = re.compile(r"(?<![\w.^])(\d*)\s?\\frac\{(\d+)\}\{(0*[1-9]\d*)\}")  # 3 1/2 is one, too
PERCENT = re.compile(r"(-?(?:\d+|\\frac\{\d+\}\{\d+\}))\s?\\%")
NUMBER = re.compile(r"(?<![\w.])(\d*\.?\d+(?:[eE][+-]?\d{1,3}(?!\w))?)")
WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[\s'.,-]+[^\W\d_]+)*")
DOUBTFUL = re.compile(
    r"[^\w\s+*/^=<>(){}\[\]|,\\%-]|[^\x00-\x7f]"  # no mathematics
    r"|(?<![\\A-Za-z])[A-Za-z][A-Za-z\d]|\d\s+\d"  # km, x2, 2 3
    r"|/\s?\d+\s?[A-Za-z(\\]|\^\s?\w+\s?\^"  # 1/2x, 9^9^9
    r"|^\d+(?:-\d+)+$|\d/\d+/"  # a range or a date
)
SYMBOL = re.compile(r"\d+|(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
MARK = re.compile(
    r".*(?:<answer>|\banswer\b[^.:\n]{0,80}?(?:\bis\b|:))[\s:]*(?:option\s)?(.*)", re.I | re.S
)
SENTENCE_END = re.compile(r"\n|</|[.?!](?=\s|$)|[,;]?\s(?:because|since|but)\b")
OPTION = re.compile(r"^\s*\(?([A-Z])[).:]+\s(?!.*\bor\b)")  # (C) 12
PROSE = re.compile(  # what stands between the formulas of a text
    r"(?<![\\A-Za-z])(?!(?:and|or)\b)[A-Za-z]+['\u2019]?[A-Za-z]+|\([A-Z]\)|[.?!:;](?=\s|$)|\n"
)


def judge(answer: str, response: str) -> float:
    """1.0 where a response gives the answer, else 0.0. Of the response counts what follows its
    thoughts and the last ####, and of that the last \\boxed{}, else the last "answer is", else the
    last line or the last formula. An answer that cannot be read is a DataError."""
    gold = read(clean(answer))
    if not gold:
        raise DataError(f"answer {answer!r} cannot be read; expected a number, LaTeX or words")
    return float(is_right(gold, response))


def is_right(gold: list, response: str) -> bool:
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return False  # endless thoughts
    readings = map(read, final_texts(clean(text)))
    return any(verify(gold, reading, timeout_seconds=SECONDS) for reading in readings)


def clean(text: str) -> str:
    text = text.rpartition("####")[2]
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    return THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)


def final_texts(text: str) -> list[str]:
    """What a response gives as its answer: as it stands, the formula in it, an option's letter."""
    _, box, rest = text.rpartition("\\boxed{")
    mark = MARK.match(text)
    if box:
        # It ends with the first brace that closes more than has been opened.
        ends = (i for i in range(len(rest) + 1) if rest[:i].count("}") > rest[:i].count("{"))
        text = rest[: next(ends, 1) - 1]
    elif mark:
        text = SENTENCE_END.split(mark[1].strip(), maxsplit=1)[0]
    formulas = [part for part in PROSE.split(text) if re.search(r"[\d\\+=]", part)]
    nearest = formulas[:1] if box or mark else formulas[-1:]
    # Of 3 x $4 = $12 the result can be read.
    nearest = [part if read(part) else part.rpartition("=")[2] for part in nearest]
    if box or mark:
        return [text, *nearest, *OPTION.findall(text)]
    return [text.strip().rpartition("\n")[2].rstrip("!"), *nearest]


def read(text: str) -> list:
    """The words that a text is, or the mathematics; [] if it is neither, or in doubt."""
    text = text.strip(" \n*,:;=\"'").rstrip(" .,~\\")
    if len(text) > LONGEST:
        return []
    letter = re.fullmatch(r"\(?([A-Za-z])[).]*", text)
    if letter:
        return [letter[1]]
    if WORDS.fullmatch(text):
        return [" ".join(text.split()).casefold()]
    text = re.sub(r",?\s(?:and|or)\s", ", ", text)
    # Exactly, and without a point.
    text = FRACTION.sub(
        lambda m: latex(Rational(m[1] or 0) + Rational(m[2]) / Rational(m[3])), text
    )
    text = NUMBER.sub(lambda m: latex(Rational(m[1])), text)
    if not DOUBTFUL.search(text):
        config = [LatexExtractionConfig()]
        percent = PERCENT.fullmatch(text)  # of 25/2 it can be read behind the formula only
        formula = f"${percent[1]}$\\%" if percent else f"${text}$"
        values = parse(formula, config, fallback_mode="no_fallback", parsing_timeout=SECONDS)
        # math-verify makes something of anything: "2 3" is 5 to it, and 12 km is 12.
        try:
            made = re.sub(r"\*\(?1/100\)?", "", str(values[:1]))  # of a percent
        except ValueError:  # Python writes no number of more than 4300 digits
            return []
        if set(SYMBOL.findall(text)) == set(SYMBOL.findall(made)):
            return values[:1]
    return []


# ------------------------------------------------------------------------------- 3. The task
PLAIN = "{{ messages[-1]['content'] }}\nAnswer:"  # for a tokenizer without a chat template


class Question(NamedTuple):
    text: str
    gold: list  # what its answer says: see `read`
    ids: list[int]  # of its prompt


class Questions:
    """An eighth of the questions, by checksum, is never trained on."""

    def __init__(self, settings, hf_config):
        """settings: checkpoint, data, system and prompt_length; hf_config: the checkpoint's."""
        pairs = read_questions(settings.data)
        self.system = settings.system
        self.known = range(hf_config.vocab_size)
        generation = Path(settings.checkpoint, "generation_config.json")
        ends = [getattr(hf_config, "eos_token_id", None)]
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                settings.checkpoint, trust_remote_code=False, local_files_only=True
            )
            if generation.exists():
                ends.append(json.loads(generation.read_text()).get("eos_token_id"))
        except Exception as error:  # of any type: transformers', and of what it calls
            raise DataError(
                f"the tokenizer or generation_config.json in {settings.checkpoint} cannot be read: "
                f"{error}"
            ) from error
        self.templated = self.tokenizer.chat_template is not None
        if not self.templated:
            self.tokenizer.chat_template = PLAIN
        self.eos = self.end_tokens(ends)
        thinks = self.prompt("?").rstrip().endswith("<think>")
        self.opening = "<think>" if thinks else ""  # of all responses
        self.checksum = 0  # of all prompts and answers: a run goes on with the same ones only
        self.parts = {True: [], False: []}  # held out or not
        self.left_out = defaultdict(list)  # numbers of lines, by reason
        texts = {}  # by ids
        for line, (text, answer) in enumerate(pairs, start=1):
            question = Question(text, read(clean(answer)), self.encode(text))
            self.checksum = zlib.crc32(repr((question.ids, answer)).encode(), self.checksum)
            other = texts.setdefault(tuple(question.ids), text)
            if other.strip() != text.strip():
                raise DataError(
                    f"to the tokenizer {other[:80]!r} and {text[:80]!r} (line {line}) are one "
                    "prompt; remove one of them"
                )
            if not question.gold:
                self.left_out["answers that cannot be read"].append(line)
            elif len(question.ids) > settings.prompt_length:
                self.left_out[f"prompts of more than {settings.prompt_length} tokens"].append(line)
            else:
                self.parts[zlib.crc32(text.strip().encode()) % 8 == 0].append(question)
        if not self.parts[True] or not self.parts[False]:
            omissions = "; ".join(self.omissions()) or "none was left out"
            raise DataError(
                f"{settings.data} has {len(self.parts[False])} questions to train on and "
                f"{len(self.parts[True])} held out; add questions ({omissions})"
            )
        prompts = [question.ids for part in self.parts.values() for question in part]
        self.longest = max(map(len, prompts))
        # No prompt begins or ends with padding, so that one can tell where it ends.
        taken = {ids[place] for ids in prompts for place in (0, -1)}
        tokens = [self.tokenizer.pad_token_id, *self.eos, *self.known]
        self.pad = next(token for token in tokens if token in self.known and token not in taken)

    def omissions(self) -> list[str]:
        """A line for each reason why questions were left out."""
        reasons = self.left_out.items()
        return [f"left out: {len(n)} {reason}, the first in line {n[0]}" for reason, n in reasons]

    def prompt(self, question: str, *answer: str) -> str:
        """A question, or a question and its answer, as the chat template writes it."""
        messages = [{"role": "user", "content": question}]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        messages += [{"role": "assistant", "content": text} for text in answer]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not answer
            )
        except Exception as error:  # of any type: the template is a program
            raise DataError(f"the checkpoint's chat template refuses: {error}") from error

    def encode(self, question: str) -> list[int]:
        """The ids of a prompt."""
        text = self.prompt(question)
        for part in (question, self.system):
            if part.strip() not in text:
                raise DataError(
                    f"the chat template, or its lack, drops {part[:80]!r} from {text[:80]!r}; give "
                    "the checkpoint one that has the messages in it"
                )
        # The template writes the special tokens itself: no second bos.
        options = {"add_special_tokens": not self.templated, "padding": False, "truncation": False}
        ids = self.tokenizer.encode(text, **options)
        # Some tokenizers end every text, even an empty one; here a response is to follow.
        if ids[-1:] == self.tokenizer.encode("", **options)[-1:]:
            ids = ids[:-1]
        self.check(ids, f"prompt {text[:80]!r}")
        return ids

    def check(self, ids, name: str) -> None:
        wrong = [token for token in ids if token not in self.known]
        if wrong or not ids:
            expected = f"expected some below the model's vocab_size {len(self.known)}"
            raise DataError(f"{name} has the ids {wrong[:3]}; {expected}: take its own tokenizer")

    def end_tokens(self, configured: list) -> tuple[int, ...]:
        """Every id that ends a response: the tokenizer's, those of config.json and
        generation_config.json, and what the chat template writes after an assistant's turn."""
        ends = {self.tokenizer.eos_token_id}
        for ids in configured:
            ends.update(ids if isinstance(ids, list) else [ids])
        chat = self.prompt("Six times seven?", "Forty-two.")
        after = chat.partition("Forty-two.")[2] if self.templated else ""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        ids = self.tokenizer.encode(after, add_special_tokens=False)
        ends.add(next((token for token in ids if token in special), None))
        ends.discard(None)
        self.check(ends, "the end of a response")
        return tuple(sorted(ends))

    def problems(self, count: int, generator, held_out: bool = False) -> list[Question]:
        """`count` questions, drawn with replacement, all of the one part or all of the other."""
        part = self.parts[held_out]
        draws = torch.randint(len(part), (count,), generator=generator)
        return [part[draw] for draw in draws.tolist()]

    def prompts(self, problems: list[Question], device="cpu") -> tuple[Tensor, Tensor]:
        """(Q, P) int64 ids, padded on the left, and (Q,) by how much."""
        longest = max(len(problem.ids) for problem in problems)
        pads = [longest - len(problem.ids) for problem in problems]
        rows = [(longest * [self.pad] + problem.ids)[-longest:] for problem in problems]
        return torch.tensor(rows, device=device), torch.tensor(pads, device=device)

    def rewards(self, problems: list[Question], rollout) -> Tensor:
        """(B,): 1.0 where a response that ended gives the answer, else 0.0; see `judge`."""
        B, C = rollout.mask.shape
        samples = B // len(problems)
        rewards = torch.zeros(B)
        for row in rollout.ended.nonzero().flatten().tolist():
            ids = rollout.tokens[row, -C:][rollout.mask[row]].tolist()
            # Special tokens stay: without the one between them two numbers would be one.
            text = self.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
            rewards[row] = is_right(problems[row // samples].gold, self.opening + text)
        return rewards
