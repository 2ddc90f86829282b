"""
Draws docs/architecture.svg: the rooms of the package, and who imports whom.

    python docs/make_architecture.py
"""

import ast
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).with_name("architecture.svg")

# Rooms from top to bottom, where each row imports only what is in it or below it. A room is what its paths hold.
ROWS = [
    [("scripts", ["scripts", "cli.py", "quiet.py"]), ("tiny models", ["testing.py"])],
    [("trainer", ["trainer.py", "config.py", "checks.py", "checkpoints.py", "callbacks.py", "console.py", "evaluation.py", "waiting.py"])],
    [("reporting", ["reporting"]), ("credit", ["credit"]), ("rewards", ["rewards"])],
    [("publishing", ["publishing"]), ("target and data", ["data.py", "sft_rows.py", "replay.py", "variants.py", "fine_tuning.py", "target.py", "validation.py", "language.py"]), ("metrics", ["metrics"])],
    [("check", ["metagradients/check.py"])],
    [("compute and run", ["metagradients/compute.py", "metagradients/run.py", "metagradients/output.py"]), ("metric", ["metagradients/metric.py"])],
    [("method", ["metagradients/method"])],
    [("kernels", ["metagradients/kernels"]), ("runtime", ["metagradients/runtime"])],
]  # fmt: skip
WIDTH, BOX, ROW, MARGIN = 920, (210, 54), 104, 24


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports when it is imported itself, by their dotted names below `trl_dpg`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]
    found = set()
    for node in ast.parse(
        path.read_text(encoding="utf-8")
    ).body:  # what is within functions or `TYPE_CHECKING` comes later
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for name in node.names:
                found.add(".".join([*filter(None, base), name.name]))
    return {name.removeprefix("trl_dpg.") for name in found}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "trl_dpg").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph() -> dict[str, set[str]]:
    """Module -> modules that it imports, among them the packages that others import on their way."""
    modules = {module_name(path): path for path in (ROOT / "trl_dpg").rglob("*.py")}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        edges[name] = set()
        for target in imports(path):
            owner = target if target in modules else target.rpartition(".")[0]
            if owner in modules and owner != name:
                packages = (owner.rsplit(".", n)[0] for n in range(1, owner.count(".") + 1))
                edges[name] |= {owner, *(package for package in packages if not name.startswith(f"{package}."))}
                edges[name].discard(name)
    return edges


def room_of(module: str) -> str | None:
    path = module.replace(".", "/")
    for row in ROWS:
        for name, paths in row:
            if any(path == p.removesuffix(".py") or path.startswith(p + "/") or path == p for p in paths):
                return name
    return None


def draw() -> str:
    places = {}
    for i, row in enumerate(ROWS):
        for j, (name, _) in enumerate(row):
            x = WIDTH / (len(row) + 1) * (j + 1)
            places[name] = (x, MARGIN + i * ROW + BOX[1] / 2)
    edges: dict[tuple[str, str], int] = defaultdict(int)
    for module, targets in graph().items():
        for target in targets:
            pair = room_of(module), room_of(target)
            if None not in pair and pair[0] != pair[1]:
                edges[pair] += 1
    height = MARGIN * 2 + (len(ROWS) - 1) * ROW + BOX[1]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="15">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#888"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<rect x="8" y="{MARGIN + 5 * ROW - 16}" width="{WIDTH - 16}" height="{2 * ROW + BOX[1] + 32}" rx="10" fill="#f3f6fb"/>',
        f'<text x="22" y="{MARGIN + 5 * ROW + 8}" fill="#567">metagradients: the engine</text>',
    ]
    for (start, end), _ in sorted(edges.items()):
        (x1, y1), (x2, y2) = places[start], places[end]
        down = BOX[1] / 2 if y2 > y1 else 0
        side = 0 if y2 > y1 else BOX[0] / 2 * (1 if x2 > x1 else -1)
        lines.append(
            f'<path d="M{x1 + side:.0f} {y1 + down:.0f} L{x2 - side:.0f} {y2 - down:.0f}" stroke="#888" stroke-opacity="0.55" '
            'stroke-width="1.3" fill="none" marker-end="url(#tip)"/>'
        )
    for name, (x, y) in places.items():
        w, h = BOX
        lines.append(
            f'<rect x="{x - w / 2:.0f}" y="{y - h / 2:.0f}" width="{w}" height="{h}" rx="7" fill="#fff" stroke="#345"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" font-weight="bold">{name}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
