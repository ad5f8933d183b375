"""The language of scores and masks: what it reads, what it refuses and how, and that no text does anything else."""

from __future__ import annotations

import os
import random
import re
import signal
import string
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fa2gen.errors import InvalidInput
from fa2gen.expression import emit, parse, tree
from fa2gen.expression.examples import EXAMPLES
from fa2gen.expression.grammar import FUNCTIONS, NAMES
from fa2gen.spec import anonymous
from tests.expressions import random_condition, random_score

README = Path(__file__).resolve().parents[2] / "fa2gen" / "expression" / "README.md"
hostile = settings(max_examples=300, deadline=None, derandomize=True)


# What it reads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_the_canonical_text_means_the_same(seed):
    rng = random.Random(seed)
    program = parse(random_score(rng), random_condition(rng), {})
    again = parse(program.score, program.allow, dict(program.types))
    assert again == program and again.key == program.key
    assert emit(again, "gradient") == emit(program, "gradient")


@pytest.mark.parametrize(
    ("score", "canonical"),
    [
        ("  (( s*(2) ))", "s * 2.0"),
        ("s - (i-j)*0.5", "s - (i - j) * 0.5"),
        ("s if j<=i else -s", "where(j <= i, s, -s)"),
        ("s * (0 <= i - j < 3 and 1 or 2)", None),
        ("s ** 2 + s**1", "s ** 2 + s"),
        ("+s\n  + b", "s + b"),
        ("s - -s * 2", "s - -s * 2.0"),
        ("s + 0.1000000000000001", "s + 0.1"),
    ],
)
def test_spelling(score, canonical):
    if canonical is None:
        with pytest.raises(InvalidInput):
            parse(score)
    else:
        assert parse(score).score == canonical


@pytest.mark.parametrize("score", ["s", "(s)", "s * 1", "s + 0", "1.0 * s - 0", "--s"])
def test_a_score_that_changes_nothing_is_none(score):
    assert parse(score).score == "" and parse(score) == parse()


@pytest.mark.parametrize("allow", ["True", "not False", "1 < 2", "True or i < j"])
def test_a_mask_that_hides_nothing_is_none(allow):
    assert parse(allow=allow).allow == ""


def test_names_of_inputs_are_the_users_own():
    """A kernel, its hash and its comment are those of the meaning; other programs have other hashes."""
    one, other = parse("cap * tanh(s / cap)"), parse("limit * tanh(s / limit)")
    assert one.key == other.key and one.formulas == other.formulas and emit(one, "gradient") == emit(other, "gradient")
    assert parse("cap * tanh(s * cap)").key != one.key
    assert parse(allow="x[j] == 1", types={"x": "int"}).key != parse(allow="x[j] == 1", types={"x": "float"}).key


@pytest.mark.parametrize(
    ("score", "allow", "types"),
    [
        ("cap * tanh(s / cap)", "", {"cap": "float"}),
        ("s + bias[h, bucket[j - i + n]]", "", {"bias": "float", "bucket": "int", "n": "int"}),
        ("", "document[i] == document[j]", {"document": "int"}),
        ("", "i - j < window or j < sinks", {"window": "int", "sinks": "int"}),
        ("", "valid[b, j] and j <= i", {"valid": "bool"}),
        ("", "not hidden[j]", {"hidden": "bool"}),
        ("where(flag, s, 2 * s)", "", {"flag": "bool"}),
        ("where(s > least, s, 0)", "", {"least": "float"}),
        ("", "rate[b] * i < 3.5", {"rate": "float"}),
        ("", "(i + shift) // size == j // size", {"shift": "int", "size": "int"}),
        ("s * x[h]", "x[h] == 1", {"x": "float"}),
    ],
)
def test_types_follow_from_use(score, allow, types):
    assert dict(parse(score, allow).types) == types


def test_a_number_called_as_an_exponent_is_written():
    program = anonymous(parse("s * 1e-5 + e"))
    assert program.score == "s * 1e-05 + number_0"


