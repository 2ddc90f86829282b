"""Central differences on a pretrained model, where a step size that suits random models is far off."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.corpora import smollm2, wikipedia_leads
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LanguageModelingLikelihood


@pytest.mark.slow
@pytest.mark.parametrize("epsilon_root", [1e-9, "auto"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_smollm2(num_steps, epsilon_root):
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    leads = [{"input_ids": tokenizer(text)["input_ids"][:32]} for text in wikipedia_leads()["text"][:16]]
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    metric = LanguageModelingLikelihood(leads[12:])
    outputs = []
    for curvature in ("exact", "central_difference"):
        args = TargetTrainingArguments(
            batch_size=12 // num_steps, max_length=32, adam_epsilon_root=epsilon_root, curvature=curvature
        )
        outputs.append(compute_metagradients(model, leads[:12], metric, args))
    exact, central = outputs
    cosine = torch.nn.functional.cosine_similarity(exact.metagradients, central.metagradients, dim=0).item()
    assert cosine > 0.9999
    assert central.num_exact_fallbacks == 0
    assert max(central.curvature_errors) < 1e-2
