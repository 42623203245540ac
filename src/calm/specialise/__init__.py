"""Make a specialist: a LoRA adapter trained on a user's rows, on exactly the weights the fleet serves.

    rows -> examples (the engine's own tokens) -> batches -> train -> adapter.gguf -> engine agrees? -> card

`run.specialise` is the whole way; what needs torch (extra `train`) is imported there and nowhere else.
The design is docs/decisions/0009-specialists.md.
"""
