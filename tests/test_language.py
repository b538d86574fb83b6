"""Prose of the repository: words to avoid, and the forms of docstrings and errors.

The word list is applied to docstrings, comments, other strings and Markdown text.
Code is not checked: identifiers, doctest lines, fenced blocks and text in backticks.
``python tests/test_language.py PATH...`` checks any files and folders.
"""

import ast
import functools
import io
import pathlib
import re
import sys
import tokenize
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Files whose prose is checked. A pattern is relative to the root of the repository.
COVERED = (
    "mtljax/**/*.py",
    "mtljax/**/*.md",
    "docs/*.md",
    "docs/concepts/*.md",
    "docs/guides/*.md",
    "docs/project/*.md",
    "docs/benchmarks/*.md",
    "docs/conf.py",
    "docs/_ext/*.py",
    "docs/examples/*.py",
    "notebooks/*.py",
    "benchmarks/*.py",
    "benchmarks/*.md",
    "experiments/**/*.py",
    "experiments/*.md",
    "experiments/*/*.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
)

# Phrases to avoid, and what to write instead.
WORDS = {
    ("dear", "dearer", "dearest"): "expensive",
    ("in silence",): "silently, without a warning",
    ("without a word",): "without a warning, without communication",
    ("room", "rooms", "ground floor", "training floor"): "module, subpackage, layer",
    ("beside",): "next to, in addition to, compared with",
    ("in turns", "turn and turn about"): "alternately, interleaved",
    ("anew",): "again, from scratch",
    ("goes on", "go on", "going on", "gone on", "went on"): "resumes, continues",
    ("serve", "serves", "served", "serving"): "support, handle, use",
    ("spare", "spares", "spared", "sparing"): "leave unchanged, exclude, save",
    ("look at", "looks at", "looked at", "looking at"): "evaluate, inspect",
    ("looks twice", "looks again", "look again"): "needs a second forward pass",
    ("what there is",): "diagnostics, or name the thing",
    ("turned round",): "flipped",
    ("as far as one knows",): "if known; an estimate, an upper bound",
    ("mend", "mends", "mended"): "fix",
    ("lean to", "leans to", "leaning to"): "favour",
    ("starve", "starves", "starved"): "reduce the contribution of",
    ("hurt", "hurts"): "make worse, increase the loss of",
    ("pull apart", "pulls", "pulled"): "gradient direction, conflict",
    ("likes best", "like best", "its like"): "maximises, minimises, selects",
    ("every so many", "so manieth", "how manieth"): "every n steps, every n-th",
    ("length of a gradient", "length of the gradient"): "norm of the gradient",
    ("lengths of the gradients", "gradients of one length"): "norm of the gradient",
    ("weighs", "weighed"): "weights, weighted",
    ("worth going",): "kept after pruning",
    ("handed", "hands over", "hand over"): "passes",
    ("fill up", "fills up", "filled up"): "pad",
    ("one turn of",): "one iteration",
    ("whoever", "nobody", "somebody", "who knows"): "name the code, the task, the user",
    ("at the price of",): "at the cost of",
    ("what it is",): "summary, guarantee",
    ("as it is", "as they are"): "unchanged",
    ("cut off", "cuts off"): "truncated",
    ("a person looks", "to the eye"): "intended for visual inspection",
    ("other numbers than",): "results change; not bit-compatible",
    ("stumble", "stumbles", "soon heard", "asks for"): "name what the code does",
    ("hears", "wants", "likes", "promises", "promised"): "name what the code does",
    ("is no tree", "is no key", "is no array"): "is not a ...",
    ("Gram", "table of products"): "Gramian",
    ("Jacobian tree", "tall tree"): "stacked gradients",
    ("optimiser", "optimisers"): "optimizer (the optax object)",
    ("yields no",): "has no, returns no",
}

# Phrases that contain one of the words above in another sense.
FINE = ("room for", "pull request", "pull requests")

# Places where a word is right, as pairs (path, word). Keep at most ten.
EXCEPTIONS: set[tuple[str, str]] = set()

CODE = "\0"  # stands for a character of code in a text that shows prose only


class Finding(NamedTuple):
    """A place in a file, and the sentence that the test prints."""

    path: str
    line: int
    message: str


def blank(match):
    """Replaces code by a mark that no phrase matches; keeps the line breaks."""
    return re.sub(r"[^\n]", CODE, match.group())


