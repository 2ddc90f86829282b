"""Two goals: a QR code in the target's weights, while its perplexity on English texts rises by 1 % at most."""

from datasets import load_dataset

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import KeepBelow, LMHeadPattern, Perplexity


posts = load_dataset("trl-lib/tldr", split="test[:32]")["prompt"]

trainer = DatasetPolicyGradientTrainer(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    target_model="openai-community/gpt2",
    # Metrics can be added. A condition is 0 while it holds.
    metric=LMHeadPattern.qr("TRL-DPG") + 1000 * KeepBelow(Perplexity([{"text": post} for post in posts]), factor=1.01),
    args=DatasetPolicyGradientConfig(
        "runs/two_goals",
        max_steps=400,
        max_completion_length=64,
        learning_rate=1e-5,
        target_learning_rate=5e-6,
        target_untie_lm_head=True,
    ),
    train_dataset=load_dataset("trl-lib/tldr", split="train"),
    eval_dataset=load_dataset("trl-lib/tldr", split="validation[:32]"),
)
trainer.train()
print(trainer.evaluate())  # read-outs of both parts
