"""A metric of your own: after fine-tuning on what the generator wrote, GPT-2 should go on from "The sky is" with " blue"."""

import torch
from datasets import load_dataset
from transformers import AutoTokenizer

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import Metric


tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")


class SaysBlue(Metric):
    """The target says " blue" after "The sky is"."""

    def __call__(self, model):
        """Higher is better; it must be differentiable by the model's parameters."""
        ids = torch.tensor([tokenizer("The sky is")["input_ids"]], device=model.device)
        scores = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        return scores[tokenizer(" blue")["input_ids"][0]]

    @torch.no_grad()
    def readouts(self, model):
        """Numbers of a fine-tuned target that a person can read. Validation logs them as `eval_probability`, ..."""
        return {"probability": self(model).exp().item()}


trainer = DatasetPolicyGradientTrainer(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    target_model="openai-community/gpt2",
    metric=SaysBlue(),
    args=DatasetPolicyGradientConfig(
        "runs/own_metric", max_steps=200, max_completion_length=64, learning_rate=1e-5, target_learning_rate=1e-5
    ),
    train_dataset=load_dataset("trl-lib/tldr", split="train"),
    eval_dataset=load_dataset("trl-lib/tldr", split="validation[:32]"),
)
trainer.train()
print(trainer.evaluate())
