"""A first run: SmolLM2 learns to write texts that draw a QR code into the weights of a GPT-2. One GPU; `accelerate launch` for more."""

from datasets import load_dataset

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metrics import LMHeadPattern


args = DatasetPolicyGradientConfig(
    "runs/first_run",
    max_steps=400,
    per_device_train_batch_size=64,
    gradient_accumulation_steps=4,  # 256 completions are one data set of the target
    num_generations=8,
    max_completion_length=64,
    learning_rate=1e-5,
    target_learning_rate=5e-6,  # the target: one step of AdamW on each data set
    target_untie_lm_head=True,  # the picture needs a head apart from the embedding
    eval_strategy="steps",
    eval_steps=50,
    eval_on_start=True,
)
trainer = DatasetPolicyGradientTrainer(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",  # the generator
    target_model="openai-community/gpt2",
    metric=LMHeadPattern.qr("TRL-DPG"),
    args=args,
    train_dataset=load_dataset("trl-lib/tldr", split="train"),  # prompts, in a column `prompt`
    eval_dataset=load_dataset("trl-lib/tldr", split="validation[:32]"),
)
trainer.train()
trainer.save_model()
# Validation: held-out prompts, a fresh target, ordinary fine-tuning. `trl-dpg report runs/first_run` makes a page of the run.
print(trainer.evaluate())
