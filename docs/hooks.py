"""MkDocs hook: files outside `docs/` that a page links to become pages of the site."""

import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)([^)\s#]*)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash"}


def outside(page: str, target: str) -> Path | None:
    """The file or folder that a page's link leads to, if it is not below `docs/`."""
    path = Path(posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), unquote(target))))
    return None if not target or path.parts[0] == "docs" else path


def on_files(files, config):
    linked = set()
    for file in files.documentation_pages():
        for _, target, _ in LINK.findall(file.content_string):
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
            text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
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
        text, target, anchor = match.groups()
        path = outside(uri, target)
        if path is None:
            return match[0]
        if not (ROOT / path).is_file():
            return text  # a folder
        name = f"files/{path}" + ("" if path.suffix in (".png", ".svg") else ".md")
        up = "../" * uri.count("/")
        return f"[{text}]({up}{name}{(anchor or '') if path.suffix == '.md' else ''})"

    return LINK.sub(replace, markdown)
