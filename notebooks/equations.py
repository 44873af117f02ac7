"""Equations of docstrings, which are written in Unicode, as LaTeX."""

import re


def displayed(lines: list[str]) -> list[str]:
    """Turns the literal blocks of a docstring that are mathematics into equations."""
    out: list[str] = []
    block: list[str] = []
    for line in [*lines, "."]:
        if block and line.strip() and not line.startswith(" "):
            out += aligned(block)
            block = []
        if block:
            block.append(line)
        elif is_equation(line) and out[-2:] and out[-2].endswith("::") and not out[-1].strip():
            out[-2] = out[-2][:-1]
            block = [line]
        else:
            out.append(line)
    return out[:-1]


def escaped(lines: list[str]) -> list[str]:
    """Escapes |g|, which would be a substitution, outside literal blocks and equations."""
    out: list[str] = []
    literal = None  # the indentation of the paragraph that announced a block
    for line in lines:
        indentation = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indentation <= literal:
            literal = None
        out.append(line if literal is not None else re.sub(r"\|(\w+)\|", r"\|\1\|", line))
        if line.rstrip().endswith("::"):
            literal = indentation
    return out


def is_equation(line: str) -> bool:
    """Whether a line of a literal block assigns something, and is no code."""
    return bool(re.match(r"\s+(\S+ ←|\w' =) ", line))


def aligned(block: list[str]) -> list[str]:
    """A literal block as one aligned equation."""
    rows = [latex(line.strip()) for line in block if line.strip()]
    lines = [r"\begin{aligned}", *(rf"& {row} \\" for row in rows), r"\end{aligned}"]
    return [".. math::", "", *(f"   {line}" for line in lines), ""]


LATEX = {"ᵗ": "^{t}", "²": "^{2}", "⁻⁸": "^{-8}", "·": r"{\cdot}", "←": r"{\leftarrow}", "max(": r"\max("}
# Words are no products of variables, as mb is.
WORDS = r"(?<![\\{\w])(?!mb\b)[a-z_]{2,}[0-9]*(?:,? [a-z][a-z_]+[0-9]*|,? [a-z]'s)*(?![\w{])"


def latex(line: str) -> str:
    """One line of Unicode mathematics as LaTeX: roots get their bar, hats their letter, words their spaces."""
    line = re.sub(r"√\(", r"\\sqrt(", line)
    while found := re.search(r"\\sqrt\(([^()]*)\)", line):
        line = line[: found.start()] + rf"\sqrt{{{found[1]}}}" + line[found.end() :]
    line = re.sub("√(\\w\u0302?)", r"\\sqrt{\1}", line)
    line = re.sub("(\\w)\u0302", r"\\hat{\1}", line)
    for unicode, command in LATEX.items():
        line = line.replace(unicode, command)
    line = re.sub(WORDS, lambda found: rf"\;\text{{{found[0]}}}\;", line)
    return re.sub(r" {2,}", r" \\qquad ", line)
