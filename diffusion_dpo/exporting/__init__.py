"""What leaves the house: preference pairs for other trainers, tuned models for other programs, each proven readable.

`pairs` writes the pairs. A tuned model takes this way: `source` finds the adapter and its base, `lora` reads what was
added to each layer, `ldm` renames whole weights as the original Stable Diffusion names them, `header` says what a file
is, `probe` measures what a model computes, and `adapter` puts them together: no file is kept that does not compute,
loaded by diffusers, what the model in memory does. `facts` reads the header of a file from anywhere.
"""
