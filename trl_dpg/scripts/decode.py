"""
Reads the picture that fine-tuning wrote into an LM head from two checkpoints alone.

    trl-dpg decode BEFORE AFTER
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parsing import Parser, make_folder_for


if TYPE_CHECKING:
    from torch import Tensor


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 if a picture was read, 1 if no QR code was read, 2 on bad input."""
    parser = Parser(
        prog="trl-dpg decode",
        description="Reads the picture that fine-tuning wrote into an LM head: the signs of its change. The exit code is 0 "
        "if a QR code was read (or if `--pattern` or `--shape` was given), 1 if no code was read, 2 on bad input.",
    )
    parser.add_argument("before", help="Checkpoint of the original model: a directory or an id on the Hub.")
    parser.add_argument("after", help="Checkpoint after fine-tuning.")
    parser.add_argument(
        "--pattern",
        help="The wanted picture: '67', an image file with a pixel for each weight, or else the text of a QR code. It is drawn beside the "
        "picture that was read, with the share of right pixels.",
    )
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("ROWS", "COLUMNS"),
        help="Size of the picture, for example 6 7. By default, that of `--pattern`, or else the sizes of QR codes are tried.",
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=lambda token: int(token) if token.isdecimal() else token,
        help="A token for each column: an id, or a text that is one token, such as ' the'. By default, the first of the vocabulary.",
    )
    parser.add_argument("--output", metavar="PNG", help="Picture to write.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(argv)
    if options.pattern is not None and options.shape is not None:
        parser.error("--shape and --pattern: a pattern has its own shape. Leave --shape out.")
    make_folder_for(options.output, "output")
    from ..metrics import decode_pattern  # imported here: PyTorch takes seconds, and `--help` does not need it
    from ..reporting.plotting import plot_pattern, plot_patterns

    wanted = None if options.pattern is None else _pattern(options.pattern)
    shape = options.shape if wanted is None else wanted.shape
    found = decode_pattern(options.before, options.after, None if shape is None else tuple(shape), options.tokens)
    rows = ["".join("?#."[sign] for sign in row) for row in found.signs.tolist()]  # ?: the weight did not move
    said: dict[str, Any] = {"text": found.text, "rows": rows}
    if wanted is not None:
        said["pixel_accuracy"] = (found.signs == wanted).double().mean().item()
    if options.output is not None and wanted is not None:
        plot_pattern(found.signs, wanted, options.output, found.text)
    elif options.output is not None:
        plot_patterns({found.text or "signs of the change": found.signs}, options.output)
    if options.json:
        print(json.dumps(said))
        return 0 if found.text is not None or shape is not None else 1
    if found.text is not None or shape is not None:
        print(*(row.replace("#", "██").replace(".", "  ").replace("?", "??") for row in rows), sep="\n")
    if wanted is not None:
        print(f"Right pixels: {100 * said['pixel_accuracy']:.1f} % (by chance: 50 %)")
    if found.text is not None:
        print(f"Text: {found.text}")
    elif shape is None:
        print(
            "No QR code was read. If you expect another picture, name it by `--pattern`, or give its size by `--shape`."
        )
        return 1
    return 0


def _pattern(name: str) -> "Tensor":
    from ..metrics import LMHeadPattern

    if name == "67":
        return LMHeadPattern.sixty_seven().pattern
    if Path(name).is_file():
        return LMHeadPattern.from_image(name).pattern
    if Path(name).suffix.lower() in (".png", ".gif", ".bmp", ".jpg", ".jpeg", ".webp"):
        raise ValueError(
            f"`--pattern` {name!r} does not exist. Give the path of an image file, '67', or the text of a QR code."
        )
    return LMHeadPattern.qr(name).pattern
