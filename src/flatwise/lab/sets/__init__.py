"""The data sets: where each is looked for, who reads it, and how its images become uint8 tensors."""