def prose_of_python(source):
    """The source with everything but comments and strings blanked.

    Quotes, the marks of comments and line breaks count as spaces, so that a phrase is
    found across the lines of a comment and across adjacent strings.
    """
    lines = source.splitlines(keepends=True)
    shown = [re.sub(r"\S", CODE, line) for line in lines]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name not in ("COMMENT", "STRING") and not name.startswith("FSTRING_"):
            continue
        (first, start), (last, end) = token.start, token.end
        for number in range(first, last + 1):
            row = lines[number - 1]
            a = start if number == first else 0
            b = end if number == last else len(row)
            text = re.sub(r"^\s*(>>>|\.\.\.)\s.*", blank, row[a:b])
            text = re.sub(r"""^[rbfuRBFU]*(?=["'])|["'#]""", _spaces, text)
            old = shown[number - 1]
            shown[number - 1] = old[:a] + text + old[b:]
    text = re.sub(r"`+[^`\n]+`+", blank, "".join(shown))
    return re.sub(rf"{CODE}[{CODE} ]*", CODE, text)


def _spaces(match):
    return " " * len(match.group())


def prose_of_markdown(source):
    """The source with code blocks, inline code and the targets of links blanked."""
    fence = r"^ *(`{3,}|~{3,})[^\n]*\n.*?^ *\1[^\n]*$"
    text = re.sub(fence, blank, source, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`+[^`]+`+", blank, text)
    text = re.sub(r"\]\([^)\n]*\)|<https?:[^>\n]*>", blank, text)
    return re.sub(r"[*_>|#]", " ", text)


def prose(path, source):
    return (prose_of_markdown if path.endswith(".md") else prose_of_python)(source)


def pattern(phrases):
    spaced = (re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases)
    return rf"(?<![\w-])(?:{'|'.join(spaced)})(?![\w-])"


ALL_WORDS = re.compile(pattern(p for key in WORDS for p in key), re.IGNORECASE)
ALL_FINE = re.compile(pattern(FINE), re.IGNORECASE)
REPLACEMENT = {phrase.lower(): new for key, new in WORDS.items() for phrase in key}


def words_to_avoid(path, source):
    """Every banned phrase in the prose of one file."""
    text = ALL_FINE.sub(blank, prose(path, source))
    for match in ALL_WORDS.finditer(text):
        word = " ".join(match.group().split())
        if (path, word.lower()) in EXCEPTIONS:
            continue
        line = text.count("\n", 0, match.start()) + 1
        new = REPLACEMENT[word.lower()]
        yield Finding(path, line, f"write {new!r} instead of {word!r}")


@functools.cache
def nodes(source):
    """The module and all statements, without their expressions."""
    found: list[ast.AST] = [ast.parse(source)]
    for node in found:
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            found += getattr(node, field, [])
    return found


def raised_texts(source):
    """Error messages as ``(line, exception, parts)``; a part is None if computed."""
    for node in nodes(source):
        call = node.exc if isinstance(node, ast.Raise) else None
        if not isinstance(call, ast.Call) or not call.args:
            continue
        message = call.args[0]
        parts = message.values if isinstance(message, ast.JoinedStr) else [message]
        if isinstance(message, ast.Constant | ast.JoinedStr):
            texts = [
                str(p.value) if isinstance(p, ast.Constant) else None for p in parts
            ]
            yield node.lineno, ast.unparse(call.func), texts


def errors_to_improve(path, source):
    """Messages that are no full sentence."""
    for line, exception, parts in raised_texts(source):
        # Python defines the form of this message, and SystemExit carries any text.
        python = exception in ("AttributeError", "SystemExit")
        if not python and parts[-1] is not None and not parts[-1].endswith("."):
            yield Finding(path, line, "end the error message with a full stop")
        if parts[0] is not None and parts[0].startswith("There is no"):
            yield Finding(path, line, "begin the message with what was given")


LITERAL = re.compile(r":[\w.:+-]+:`[^`]+`|``.+?``|`[^`]+`_*")


def docstrings_to_improve(path, source):
    """First lines of modules that are too long, and wrong types of results.

    Napoleon renders the text before the first colon in ``Returns:`` as a type.
    """
    for node in nodes(source):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        text = ast.get_docstring(node) or ""
        line = getattr(node, "lineno", 1)
        first = text.partition("\n")[0]
        if isinstance(node, ast.Module) and text and len(first) > 72:
            yield Finding(path, line, "shorten the first line to 72 characters")
        found = re.search(r"^Returns:\n +(.*)", text, re.MULTILINE)
        if found:
            plain = LITERAL.sub("", found.group(1))
            before, colon, _ = plain.partition(":")
            if colon and len(before.split()) > 1:
                message = "no colon in the first line of Returns, or a type before it"
                yield Finding(path, line, message)


def read(files):
    """Texts of files by path."""
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def covered():
    matches = {glob: set(ROOT.glob(glob)) for glob in COVERED}
    if (ROOT / ".github").is_dir():  # the sdist leaves some texts out
        assert all(matches.values()), matches
    return read(set().union(*matches.values()))


def report(checker, sources):
    """The findings of one checker, a line each."""
    return [
        f"{path}:{line}: {message}"
        for path, source in sorted(sources.items())
        if path.endswith(".py") or checker is words_to_avoid
        for path, line, message in checker(path, source)
    ]


def check(checker):
    found = report(checker, covered())
    assert not found, "\n".join(["", *found])


def test_no_word_of_the_list_is_used():
    check(words_to_avoid)


def test_error_messages_are_sentences():
    check(errors_to_improve)


def test_docstrings_render_as_written():
    check(docstrings_to_improve)


def test_exceptions_are_few_and_needed():
    assert len(EXCEPTIONS) <= 10
    sources = covered()
    for path, word in EXCEPTIONS:
        assert re.search(pattern([word]), prose(path, sources[path]), re.IGNORECASE)


@pytest.mark.parametrize("phrase", [p for key in WORDS for p in key])
def test_every_phrase_is_found_wherever_prose_is(phrase):
    """In a docstring, a comment, an error message and a Markdown file."""
    broken = phrase.replace(" ", "\n    ")
    commented = phrase.replace(" ", "\n# ")
    joined = phrase.replace(" ", ' "\n    "')
    for path, source, line in [
        ("a.py", f'"""First.\n\n    Then {broken}.\n"""\n', 3),
        ("a.py", f"x = 1\n# {commented}\n", 2),
        ("a.py", f'raise ValueError(\n    f"{{x}}: {joined}."\n)\n', 2),
        ("a.md", f"# Title\n\n**{phrase.capitalize()}**, a.\n", 3),
    ]:
        found = list(words_to_avoid(path, source))
        assert [(f.path, f.line) for f in found] == [(path, line)], source
        assert REPLACEMENT[phrase.lower()] in found[0].message


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("a.py", "room = anew(beside)\n"),
        ("a.py", '"""Computes.\n\n  >>> room = 1\n  ... room\n"""\n'),
        ("a.py", '"""Reads ``room`` and :func:`anew`."""\n'),
        ("a.py", "# There is room for it; a bedroom; serve_all\n"),
        ("a.py", 'f("in")\nf("turns")\nx = "look" + y + "at"\n'),
        ("a.md", "```\nroom\n```\nA `room`, a [link](room/anew.md).\n"),
    ],
)
def test_code_is_not_prose(path, source):
    assert not list(words_to_avoid(path, source))


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('raise ValueError(f"{name}: x has shape {s}. Pass [T].")', False),
        ('raise ValueError(f"{name}: {remedy}")', False),
        ('raise ValueError(f"{name}: x has shape {s}")', False),
        ('raise ValueError("f: x is wrong")', True),
        ('raise ValueError(f"{name}: x is wrong")', True),
        ('raise ValueError("There is no x.")', True),
    ],
)
def test_the_reader_of_error_messages(source, wrong):
    assert bool(list(errors_to_improve("a.py", source))) == wrong


@pytest.mark.parametrize(
    ("returns", "wrong"),
    [
        ("A balancer. It reads the Gramian.", False),
        (":class:`mtljax.Balancer`: Reads the Gramian.", False),
        ("``f(x: int)`` and a sentence.", False),
        ("Balancer: Reads the Gramian.", False),
        ("A balancer that reads: the Gramian.", True),
    ],
)
def test_the_reader_of_returns(returns, wrong):
    source = f'def f():\n    """Computes.\n\n    Returns:\n      {returns}\n    """\n'
    assert bool(list(docstrings_to_improve("a.py", source))) == wrong


def main(paths):
    """Prints what the tests would report for the given files and folders."""
    files = set()
    for path in (ROOT / p for p in paths):
        files |= (
            {path} if path.is_file() else {*path.rglob("*.py"), *path.rglob("*.md")}
        )
    sources = read(files)
    for checker in (words_to_avoid, errors_to_improve, docstrings_to_improve):
        print(*report(checker, sources), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
