"""The embedded default: a tiny real Stable Diffusion and a tiny real CLIP for a world of coloured shapes."""
