"""Frameworks that call ``optimizer.step()`` by themselves: one small file each.

None of them imports another, but for the Hugging Face Trainer, which itself stands on Accelerate.

A framework runs the clean pass, clips, unscales, steps, logs and counts as it always does. What is added is the second
pass, between its last backward pass and its step.
"""
