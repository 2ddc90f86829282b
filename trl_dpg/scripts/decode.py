"""
Reads the picture that fine-tuning wrote into an LM head from two checkpoints alone.

    trl-dpg decode BEFORE AFTER
"""

import json

from .parsing import Parser, make_folder_for


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 if something was read, 1 if no QR code was, 2 on bad input."""
    parser = Parser(
        prog="trl-dpg decode",
        description="Reads the picture that fine-tuning wrote into an LM head: the signs of its change. The exit code is 0 "
        "if a QR code was read (or `--shape` was given), 1 if none was, 2 on bad input.",
    )
    parser.add_argument("before", help="Checkpoint of the original: a directory or an id on the Hub.")
    parser.add_argument("after", help="Checkpoint after fine-tuning.")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("ROWS", "COLUMNS"),
        help="Size of the picture, for example 6 7. By default that of a QR code is looked for.",
    )
    parser.add_argument("--output", metavar="PNG", help="Picture to write.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(argv)
    make_folder_for(options.output, "output")
    from ..metrics import decode_pattern  # not before `--help` was shown: PyTorch takes seconds
    from ..reporting.plotting import plot_patterns

    shape = tuple(options.shape) if options.shape is not None else None
    found = decode_pattern(options.before, options.after, shape)
    rows = ["".join("?#."[sign] for sign in row) for row in found.signs.tolist()]  # ? did not move
    if options.output is not None:
        plot_patterns({found.text or "signs of the change": found.signs}, options.output)
    if options.json:
        print(json.dumps({"text": found.text, "rows": rows}))
    else:
        print(*(row.replace("#", "██").replace(".", "  ").replace("?", "??") for row in rows), sep="\n")
        print(f"Text: {found.text}" if found.text is not None else "No QR code was read.")
    return 0 if found.text is not None or shape is not None else 1
