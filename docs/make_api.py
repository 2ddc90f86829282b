"""
Writes docs/api.md from the docstrings of the public names.

    python docs/make_api.py
"""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path


MODULES = ["trl_dpg", "trl_dpg.metrics", "trl_dpg.metagradients", "trl_dpg.rewards"]
PATH = Path(__file__).with_name("api.md")

# Sections of a docstring whose items become a list
SECTIONS = ("Args", "Parameters", "Attributes", "Returns", "Raises")

# Where each public name is documented: below the first module that has it
PLACES = {name: f"{module}.{name}" for module in reversed(MODULES) for name in import_module(module).__all__}


def render() -> str:
    """The page."""
    lines = [
        "# API reference",
        "Written from the docstrings by `python docs/make_api.py`: change them, not this page. Names of other libraries are "
        "as their own documentation has them.",
    ]
    for module_name in MODULES:
        module = import_module(module_name)
        lines += [f"## {module_name}", markdown(inspect.getdoc(module) or "")]
        for name in sorted(module.__all__, key=str.lower):
            place, value = f"{module_name}.{name}", getattr(module, name)
            lines.append(f"### {place}")
            if PLACES[name] != place:
                lines.append(f"The same as {link(PLACES[name])}.")
            else:
                lines += of_class(value, name) if inspect.isclass(value) else of_function(value, name)
    return "\n\n".join(line for line in lines if line) + "\n"


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def link(name: str) -> str:
    """A name as code, which leads to where it is documented."""
    place = PLACES.get(name.rpartition(".")[2], "")
    return f"[`{name}`](#{anchor(place)})" if place.endswith(name) else f"`{name}`"


def of_class(value: type, name: str) -> list[str]:
    """A class: how it is made, what it is, and the public methods that this package gives it."""
    bases = [base.__name__ for base in value.__bases__ if base.__name__ not in ("object", "ABC")]
    lines = [f"*class* `{name}{signature(value)}`{', a ' + ' and '.join(f'`{b}`' for b in bases) if bases else ''}"]
    lines.append(markdown(inspect.getdoc(value) or ""))
    methods = {}
    for base in reversed(value.__mro__):
        if base.__module__.startswith("trl_dpg"):
            methods |= {
                key: member for key, member in vars(base).items() if not key.startswith("_") or key == "__call__"
            }
    for key, member in methods.items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(function, property):
            lines.append(f"*property* `{name}.{key}`: {markdown(inspect.getdoc(function) or '')}")
        elif inspect.isfunction(function) and function.__doc__:
            lines += [f"#### {name}.{key}", *of_function(function, key, bound=not isinstance(member, staticmethod))]
    return lines


def of_function(value, name: str, bound: bool = False) -> list[str]:
    """A function or method."""
    return [f"`{name}{signature(value, bound)}`", markdown(inspect.getdoc(value) or "")]


def signature(value, bound: bool = False) -> str:
    """Names and defaults; types are in the docstring. Of a configuration, whose fields are listed there, nothing."""
    if dataclasses.is_dataclass(value):
        return "(...)"
    shown = []
    parameters = list(inspect.signature(value).parameters.values())[bound:]
    for index, parameter in enumerate(parameters):
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind == parameter.KEYWORD_ONLY and all(
            p.kind not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL) for p in parameters[:index]
        ):
            shown.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        shown.append(f"{stars}{parameter.name}{default}")
    return f"({', '.join(shown)})"


def markdown(doc: str) -> str:
    """A docstring in TRL's format as Markdown."""
    doc = re.sub(r"\\\\\((.*?)\\\\\)", lambda match: f"${match[1].strip()}$", doc, flags=re.DOTALL)
    doc = re.sub(r"\[`~?([^`]*)`\](?!\()", lambda match: link(match[1]), doc)
    parts, section = [], None
    for line in doc.splitlines():
        heading = re.fullmatch(r"(\w+)(.*):", line)
        if heading and heading[1] in SECTIONS:
            section = heading[1]
            parts.append(f"**{line[:-1]}**\n")
        elif line == "Example:":
            section = None
        elif section and line and not line.startswith(" "):
            section = None
            parts.append(line)
        elif section:
            parts.append(item(line))
        else:
            parts.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip()


def item(line: str) -> str:
    """A line below a section's heading: an item, or what is said about one."""
    text = line[4:]
    if not re.match(r"[`\[\w*]", text):
        return f"  {text.removeprefix('    ')}" if text.strip() else ""
    names = re.match(r"([\w*]+(?:, [\w*]+)*)( \(|:$)", text)
    if names is None:
        return f"- {text}"
    return f"- **{names[1].replace('*', chr(92) + '*')}**{text[len(names[1]) :]}"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
