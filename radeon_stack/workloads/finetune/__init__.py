"""QLoRA fine-tuning with stock TRL, PEFT and bitsandbytes. Read `story.py` first."""