def test_inputs_know_their_axes():
    inputs = {given.name: given for given in parse("s + t[b, h, j - i] + u[i] + u[j]", "n > i and v[hk, j] > 2").inputs}
    assert inputs["t"].axes == ("b", "h", "") and inputs["u"].axes == ("",) and inputs["v"].axes == ("hk", "j")
    assert inputs["u"].rank == 1 and len(inputs["u"].indices) == 2 and not inputs["n"].is_tensor
    assert sorted(given.token for given in inputs.values()) == ["input_0", "input_1", "input_3", "number_2"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_stand_in_the_readme(name):
    made = EXAMPLES[name]
    text = README.read_text()
    for what in ("score", "allow"):
        written = getattr(made, what)
        assert not written or f'{what} = "{written}"' in text, name


# What it refuses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "column", "says"),
    [
        ("sin(s)", 1, "'sin' is no function of the language; they are where, min, max, abs"),
        ("s + exp", 5, "exp is a function: write exp"),
        ("((s ** 8) ** 8) ** 8", 1, "powers of powers are 512 factors, more than 64"),
        ("s * tanh(s, 2)", 5, "tanh takes 1 argument, not 2"),
        ("min(s)", 1, "min takes 2 to 8 arguments, not 1"),
        ("exp(x=s)", 1, "arguments of exp have no names"),
        ("s + (j <= i)", 6, "the right side of + must be a number, and this is true or false"),
        ("where(s, 1, 2)", 7, "the condition must be true or false, and this is a float; write ... != 0"),
        ("where(i < j, s, i < j)", 17, "one alternative is a float, the other true or false"),
        ("s[i]", 1, "s is a number, and has no indices"),
        ("s + t[s]", 7, "an index must be a whole number, not a float"),
        ("s + t[where(s > 0, 1, 2)]", 7, "an index can not depend on s"),
        ("s + t[i] + t[i, j]", 12, "t has 2 indices here and 1 index before"),
        ("s + t + t[i]", 9, "t has 1 index here and no index before"),
        ("s + t[i, j, b, h, hk]", 5, "a tensor has 1 to 4 indices, not 5"),
        ("s + t[0:2]", 8, "the character ':' is not allowed: there are no slices"),
        ("s & i", 3, "the character '&' is not allowed: write 'and'"),
        ("s + 'a'", 5, "there are no strings"),
        ("s + 2j", 5, "write '2 * j' for a product"),
        ("s * 0", 1, "this is 0.0, whatever s"),
        ("s + None", 5, "None is no number"),
        ("s + 1e39", 5, "beyond fp32; hide keys by 'allow'"),
        ("s + 2147483648", 5, "whole numbers end at 2147483647"),
        ("s ** 0.5", 6, "an exponent is a whole number from 1 to 8"),
        ("s ** s", 6, "an exponent is a whole number"),
        ("s // 2", 1, "// is for whole numbers, and this is a float; use / for floats"),
        ("s + i // j", 10, "right of // can not depend on i, j or a tensor"),
        ("s + i % 0", 9, "right of % must be positive"),
        ("s.real", 1, "a dot after a name: there are no attributes"),
        ("s + [1]", 5, "a list is not part of the language"),
        ("s + (1, 2)", 5, "a tuple outside of [...]"),
        ("s < i < j", 1, "a score is a number, and this is true or false; write it as allow"),
        ("i - j", 1, "this does not depend on s"),
        ("s + __import__", 5, "a name begins with a letter"),
        ("s + " + "n" * 41, 5, "at most 40 characters"),
        ("s +", None, "this is no expression"),
        ("s s", 1, "this is no expression"),
        ("s + \u0435", 5, "is not allowed"),
        ("s in s", 6, "comparisons are"),
        ("s = 2", None, "this is no expression"),
        ("s @ s", 3, "the character '@' is not allowed"),
        ("", None, None),
        (" ", 1, "nothing is written"),
        ("s + " + "(" * 300 + "s" + ")" * 300, None, "this is no expression"),
        ("-" * 100 + "s", 41, "nested more than 40 deep"),
        ("+".join(["s"] * 500), None, "nested more than 40 deep"),
        ("s+" + "+".join([f"max({', '.join(['s * s'] * 8)})"] * 20), None, "this is more than 400 operations"),
        ("s" * 4001, 4001, "4001 characters are more than 4000"),
        ("+".join(["s", *(f"n{place}" for place in range(17))]), None, "more than 16 numbers and tensors"),
    ],
)
def test_errors_point_at_the_column(score, column, says):
    if says is None:
        parse(score)
        return
    with pytest.raises(InvalidInput) as caught:
        parse(score)
    message = str(caught.value)
    assert says in message, message
    head, line, mark = message.split("\n")
    assert re.match(r"score, column \d+: ", head)
    if column is not None:
        assert head.startswith(f"score, column {column}: ")
        assert mark.index("^") < len(line) + 1
        if column <= 80 and column <= len(score) and score[column - 1].isascii():
            assert line[mark.index("^")] == score[column - 1], message


@pytest.mark.parametrize(
    ("allow", "says"),
    [
        ("s > 0", "which keys are seen can not depend on s"),
        ("i - j", "true or false, and this is a whole number"),
        ("x[j]", None),
        ("i and j", "a side of 'and' must be true or false"),
        ("not i", "what is negated must be true or false"),
        ("(i < j) < 2", "this is true or false; compare numbers"),
        ("(i < j) == (j < i)", None),
    ],
)
def test_masks_are_conditions(allow, says):
    if says is None:
        parse(allow=allow)
        return
    with pytest.raises(InvalidInput, match=re.escape(says)):
        parse(allow=allow)


def test_declared_types_are_of_the_inputs():
    with pytest.raises(InvalidInput, match="'caps' is not in score or allow; they name cap"):
        parse("cap * s", types={"caps": "float"})
    with pytest.raises(InvalidInput, match="'tanh' is a word of the language"):
        parse("cap * tanh(s)", types={"tanh": "float"})
    with pytest.raises(InvalidInput, match="types of inputs are float, int, bool, not 'double'"):
        parse("cap * s", types={"cap": "double"})
    with pytest.raises(InvalidInput, match="must be strings"):
        parse(3)


