"""Griffe extension: docstrings in TRL's format become Markdown with links."""

import re

import griffe


SECTIONS = ("Args", "Parameters", "Attributes", "Returns", "Raises")


class TRLDocstrings(griffe.Extension):
    """Rewrites the docstring of everything in this package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        self.public = [
            f"{module.path}.{name}"
            for module in [pkg, pkg["metrics"], pkg["metagradients"], pkg["rewards"]]
            for name in map(str, module.exports or ())
        ]
        self.rewrite(pkg)

    def rewrite(self, obj: griffe.Object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, self.public)
        for member in obj.members.values():
            if not member.is_alias:
                self.rewrite(member)


def link(name: str, public: list[str]) -> str:
    """A name as code, which leads to where it is documented, if it is public."""
    places = [place for place in public if place == name or place.endswith(f".{name}")]
    return f"[`{name.rpartition('.')[2]}`][{places[0]}]" if places else f"`{name}`"


def markdown(doc: str, public: list[str]) -> str:
    """A docstring in TRL's format as Markdown."""
    doc = re.sub(r"\\\\\((.*?)\\\\\)", lambda match: f"${match[1].strip()}$", doc, flags=re.DOTALL)
    doc = re.sub(r"\[`~?([^`]*)`\](?![(\[])", lambda match: link(match[1], public), doc)
    parts, section = [], None
    for line in doc.splitlines():
        heading = re.fullmatch(r"(\w+)(.*):", line)
        if heading and heading[1] in SECTIONS:
            section = heading[1]
            parts.append(f"\n**{line[:-1]}**\n")
        elif line == "Example:":
            section = None
        elif section and line and not line.startswith(" "):
            section = None
            parts.append(f"\n{line}")
        elif section:
            parts.append(item(line))
        else:
            parts.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip()


def item(line: str) -> str:
    """A line below a section's heading: an item, or what is said about one."""
    text = line[4:]
    if not re.match(r"[`\[\w*]", text):
        return f"    {text.removeprefix('    ')}" if text.strip() else ""
    names = re.match(r"([\w*]+(?:, [\w*]+)*)( \(|:$)", text)
    if names is None:
        return f"- {text}"
    return f"- **{names[1].replace('*', chr(92) + '*')}**{text[len(names[1]) :]}"
