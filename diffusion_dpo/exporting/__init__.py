"""What leaves the house: preference pairs for other trainers, tuned models for other programs, each proven readable.

`pairs` writes the pairs. A tuned model takes this way: `source` finds the adapter and its base, `lora` names its
layers as kohya does, `merged` writes whole folders, `header` says what a file is, `probe` measures what a model
computes, `public` asks diffusers what it makes of a user's own file, and `adapter` puts them together: no file is kept
that does not compute, loaded by diffusers, what the weights of the adapter say.
"""