def test_what_a_call_makes_too_large_is_refused():
    product = parse(allow="i * j < 100")
    product.check(1000, 1000, {})
    with pytest.raises(InvalidInput, match=r"i \* j reaches 4294836225 at these lengths, beyond 2147483647"):
        product.check(2**16, 2**16, {})
    distance = parse("s - 0.1 * abs(i - j)")
    distance.check(2**24, 2**24, {})
    with pytest.raises(InvalidInput, match=f"beyond {2**24}"):
        distance.check(2**24, 2**24 + 2, {})
    divided = parse(allow="i // size == j // size")
    divided.check(100, 100, {"size": 3})
    with pytest.raises(InvalidInput, match="i // size divides by 0; it must be positive"):
        divided.check(100, 100, {"size": 0})


def test_a_text_whose_parts_repeat_is_read_at_once():
    """As a tree of 9^12 leaves; of a graph of its nodes it takes milliseconds."""
    text = "i % 3"
    for _ in range(12):
        text = f"({text}) ** 8 % 7"
    assert parse(f"s + r[{text}]").score


# No text does anything else ------------------------------------------------------------------------------------------

WORDS = [
    *NAMES,
    *FUNCTIONS,
    "cap",
    "t",
    "and",
    "or",
    "not",
    "if",
    "else",
    "in",
    "is",
    "lambda",
    "yield",
    "await",
    "async",
]
WORDS += ["True", "None", "__import__", "eval", "os.system", "s.__class__", "1", "0.5", "1e400", "9" * 30, "0x10", "1j"]
WORDS += [
    *"+-*/%()[],<>=!.:;{}@&|^~#\\\"'\n\t\0\x1b$?`",
    "**",
    "//",
    "<=",
    "==",
    ":=",
    "->",
    "*/",
    "/*",
    "\u00e9",
    "\uff53",
]
PIECES = st.lists(st.sampled_from(WORDS), max_size=25).flatmap(
    lambda words: st.sampled_from(["", " "]).map(lambda between: between.join(words))
)
TEXTS = st.one_of(
    st.text(max_size=60), st.text(string.printable, max_size=60), PIECES, PIECES.map(lambda x: f"s + {x}")
)
OWN = re.compile(
    r"(?:head|row|column|value|number|input|load_input)_\d+|p|softmax_scale|acc|float_i|float_j|i|j|b|h|hk|seqlen_[qk]"
    r"|float|int|bool|const|static_cast|true|false|f?abs|f?min|fm(?:in|ax)f|max|fabsf"
    r"|(?:tanh|exp2|log2|sqrt|reciprocal)_approx|floor_(?:divide|modulo)|[ij][01]"
    r"|(?:low|high)est_input_\d+_[ij](?:_(?:above|below|not)(?:_minus)?_\d+)*"
)


@hostile
@given(TEXTS, TEXTS)
def test_a_hostile_text_is_refused_or_harmless(score, allow):
    """An InvalidInput, or code of our own words alone."""
    for arguments in ({"score": f"s * ({score})"}, {"score": score}, {"allow": allow}):
        try:
            program = parse(**arguments)
        except InvalidInput as error:
            assert all(character.isprintable() or character == "\n" for character in str(error))
            continue
        assert_own_words_alone(program)


def assert_own_words_alone(program) -> None:
    for what in ("score", "gradient", "allow", "blocks", "inputs"):
        code = emit(program, what)
        for line in [*(line for level in code.levels.values() for line in level), *code.results.values()]:
            words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\b\d[\w.]*(?:e[+-]\d+)?f?", "", line))
            assert all(OWN.fullmatch(word) for word in words), line
            assert re.fullmatch(r"[\w .,()<>=!&|*/%+?:;-]*", line), line


@hostile
@given(st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,39}", fullmatch=True))
def test_a_name_never_reaches_the_code(word):
    """Not even a keyword of C++, a macro or a name of a kernel."""
    try:
        program = parse(f"s * {word} + tanh({word})", f"{word}_x[j] < i and j <= {word}")
    except InvalidInput:
        return
    assert_own_words_alone(program)
    known = {*FUNCTIONS, *NAMES, "d", "score", "allow", "and", "or", "not", "sign"}
    for _, text in program.formulas:
        assert all(word in known or OWN.fullmatch(word) for word in re.findall(r"[A-Za-z_]\w*", text)), text


def test_a_child_forked_while_a_thread_makes_a_node_makes_nodes():
    """It would wait for that thread, which it has not."""
    held = threading.Event()

    def hold() -> None:
        with tree._lock:
            held.set()
            time.sleep(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a child that hangs is ended by it
        os._exit(0 if tree.const(1.5) is tree.const(1.5) else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
