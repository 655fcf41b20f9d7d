"""`bilevel_torch.FirstOrder` in the trainers of transformers (`huggingface`) and Lightning (`lightning`).

Each module imports its trainer, so import the module that you need.
"""
