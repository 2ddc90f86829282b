"""Docstrings of the public names: as Markdown they keep what they say, and their code runs."""

import importlib
import inspect
import re

import pytest

from docs.griffe_trl import markdown
from trl_dpg.testing import tiny_prompts


MODULES = ("trl_dpg", "trl_dpg.metrics", "trl_dpg.metagradients", "trl_dpg.rewards")
PUBLIC = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module in MODULES
    for name in importlib.import_module(module).__all__
}


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
    assert markdown(doc, list(PUBLIC)) == (
        "Weight $w_i$ of a [`LMHeadNorm`][trl_dpg.metrics.LMHeadNorm], as in `trl.SFTTrainer`.\n\n"
        "**Args**\n\n- **norm** (`float`, *optional*):\n    Norm:\n\n    - of the head,\n      in float64;\n"
        "- **\\*args, \\*\\*kwargs**:\n    Others.\n\n**Returns**\n\n- `float`: A number."
    )


# Those with `>>>` are run by `--doctest-modules`.
EXAMPLES = {
    name: code
    for name, value in PUBLIC.items()
    for code in re.findall(r"```python\n(.*?)```", inspect.getdoc(value) or "", flags=re.DOTALL)
    if ">>>" not in code and not name.startswith("trl_dpg.rewards.")
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_a_docstring(name, directory, tiny):
    exec(directory.substitute(EXAMPLES[name]), {"dataset": tiny_prompts(16, 1)["train"]})


def test_examples_are_found():
    assert {"trl_dpg.DatasetPolicyGradientTrainer", "trl_dpg.MetagradientReward"} <= set(EXAMPLES)
