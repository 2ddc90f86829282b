"""
Writes one self-contained HTML page about a run.

    trl-dpg report runs/qr
"""

from .parsing import Parser, make_folder_for


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    about = "Writes one self-contained HTML page about a run: open it in a browser."
    parser = Parser(prog="trl-dpg report", description=about)
    parser.add_argument("run_dir", help="The run's `output_dir`.")
    parser.add_argument("--output", help="HTML file to write. By default, `report.html` in the run's folder.")
    options = parser.parse_args(argv)
    make_folder_for(options.output, "output")
    from ..reporting import write_report  # imported here: PyTorch takes seconds, and `--help` does not need it

    print(write_report(options.run_dir, options.output))
    return 0
