"""The API reference is what the docstrings say."""

import runpy

from tests.docs.pages import ROOT


API = runpy.run_path(str(ROOT / "docs" / "make_api.py"))


def test_up_to_date():
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == API["render"](), "docs/api.md is out of date: run `python docs/make_api.py`"


def test_every_public_name_is_there():
    lines = API["render"]().splitlines()
    for module in API["MODULES"]:
        names = __import__(module, fromlist=["__all__"]).__all__
        assert names and all(f"### {module}.{name}" in lines for name in names)


def test_format_of_a_docstring():
    doc = """
Weight \\\\( w_i \\\\) of a [`~trl_dpg.metrics.LMHeadNorm`], as in [`~trl.SFTTrainer`].

Args:
    norm (`float`, *optional*):
        Norm:

        - of the head,
          in float64;
    *args, **kwargs:
        Others.

Returns:
    `float`: A number.
""".strip()
    assert API["markdown"](doc) == (
        "Weight $w_i$ of a [`trl_dpg.metrics.LMHeadNorm`](#trl_dpgmetricslmheadnorm), as in `trl.SFTTrainer`.\n\n"
        "**Args**\n\n- **norm** (`float`, *optional*):\n  Norm:\n\n  - of the head,\n    in float64;\n"
        "- **\\*args, \\*\\*kwargs**:\n  Others.\n\n**Returns**\n\n- `float`: A number."
    )
