"""Fine-tuning: a checkpoint and the user's conversations into an adapter or a new checkpoint, by PEFT and Trainer."""
