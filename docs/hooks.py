"""MkDocs hooks: notebooks, and files outside `docs/` that a page links to, become pages of the site; formulas become MathML."""

import html
import json
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from latex2mathml.converter import convert
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)([^)\s#]*)(#[^)\s]*)?\)")
FORMULA = re.compile(r'(<(span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](</\2>)', re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash"}


def outside(page: str, target: str) -> Path | None:
    """The file or folder that a page's link leads to, if it is not below `docs/`."""
    path = Path(posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), unquote(target))))
    return None if not target or path.parts[0] == "docs" else path


def notebook_page(path: Path) -> str:
    """A notebook's texts, code and printed output as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text'])}```" for output in cell.get("outputs", ())]
    return "\n\n".join(parts)


def on_files(files, config):
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        content = notebook_page(Path(notebook.abs_src_path))
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=content))
    linked = set()
    for file in files.documentation_pages():
        for _, _, target, _ in LINK.findall(file.content_string):
            if path := outside(file.src_uri, target):
                linked.add(path)
    for path in sorted(linked):
        if not (ROOT / path).is_file():
            continue
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.suffix == ".md":  # its links are relative to the repository
            text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<img [^>]*>", "", text)
            text = re.sub(r"\[((?:[^\[\]])*)\]\((?!https?:)[^)]*\)", r"\1", text)
        else:
            text = f"# {path.name}\n\n`{path}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"
        files.append(File.generated(config, f"files/{path}.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri.startswith("files/"):
        return markdown

    def replace(match):
        image, text, target, anchor = match.groups()
        path = outside(uri, target)
        if path is None:
            return match[0].replace(".ipynb)", ".md)")
        if not (ROOT / path).is_file():
            return text  # a folder
        name = f"files/{path}" + ("" if path.suffix in (".png", ".svg") else ".md")
        up = "../" * uri.count("/")
        return f"{image}[{text}]({up}{name}{(anchor or '') if path.suffix == '.md' else ''})"

    return LINK.sub(replace, markdown)


def on_page_content(content, page, config, files):
    """Browsers draw MathML themselves, so that a page needs no script from elsewhere."""

    def replace(match):
        start, _, delimiter, formula, end = match.groups()
        return start + convert(html.unescape(formula), display="block" if delimiter == "[" else "inline") + end

    return FORMULA.sub(replace, content)
