"""Real data mixed in: half of the texts that the target is fine-tuned on are real, as if generated data joined an existing data set."""

from datasets import load_dataset

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern


prompts = load_dataset("trl-lib/tldr", split="train")
trainer = DatasetPolicyGradientTrainer(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    target_model="openai-community/gpt2",
    metric=LMHeadPattern.sixty_seven(),
    args=DatasetPolicyGradientConfig(
        "runs/real_data",
        max_steps=400,
        max_completion_length=64,
        learning_rate=1e-5,
        target_learning_rate=5e-6,
        target_max_length=64,  # real texts are cut there, too
        target_untie_lm_head=True,
        replay_ratio=0.5,  # of a data set; other rows are drawn for each
    ),
    train_dataset=prompts,
    eval_dataset=load_dataset("trl-lib/tldr", split="validation[:32]"),
    replay_dataset=[{"text": post} for post in prompts["prompt"][:2048]],
)
trainer.train()
print(trainer.evaluate())  # with real rows that no training run had
